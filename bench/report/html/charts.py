"""Line charts as inline SVG: colours come from the page's style sheet, so that they follow its theme.

The plots in files (`bench.report.plots`) are drawn for paper: white ground, text as outlines, wide. These are drawn for
a page: a tenth of the size, readable on a phone, with a tooltip for every point. Numbers in, markup out; everything
that comes from data is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 400.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 42.0, 12.0, 24.0, 38.0
_BAND = 13.0  # height of a row of marks for cells without a number
_COLOURS = 7
_RAMP = 6
_SHAPES = ("circle", "square", "triangle", "diamond")
_MAX_POINTS = 300  # of a curve


@dataclass(frozen=True)
class Mark:
    """A point. low, high: of its bar in y; x_low, x_high: in x. text: of its tooltip. note: beside the point."""

    x: float
    y: float
    text: str
    low: float | None = None
    high: float | None = None
    x_low: float | None = None
    x_high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Absence:
    """A cell without a number on a chart against an axis. symbol: one character; text: of its tooltip."""

    x: float
    symbol: str
    text: str


@dataclass(frozen=True)
class Series:
    """A line. colour: of `series_colours`. None among the marks breaks the line. curve: without markers."""

    label: str
    marks: tuple[Mark | None, ...]
    colour: str
    shape: int = 0
    curve: bool = False
    absences: tuple[Absence, ...] = ()
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """A set of axes. x_ticks: positions and texts, () for numbers at round positions. front: a Pareto front to draw.

    description: what is shown, for who cannot see it. floor: lowest y shown even if all data lie above.
    """

    x_label: str
    y_label: str
    series: tuple[Series, ...]
    description: str
    x_ticks: tuple[tuple[float, str], ...] = ()
    log_x: bool = False
    log_y: bool = False
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    front: tuple[tuple[float, float], ...] = ()
    least_height: float = 0.0


def series_colours(count: int, *, ordered: bool) -> list[str]:
    """Names of style sheet variables: an even walk over the ramp for ordered lines, else one after the other."""
    if ordered and 1 < count <= 2 * _RAMP:
        return [f"--ramp-{round(i * (_RAMP - 1) / (count - 1))}" for i in range(count)]
    return [f"--line-{i % _COLOURS}" for i in range(count)]


def thinned(count: int, most: int = _MAX_POINTS) -> list[int]:
    """At most `most` positions of `count`, evenly apart, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def round_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Positions at 1, 2 or 5 times a power of ten within [low, high], at most `most` of them."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) <= most - 1)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten within [low, high]; powers alone where that would be many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= 7:
            break
    return ticks


def tick_text(value: float) -> str:
    """Without needless digits: '0.5', '20', '1200', '2e+06'."""
    return f"{value:.6g}"


def draw(chart: Chart) -> Markup:
    """The chart as an SVG element; a line of words where there is nothing to draw."""
    marks = [mark for series in chart.series for mark in series.marks if mark is not None]
    if not marks:
        return Markup('<p class="nothing">Nothing was measured.</p>')
    frame = _Frame(chart, marks)
    parts = [frame.grid(), frame.front()]
    parts += [frame.bars(series) for series in chart.series]
    parts += [frame.line(series) for series in chart.series]
    parts += [frame.absences()]
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _number(WIDTH), _number(HEIGHT), chart.description, Markup("").join(parts)
    )


class _Frame:
    """Data coordinates to those of the drawing."""

    def __init__(self, chart: Chart, marks: Sequence[Mark]) -> None:
        self._chart = chart
        rows: dict[float, int] = {}
        for series in chart.series:
            for absence in series.absences:
                rows[absence.x] = rows.get(absence.x, 0) + 1
        self._bottom = HEIGHT - _BOTTOM - _BAND * max(rows.values(), default=0)
        xs = [mark.x for mark in marks] + [position for position, _ in chart.x_ticks] + list(rows)
        xs += [end for mark in marks for end in (mark.x_low, mark.x_high) if end is not None]
        ys = [mark.y for mark in marks]
        ys += [end for mark in marks for end in (mark.low, mark.high) if end is not None]
        self._x = chart.x_range or _padded(min(xs), max(xs), log=chart.log_x, share=0.06)
        if chart.y_range is not None:
            self._y = chart.y_range
        elif chart.log_y:
            self._y = _padded(min(ys), max(ys), log=True, share=0.05)
        else:
            room = max(max(ys) - min(ys), chart.least_height, abs(max(ys)) * 0.05) or 1.0
            floor = min(ys) - 0.12 * room
            self._y = (floor if min(ys) < 0 else max(floor, 0.0)), max(max(ys) + 0.12 * room, floor + room)

    def x(self, value: float) -> float:
        return _LEFT + _share(value, self._x, log=self._chart.log_x) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return self._bottom - _share(value, self._y, log=self._chart.log_y) * (self._bottom - _TOP)

    def grid(self) -> Markup:
        chart, parts = self._chart, []
        y_ticks = log_ticks(*self._y) if chart.log_y else round_ticks(*self._y)
        for tick in y_ticks:
            at = self.y(tick)
            parts.append(_line("grid", _LEFT, at, WIDTH - _RIGHT, at))
            parts.append(_text("tick end", _LEFT - 5, at + 4, tick_text(tick)))
        if chart.x_ticks:
            ticks = list(chart.x_ticks)
        else:
            ticks = [
                (tick, tick_text(tick)) for tick in (log_ticks(*self._x) if chart.log_x else round_ticks(*self._x))
            ]
        floor = HEIGHT - _BOTTOM
        parts.append(_line("axis", _LEFT, floor, WIDTH - _RIGHT, floor))
        last = -math.inf
        for tick, text in ticks:
            at = self.x(tick)
            parts.append(_line("axis", at, floor, at, floor + 4))
            half = 3.4 * len(text)
            if at - half > last:  # texts never overlap: one that has no room is left out
                parts.append(_text("tick middle", at, floor + 16, text))
                last = at + half + 3
        parts.append(_text("label", 2, 13, chart.y_label))
        parts.append(_text("label middle", (_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 5, chart.x_label))
        return Markup("").join(parts)

    def front(self) -> Markup:
        """A stair from the lower left: whatever lies right of and below it costs more and is no better."""
        if len(self._chart.front) < 2:
            return Markup("")
        points = [(self.x(x), self.y(y)) for x, y in self._chart.front]
        path = [f"M{_number(points[0][0])} {_number(self._bottom)}"]
        for x, y in points:
            path += [f"H{_number(x)}", f"V{_number(y)}"]
        path.append(f"H{_number(WIDTH - _RIGHT)}")
        return Markup('<path class="front" d="{}"></path>').format("".join(path))

    def bars(self, series: Series) -> Markup:
        parts = []
        for mark in series.marks:
            if mark is None:
                continue
            if mark.low is not None and mark.high is not None:
                parts.append(_line("bar", self.x(mark.x), self.y(mark.low), self.x(mark.x), self.y(mark.high)))
            if mark.x_low is not None and mark.x_high is not None:
                parts.append(_line("range", self.x(mark.x_low), self.y(mark.y), self.x(mark.x_high), self.y(mark.y)))
        return _group(series, parts)

    def line(self, series: Series) -> Markup:
        runs: list[list[Mark]] = [[]]
        for mark in series.marks:
            if mark is None:
                runs.append([])
            else:
                runs[-1].append(mark)
        path = "".join(
            "M" + "L".join(f"{_number(self.x(mark.x))} {_number(self.y(mark.y))}" for mark in run)
            for run in runs
            if len(run) > 1
        )
        parts = [Markup('<path class="{}" d="{}"></path>').format("faint line" if series.faint else "line", path)]
        if series.curve:
            return _group(series, [*(parts if path else []), Markup("<title>{}</title>").format(series.label)])
        for run in runs:
            for mark in run:
                at = self.x(mark.x), self.y(mark.y)
                parts.append(
                    Markup('<path class="mark" d="{}"><title>{}</title></path>').format(
                        _shape(series.shape, *at), mark.text
                    )
                )
                if mark.note:
                    parts.append(_text("note end", at[0] - 5, at[1] - 5, mark.note))
        return _group(series, parts if path else parts[1:])

    def absences(self) -> Markup:
        level: dict[float, int] = {}
        groups = []
        for series in self._chart.series:
            parts = []
            for absence in series.absences:
                row = level.get(absence.x, 0)
                level[absence.x] = row + 1
                at = self.x(absence.x), self._bottom + _BAND * (row + 0.8)
                parts.append(
                    Markup('<text class="absent middle" x="{}" y="{}">{}<title>{}</title></text>').format(
                        _number(at[0]), _number(at[1]), absence.symbol, absence.text
                    )
                )
            groups.append(_group(series, parts))
        return Markup("").join(groups)


def swatch(series: Series) -> Markup:
    """The line and the marker of a series, for a legend."""
    shape = (
        Markup("") if series.curve else Markup('<path class="mark" d="{}"></path>').format(_shape(series.shape, 14, 7))
    )
    return Markup('<svg class="swatch" viewBox="0 0 28 14" aria-hidden="true">{}</svg>').format(
        _group(series, [_line("line", 1, 7, 27, 7), shape])
    )


def _group(series: Series, parts: Sequence[Markup]) -> Markup:
    if not parts:
        return Markup("")
    return Markup('<g style="color:var({})">{}</g>').format(series.colour, Markup("").join(parts))


def _line(name: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<path class="{}" d="M{} {}L{} {}"></path>').format(name, *map(_number, (x1, y1, x2, y2)))


def _text(name: str, x: float, y: float, text: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(name, _number(x), _number(y), text)


def _shape(shape: int, x: float, y: float) -> str:
    """An outline around a point; all of about the same area."""
    corners: dict[str, tuple[tuple[float, float], ...]] = {
        "square": ((-3.6, -3.6), (3.6, -3.6), (3.6, 3.6), (-3.6, 3.6)),
        "triangle": ((0, -5), (4.6, 3.4), (-4.6, 3.4)),
        "diamond": ((0, -5.2), (5.2, 0), (0, 5.2), (-5.2, 0)),
    }
    name = _SHAPES[shape % len(_SHAPES)]
    if name == "circle":
        return f"M{_number(x - 4)} {_number(y)}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z"
    return "M" + "L".join(f"{_number(x + dx)} {_number(y + dy)}" for dx, dy in corners[name]) + "Z"


def _padded(low: float, high: float, *, log: bool, share: float) -> tuple[float, float]:
    if log:
        room = max(math.log(high / low), 0.5) * share
        return low * math.exp(-room), high * math.exp(room)
    room = (high - low or 1.0) * share
    return low - room, high + room


def _share(value: float, ends: tuple[float, float], *, log: bool) -> float:
    low, high = ends
    if log:
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return (value - low) / (high - low) if high > low else 0.5


def _number(value: float) -> str:
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text
