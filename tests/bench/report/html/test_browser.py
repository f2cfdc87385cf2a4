"""The page in a real browser: what it looks like to a machine, on a desk and on a phone, in light and dark."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_records import make_grid
from report_store import make_results

from bench.report.evidence import EvidenceReader
from bench.report.html.page import ReportInput, build_page
from bench.report.state import cell_states
from bench.store import Store

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium: none of chromium, google-chrome is in PATH")

DARK, LIGHT = "rgb(13, 17, 23)", "rgb(255, 255, 255)"
HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"

# Looks at the report from outside, as the report itself runs no script.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><title>frame</title><style>iframe { border: 0; height: 800px }</style>
<iframe id="desk" src="index.html" style="width: 1280px"></iframe>
<iframe id="phone" src="index.html" style="width: 360px"></iframe>
<pre id="found"></pre>
<script>
onload = () => {
  const found = {};
  for (const name of ["desk", "phone"]) {
    const page = document.getElementById(name).contentDocument, view = page.defaultView;
    const ground = () => view.getComputedStyle(page.body).backgroundColor;
    const one = {title: page.title, width: page.documentElement.scrollWidth, scripts: page.scripts.length};
    one.grounds = [ground()];
    for (const id of ["theme-dark", "theme-light", "theme-auto"]) {
      page.getElementById(id).click();
      one.grounds.push(ground());
    }
    one.line = view.getComputedStyle(page.querySelector(".chart .mark")).fill;
    one.marks = page.querySelectorAll(".chart .mark").length;
    one.pictures = [...page.images].map((image) => image.complete && image.naturalWidth > 0);
    const scroller = page.querySelector(".scroll");
    scroller.focus();
    one.focus = page.activeElement === scroller;
    one.elements = page.body.querySelectorAll("*").length;
    one.heading = page.querySelector("h1").textContent;
    found[name] = one;
  }
  document.getElementById("found").textContent = JSON.stringify(found);
};
</script>
"""


def _browse(page: Path, profile: Path, *, dark: bool = False) -> tuple[str, list[str]]:
    """The document after loading, and what the console says."""
    assert BROWSER is not None
    command = [
        *(BROWSER, "--headless=new", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND"),
        *("--enable-logging=stderr", "--v=0", f"--user-data-dir={profile}", "--window-size=1400,900"),
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),
        *("--dump-dom", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


def _look(folder: Path, text: str, *, dark: bool = False) -> tuple[dict[str, Any], list[str]]:
    # All pictures are decoded before the page counts as loaded, those that are out of sight as well.
    (folder / "index.html").write_text(text.replace('loading="lazy"', 'loading="eager"'), encoding="utf-8")
    (folder / "frame.html").write_text(FRAME)
    document, console = _browse(folder / "frame.html", folder / f"profile-{dark}", dark=dark)
    found = re.search(r'<pre id="found">(.*?)</pre>', document, re.DOTALL)
    assert found is not None
    return json.loads(html.unescape(found[1])), console


@pytest.fixture
def content(tmp_path: Path) -> ReportInput:
    results, stored = make_results(tmp_path)
    records = [*stored, *make_grid()[3:]]
    records[2]["label"] = HOSTILE
    records[3]["command"] = HOSTILE
    states = cell_states(records, records, None)
    return ReportInput(HOSTILE, HOSTILE, states, HOSTILE, [HOSTILE], reader=EvidenceReader(Store(results)))


def test_the_page_shows_without_a_complaint_on_a_desk_and_on_a_phone(tmp_path: Path, content: ReportInput) -> None:
    found, console = _look(tmp_path, build_page(content).text)
    assert console == []
    for name, width in (("desk", 1280), ("phone", 360)):
        seen = found[name]
        assert seen["width"] <= width, f"{name}: the page scrolls sideways"
        assert seen["title"] == f"{HOSTILE} on {HOSTILE}"
        assert seen["heading"] == HOSTILE
        assert seen["scripts"] == 0
        assert seen["marks"] > 10
        assert len(seen["pictures"]) > 2
        assert all(seen["pictures"])
        assert seen["focus"]
        # As the system wishes, dark, light, and as the system wishes again.
        assert seen["grounds"] == [LIGHT, DARK, LIGHT, LIGHT]
    assert found["desk"]["elements"] == found["phone"]["elements"]


def test_the_browser_tells_a_damaged_picture(tmp_path: Path, content: ReportInput) -> None:
    text = build_page(content).text
    damaged = re.sub(r"(data:image/[a-z]+;base64,)[^\"]+", r"\1AAAA", text, count=1)
    assert damaged != text
    found, _ = _look(tmp_path, damaged)
    assert found["desk"]["pictures"].count(False) == found["phone"]["pictures"].count(False) == 1


def test_on_a_dark_system_it_is_dark_and_can_be_made_light(tmp_path: Path, content: ReportInput) -> None:
    found, console = _look(tmp_path, build_page(replace(content, pictures=0)).text, dark=True)
    assert console == []
    assert found["desk"]["grounds"] == [DARK, DARK, LIGHT, DARK]
    assert found["desk"]["line"].startswith("rgb(")


def test_the_browser_would_complain_about_scripts_and_about_what_lies_elsewhere(
    tmp_path: Path, content: ReportInput
) -> None:
    text = build_page(replace(content, pictures=0)).text
    forbidden = "<script>document.title = 'taken'</script><img src='http://elsewhere.invalid/x.png' alt=''>"
    found, console = _look(tmp_path, text.replace("</main>", f"{forbidden}</main>"))
    assert found["desk"]["title"] != "taken"  # the policy holds, whatever gets into the page
    assert any("Content Security Policy" in line for line in console)
