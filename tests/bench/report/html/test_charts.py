from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.report.html.charts import (
    HEIGHT,
    WIDTH,
    Absence,
    Chart,
    Mark,
    Series,
    draw,
    log_ticks,
    round_ticks,
    series_colours,
    swatch,
    thinned,
)

TICKS = ((1.0, "1"), (2.0, "2"), (4.0, "4"))


def _chart(*marks: Mark | None, **changes: object) -> Chart:
    series = (Series("a", marks, "--line-0", absences=tuple(changes.pop("absences", ()))),)  # type: ignore[arg-type]
    return Chart("steps", "AP", series, "a chart", **{"x_ticks": TICKS, "log_x": True, **changes})  # type: ignore[arg-type]


def _places(svg: str, name: str) -> list[tuple[float, float]]:
    paths = re.findall(rf'class="{name}" d="M([\d.-]+) ([\d.-]+)', svg)
    return [(float(x), float(y)) for x, y in paths]


def test_marks_stand_at_their_numbers_on_a_log_axis() -> None:
    svg = str(draw(_chart(Mark(1, 10, "one"), Mark(2, 20, "two"), Mark(4, 30, "four"))))
    ElementTree.fromstring(svg)
    (x1, y1), (x2, y2), (x4, y4) = _places(svg, "mark")
    assert x2 - x1 == pytest.approx(x4 - x2, abs=0.11)
    assert y1 - y2 == pytest.approx(y2 - y4, abs=0.11)
    assert "<title>two</title>" in svg
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in _places(svg, "mark"))


def test_a_gap_breaks_the_line_and_an_absent_cell_is_marked_below_the_data() -> None:
    absent = [Absence(2, "✗", "failed: out of memory"), Absence(2, "?", "missing")]
    svg = str(draw(_chart(Mark(1, 10, "one"), None, Mark(4, 30, "four"), absences=absent)))
    assert 'class="line"' not in svg  # two single points, no line over what was not measured
    assert "<title>failed: out of memory</title>" in svg
    rows = [float(y) for y in re.findall(r'class="absent middle" x="[\d.]+" y="([\d.]+)"', svg)]
    assert len(set(rows)) == 2
    assert min(rows) > max(y for _, y in _places(svg, "mark"))


def test_bars_of_intervals_and_ranges() -> None:
    svg = str(draw(_chart(Mark(1, 10, "", low=8, high=12, x_low=0.9, x_high=1.2, note="4"))))
    assert 'class="bar"' in svg
    assert 'class="range"' in svg
    assert '<text class="note end"' in svg


def test_the_pareto_front_is_a_stair_from_the_bottom_to_the_right() -> None:
    marks = (Mark(1, 10, ""), Mark(2, 20, ""))
    svg = str(draw(_chart(*marks, front=((1, 10), (2, 20)))))
    path = re.search(r'class="front" d="([^"]+)"', svg)
    assert path is not None
    assert re.fullmatch(r"M[\d. ]+H[\d.]+V[\d.]+H[\d.]+V[\d.]+H388", path[1])
    assert 'class="front"' not in str(draw(_chart(*marks, front=((1, 10),))))


def test_nothing_measured_is_said_in_words() -> None:
    assert draw(_chart(None)) == '<p class="nothing">Nothing was measured.</p>'
    assert draw(Chart("x", "y", (), "")) == '<p class="nothing">Nothing was measured.</p>'


@pytest.mark.parametrize("value", [0.0, 50.0, -3.0])
def test_one_point_alone_can_be_drawn(value: float) -> None:
    svg = str(draw(Chart("x", "y", (Series("a", (Mark(1, value, "t"),), "--line-0"),), "d")))
    assert "nan" not in svg
    assert len(_places(svg, "mark")) == 1


def test_everything_is_escaped() -> None:
    hostile = "</svg><script>alert('1')</script>&\""
    mark = Mark(1, 10, hostile, note=hostile)
    series = (Series(hostile, (mark,), "--line-0", absences=(Absence(2, "✗", hostile),)),)
    chart = Chart(hostile, hostile, series, hostile, x_ticks=((1, hostile),))
    svg = str(draw(chart))
    assert "<script" not in svg
    assert {element.tag for element in ElementTree.fromstring(svg).iter()} <= {"svg", "g", "path", "text", "title"}
    assert hostile in [element.text for element in ElementTree.fromstring(svg).iter("title")]
    assert "<script" not in str(swatch(series[0]))


def test_ticks_are_round_and_few() -> None:
    assert round_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert round_ticks(41, 63) == [45, 50, 55, 60]
    assert round_ticks(5, 5) == [5]
    assert log_ticks(30, 450) == pytest.approx([50, 100, 200])
    assert log_ticks(1, 1e6) == pytest.approx([1, 10, 100, 1e3, 1e4, 1e5, 1e6])


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_lie_within_their_ends(low: float, span: float) -> None:
    ticks = round_ticks(low, low + span)
    assert 1 <= len(ticks) <= 7
    assert all(low - span * 1e-6 <= tick <= low + span * (1 + 1e-6) for tick in ticks)


def test_ordered_lines_walk_over_the_ramp_and_others_over_the_palette() -> None:
    assert series_colours(3, ordered=True) == ["--ramp-0", "--ramp-2", "--ramp-5"]
    assert series_colours(2, ordered=False) == ["--line-0", "--line-1"]
    assert len(set(series_colours(6, ordered=True))) == 6
    assert series_colours(8, ordered=False)[7] == "--line-0"
    assert series_colours(1, ordered=True) == ["--line-0"]


def test_thinning_keeps_the_ends() -> None:
    assert thinned(3, 5) == [0, 1, 2]
    kept = thinned(1000, 300)
    assert (kept[0], kept[-1], len(kept), len(set(kept))) == (0, 999, 300, 300)
