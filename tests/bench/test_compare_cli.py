from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from compare_records import MACHINE, timed_record

from bench.calibration import load_calibration
from bench.diffbench import main
from bench.record import parse_record
from bench.store import Store

GATES = """\
gates:
  latency_s/total: {relative: 0.05, absolute: 0.0005, noise: 0.01}
"""


def write(folder: Path, records: list[dict[str, Any]], machine: str = MACHINE) -> Path:
    for record in records:
        Store(folder).write_record(parse_record(record, "test"), machine)
    return folder


def run(steps: int = 1, **settings: Any) -> dict[str, Any]:
    return timed_record(steps, spread=0.01, **settings)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with gates and two results folders of which the head is 20 % slower."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    (tmp_path / "gates.yaml").write_text(GATES)
    write(tmp_path / "base", [run(1), run(2)])
    write(tmp_path / "slow", [run(1), run(2, median_s=0.012)])
    return tmp_path


def compare(*arguments: str) -> int:
    return main(["compare", *arguments, "--gates", "gates.yaml"])


def head_of(kind: str) -> list[dict[str, Any]]:
    if kind == "cell lost":
        return [run(1)]
    if kind == "failed":
        return [run(1), run(2) | {"status": "failed", "reason": "killed", "metrics": {}}]
    if kind == "other sizes":
        other = run(2, median_s=0.02)
        other["config"]["data"]["shapes_image_size"] = 128
        return [run(1), other]
    if kind == "noise":
        return [run(1), run(2, median_s=0.0102, generator=np.random.default_rng(1))]
    return [run(1), run(2, median_s={"same": 0.010, "slow": 0.012, "fast": 0.008}[kind])]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("same", 0),
        ("fast", 0),
        ("slow", 1),
        ("cell lost", 3),
        ("failed", 4),
        ("other sizes", 5),
        ("noise", 6),
    ],
)
def test_each_exit_code(folder: Path, kind: str, code: int) -> None:
    write(folder / "head", head_of(kind))
    gates = GATES.replace("0.01}", "0.2}") if kind == "noise" else GATES
    (folder / "gates.yaml").write_text(gates)
    assert compare("base", "head") == code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none", "base"], "none: cannot be read (No such file or directory)"),
        (["empty", "base"], "empty: no records"),
        (["text.json", "base"], "text.json: not valid JSON"),
        (["list.json", "base"], "list.json: an empty list"),
        (["base", "base", "--calibration", "none.yaml"], "none.yaml: cannot be read"),
        (["base", "base", "--benchmarks"], "base: cannot be read"),
        (["base", "base", "--format", "pdf"], "'pdf' is not one of"),
        (["base"], "HEAD is missing, and base is no file of diffbench race"),
        ([], "Missing argument"),
    ],
)
def test_a_mistake_of_the_user_is_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    (folder / "empty").mkdir()
    (folder / "text.json").write_text("nothing")
    (folder / "list.json").write_text("[]")
    assert main(["compare", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_broken_gates_file_is_told_line_by_line(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "gates.yaml").write_text("gates:\n  segm/AP: {relative: x}\n")
    assert compare("base", "slow") == 2
    assert capsys.readouterr().err.startswith("gates.yaml:2:23: gates.segm/AP.relative: 'x' is not allowed.")


def test_folders_at_every_level_and_lists_of_records(folder: Path, capsys: pytest.CaptureFixture) -> None:
    for below in ("", "/quickstart", f"/quickstart/{MACHINE}"):
        assert compare(f"base{below}", f"slow{below}") == 1
    files = sorted((folder / "base").rglob("*.json"))
    (folder / "list.json").write_text(json.dumps([json.loads(file.read_text()) for file in files]))
    assert compare("list.json", "base") == 0
    assert compare(str(files[0]), str(files[0])) == 0
    assert "no regression (exit code 0): 1 same" in capsys.readouterr().out


def test_formats(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert compare("base", "slow", "--format", "json") == 1
    assert json.loads(capsys.readouterr().out)["counts"]["worse"] == 1
    assert compare("base", "slow", "--format", "junit", "--out", "junit.xml") == 1
    assert capsys.readouterr().out.startswith("wrote junit.xml: regression (exit code 1): 1 worse")
    assert ElementTree.parse("junit.xml").getroot()[0].get("failures") == "1"
    assert compare("base", "slow", "--format", "markdown") == 1
    assert "| worse | quickstart" in capsys.readouterr().out


def test_github_gets_annotations_and_a_job_summary(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "summary.md").write_text("# Before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary.md"))
    assert compare("base", "slow", "--format", "github") == 1
    out = capsys.readouterr().out
    assert out.startswith(f"::error file=slow/quickstart/{MACHINE}/run-2-20-0-.json,title=worse%3A quickstart")
    assert (folder / "summary.md").read_text().startswith("# Before\n### Comparison: regression")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folder))
    assert compare("base", "slow", "--format", "github") == 2


def test_calibrate_and_compare(folder: Path, capsys: pytest.CaptureFixture) -> None:
    generator = np.random.default_rng(0)
    for number in range(4):
        factor = float(np.exp(0.02 * generator.standard_normal()))
        write(folder / f"run{number}", [run(1, median_s=0.01 * factor, generator=generator)])
    runs = [f"run{number}" for number in range(4)]
    assert main(["calibrate", *runs, "--out", "calibration.json"]) == 0
    assert "from 4 runs" in capsys.readouterr().out
    noise = load_calibration(folder / "calibration.json")
    assert 0.005 < noise.machines[MACHINE]["latency_s/total"].noise < 0.05
    (folder / "gates.yaml").write_text("calibration: calibration.json\n" + GATES.replace(", noise: 0.01", ""))
    write(folder / "half", [run(1, median_s=0.02)])
    assert compare("run0", "half") == 1
    assert compare("run0", "run1") in (0, 6)
    assert compare("run0", "half", "--calibration", "calibration.json") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base", "slow", "--out", "c.yaml"], "2 runs on example-cpu-2c-0a0a0a, at least 3 are needed"),
        (["base", "base", "slow", "--out", "c.yaml"], "hold the same samples"),
        (["base", "--out", "c.txt"], "--out c.txt: is not allowed"),
    ],
)
def test_calibrate_refuses(folder: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    assert main(["calibrate", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "c.yaml").exists()


def test_benchmarks_go_through_the_same_gates(folder: Path) -> None:
    def file(name: str, tests: dict[str, float]) -> str:
        entries = [{"fullname": test, "stats": {"median": value, "data": [value] * 5}} for test, value in tests.items()]
        (folder / name).write_text(json.dumps({"benchmarks": entries}))
        return name

    (folder / "gates.yaml").write_text("gates:\n  benchmark_s/*: {relative: 0.1, absolute: 0, noise: 0.01}\n")
    base = file("a.json", {"x": 1.0, "y": 1.0})
    assert compare("--benchmarks", base, file("b.json", {"x": 1.0, "y": 1.0})) == 0
    assert compare("--benchmarks", base, file("b.json", {"x": 2.0, "y": 1.0})) == 1
    assert compare("--benchmarks", base, file("b.json", {"x": 1.0})) == 3
    assert compare("--benchmarks", file("b.json", {"x": 1.0}), base) == 3
