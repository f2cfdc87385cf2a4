from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_records import make_grid, make_record

from bench.errors import RecordError, StoreError
from bench.plan import Cell
from bench.record import parse_record
from bench.report.build import (
    build_plots,
    build_tables,
    default_plots,
    default_tables,
    is_stale,
    read_records,
    select,
    write_plots,
    write_tables,
)
from bench.store import Store


def _cell(record: dict[str, Any]) -> Cell:
    return Cell(record["run_id"], record["label"], record["axes"], record["config"], {})


def _store(results: Path, records: list[dict[str, Any]], machine: str = "box") -> None:
    for record in records:
        if record["status"] != "missing":
            Store(results).write_record(parse_record(record, "test"), machine)


def test_records_are_read_by_machine(tmp_path: Path) -> None:
    _store(tmp_path, [make_record(1)], "b")
    _store(tmp_path, [make_record(1), make_record(2)], "a")
    found = read_records(tmp_path, "quickstart")
    assert {machine: len(records) for machine, records in found.items()} == {"a": 2, "b": 1}
    assert list(found) == ["a", "b"]


def test_no_records_says_where_there_are_some(tmp_path: Path) -> None:
    _store(tmp_path, [make_record()])
    with pytest.raises(RecordError, match="no records. Suites with results in .*: quickstart"):
        read_records(tmp_path, "quickstrat")
    with pytest.raises(RecordError, match="Run run-suite first"):
        read_records(tmp_path / "nowhere", "quickstart")


def test_with_a_plan_its_cells_count_in_its_order() -> None:
    planned = [make_record(4), make_record(1), make_record(2)]
    other = make_record(8)
    selection = select([planned[1], planned[0], other], [_cell(record) for record in planned])
    assert [(record["axes"]["sampling_steps"], record["status"]) for record in selection.records] == [
        (4, "ok"),
        (1, "ok"),
        (2, "missing"),
    ]
    assert selection.notes == ("1 record of other versions or settings of this suite left out",)


def test_without_a_plan_the_latest_record_of_a_cell_counts() -> None:
    old, new = make_record(ap=0.1), make_record(ap=0.2)
    old["run_id"], new["started_at"] = "old", "2026-02-01T00:00:00Z"
    selection = select([new, old], None)
    assert selection.records == (new,)
    assert selection.notes == ("1 older record of the same cells left out",)


def test_a_failed_run_that_never_started_is_selected_too() -> None:
    record = make_record(status="failed", reason="no data")
    record["started_at"] = None
    assert select([record], None).records == (record,)


def test_the_files_are_named_by_what_they_show() -> None:
    specs = [
        {"rows": "sampler.num_proposals", "columns": "sampling_steps", "metric": "segm/AP"},
        {"rows": "num_proposals", "columns": "sampling_steps", "metric": "segm/AP"},
        {"kind": "long", "metrics": ["segm/AP"]},
    ]
    assert list(build_tables(make_grid(), specs)) == [
        "segm-AP-by-num_proposals-and-sampling_steps",
        "segm-AP-by-num_proposals-and-sampling_steps-2",
        "cells",
    ]


def test_defaults_cover_two_axes_one_axis_and_none() -> None:
    assert default_tables(make_grid()) == [
        {"rows": "num_proposals", "columns": "sampling_steps", "metric": "segm/AP"},
        {"kind": "long"},
    ]
    assert [(spec["x"], spec["lines"]) for spec in default_plots(make_grid())] == [
        ("sampling_steps", "num_proposals"),
        ("latency_s/total", "num_proposals"),
    ]
    assert default_tables([make_record(1), make_record(2)]) == [{"kind": "long"}]
    assert default_plots([make_record()]) == []


def test_written_twice_the_files_are_the_same_and_are_not_touched_again(tmp_path: Path) -> None:
    for _ in range(2):
        paths = write_tables(build_tables(make_grid()), tmp_path) + write_plots(build_plots(make_grid()), tmp_path)
        times = {path: path.stat().st_mtime_ns for path in paths}
    assert {path.suffix for path in paths} == {".md", ".csv", ".tex", ".png", ".svg"}
    before = {path: path.read_bytes() for path in paths}
    for path in paths:
        path.unlink()
    write_tables(build_tables(make_grid()), tmp_path)
    write_plots(build_plots(make_grid()), tmp_path)
    assert {path: path.read_bytes() for path in paths} == before
    write_tables(build_tables(make_grid()), tmp_path)
    assert all(path.read_bytes() == before[path] for path in times)
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file: cannot be written"):
        write_tables(build_tables(make_grid()), tmp_path / "file")


def test_too_many_panels_name_the_plot() -> None:
    records = [make_record(steps, kind=kind) for steps in (1, 2) for kind in range(13)]
    with pytest.raises(RecordError, match=r"plots\[0\]: .*13 panels"):
        build_plots(records, [{"x": "sampling_steps", "y": "segm/AP"}])


def test_reports_load_neither_torch_nor_the_model_nor_matplotlib() -> None:
    code = (
        "import sys, bench.diffbench, bench.report.build\n"
        "from report_records import make_grid\n"
        "from bench.report.build import build_tables, build_plots\n"
        "build_tables(make_grid())\n"
        "print('matplotlib' in sys.modules)\n"
        "build_plots(make_grid())\n"
        "print(*(name for name in ('torch', 'diffinst.model', 'diffinst.build') if name in sys.modules))\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=root,
        env={"PYTHONPATH": f"{root}:{root / 'tests'}", "MPLBACKEND": "Agg", "HOME": "/nonexistent"},
        check=True,
    )
    assert done.stdout.split("\n") == ["False", "", ""]


@pytest.mark.parametrize(
    ("recorded", "is_old"),
    [({"score": "aa"}, False), ({"score": "bb"}, True), ({}, True), ({"score": "aa", "train": "cc"}, False)],
)
def test_a_record_of_other_code_is_told(recorded: dict[str, str], is_old: bool) -> None:
    record = {**make_record(), "nodes": {"score": "score-1"}, "code": recorded}
    cell = dataclasses.replace(_cell(record), code={"score": "aa", "train": "dd"})
    assert is_stale(record, cell) is is_old
    notes = select([record], [cell]).notes
    assert [note.split(":")[0] for note in notes] == ["1 record of other code than today's"] * is_old
    assert not is_stale({**record, "status": "missing"}, cell)
