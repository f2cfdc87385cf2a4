from __future__ import annotations

from typing import Any

import pytest
from report_records import make_grid, make_record

from bench.plan import Cell
from bench.report import state as state_module
from bench.report.build import select
from bench.report.cells import Record, axes_of
from bench.report.state import cell_states, differences


def _cell(record: dict, **changes: object) -> Cell:
    nodes = {"train": "train-2", "predict": "predict-2"}
    return Cell(f"planned-{record['run_id']}", record["label"], record["axes"], record["config"] | changes, nodes)  # type: ignore[arg-type]


def test_every_state_of_a_record_with_its_reason() -> None:
    states = cell_states(make_grid(), make_grid(), None)
    found = [(state.state, state.reason) for state in states]
    assert found.count(("ok", "")) == 6
    assert ("failed", "out of memory: the process was killed\ntrace") in found
    assert ("skipped", "its training failed") in found
    assert ("missing", "it has not been run") in found


def test_a_cell_that_cannot_be_run_says_why() -> None:
    record = make_record(1)
    cell = Cell("x", record["label"], record["axes"], record["config"], {}, missing="model.weights: does not exist")
    selected = select([make_record(2)], [cell]).records
    (state,) = cell_states(selected, [make_record(2)], [cell])
    assert (state.state, state.reason) == ("skipped", "model.weights: does not exist")


def test_a_record_of_other_settings_makes_a_cell_stale_and_names_them() -> None:
    old = make_record(1)
    cell = _cell(old, train={**old["config"]["train"], "iterations": 300})
    (state,) = cell_states(select([old], [cell]).records, [old], [cell])
    assert state.state == "stale"
    assert state.older == old
    assert state.reason == "the record of 2026-01-02 is of other settings: train.iterations 1500 instead of 300"


def test_a_record_of_the_same_settings_measured_otherwise_is_stale() -> None:
    old = make_record(1)
    cell = _cell(old)
    (state,) = cell_states(select([old], [cell]).records, [old], [cell])
    assert (state.state, state.older) == ("stale", old)
    assert state.reason == "the record of 2026-01-02 has the same settings, but was measured otherwise"


def test_a_record_of_other_code_is_stale_and_shown() -> None:
    record = make_record(1)
    record["nodes"], record["code"] = {"train": "train-1", "score": "score-1"}, {"train": "a", "score": "b"}
    cell = Cell(
        record["run_id"], record["label"], record["axes"], record["config"], {}, code={"train": "a", "score": "c"}
    )
    (state,) = cell_states([record], [record], [cell])
    assert (state.record, state.state, state.older) == (record, "stale", None)
    assert state.reason == "measured with other code than today's: that of score has changed"
    (state,) = cell_states([{**record, "code": {}}], [record], [cell])
    assert state.reason.startswith("it is older than digests of code")
    (state,) = cell_states([{**record, "code": {"train": "a", "score": "c"}}], [record], [cell])
    assert state.state == "ok"


def test_of_several_older_records_the_newest_counts_and_other_cells_do_not() -> None:
    first, second, other = make_record(1), make_record(1), make_record(2)
    first["run_id"], second["run_id"], second["started_at"] = "a", "b", "2026-02-01T00:00:00Z"
    cell = _cell(first)
    (state,) = cell_states(select([first, second, other], [cell]).records, [first, second, other], [cell])
    assert state.older == second
    cells = [_cell(make_record(8))]
    (state,) = cell_states(select([first], cells).records, [first], cells)
    assert state.state == "missing"


def test_each_record_is_looked_at_a_few_times_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    every = [make_record(1 + number % 10, 1 + number // 10) for number in range(100)]
    selected = [{**record, "run_id": f"new-{record['run_id']}", "status": "missing"} for record in every]
    looks = []

    def look(record: Record) -> dict[str, Any]:
        looks.append(record)
        return axes_of(record)

    monkeypatch.setattr(state_module, "axes_of", look)
    states = cell_states(selected, every, None)
    assert [state.older for state in states] == every
    assert len(looks) <= 3 * len(every)


def test_differences_name_settings_that_both_know() -> None:
    old = {"train": {"iterations": 5, "gone": 1, "sizes": (1, 2)}, "data": {"dataset": "coco"}, "engine": {"name": "x"}}
    new = {"train": {"iterations": 6, "young": 1, "sizes": [1, 2]}, "data": {"dataset": "shapes"}}
    assert differences(old, new) == ["train.iterations 5 instead of 6", "data.dataset coco instead of shapes"]
