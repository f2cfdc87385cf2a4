"""The charts of the page: a suite's plots and others of its main metric as `charts.Chart`, with legend and notes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from bench.report.cells import STATE_TEXT, STATES, Record, State, Value, bare, metric_names, value_of, varying_axes
from bench.report.conditions import conditions
from bench.report.html.charts import Absence, Chart, Mark, Series, draw, series_colours, swatch, thinned
from bench.report.html.views import main_metric
from bench.report.metrics import axis_label, axis_text
from bench.report.plots import Line, Panel, Plot, Point, build_plot, fronts_of

_SYMBOLS: dict[State, str] = {"failed": "✗", "skipped": "○", "missing": "?", "unmeasured": "–"}
_MAX_WITH_BARS = 60  # points of a chart; more bars would hide them


@dataclass(frozen=True)
class ChartView:
    """A chart with what stands around it. panels: (heading, drawing). legend: (swatch, label)."""

    title: str
    panels: tuple[tuple[str, Markup], ...]
    legend_title: str
    legend: tuple[tuple[Markup, str], ...]
    notes: tuple[str, ...]


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
    colours = series_colours(len(plot.panels[0].lines) if plot.panels else 0, ordered=plot.lines_ordered)
    panels: list[tuple[str, Markup]] = []
    first: tuple[Series, ...] = ()
    for panel in plot.panels:
        by_line = [
            [_series(plot, part, colours[i], i, with_bars=not crowded) for part in _sets_of(line)]
            for i, line in enumerate(panel.lines)
        ]
        first = first or tuple(parts[0] for parts in by_line)
        series = tuple(part for parts in by_line for part in parts)
        panels.append((panel.title, draw(_chart(plot, panel, series))))
    # The conditions stand once on the page.
    notes = [line for line in plot.caption.splitlines() if line != " · ".join(conditions(records, [x, y]))]
    if crowded:
        notes = [note for note in notes if not note.startswith(("Horizontal bars", "Vertical bars"))]
        notes.append("So many points are drawn without bars; the tables have their intervals.")
    if plot.x_is_metric and not plot.falling_y and any(len(_front(panel)) > 1 for panel in plot.panels):
        notes.insert(0, "The stair is the Pareto front: right of and below it, a cell costs more and is no better.")
    absent = {point.y.state for panel in plot.panels for line in panel.lines for point in line.points}
    notes += [f"{_SYMBOLS[state]} {STATE_TEXT[state]}" for state in STATES if state in absent and not plot.x_is_metric]
    legend = tuple((swatch(entry), entry.label) for entry in first) if plot.lines_label else ()
    return ChartView(plot.title, tuple(panels), plot.lines_label, legend, tuple(notes))


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
    """The panel's Pareto front; none where its cells are of several sets of images."""
    fronts = fronts_of(panel)
    return fronts[0] if len(fronts) == 1 else []


def _sets_of(line: Line) -> list[Line]:
    """A line for each set of images: values of different ones are not joined."""
    sets = sorted({point.image_set for point in line.points if point.y.mean is not None})
    if len(sets) < 2:
        return [line]
    gap = Point(None, Value("absent"))

    def only(of: int) -> tuple[Point, ...]:
        return tuple(point if point.image_set == of or point.y.mean is None else gap for point in line.points)

    return [replace(line, points=only(of)) for of in sets]


def _series(plot: Plot, line: Line, colour: str, shape: int, *, with_bars: bool) -> Series:
    marks: list[Mark | None] = []
    absences = []
    for point in line.points:
        name = f"{plot.lines_label} {line.label}, " if plot.lines_label else ""
        if point.x is None or point.y.mean is None:
            marks.append(None)
            if point.x is not None and point.y.state in STATES:
                text = f"{name}{plot.x_label} {axis_text(point.step)}: {STATE_TEXT[point.y.state]}"
                absences.append(Absence(point.x, _SYMBOLS[point.y.state], f"{text}: {point.y.reason}".rstrip(": ")))
            continue
        low, high = point.bar or (None, None)
        marks.append(
            Mark(
                point.x,
                point.y.mean,
                name + _point_text(plot, point, low, high),
                low if with_bars else None,
                high if with_bars else None,
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
    if low is not None and high is not None:
        value += f" ({low:.{digits}f} to {high:.{digits}f})"
    along = f"{plot.along_label} {axis_text(point.step)}, " if plot.along_label else ""
    at = f"{point.x:.4g}" if plot.x_is_metric else axis_text(point.step)
    return f"{along}{plot.x_label} {at}: {plot.y_label} {value}"


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
