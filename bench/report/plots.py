"""Plots out of records: one metric against an axis (AP against steps) or against another metric (AP against latency).

Pure functions: the same records give the same bytes, PNG and SVG. Lines are told apart by colour, marker and label; an
ordered axis (proposal counts) gets an ordered ramp. Failed, skipped, missing and unmeasured cells never vanish: against
an axis they are marked under the data, against a metric they are named in the caption.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bench.report.cells import (
    STATE_TEXT,
    STATES,
    Record,
    State,
    Value,
    axis_value,
    bare,
    group_by,
    is_metric,
    is_score,
    ordered,
    unit_of,
    value_of,
    varying_axes,
)
from bench.report.conditions import conditions
from bench.report.metrics import Style, axis_label, axis_text, style_of
from bench.report.tables import absences
from bench.stats.paired import image_sets, place_of_images

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, made for colour-blind readers; without its yellow, too light on white.
CATEGORICAL = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
# Ends of an ordered ramp whose lightness falls evenly (it reads in grey too); both hold 3:1 against white.
_RAMP = ((0.96, 0.55, 0.17), (0.80, 0.27, 0.36), (0.46, 0.15, 0.50), (0.13, 0.09, 0.38))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
_STATE_MARKERS: dict[State, str] = {
    "failed": "x",
    "skipped": "o",
    "missing": "_",
    "unmeasured": "d",
    "incomparable": "D",
}
# Sizes that look equal: a triangle of size 6.5 is smaller than a disc of 6.5.
_MARKER_SIZES = {"o": 6.8, "s": 6.2, "^": 7.8, "D": 5.8, "v": 7.8, "P": 7.6, "X": 7.6, "h": 7.4}
_INK, _GREY, _LIGHT, _SHADE = "#1F2328", "#59636E", "#DDE2E8", "#F3F5F8"
_BAND_STEP = 0.06  # height of one mark in the band of absent cells, as a share of the axes
_MAX_PANELS = 12
_ASIDE = 5.0  # points between the bars of two lines at one value of an axis

_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same glyphs on every machine
    "font.size": 10,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.which": "major",
    "grid.color": _LIGHT,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "svg.hashsalt": "diffinst-bench",  # otherwise the ids inside an SVG are random
    "svg.fonttype": "path",
    "path.simplify": False,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}


@dataclass(frozen=True)
class Point:
    """A cell on a line. x: position or metric value, None where there is none. step: its value of the axis along it.

    image_set: number of the set of images that it was scored on; scores of different ones are not compared.
    """

    x: float | None
    y: Value
    step: Any = None
    low: float | None = None
    high: float | None = None
    image_set: int = 0

    @property
    def bar(self) -> tuple[float, float] | None:
        """Ends of the vertical bar: the 95 % interval where there is one, else the deviation over seeds.

        It ends at 0, which no metric falls below.
        """
        half = self.y.half or self.y.spread
        if self.y.mean is None or not half:
            return None
        return max(self.y.mean - half, min(self.y.mean, 0.0)), self.y.mean + half


@dataclass(frozen=True)
class Line:
    """Points of one value of the lines axis, in the order of the axis that runs along the line."""

    label: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Panel:
    """One set of axes: the values of what varies beside x and lines, '' where nothing does."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Plot:
    """A plot as numbers in display units, before anything is drawn; tick_values: positions and texts of an axis x."""

    title: str
    x_label: str
    y_label: str
    y_style: Style
    panels: tuple[Panel, ...]
    lines_label: str = ""
    lines_ordered: bool = False
    tick_values: tuple[tuple[float, str], ...] = ()
    along_label: str = ""
    log_x: bool = False
    x_is_names: bool = False
    x_is_metric: bool = False
    falling_y: bool = False
    caption: str = ""


def _without_implied(records: Sequence[Record], names: Sequence[str], shown: Sequence[str]) -> list[str]:
    """The axes but for those whose value follows from another one's, as the weights' file does from the engine."""
    kept = list(names)
    for name in reversed(names):
        for other in (*shown, *(one for one in kept if one != name)):
            pairs = {(axis_value(record, other), axis_value(record, name)) for record in records}
            if len(pairs) == len({value for value, _ in pairs}):
                kept.remove(name)
                break
    return kept


def build_plot(
    records: Sequence[Record], *, x: str, y: str, lines: str | None = None, title: str | None = None
) -> Plot:
    """Arrange the records into panels, lines and points; see the module's text.

    Args:
        records: JSON objects of RunRecord, 'missing' ones included where a plan is known.
        x: an axis ('sampling_steps') or a metric ('latency_s/total').
        y: a metric.
        lines: the axis with one line per value; None: a single line.
        title: by default 'Y against X'.
    Raises:
        ValueError: more panels than anybody would read.
    """
    x_is_metric = is_metric(records, x)
    y_style = style_of(y, unit_of(records, y))
    x_style = style_of(x, unit_of(records, x))
    rest = [name for name in varying_axes(records) if name not in {bare(x), bare(lines or "")}]
    rest = _without_implied(records, rest, [] if lines is None else [bare(lines)])
    # Against a metric, the axis with most values runs along the line; against an axis, x itself does.
    along = bare(x)
    if x_is_metric:
        along = max(rest, key=lambda name: len({axis_value(record, name) for record in records}), default="")
        rest = [name for name in rest if name != along]
    # Only a score depends on the images; those who have none are in no set of their own.
    sets = image_sets(records) if is_score(y) or is_score(x) else []
    positions, ticks, log_x = _axis_positions(records, along) if along else ({}, (), False)
    panels = group_by(records, rest)
    if len(panels) > _MAX_PANELS:
        raise ValueError(
            f"a plot of {y} against {x} would need {len(panels)} panels, one per {', '.join(rest)}; "
            f"{_MAX_PANELS} are allowed. Plot a suite with fewer axes, or use --only"
        )
    line_values = ordered(axis_value(record, lines) for record in records) if lines else [None]
    drawn = []
    for key, members in sorted(panels.items(), key=lambda item: _rank(records, rest, item[0])):
        by_line = group_by(members, [lines]) if lines else {(None,): members}
        panel_lines = []
        for line_value in line_values:
            cells = group_by(by_line.get((line_value,), []), [along] if along else [])
            steps = list(positions) if along else [None]
            points = []
            for step in steps:
                cell = cells.get((step,) if along else (), [])
                point = _point(cell, x, y, x_style, y_style, x_is_metric, positions, step)
                points.append(replace(point, image_set=place_of_images(cell, sets)))
            panel_lines.append(Line(axis_text(line_value) if lines else "", tuple(points)))
        label = ", ".join(f"{axis_label(name)} {axis_text(value)}" for name, value in zip(rest, key))
        drawn.append(Panel(label, tuple(panel_lines)))

    if x_is_metric:
        values = [point.x for panel in drawn for line in panel.lines for point in line.points if point.x]
        log_x = bool(values) and min(values) > 0 and max(values) / min(values) > 8
    return Plot(
        title=title or f"{_capital(y_style.label)} against {x_style.label if x_is_metric else axis_label(x)}",
        x_label=_metric_axis(x_style) if x_is_metric else _capital(axis_label(x)),
        y_label=_metric_axis(y_style),
        y_style=y_style,
        panels=tuple(drawn),
        lines_label=axis_label(lines) if lines else "",
        lines_ordered=all(isinstance(value, int | float) and not isinstance(value, bool) for value in line_values),
        tick_values=() if x_is_metric else ticks,
        along_label=axis_label(along) if x_is_metric and along else "",
        log_x=log_x,
        x_is_names=not x_is_metric and any(isinstance(value, str) for value in positions),
        x_is_metric=x_is_metric,
        falling_y=y.startswith(("latency_s", "training_step_s", "peak_memory_bytes", "flops", "num_parameters")),
        caption=_caption(records, x, y, x_is_metric, axis_label(along) if along else "", sets),
    )


def render(plot: Plot) -> dict[str, bytes]:
    """Draw a plot: {'png': ..., 'svg': ...}, the same bytes for the same plot and matplotlib version."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # From the defaults on: nobody's matplotlibrc may change the picture.
    settings: Any = {**dict(mpl.rcParamsDefault), **_STYLE}
    with mpl.rc_context(settings):
        figure = _draw(plot)
        FigureCanvasAgg(figure)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return {"png": png.getvalue(), "svg": svg.getvalue()}


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats: less x and more y is better. Rising in both, equal points once."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _point(
    cell: Sequence[Record],
    x: str,
    y: str,
    x_style: Style,
    y_style: Style,
    x_is_metric: bool,
    positions: dict[Any, float],
    step: Any,
) -> Point:
    value = _scaled(value_of(cell, y), y_style)
    if not x_is_metric:
        return Point(positions[step], value, step)
    at = _scaled(value_of(cell, x), x_style)
    return Point(at.mean, value, step, at.low, at.high)


def _scaled(value: Value, style: Style) -> Value:
    def scale(number: float | None) -> float | None:
        return None if number is None else number * style.scale

    return Value(
        value.state,
        scale(value.mean),
        scale(value.spread),
        scale(value.low),
        scale(value.high),
        value.count,
        value.total,
        value.reason,
        scale(value.half),
        value.over,
    )


def _axis_positions(
    records: Sequence[Record], name: str
) -> tuple[dict[Any, float], tuple[tuple[float, str], ...], bool]:
    """Where each value of an axis stands: numbers at their value (on a log scale if they span much), names in a row."""
    values = ordered(axis_value(record, name) for record in records)
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        positions = {value: float(value) for value in values}
        log = min(values) > 0 and max(values) / min(values) >= 4
        return positions, tuple((float(value), axis_text(value)) for value in values), log
    return (
        {value: float(i) for i, value in enumerate(values)},
        tuple((float(i), axis_text(value)) for i, value in enumerate(values)),
        False,
    )


def _rank(records: Sequence[Record], names: Sequence[str], key: tuple[Any, ...]) -> tuple[int, ...]:
    orders = [ordered(axis_value(record, name) for record in records) for name in names]
    return tuple(order.index(part) for order, part in zip(orders, key))


def _metric_axis(style: Style) -> str:
    unit = "×100" if style.scale == 100 else style.unit
    label = "latency per image, median" if style.label == "latency" else style.label
    return f"{_capital(label)} ({unit})" if unit else _capital(label)


def _caption(
    records: Sequence[Record], x: str, y: str, x_is_metric: bool, along: str, sets: Sequence[tuple[int | None, str]]
) -> str:
    lines: list[str] = []
    if len(sets) > 1:
        counts = " and ".join(str(count) for count in sorted({count for count, _ in sets if count is not None}))
        joined = "lines and Pareto fronts join" if x_is_metric else "lines join"
        lines.append(
            f"Scored on {len(sets)} different sets of images ({counts}), which are not comparable: "
            f"{joined} cells of one set alone."
        )
    if x_is_metric:
        lines += absences(records, [x, y])
    if x_is_metric and any(value_of([record], x).low is not None for record in records):
        lines.append("Horizontal bars: 5th to 95th percentile.")
    if x_is_metric and along:
        lines.append(f"Numbers at the points: {along}.")
    lines += _bars_text([value_of(cell, y) for cell in group_by(records, varying_axes(records)).values()])
    lines.append(" · ".join(conditions(records, [x, y])))
    return "\n".join(line for line in lines if line)


def _bars_text(values: Sequence[Value]) -> list[str]:
    """What the vertical bars are."""
    over = list(dict.fromkeys(value.over for value in values if value.half))
    texts = []
    if over:
        of = f" over {' and '.join(over[0])}" if len(over) == 1 else ""
        texts.append(f"95 % interval{of}, of each value alone (tables compare on the same images)")
    if any(value.spread and not value.half for value in values):
        texts.append("standard deviation over seeds" + (" where there is no interval" if over else ""))
    return [f"Vertical bars: {'; '.join(texts)}."] if texts else []


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _colours(plot: Plot) -> list[str]:
    count = len(plot.panels[0].lines) if plot.panels else 0
    if not plot.lines_ordered or count < 2:
        return [CATEGORICAL[i % len(CATEGORICAL)] for i in range(count)]
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    ramp = LinearSegmentedColormap.from_list("ordered", _RAMP)
    return [to_hex(ramp(i / (count - 1))) for i in range(count)]


def _draw(plot: Plot) -> Figure:
    from matplotlib.figure import Figure

    count = max(1, len(plot.panels))
    columns = 2 if count in {2, 4} else min(count, 3)
    rows = math.ceil(count / columns)
    panel_width, panel_height = (6.4, 3.6) if count == 1 else (3.7, 3.0)
    width = panel_width * columns + 0.6
    caption = _wrapped(plot.caption, int(width * 15))
    # Inches above and below the panels: title, legend and panel titles; tick labels, axis label and caption.
    per_row = max(1, int((width - 1.9) / 0.85))
    entries = (len(plot.panels[0].lines) if plot.panels else 0) + len(_absent_states(plot)) + plot.x_is_metric
    legend_rows = math.ceil(entries / per_row)
    top, bottom = 0.60 + 0.2 * legend_rows + (0.22 if count > 1 else 0.0), 0.78 + 0.145 * len(caption)
    height = panel_height * rows + top + bottom
    figure = Figure(figsize=(width, height))
    grid = figure.add_gridspec(
        rows,
        columns,
        left=(0.72 + 0.09 * _digits_beyond(plot, 4)) / width,
        right=1 - 0.30 / width,
        top=1 - top / height,
        bottom=bottom / height,
        hspace=0.26 if count % columns == 0 else 0.42,
        wspace=0.12,
    )
    colours = _colours(plot)
    shared: Axes | None = None
    for i, panel in enumerate(plot.panels):
        axes = figure.add_subplot(grid[i // columns, i % columns], sharex=shared, sharey=shared)
        shared = shared or axes
        _draw_panel(axes, plot, panel, colours)
        axes.set_title(panel.title, fontsize=9, loc="left", color=_INK)
        last_in_column = i + columns >= count
        axes.tick_params(labelbottom=last_in_column, labelleft=i % columns == 0, length=3)
        if last_in_column:
            axes.set_xlabel(plot.x_label)
        if i % columns == 0:
            axes.set_ylabel(plot.y_label)
    left = 0.72 / width
    figure.text(left, 1 - 0.14 / height, plot.title, fontsize=12.5, weight="bold", va="top")
    _legend(figure, plot, colours, left, 1 - 0.46 / height, per_row)
    figure.text(left, 0.14 / height, "\n".join(caption), fontsize=7.5, color=_GREY, va="bottom", linespacing=1.35)
    return figure


def _wrapped(text: str, width: int) -> list[str]:
    # No-break spaces inside phrases and before each dot: a line ends after a dot, never within a phrase that fits.
    lines = [
        line.replace(" ", "\u00a0").replace("·\u00a0", "· ") if " · " in line else line for line in text.splitlines()
    ]
    return [part.replace("\u00a0", " ") for line in lines for part in textwrap.wrap(line, width)]


def _absent_states(plot: Plot) -> list[State]:
    if plot.x_is_metric:
        return []
    states = {point.y.state for panel in plot.panels for line in panel.lines for point in line.points}
    return [state for state in STATES if state in states]


def _legend(figure: Figure, plot: Plot, colours: Sequence[str], left: float, top: float, per_row: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    if plot.lines_label:
        word = figure.text(left, top, f"{_capital(plot.lines_label)}", fontsize=9, color=_GREY, va="top")
        extent = word.get_window_extent(FigureCanvasAgg(figure).get_renderer())
        left += (extent.width / figure.dpi + 0.12) / figure.get_size_inches()[0]
        for i, line in enumerate(plot.panels[0].lines):
            marker = _MARKERS[i % len(_MARKERS)]
            look: dict[str, Any] = {"marker": marker, "markersize": _MARKER_SIZES[marker], "markeredgecolor": "white"}
            handles.append(Line2D([], [], color=colours[i], linewidth=1.8, label=line.label, **look))
    fronts = [front for panel in plot.panels for front in fronts_of(panel)]
    if plot.x_is_metric and not plot.falling_y and any(len(front) > 1 for front in fronts):
        handles.append(Patch(facecolor=_SHADE, edgecolor=_GREY, linewidth=0.8, label="Pareto front"))
    handles += [_state_handle(state) for state in _absent_states(plot)]
    if handles:
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(left, top),
            ncols=min(len(handles), per_row),
            frameon=False,
            borderpad=0,
            borderaxespad=0,
            handlelength=1.7,
            handletextpad=0.5,
            columnspacing=1.4,
            fontsize=9,
        )


def _state_handle(state: State) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", color=_GREY, label=STATE_TEXT[state], **_state_look(state, _GREY))


def _state_look(state: State, colour: str) -> dict[str, Any]:
    face = "none" if state in {"skipped", "unmeasured"} else colour
    return {
        "marker": _STATE_MARKERS[state],
        "markersize": 6.5,
        "markerfacecolor": face,
        "markeredgecolor": colour,
        "markeredgewidth": 1.6,
    }


_BEYOND = 1.1  # how far an axis goes at most beyond its largest value


def _digits_beyond(plot: Plot, room: int) -> int:
    """How many more digits the largest y value has before its point than there is room for beside the axis."""
    values = [point.y.mean for panel in plot.panels for line in panel.lines for point in line.points]
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    # The axis goes on beyond it: 9971 may stand under a tick of 10000.
    return max(0, len(f"{largest * _BEYOND:.0f}") - room)


def _draw_panel(axes: Axes, plot: Plot, panel: Panel, colours: Sequence[str]) -> None:
    from matplotlib.ticker import NullLocator

    _scale_axes(axes, plot)
    if plot.x_is_metric and not plot.falling_y:
        _shade_front(axes, panel)
    has_bars = any(point.bar for line in panel.lines for point in line.points)
    for i, line in enumerate(panel.lines):
        # Values of an axis are shared by all lines: side by side, their bars can be told apart.
        aside = (i - (len(panel.lines) - 1) / 2) * _ASIDE if has_bars and not plot.x_is_metric else 0.0
        _draw_line(axes, plot, line, colours[i], _MARKERS[i % len(_MARKERS)], aside)
    _annotate_steps(axes, plot, panel, colours)
    if not plot.x_is_metric:
        _mark_absent(axes, panel, colours)
    if not any(_is_shown(point) for line in panel.lines for point in line.points):
        axes.text(0.5, 0.5, "nothing measured", transform=axes.transAxes, ha="center", va="center", color=_GREY)
        axes.yaxis.set_major_locator(NullLocator())
        if plot.x_is_metric:
            axes.xaxis.set_major_locator(NullLocator())


def _shade_front(axes: Axes, panel: Panel) -> None:
    """Shade what is beaten: whatever lies right of and below a point of the front costs more and is no better.

    Of several sets of images none beats another's, so that only the fronts are drawn.
    """
    fronts = fronts_of(panel)
    right, floor = axes.get_xlim()[1], axes.get_ylim()[0]
    for front in fronts:
        if len(front) < 2:
            continue
        xs = [x for x, _ in front] + [right]
        ys = [y for _, y in front] + [front[-1][1]]
        if len(fronts) == 1:
            axes.fill_between(xs, ys, floor, step="post", color=_SHADE, linewidth=0, zorder=0.4)
        axes.step([xs[0], *xs], [floor, *ys], where="post", color=_GREY, linewidth=0.7, alpha=0.8, zorder=1.4)


def _is_shown(point: Point) -> bool:
    return point.x is not None and point.y.mean is not None


def fronts_of(panel: Panel) -> list[list[tuple[float, float]]]:
    """The Pareto front of each set of images that is shown."""
    points: dict[int, list[tuple[float, float]]] = {}
    for line in panel.lines:
        for point in line.points:
            if point.x is not None and point.y.mean is not None:
                points.setdefault(point.image_set, []).append((point.x, point.y.mean))
    return [pareto_front(found) for _, found in sorted(points.items())]


def _scale_axes(axes: Axes, plot: Plot) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, NullLocator

    shown = [point for panel in plot.panels for line in panel.lines for point in line.points if _is_shown(point)]
    ys = [float(point.y.mean or 0.0) for point in shown]
    if plot.log_x:
        axes.set_xscale("log", base=2 if plot.tick_values else 10)
    if plot.tick_values:
        positions = [position for position, _ in plot.tick_values]
        axes.xaxis.set_major_locator(FixedLocator(positions))
        axes.xaxis.set_major_formatter(FixedFormatter([text for _, text in plot.tick_values]))
        axes.xaxis.set_minor_locator(NullLocator())
        _pad_x(axes, positions, plot.log_x, share=0.07)
    elif plot.x_is_metric and shown:
        ends = [end for point in shown for end in (point.x, point.low, point.high) if end is not None]
        if plot.log_x:
            axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
            _pad_x(axes, ends, True, share=0.07)
        else:
            axes.set_xlim(0, max(ends) * 1.06)
    if ys:
        bars = [point.bar or (y, y) for y, point in zip(ys, shown)]
        low, high = min(bar[0] for bar in bars), max(bar[1] for bar in bars)
        # Differences below a twentieth, or below one point of AP, are not blown up to the whole height.
        room = max(high - low, abs(high) * 0.05, 1.0 if plot.y_style.scale == 100 else 0.0) or 1.0
        band = _band_height(plot.panels) if not plot.x_is_metric else 0.0
        floor = low - 0.12 * room if low < 0 else max(low - 0.12 * room, 0.0)
        top = max(high + 0.12 * room, floor + room)
        # Under the data there is room for the band of absent cells, beside which no number stands.
        axes.set_ylim(floor - (top - floor) * band / (1 - band), top)
        if band:
            axes.yaxis.set_major_locator(FixedLocator([tick for tick in axes.get_yticks() if floor <= tick <= top]))


def _band_height(panels: Iterable[Panel]) -> float:
    """The share of the axes' height that the marks of absent cells take: 0 where every cell has its number."""
    most = 0
    for panel in panels:
        absent = [point.x for line in panel.lines for point in line.points if point.y.state in STATES]
        most = max([most, *(absent.count(x) for x in absent)])
    return _BAND_STEP * (most + 0.5) if most else 0.0


def _pad_x(axes: Axes, values: Sequence[float], log: bool, *, share: float) -> None:
    low, high = min(values), max(values)
    if log:
        room = max(math.log(high / low), 0.5) * share
        axes.set_xlim(low * math.exp(-room), high * math.exp(room))
    else:
        room = max(high - low, 1.0) * share
        axes.set_xlim(low - room, high + room)


def _draw_line(axes: Axes, plot: Plot, line: Line, colour: str, marker: str, aside: float) -> None:
    """aside: points of the page by which the whole line is moved to the right."""
    from matplotlib.transforms import ScaledTranslation

    assert axes.figure is not None
    moved = axes.transData + ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans)
    # A point without a number breaks the line: nothing is drawn over what was not measured.
    shown = [(point.x, point.y.mean) if _is_shown(point) else (math.nan, math.nan) for point in line.points]
    xs, ys = [x or 0.0 for x, _ in shown], [y or 0.0 for _, y in shown]
    for image_set in sorted({point.image_set for point in line.points if _is_shown(point)} or {0}):
        of_set = [y if point.image_set == image_set else math.nan for y, point in zip(ys, line.points)]
        # Between names there is nothing to interpolate: a faint line only guides the eye.
        alpha = 0.25 if plot.x_is_names else 1
        axes.plot(xs, of_set, color=colour, linewidth=1.8, alpha=alpha, zorder=3, transform=moved)
    size = _MARKER_SIZES[marker]
    axes.plot(
        xs,
        ys,
        color=colour,
        marker=marker,
        markersize=size,
        linestyle="none",
        markeredgecolor="white",
        zorder=4,
        clip_on=False,
        transform=moved,
    )
    for point in line.points:
        if point.x is None or point.y.mean is None:
            continue
        if plot.x_is_metric and point.low is not None and point.high is not None:
            axes.plot([point.low, point.high], [point.y.mean] * 2, color=colour, alpha=0.35, linewidth=2.4, zorder=2)
        if point.bar is not None:
            look: dict[str, Any] = {"color": colour, "alpha": 0.55, "capsize": 2.5, "lw": 1.2, "zorder": 2}
            away = [[point.y.mean - point.bar[0]], [point.bar[1] - point.y.mean]]
            axes.errorbar([point.x], [point.y.mean], away, fmt="none", transform=moved, **look)


def _annotate_steps(axes: Axes, plot: Plot, panel: Panel, colours: Sequence[str]) -> None:
    """Along a line against a metric, each point says its value of the axis that runs along it."""
    if not plot.along_label:
        return
    for i, line in enumerate(panel.lines):
        for point in line.points:
            if point.x is not None and point.y.mean is not None:
                axes.annotate(
                    axis_text(point.step),
                    (point.x, point.y.mean),
                    xytext=(-4, 4),
                    textcoords="offset points",
                    ha="right",
                    va="bottom",
                    fontsize=7.5,
                    color=colours[i],
                    zorder=5,
                )


def _mark_absent(axes: Axes, panel: Panel, colours: Sequence[str]) -> None:
    """Cells without a number, in a band under the data: at their place on the x axis, in their line's colour."""
    from matplotlib.patches import Rectangle

    band = _band_height([panel])
    if not band:
        return
    axes.add_patch(Rectangle((0, 0), 1, band, transform=axes.transAxes, facecolor=_SHADE, edgecolor="none", zorder=0.5))
    stacked: dict[float, int] = {}
    for i, line in enumerate(panel.lines):
        for point in line.points:
            if point.x is None or point.y.state not in STATES:
                continue
            level = stacked.get(point.x, 0)
            stacked[point.x] = level + 1
            axes.plot(
                [point.x],
                [_BAND_STEP * (level + 0.75)],
                transform=axes.get_xaxis_transform(),
                linestyle="none",
                zorder=4,
                **_state_look(point.y.state, colours[i]),
            )
