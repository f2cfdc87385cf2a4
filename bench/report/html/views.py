"""What the page shows out of records alone: states, bars, environments and commands, ready for the template."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.report.cells import (
    REPEAT_AXES,
    Record,
    axis_value,
    metric_names,
    value_of,
    varying_axes,
)
from bench.report.html.charts import thinned
from bench.report.latency import quantile_of
from bench.report.metrics import axis_label, axis_text, style_of
from bench.report.state import STATE_MARK, CellState

Z_95 = 1.959963984540054  # of the standard normal: 95 % lie within
MANY = 40  # rows; longer tables are folded
MAX_BARS = 30
_MAX_LATENCIES = 40
_MAX_ENVIRONMENTS = 4
_LONG_TEXT = 160


@dataclass(frozen=True)
class StateRow:
    """A cell. value: its main metric with its interval. log: the end of the failed node's log."""

    name: str
    state: str
    mark: str
    reason: str
    value: str
    run_id: str
    when: str
    log: str


@dataclass(frozen=True)
class Bar:
    """A bar of a table of bars. share: of the full width in percent. text: the number."""

    label: str
    share: float
    text: str


@dataclass(frozen=True)
class BarsView:
    """The best and the worst of many bars; `rest` are all of them, where not all are shown."""

    title: str
    shown: tuple[Bar, ...]
    rest: tuple[Bar, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class SpanRow:
    """A distribution. left, width: of the range p5 to p95, in percent; box and median likewise. texts: of columns."""

    label: str
    left: float
    width: float
    box_left: float
    box_width: float
    median: float
    texts: tuple[str, ...]


@dataclass(frozen=True)
class EnvironmentView:
    """Conditions that some runs share. facts: (dotted name, value); long: texts that need room of their own."""

    title: str
    facts: tuple[tuple[str, str], ...]
    long: tuple[tuple[str, str], ...]
    packages: tuple[tuple[str, str], ...]


def main_metric(records: Sequence[Record]) -> str | None:
    """Mask AP where it was measured, else box AP, else the first that was measured."""
    known = metric_names(records)
    for name in ("segm/AP", "bbox/AP", *known):
        if name in known and value_of(list(records), name).state == "ok":
            return name
    return None


def cell_names(records: Sequence[Record]) -> Callable[[Record], str]:
    """What tells each record from the others: 'proposals 50, sampling steps 4'."""
    names = varying_axes(records)
    names += [name for name in REPEAT_AXES if len({axis_value(other, name) for other in records}) > 1]

    def name_of(record: Record) -> str:
        parts = [f"{axis_label(name)} {axis_text(axis_value(record, name))}" for name in names]
        return ", ".join(parts) or str(record.get("label") or record.get("run_id") or "the only cell")

    return name_of


def interval_text(record: Record, metric: str) -> str:
    """'49.8 ± 2.1': the value with 1.96 standard errors, where the record has them; '' without a value."""
    entry = record.get("metrics", {}).get(metric, {})
    if record.get("status") != "ok" or entry.get("value") is None:
        return ""
    style = style_of(metric, str(entry.get("unit") or ""))
    error = entry.get("standard_error")
    text = style.format(entry["value"]) + (f" ± {style.format(Z_95 * error)}" if error is not None else "")
    return f"{text} {style.unit}".strip()


def state_rows(states: Sequence[CellState], metric: str | None) -> list[StateRow]:
    """One row for each cell, in the order of the table."""
    name_of = cell_names([state.record for state in states])
    rows = []
    for state in states:
        shown = state.older or state.record
        value = interval_text(shown, metric) if metric else ""
        rows.append(
            StateRow(
                name=name_of(state.record),
                state=state.state,
                mark=STATE_MARK[state.state],
                reason=state.reason,
                value=f"{value} (older)" if value and state.older is not None else value,
                run_id=str(shown.get("run_id") or ""),
                when=str(shown.get("finished_at") or shown.get("started_at") or ""),
                log=str(state.record.get("log") or ""),
            )
        )
    return rows


# -- bars and distributions -------------------------------------------------------------------------------------------


def class_bars(record: Record, name: str, metric: str) -> BarsView | None:
    """AP of each class of one cell, best first; of many classes the best and the worst."""
    values = record.get("per_class", {}).get(metric)
    if not values:
        return None
    style, errors = style_of(metric), record.get("per_class_errors", {}).get(metric, {})

    def text_of(label: str, value: float) -> str:
        error = errors.get(label)
        return style.format(value) + (f" ± {style.format(Z_95 * error)}" if error is not None else "")

    known = [(value, label) for label, value in values.items() if value is not None]
    known.sort(key=lambda entry: (-entry[0], entry[1]))
    unknown = sum(value is None for value in values.values())
    bars = tuple(Bar(label, _percent(value), text_of(label, value)) for value, label in known)
    notes = [f"Of the cell with the best {style.label} ({name}), {style.label} ×100 of each class."]
    if any(errors.get(label) is not None for _, label in known):
        notes.append("±: half the 95 % interval over images.")
    if unknown:
        notes.append(f"{unknown} {'class has' if unknown == 1 else 'classes have'} no instance in the split.")
    if len(bars) <= MAX_BARS:
        return BarsView("Classes", bars, (), tuple(notes))
    half = MAX_BARS // 2
    notes.append(f"The {half} best and the {half} worst of {len(bars)} classes; all are in the table below them.")
    return BarsView("Classes", (*bars[:half], *bars[-half:]), bars, tuple(notes))


def latency_rows(records: Sequence[Record]) -> tuple[list[SpanRow], list[str]]:
    """The distribution of the raw latencies of each cell, on one scale."""
    found = []
    name_of = cell_names(records)
    for record in records:
        samples = record.get("samples", {}).get("latency_s", {}).get("total")
        if record.get("status") == "ok" and samples:
            quantiles = np.percentile(samples, [5, 25, 50, 75, 95]) * 1e3
            found.append((name_of(record), quantiles, samples, _interval_of_median(record)))
    notes = []
    if len(found) > _MAX_LATENCIES:
        ranked = sorted(found, key=lambda entry: entry[1][2])
        found = [ranked[i] for i in thinned(len(ranked), _MAX_LATENCIES)]
        notes.append(f"{_MAX_LATENCIES} of {len(ranked)} cells, evenly over their medians.")
    if not found:
        return [], notes
    low = min(quantiles[0] for _, quantiles, _, _ in found)
    high = max(quantiles[-1] for _, quantiles, _, _ in found)
    log = low > 0 and high / low > 8
    notes.append(f"From {low:.1f} to {high:.1f} ms{', on a logarithmic scale' if log else ''}.")

    def at(value: float) -> float:
        if high <= low:
            return 50.0
        share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return round(100 * share, 2)

    rows = []
    if any(interval for _, _, _, interval in found):
        notes.append("In brackets: the 95 % interval of the median.")
    for name, quantiles, samples, interval in found:
        p5, p25, p50, p75, p95 = (at(float(value)) for value in quantiles)
        ends = (f"{quantiles[0]:.1f}", f"{quantiles[2]:.1f}{interval}", f"{quantiles[4]:.1f}")
        texts = (*ends, f"{max(samples) * 1e3:.1f}", str(len(samples)))
        rows.append(SpanRow(name, p5, round(p95 - p5, 2), p25, round(p75 - p25, 2), p50, texts))
    return rows, notes


def _interval_of_median(record: Record) -> str:
    found = quantile_of(record)
    if found is None or found.low is None or found.high is None:
        return ""
    return f" [{found.low * 1e3:.1f}–{found.high * 1e3:.1f}]"


def _percent(share: float) -> float:
    return round(100 * min(max(share, 0.0), 1.0), 2)


# -- where and how ----------------------------------------------------------------------------------------------------


def environments(records: Sequence[Record]) -> tuple[list[EnvironmentView], list[str]]:
    """Each distinct environment once, with how many runs have it."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        environment = record.get("environment")
        if environment:
            groups.setdefault(json.dumps(environment, sort_keys=True), []).append(record)
    views = []
    name_of = cell_names(records)
    for members in list(groups.values())[:_MAX_ENVIRONMENTS]:
        environment = dict(members[0]["environment"])
        packages = environment.pop("packages", None) or {}
        flat = list(_flat(environment))
        title = f"{len(members)} run{'' if len(members) == 1 else 's'}"
        if len(members) < len(records) and len(members) <= 3:
            title += f": {'; '.join(map(name_of, members))}"
        views.append(
            EnvironmentView(
                title,
                tuple((name, value) for name, value in flat if len(value) <= _LONG_TEXT),
                tuple((name, value) for name, value in flat if len(value) > _LONG_TEXT),
                tuple((str(name), axis_text(version)) for name, version in packages.items())
                if isinstance(packages, Mapping)
                else (("packages", axis_text(packages)),),
            )
        )
    left = len(groups) - len(views)
    return views, [f"{left} more environments are in the records."] if left > 0 else []


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, entry in value.items():
            yield from _flat(entry, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        for position, entry in enumerate(value):
            yield from _flat(entry, f"{prefix}[{position}]")
    else:
        yield prefix, "none" if value in ([], {}, None) else axis_text(value)


def commands(records: Sequence[Record]) -> list[tuple[str, int]]:
    """Each command line with the number of runs that it gave, in order of first appearance."""
    counts: dict[str, int] = {}
    for record in records:
        command = str(record.get("command") or "")
        if command:
            counts[command] = counts.get(command, 0) + 1
    return list(counts.items())
