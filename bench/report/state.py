"""What became of every cell of a suite: ok, failed, skipped, missing or stale, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bench.plan import Cell
from bench.report.build import is_stale
from bench.report.cells import Record, axes_of
from bench.report.metrics import axis_text

CellStateName = Literal["ok", "failed", "skipped", "missing", "stale"]
CELL_STATES: tuple[CellStateName, ...] = ("ok", "failed", "skipped", "stale", "missing")
STATE_MARK: dict[CellStateName, str] = {"ok": "✓", "failed": "✗", "skipped": "○", "stale": "↻", "missing": "?"}
_MAX_DIFFERENCES = 4
Axes = frozenset[tuple[str, Any]]  # names and values; equal exactly when the mappings are


@dataclass(frozen=True)
class CellState:
    """record: of the selection, one with status 'missing' where there is none.

    older: of a stale cell, the record to show, where that is not `record` itself.
    """

    record: Record
    state: CellStateName
    reason: str = ""
    older: Record | None = None


def cell_states(selected: Sequence[Record], every: Sequence[Record], cells: Sequence[Cell] | None) -> list[CellState]:
    """The states of the selected records, in their order.

    A cell is stale when its record was made by other code than today's, or when there is one of its axes only, of
    another version of the suite.

    Args:
        selected: as `bench.report.build.select` gives them.
        every: all records of the suite on the machine.
        cells: of the plan; None where no plan is known, and then nothing is missing or stale.
    """
    planned = {cell.run_id: cell for cell in cells or ()}
    by_axes: dict[Axes, list[Record]] = {}
    for record in every:
        by_axes.setdefault(_key(record), []).append(record)
    states = []
    for record in selected:
        if record.get("status") == "missing":
            cell = planned.get(str(record.get("run_id")))
            older = _newest_other(record, by_axes.get(_key(record), ()))
            if older is not None:
                states.append(CellState(record, "stale", _why_stale(older, record), older))
                continue
            reason = cell.missing if cell is not None and cell.missing else "it has not been run"
            states.append(CellState(record, "missing", str(reason)))
            continue
        if record.get("status") == "ok" and (changed := _changed_code(record, planned)):
            states.append(CellState(record, "stale", changed))
            continue
        status: CellStateName = "ok"
        for name in CELL_STATES:
            if record.get("status") == name:
                status = name
        states.append(CellState(record, status, str(record.get("reason") or "")))
    return states


def _changed_code(record: Record, planned: Mapping[str, Cell]) -> str:
    """What code has changed since a record of a planned cell was made; '' for none."""
    cell = planned.get(str(record.get("run_id")))
    if cell is None or not is_stale(record, cell):
        return ""
    known = record.get("code") or {}
    if not known:
        return "it is older than digests of code in records, so the code may have changed"
    changed = [kind for kind, code in cell.code.items() if kind in record.get("nodes", {}) and known.get(kind) != code]
    return f"measured with other code than today's: that of {', '.join(changed)} has changed"


def _key(record: Record) -> Axes:
    return frozenset(axes_of(record).items())


def _newest_other(record: Record, same: Sequence[Record]) -> Record | None:
    """The newest of the records with a record's axes, itself aside."""
    others = [other for other in same if other.get("run_id") != record.get("run_id")]
    return max(others, key=lambda other: (str(other.get("started_at") or ""), str(other.get("run_id"))), default=None)


def _why_stale(older: Record, record: Record) -> str:
    when = str(older.get("started_at") or "")[:10]
    which = f"the record of {when}" if when else "its record"
    changes = differences(older.get("config", {}), record.get("config", {}))
    if changes:
        more = f" and {len(changes) - _MAX_DIFFERENCES} more" if len(changes) > _MAX_DIFFERENCES else ""
        return f"{which} is of other settings: {', '.join(changes[:_MAX_DIFFERENCES])}{more}"
    return f"{which} has the same settings, but was measured otherwise"


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """'train.iterations 300 instead of 1500' for each setting of `old` that is not as in `new`.

    A setting that only one of the two knows is younger or older than the other, and no difference.
    """
    found = []
    for name, value in old.items():
        if name not in new:
            continue
        if isinstance(value, Mapping) and isinstance(new[name], Mapping):
            found += differences(value, new[name], f"{prefix}{name}.")
        elif _plain(value) != _plain(new[name]):
            found.append(f"{prefix}{name} {axis_text(value)} instead of {axis_text(new[name])}")
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
