"""What the page shows out of records alone: states, charts, bars, environments and commands, ready for the template."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from bench.report.cells import (
    REPEAT_AXES,
    STATE_TEXT,
    STATES,
    Record,
    State,
    axis_value,
    bare,
    metric_names,
    value_of,
    varying_axes,
)
from bench.report.conditions import conditions
from bench.report.html.charts import Absence, Chart, Mark, Series, draw, series_colours, swatch, thinned
from bench.report.metrics import axis_label, axis_text, style_of
from bench.report.plots import Line, Panel, Plot, Point, build_plot, pareto_front
from bench.report.state import STATE_MARK, CellState

Z_95 = 1.959963984540054  # of the standard normal: 95 % lie within
MANY = 40  # rows; longer tables are folded
MAX_BARS = 30
_MAX_LATENCIES = 40
_MAX_ENVIRONMENTS = 4
_LONG_TEXT = 160
_MAX_WITH_BARS = 60  # points of a chart; more bars would hide them
_SYMBOLS: dict[State, str] = {"failed": "✗", "skipped": "○", "missing": "?", "unmeasured": "–"}


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
class ChartView:
    """A chart with what stands around it. panels: (heading, drawing). legend: (swatch, label)."""

    title: str
    panels: tuple[tuple[str, Markup], ...]
    legend_title: str
    legend: tuple[tuple[Markup, str], ...]
    notes: tuple[str, ...]


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


# -- charts -----------------------------------------------------------------------------------------------------------


def plot_specs(records: Sequence[Record], asked: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The suite's plots, and the main metric against sampling steps, latency and proposals where that is not there."""
    specs = [dict(spec) for spec in asked]
    metric = main_metric(records)
    if metric is None:
        return specs
    axes = sorted(varying_axes(records), key=lambda name: name != "sampling_steps")
    for x in ("sampling_steps", "latency_s/total", "num_proposals"):
        if "/" in x and x not in metric_names(records):
            continue
        if "/" not in x and x not in axes:
            continue
        if any((bare(spec["x"]), spec["y"]) == (bare(x), metric) for spec in specs):
            continue
        others = [name for name in axes if name != x]
        if "/" in x and len(others) < 2:
            others = []  # the only axis runs along the line
        specs.append({"x": x, "y": metric, "lines": others[-1] if others else None})
    return specs


def missing_plots(records: Sequence[Record]) -> list[str]:
    """Why a usual chart is not there."""
    axes = varying_axes(records)
    notes = [
        f"AP against {axis_label(name)}: all cells have the same number of them."
        for name in ("sampling_steps", "num_proposals")
        if name not in axes
    ]
    if value_of(list(records), "latency_s/total").state != "ok":
        notes.append("AP against latency: no latency was measured.")
    return notes


def chart_view(records: Sequence[Record], spec: Mapping[str, Any]) -> ChartView:
    """One of a suite's plots.

    Raises:
        ValueError: it would have too many panels.
    """
    x, y = str(spec["x"]), str(spec["y"])
    arguments: dict[str, Any] = {"x": x, "y": y, "lines": spec.get("lines"), "title": spec.get("title")}
    plot = build_plot(records, **arguments)
    crowded = sum(len(line.points) for panel in plot.panels for line in panel.lines) > _MAX_WITH_BARS
    ends = [] if crowded else [build_plot(moved, **arguments) for moved in _shifted(records, y)]
    colours = series_colours(len(plot.panels[0].lines) if plot.panels else 0, ordered=plot.lines_ordered)
    panels: list[tuple[str, Markup]] = []
    first: tuple[Series, ...] = ()
    for number, panel in enumerate(plot.panels):
        series = tuple(
            _series(plot, line, colours[i], i, [end.panels[number].lines[i] for end in ends], with_bars=not crowded)
            for i, line in enumerate(panel.lines)
        )
        first = first or series
        panels.append((panel.title, draw(_chart(plot, panel, series))))
    # The conditions stand once on the page.
    notes = [line for line in plot.caption.splitlines() if line != " · ".join(conditions(records))]
    if crowded:
        notes = [note for note in notes if not note.startswith(("Horizontal bars", "Vertical bars"))]
        notes.append("So many points are drawn without bars; the tables have their intervals.")
    elif ends:
        notes.insert(0, "Vertical bars without seeds: 95 % intervals over images.")
    if plot.x_is_metric and not plot.falling_y and any(len(_front(panel)) > 1 for panel in plot.panels):
        notes.insert(0, "The stair is the Pareto front: right of and below it, a cell costs more and is no better.")
    absent = {point.y.state for panel in plot.panels for line in panel.lines for point in line.points}
    notes += [f"{_SYMBOLS[state]} {STATE_TEXT[state]}" for state in STATES if state in absent and not plot.x_is_metric]
    legend = tuple((swatch(entry), entry.label) for entry in first) if plot.lines_label else ()
    return ChartView(plot.title, tuple(panels), plot.lines_label, legend, tuple(notes))


def _shifted(records: Sequence[Record], metric: str) -> list[list[Record]]:
    """The records with the lower and with the upper end of the interval in place of the value; [] without any."""
    if all(record.get("metrics", {}).get(metric, {}).get("standard_error") is None for record in records):
        return []

    def moved(record: Record, sign: float) -> Record:
        entry = record.get("metrics", {}).get(metric, {})
        if entry.get("value") is None or entry.get("standard_error") is None:
            return record
        value = entry["value"] + sign * Z_95 * entry["standard_error"]
        return {**record, "metrics": {**record["metrics"], metric: {**entry, "value": value}}}

    return [[moved(record, sign) for record in records] for sign in (-1, 1)]


def _chart(plot: Plot, panel: Panel, series: tuple[Series, ...]) -> Chart:
    where = f" ({panel.title})" if panel.title else ""
    return Chart(
        x_label=plot.x_label,
        y_label=plot.y_label,
        series=series,
        description=f"{plot.title}{where}: a line chart; its numbers are in the tables.",
        x_ticks=plot.tick_values,
        log_x=plot.log_x,
        front=tuple(_front(panel)) if plot.x_is_metric and not plot.falling_y else (),
        # Differences below one point of AP are not blown up to the whole height.
        least_height=1.0 if plot.y_style.scale == 100 else 0.0,
    )


def _front(panel: Panel) -> list[tuple[float, float]]:
    return pareto_front(
        (point.x, point.y.mean)
        for line in panel.lines
        for point in line.points
        if point.x is not None and point.y.mean is not None
    )


def _series(plot: Plot, line: Line, colour: str, shape: int, ends: Sequence[Line], *, with_bars: bool) -> Series:
    marks: list[Mark | None] = []
    absences = []
    for position, point in enumerate(line.points):
        name = f"{plot.lines_label} {line.label}, " if plot.lines_label else ""
        if point.x is None or point.y.mean is None:
            marks.append(None)
            if point.x is not None and point.y.state in STATES:
                text = f"{name}{plot.x_label} {axis_text(point.step)}: {STATE_TEXT[point.y.state]}"
                absences.append(Absence(point.x, _SYMBOLS[point.y.state], f"{text}: {point.y.reason}".rstrip(": ")))
            continue
        low = high = None
        if point.y.spread:
            low, high = point.y.mean - point.y.spread, point.y.mean + point.y.spread
        elif len(ends) == 2:
            low, high = (end.points[position].y.mean for end in ends)
        marks.append(
            Mark(
                point.x,
                point.y.mean,
                name + _point_text(plot, point, low, high),
                low if with_bars and low != high else None,
                high if with_bars and low != high else None,
                point.low if with_bars else None,
                point.high if with_bars else None,
                axis_text(point.step) if plot.along_label else "",
            )
        )
    return Series(line.label, tuple(marks), colour, shape, absences=tuple(absences), faint=plot.x_is_names)


def _point_text(plot: Plot, point: Point, low: float | None, high: float | None) -> str:
    assert point.x is not None
    assert point.y.mean is not None
    digits = plot.y_style.digits
    value = f"{point.y.mean:.{digits}f}"
    if low is not None and high is not None and low != high:
        value += f" ({low:.{digits}f} to {high:.{digits}f})"
    along = f"{plot.along_label} {axis_text(point.step)}, " if plot.along_label else ""
    at = f"{point.x:.4g}" if plot.x_is_metric else axis_text(point.step)
    return f"{along}{plot.x_label} {at}: {plot.y_label} {value}"


# -- bars and distributions -------------------------------------------------------------------------------------------


def class_bars(record: Record, name: str, metric: str) -> BarsView | None:
    """AP of each class of one cell, best first; of many classes the best and the worst."""
    values = record.get("per_class", {}).get(metric)
    if not values:
        return None
    style = style_of(metric)
    known = [(value, label) for label, value in values.items() if value is not None]
    known.sort(key=lambda entry: (-entry[0], entry[1]))
    unknown = sum(value is None for value in values.values())
    bars = tuple(Bar(label, _percent(value), style.format(value)) for value, label in known)
    notes = [f"Of the cell with the best {style.label} ({name}), {style.label} ×100 of each class."]
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
            found.append((name_of(record), np.percentile(samples, [5, 25, 50, 75, 95]) * 1e3, samples))
    notes = []
    if len(found) > _MAX_LATENCIES:
        ranked = sorted(found, key=lambda entry: entry[1][2])
        found = [ranked[i] for i in thinned(len(ranked), _MAX_LATENCIES)]
        notes.append(f"{_MAX_LATENCIES} of {len(ranked)} cells, evenly over their medians.")
    if not found:
        return [], notes
    low = min(quantiles[0] for _, quantiles, _ in found)
    high = max(quantiles[-1] for _, quantiles, _ in found)
    log = low > 0 and high / low > 8
    notes.append(f"From {low:.1f} to {high:.1f} ms{', on a logarithmic scale' if log else ''}.")

    def at(value: float) -> float:
        if high <= low:
            return 50.0
        share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return round(100 * share, 2)

    rows = []
    for name, quantiles, samples in found:
        p5, p25, p50, p75, p95 = (at(float(value)) for value in quantiles)
        texts = (*(f"{quantiles[i]:.1f}" for i in (0, 2, 4)), f"{max(samples) * 1e3:.1f}", str(len(samples)))
        rows.append(SpanRow(name, p5, round(p95 - p5, 2), p25, round(p75 - p25, 2), p50, texts))
    return rows, notes


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


def curve_chart(
    title: str,
    curves: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    ordered: bool = False,
    legend_title: str = "",
    notes: Sequence[str] = (),
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    log_y: bool = False,
) -> ChartView:
    """Curves of many points each: (label, x, y)."""
    colours = series_colours(len(curves), ordered=ordered)
    series = []
    for (label, xs, ys), colour in zip(curves, colours):
        marks = tuple(Mark(float(xs[i]), float(ys[i]), "") for i in thinned(len(xs)))
        series.append(Series(label, marks, colour, curve=True))
    chart = Chart(
        x_label,
        y_label,
        tuple(series),
        f"{title}: curves of {', '.join(label for label, _, _ in curves)}",
        x_range=x_range,
        y_range=y_range,
        log_y=log_y,
    )
    legend = tuple((swatch(entry), entry.label) for entry in series)
    return ChartView(title, (("", draw(chart)),), legend_title, legend, tuple(notes))
