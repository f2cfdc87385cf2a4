from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from html_pages import check_harmless, read_page
from hypothesis import given, settings
from hypothesis import strategies as st
from report_records import make_grid, make_record
from report_store import make_results

from bench.outlook import PlanLine
from bench.plan import Node
from bench.report.build import build_tables
from bench.report.evidence import EvidenceReader
from bench.report.html.page import POLICY, ReportInput, build_page, clean, safe_link
from bench.report.state import CellState, cell_states
from bench.report.tables import Column, Entry, Table
from bench.store import Store

HOSTILE = [
    "<script>alert(1)</script>",
    "</title></style></textarea><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x=\'',
    "]]><!-- --><![CDATA[ -->",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% raw %}{{ config }}",
    "a\u2028b\u2029c\x00d\x1be\x85f\ud800g\u202eh",
    "&lt;b&gt; &amp;amp; &#60;script&#62;",
    "</pre></td></table></section></main>",
]


def _input(records: list[dict[str, Any]], **changes: Any) -> ReportInput:
    return ReportInput("quickstart", "box", cell_states(records, records, None), **changes)


def _stored(folder: Path, **changes: Any) -> ReportInput:
    results, records = make_results(folder)
    return _input(records, reader=EvidenceReader(Store(results)), **changes)


def test_every_section_is_there_and_can_be_jumped_to(tmp_path: Path) -> None:
    page = check_harmless(build_page(_stored(tmp_path)).text)
    ids = {attributes.get("id") for _, attributes in page.tags}
    targets = {str(link["href"])[1:] for link in page.all("a") if str(link["href"]).startswith("#")}
    assert targets <= ids
    assert len(targets) == 12
    assert [attributes["id"] for attributes in page.all("h2")] == list(dict.fromkeys(a["id"] for a in page.all("h2")))
    assert len(page.all("h1")) == 1


def test_the_page_forbids_network_and_scripts_and_has_none(tmp_path: Path) -> None:
    text = build_page(_stored(tmp_path)).text
    page = check_harmless(text)
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy == POLICY
    assert "default-src 'none'" in str(policy)
    assert "script" not in {name for name, _ in page.tags}
    assert not re.search(r"@import|url\(", text)
    assert [attributes["href"] for attributes in page.all("a") if "://" in str(attributes["href"])] == [
        "https://arxiv.org/abs/2008.08115"
    ]


def test_the_same_records_and_store_give_the_same_bytes(tmp_path: Path) -> None:
    content = _stored(tmp_path)
    again = replace(content, reader=EvidenceReader(Store(tmp_path / "results")))
    assert build_page(content).text == build_page(again).text


def test_states_are_counted_and_reasons_told() -> None:
    records = make_grid()
    records[8]["log"] = "Traceback\nMemoryError"
    page = read_page(build_page(_input(records)).text)
    for text in ("✓ 6 ok", "✗ 1 failed", "○ 1 skipped", "? 1 missing", "↻ 0 stale"):
        assert text in page.texts
    assert "out of memory: the process was killed\ntrace" in page.text
    assert "its training failed" in page.text
    assert "it has not been run" in page.text
    assert "Traceback\nMemoryError" in page.texts


def test_a_stale_cell_shows_the_number_of_its_older_record() -> None:
    old, new = make_record(1, ap=0.4321), {**make_record(1), "status": "missing", "run_id": "new", "metrics": {}}
    other = make_record(2)
    states = [CellState(new, "stale", "is of other settings", old), CellState(other, "ok")]
    page = read_page(build_page(ReportInput("s", "m", states)).text)
    assert "43.2 (older)" in page.texts
    assert "↻ stale" in page.texts


def test_without_a_store_each_part_says_so_and_none_is_dropped() -> None:
    page = read_page(build_page(_input(make_grid())).text)
    assert page.text.count("no store was given") == 4
    assert {"precision", "errors", "gallery", "losses"} <= {attributes.get("id") for attributes in page.all("h2")}


def test_an_empty_store_says_what_is_not_there(tmp_path: Path) -> None:
    records = make_grid()
    for record in records:
        record["nodes"] = {"dataset": "dataset-1", "train": "train-1", "predict": "predict-1"}
    page = read_page(build_page(_input(records, reader=EvidenceReader(Store(tmp_path)))).text)
    assert page.texts.count("Not for any cell: its predictions are not in the store.") == 3
    assert "The losses of train-1 are not in the store." in page.texts


def test_intervals_are_shown_in_the_table_and_in_the_charts() -> None:
    records = make_grid()
    for record in records:
        if "segm/AP" in record["metrics"]:
            record["metrics"]["segm/AP"] |= {"standard_error": 0.01, "error_of": "images"}
    text = build_page(_input(records)).text
    page = read_page(text)
    assert "31.0 ± 2.0" in page.texts  # 1.96 standard errors
    assert "Mask AP ± 1.96 standard errors: a 95 % interval, over images." in page.texts
    assert any("31.0 (29.0 to 33.0)" in found for found in page.texts)
    assert text.count('class="bar"') == 3 * 6  # a bar for each measured cell in each of three charts
    without = build_page(_input(make_grid())).text
    assert 'class="bar"' not in without
    assert "The records hold no standard error of mask AP." in read_page(without).texts


def test_the_usual_charts_are_drawn_and_what_cannot_be_is_named() -> None:
    page = read_page(build_page(_input(make_grid())).text)
    headings = [text for text in page.texts if text.startswith("Mask AP against")]
    assert headings == ["Mask AP against sampling steps", "Mask AP against latency", "Mask AP against proposals"]
    one = read_page(build_page(_input([make_record()])).text)
    assert "AP against sampling steps: all cells have the same number of them." in one.texts
    many = [make_record(steps, kind=kind) for steps in (1, 2) for kind in range(13)]
    crowded = read_page(build_page(_input(many, plots=[{"x": "sampling_steps", "y": "segm/AP"}])).text)
    assert any(text.startswith("Not drawn: ") and "13 panels" in text for text in crowded.texts)


def test_pictures_have_words_beside_them_and_can_be_left_out(tmp_path: Path) -> None:
    content = _stored(tmp_path)
    made = build_page(content)
    images = read_page(made.text).all("img")
    assert (
        made.num_pictures == len(images) == 2 + 2 + 3
    )  # a best and a worst one, and two cells of one that they disagree about
    assert not made.is_generated
    assert all(re.match(r"Image \d+, .*(found by|F1|no instances)", str(image["alt"])) for image in images)
    without = build_page(replace(content, pictures=0))
    assert without.num_pictures == 0
    assert "data:image" not in without.text.replace("img-src data:", "")
    assert "Pictures were left out (--no-gallery)." in read_page(without.text).texts


def test_tables_have_headers_with_a_scope_and_can_be_scrolled_with_the_keyboard(tmp_path: Path) -> None:
    page = read_page(build_page(_stored(tmp_path)).text)
    assert all(attributes.get("scope") in ("col", "row", "colgroup") for attributes in page.all("th"))
    regions = [attributes for attributes in page.all("div") if attributes.get("class") == "scroll"]
    assert len(regions) == len(page.all("table"))
    assert all(region["tabindex"] == "0" and region["role"] == "region" for region in regions)
    assert all(attributes.get("aria-label") for attributes in page.all("svg") if attributes.get("role") == "img")


def test_many_cells_and_classes_are_folded_and_the_page_stays_small() -> None:
    records = []
    for i in range(200):
        record = make_record(1 + i % 10, 20 + i // 10, ap=0.2 + i / 1000)
        record["per_class"] = {"segm/AP": {f"class {j}": j / 1203 if j % 5 else None for j in range(1203)}}
        record["samples"] = {"latency_s": {"total": [0.01 + i / 1e4] * 50}}
        records.append(record)
    text = build_page(_input(records)).text
    page = check_harmless(text)
    assert len(text.encode()) < 1_500_000
    assert "All 200 cells" in page.texts
    assert "All 962 classes" in page.texts
    assert "241 classes have no instance in the split." in page.texts
    assert "40 of 200 cells, evenly over their medians." in page.texts


def test_published_numbers_stand_beside_ours_with_checked_links() -> None:
    entries = (Entry("row", ("row",)), Entry("30.1", ("30.1",), link="../box/1.json"))
    evil = (Entry("evil", ("evil",)), Entry("x", ("x",), link="javascript:alert(1)"))
    table = Table("Paper", (Column("row", ("row",)), Column("ours", ("ours",))), (entries, evil), 1)
    page = check_harmless(build_page(_input([make_record()], claims=[table])).text)
    assert {"href": "../box/1.json", "rel": "noopener noreferrer"} in page.all("a")
    assert "Paper" in page.texts
    page = read_page(build_page(_input([make_record()], claims_note="None is tied.")).text)
    assert "None is tied." in page.texts


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("https://arxiv.org/abs/1", True),
        ("../quickstart/box/1.json", True),
        ("claims.md", True),
        ("javascript:alert(1)", False),
        (" javascript:alert(1)", False),
        ("JaVaScRiPt:alert(1)", False),
        ("data:text/html,x", False),
        ("//elsewhere.org/x", False),
        ("/etc/passwd", False),
        ("https://a.org/\"onclick='x'", False),
        ("https://a.org/\n", False),
        ("", False),
    ],
)
def test_links_lead_to_web_pages_or_to_files_beside(target: str, allowed: bool) -> None:
    assert safe_link(target) == (target if allowed else "")


def test_characters_that_no_page_may_hold_are_replaced() -> None:
    assert clean("a\x00b\x1bc\x85d\ud800e\u202ef\n\tg") == "a\ufffdb\ufffdc\ufffdd\ufffde\ufffdf\n\tg"
    assert clean("ä 中 \u2028").encode()


def _hostile_input(text: str, folder: Path | None = None) -> ReportInput:
    """`text` wherever a record, a plan or a suite has text."""
    records = [make_record(1, 20, kind=text), make_record(2, 20, kind="other"), make_record(1, 50, kind=text)]
    records[1] |= {"status": "failed", "reason": text, "log": text}
    for record in records:
        record |= {"suite": text, "command": text, "label": text, "run_id": text + str(id(record))}
        record["per_class"] = {"segm/AP": {text: 0.5, "b": None}}
        record["samples"] = {"latency_s": {"total": [0.1, 0.2]}}
        record["environment"] |= {"os": text, text: text, "dirty_diff": text * 30, "gpus": [{"name": text}]}
        record["environment"]["packages"] = {text: text}
        record["config"]["data"]["dataset"] = text
        record["metrics"][text] = {"value": None, "unit": text, "higher_is_better": None, "reason": text}
        record["finished_at"] = text
    states = [CellState(record, "ok" if record["status"] == "ok" else "failed", text) for record in records]
    table = Table(text, (Column(text, (text,)),), ((Entry(text, (text,), link=text),),), 0, notes=(text,))
    plots = [{"x": "kind", "y": "segm/AP", "lines": "sampling_steps", "title": text}, {"x": text, "y": text}]
    lines = [PlanLine(Node(text, "train", (), {}), "run", text, text, None)]
    reader = None if folder is None else EvidenceReader(Store(folder))
    return ReportInput(
        text, text, states, text, [text], [], plots, plan=lines, claims=[table], claims_note=text, reader=reader
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str, tmp_path: Path) -> None:
    page = check_harmless(build_page(_hostile_input(text, tmp_path)).text)
    plain = clean(text)
    for found in ("h1", "pre"):
        assert found in {name for name, _ in page.tags}
    assert page.text.count(plain) > 20
    assert not any(link["href"] == text for link in page.all("a"))


def test_a_hostile_class_name_in_a_data_set_stays_text(tmp_path: Path) -> None:
    results, records = make_results(tmp_path)
    annotations = tmp_path / "data/instances.json"
    annotations.write_text(annotations.read_text().replace('"cat"', '"<script>alert(1)</script>"'))
    records[0]["config"]["data"]["class_agnostic"] = False
    content = _input(records, reader=EvidenceReader(Store(results)))
    assert "<script" not in build_page(content).text


_PIECES = st.sampled_from([*"<>\"'&/!-[]{}% \u2028", "script", "x="])


@settings(max_examples=8, deadline=None)
@given(st.lists(_PIECES | st.characters(), min_size=1, max_size=12).map("".join))
def test_no_text_makes_an_element(text: str) -> None:
    check_harmless(build_page(_hostile_input(f"x{text}")).text)


def test_the_tables_are_those_of_the_files() -> None:
    records = make_grid()
    page = read_page(build_page(_input(records)).text)
    for table in build_tables(records).values():
        assert table.title in page.texts
        for row in table.rows:
            for entry in row:
                assert entry.text in page.texts
