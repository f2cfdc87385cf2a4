from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from report_records import make_record

import bench.compare_cli
from bench.compare import ExitCode
from bench.diffbench import main
from bench.plan import build_plan
from bench.record import parse_record
from bench.store import Store
from bench.suite import load_suite
from bench.unexpected import EXIT_CODE

SUITE = """\
name: small
data: {dataset: shapes}
axes:
  product: {sampling_steps: [1, 2, 4], num_proposals: [20, 50]}
tables:
  - {rows: num_proposals, columns: sampling_steps, metric: segm/AP}
plots:
  - {x: sampling_steps, y: segm/AP, lines: num_proposals}
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite of six cells, of which all but the last have a record; the results are in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(SUITE)
    for cell in build_plan(load_suite(path)).cells[:-1]:
        record = make_record(cell.axes["sampling_steps"], cell.axes["num_proposals"], ap=0.3)
        record |= {"suite": "small", "run_id": cell.run_id, "axes": cell.axes, "config": cell.config}
        Store(tmp_path / "results").write_record(parse_record(record, "test"), "box")
    return path


def test_table_writes_three_formats_and_marks_the_missing_cell(suite: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["table", str(suite)]) == 0
    folder = suite.parent / "results/small/box/report"
    stem = "segm-AP-by-num_proposals-and-sampling_steps"
    assert sorted(path.name for path in folder.iterdir()) == [f"{stem}.csv", f"{stem}.md", f"{stem}.tex"]
    assert (folder / f"{stem}.csv").read_text() == (
        "num_proposals,sampling_steps=1,sampling_steps=2,sampling_steps=4\n20,30,30,30\n50,30,30,missing\n"
    )
    assert f"wrote results/small/box/report/{stem}.md" in capsys.readouterr().out


def test_table_prints_exactly_what_the_file_has_and_writes_nothing(suite: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["table", str(suite), "--print", "md"]) == 0
    printed = capsys.readouterr().out
    assert not (suite.parent / "results/small/box/report").exists()
    main(["table", str(suite)])
    (written,) = (suite.parent / "results/small/box/report").glob("*.md")
    assert written.read_text() == printed


def test_plot_writes_png_and_svg_elsewhere_if_asked(suite: Path) -> None:
    assert main(["plot", str(suite), "--out", "pictures"]) == 0
    names = sorted(path.name for path in (suite.parent / "pictures").iterdir())
    assert names == ["segm-AP-against-sampling_steps.png", "segm-AP-against-sampling_steps.svg"]


def test_only_restricts_the_cells(suite: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["table", str(suite), "--only", "num_proposals=20", "--print", "csv"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["20,30,30,30"]


def test_records_of_other_cells_are_left_out_and_said_so(suite: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["table", str(suite), "--set", "sampling_steps=[1, 8]", "--print", "terminal"]) == 0
    out = capsys.readouterr().out
    assert "note: 3 records of other versions or settings of this suite left out" in out
    assert out.count("? missing") > 2


def test_a_suite_without_any_record_leaves_an_earlier_report_alone(suite: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["table", str(suite)]) == 0
    (written,) = (suite.parent / "results/small/box/report").glob("*.md")
    before = written.read_text()
    assert main(["table", str(suite), "--set", "iterations=7"]) == 2
    assert "none of the records in results/small belongs to this suite" in capsys.readouterr().err
    assert written.read_text() == before


def test_a_folder_of_results_will_do(suite: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["table", "results/small", "--print", "csv"]) == 0
    first = capsys.readouterr().out
    assert main(["table", "small", "--print", "csv"]) == 0
    assert capsys.readouterr().out == first
    assert "num_proposals,sampling_steps=1" in first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table", "nowhere"], "results/nowhere: no records. Suites with results in results: small"),
        (["table", "results/small", "--set", "seed=1"], "--set and --only need a suite file"),
        (["plot", "small.yaml", "--machine", "other"], "--machine other: no records. Allowed: box"),
        (["table", "small.yaml", "--set", "sampling_step=1"], "sampling_steps"),
        (["table", "gone.yaml"], "gone.yaml: cannot be read"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    suite: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_damaged_record_is_named(suite: Path, capsys: pytest.CaptureFixture) -> None:
    record = next((suite.parent / "results/small/box").glob("*.json"))
    record.write_text(record.read_text()[:-20])
    assert main(["table", str(suite)]) == 2
    assert record.name in capsys.readouterr().err


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*arguments: object, **settings: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("variable", [None, "0", "1"])
def test_an_unexpected_error_is_one_line_and_no_regression(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    monkeypatch.setattr(bench.compare_cli, "_read_sides", raising(ZeroDivisionError("by\nnought")))
    monkeypatch.delenv("DIFFBENCH_TRACEBACK", raising=False)
    if variable is not None:
        monkeypatch.setenv("DIFFBENCH_TRACEBACK", variable)
    assert main(["compare", "a", "b"]) == EXIT_CODE == 70
    assert EXIT_CODE not in set(ExitCode)
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert last.startswith("diffbench: unexpected error (exit code 70): ZeroDivisionError: by nought. ")
    assert ("Traceback" in error) is (variable == "1")
    assert (last.endswith("Set DIFFBENCH_TRACEBACK=1 to see where"), error.count("\n") == 1) == (variable != "1",) * 2


def test_output_that_nobody_takes_is_no_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):  # which typer replaces
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.setattr(bench.compare_cli, "_read_sides", raising(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert main(["compare", "a", "b"]) == EXIT_CODE


@pytest.mark.parametrize(("command", "takes_a_suite"), [("table", True), ("claims", False), ("verify", False)])
def test_help_speaks_of_a_suite_file_only_where_one_is_taken(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, command: str, takes_a_suite: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([command, "--help"]) == 0
    assert ("for a suite file" in capsys.readouterr().out) is takes_a_suite
