from __future__ import annotations

import io
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from report_records import make_grid, make_record

from bench.report.plots import _draw, build_plot, fronts_of, pareto_front, render


def test_against_an_axis_there_is_a_line_per_value_and_a_point_per_step() -> None:
    plot = build_plot(make_grid(), x="sampling_steps", y="segm/AP", lines="num_proposals")
    (panel,) = plot.panels
    assert [line.label for line in panel.lines] == ["20", "50", "100"]
    assert [point.x for point in panel.lines[1].points] == [1, 2, 4]
    assert [point.y.mean for point in panel.lines[1].points] == pytest.approx([34.5, 36.3, 38.1])
    assert [point.y.state for point in panel.lines[2].points] == ["ok", "skipped", "failed"]
    assert (plot.x_label, plot.y_label) == ("Sampling steps", "Mask AP (×100)")
    assert plot.tick_values == ((1.0, "1"), (2.0, "2"), (4.0, "4"))


def test_against_latency_the_points_carry_percentiles_and_steps_in_ms() -> None:
    plot = build_plot(make_grid(), x="latency_s/total", y="segm/AP", lines="num_proposals")
    point = plot.panels[0].lines[0].points[0]
    assert (point.x, point.low, point.high, point.step) == pytest.approx((7.1, 6.39, 8.875, 1))
    assert plot.x_label == "Latency per image, median (ms)"
    # Cells without a latency have no place on this axis: the caption names them.
    assert "failed: sampling_steps=4 num_proposals=100: out of memory" in plot.caption
    assert "skipped: sampling_steps=2 num_proposals=100" in plot.caption
    assert "missing: sampling_steps=4 num_proposals=20" in plot.caption
    assert "Example CPU 9000, 2 cores" in plot.caption


def test_another_axis_makes_panels_and_seeds_make_deviations() -> None:
    records = [
        make_record(steps, seed=seed, backbone=name, ap=0.3 + 0.02 * seed)
        for steps in (1, 4)
        for seed in (0, 1)
        for name in ("tiny", "resnet50")
    ]
    plot = build_plot(records, x="sampling_steps", y="segm/AP")
    assert [panel.title for panel in plot.panels] == ["backbone tiny", "backbone resnet50"]
    value = plot.panels[0].lines[0].points[0].y
    # mean of 30 and 32; deviation sqrt(2)
    assert (value.mean, value.spread) == pytest.approx((31, 2**0.5))
    assert "standard deviation over seeds" in plot.caption


def test_an_axis_that_follows_from_another_makes_no_panels() -> None:
    # The weights' file follows from the engine; the note follows from nothing.
    files = {"one": "one.pth", "two": "two.pth"}
    records = [
        make_record(steps, engine=name, weights=files[name], note=note)
        for steps in (1, 4)
        for name in files
        for note in ("a", "b")
    ]
    plot = build_plot(records, x="sampling_steps", y="segm/AP", lines="engine")
    assert [panel.title for panel in plot.panels] == ["note a", "note b"]
    assert [line.label for line in plot.panels[0].lines] == ["one", "two"]
    apart = build_plot(records, x="sampling_steps", y="segm/AP", lines="note")
    assert [panel.title for panel in apart.panels] == ["engine one", "engine two"]


@pytest.mark.parametrize("seconds", [0.5, 1.0, 9.2, 9.971, 20.0, 95.0, 300.0])  # the axis is in ms, and ends beyond
def test_long_numbers_have_room_beside_the_axis(seconds: float) -> None:
    plot = build_plot([make_record(1, latency_s=seconds), make_record(4)], x="sampling_steps", y="latency_s/total")
    picture = np.asarray(Image.open(io.BytesIO(render(plot)["png"])).convert("L"))
    assert (picture[:, :4] == 255).all()


def test_intervals_of_the_records_are_the_vertical_bars() -> None:
    records = make_grid()
    for record in records:
        if record.get("metrics", {}).get("segm/AP", {}).get("value") is not None:
            record["metrics"]["segm/AP"]["standard_error"] = 0.02
    plot = build_plot(records, x="sampling_steps", y="segm/AP", lines="num_proposals")
    point = plot.panels[0].lines[0].points[0]
    assert point.y.mean is not None
    assert point.bar == pytest.approx((point.y.mean - 3.92, point.y.mean + 3.92), abs=1e-3)  # 100 * 0.02 * 1.96
    assert "Vertical bars: 95 % interval over images, of each value alone" in plot.caption
    assert "standard deviation" not in plot.caption
    bare = build_plot(make_grid(), x="sampling_steps", y="segm/AP", lines="num_proposals")
    assert bare.panels[0].lines[0].points[0].bar is None
    assert "Vertical bars" not in bare.caption
    # The axes have room for the bars.
    bars = [point.bar for line in plot.panels[0].lines for point in line.points if point.bar is not None]
    low, high = _draw(plot).axes[0].get_ylim()
    assert low < min(end for end, _ in bars)
    assert high > max(end for _, end in bars)


def test_no_bar_goes_below_zero() -> None:
    record = make_record(ap=0.001)
    record["metrics"]["segm/AP"]["standard_error"] = 0.002
    ((point,),) = (line.points for line in build_plot([record], x="sampling_steps", y="segm/AP").panels[0].lines)
    assert point.bar == pytest.approx((0.0, 0.1 + 0.392), abs=1e-3)


def two_sets() -> list:
    """Steps 1, 2 on 200 images and 4, 8 on 1000, where all is better and as fast."""
    records = [make_record(steps, ap=0.3 + 0.01 * i, latency_s=0.01 + 0.01 * i) for i, steps in enumerate((1, 2))]
    records += [make_record(steps, ap=0.5 + 0.01 * i, latency_s=0.01 + 0.01 * i) for i, steps in enumerate((4, 8))]
    for place, record in enumerate(records):
        record["metrics"]["num_images"] = {"value": 1000 if place > 1 else 200, "unit": "images"}
    return records


def test_no_line_joins_cells_of_different_images() -> None:
    plot = build_plot(two_sets(), x="sampling_steps", y="segm/AP")
    assert [point.image_set for point in plot.panels[0].lines[0].points] == [0, 0, 1, 1]
    assert "Scored on 2 different sets of images (200 and 1000)" in plot.caption
    figure = _draw(plot)
    joined = [
        np.asarray(line.get_ydata(), dtype=float)
        for line in figure.axes[0].lines
        if line.get_linestyle() == "-" and np.size(line.get_xdata()) == 4
    ]
    assert joined
    for values in joined:
        drawn = ~np.isnan(values)
        assert drawn.tolist() in ([True, True, False, False], [False, False, True, True])


def test_a_front_is_of_one_set_of_images() -> None:
    plot = build_plot(two_sets(), x="latency_s/total", y="segm/AP")
    fronts = fronts_of(plot.panels[0])
    assert [[round(y) for _, y in front] for front in fronts] == [[30, 31], [50, 51]]
    assert "lines and Pareto fronts join cells of one set alone" in plot.caption
    render(plot)
    # What has nothing to do with images is joined as ever.
    timed = build_plot(two_sets(), x="sampling_steps", y="latency_s/total")
    assert {point.image_set for point in timed.panels[0].lines[0].points} == {0}
    assert "different sets" not in timed.caption


def test_cells_without_a_number_of_images_are_of_one_set() -> None:
    plot = build_plot(make_grid(), x="latency_s/total", y="segm/AP", lines="num_proposals")
    assert {point.image_set for line in plot.panels[0].lines for point in line.points} == {0}
    assert "different sets" not in plot.caption


def test_too_many_panels_are_refused_with_a_way_out() -> None:
    records = [make_record(steps, kind=kind) for steps in (1, 2) for kind in range(13)]
    with pytest.raises(ValueError, match="13 panels, one per kind; 12 are allowed"):
        build_plot(records, x="sampling_steps", y="segm/AP")


@pytest.mark.parametrize("x", ["sampling_steps", "latency_s/total"])
def test_the_same_records_give_the_same_bytes(x: str) -> None:
    first, again = (render(build_plot(make_grid(), x=x, y="segm/AP", lines="num_proposals")) for _ in range(2))
    assert again == first
    assert first["png"].startswith(b"\x89PNG")
    assert first["svg"].startswith(b"<?xml")
    assert b"<dc:date>" not in first["svg"]


def test_the_order_of_the_files_does_not_show() -> None:
    records = make_grid()
    plot = build_plot(records, x="sampling_steps", y="segm/AP", lines="num_proposals")
    random.Random(0).shuffle(records)
    assert build_plot(records, x="sampling_steps", y="segm/AP", lines="num_proposals") == plot


def test_absent_cells_stand_under_the_data_at_their_place() -> None:
    (axes,) = _draw(build_plot(make_grid(), x="sampling_steps", y="segm/AP", lines="num_proposals")).axes
    marks = [(line.get_marker(), *line.get_xydata()[0]) for line in axes.lines if line.get_marker() in {"x", "_", "o"}]
    found = [mark for mark in marks if mark[2] < 1]  # positions as shares of the axes' height; AP is above 30
    # Missing: 20 proposals; skipped and failed: 100 proposals. At 4 steps two of them are stacked.
    assert found == [("_", 4, pytest.approx(0.045)), ("o", 2, pytest.approx(0.045)), ("x", 4, pytest.approx(0.105))]
    lowest = 31.0
    bottom, top = axes.get_ylim()
    assert (lowest - bottom) / (top - bottom) > 0.15  # no measured point inside the band


def test_failed_skipped_missing_and_unmeasured_look_different() -> None:
    pictures = []
    for status in ("failed", "skipped", "missing", "ok"):
        records = [make_record(1), make_record(2, status=status, reason=None if status == "ok" else "x", ap=None)]
        pictures.append(render(build_plot(records, x="sampling_steps", y="segm/AP"))["png"])
    assert len(set(pictures)) == 4


@pytest.mark.parametrize(
    "records",
    [
        [make_record(status="failed", reason="crash")],
        [make_record(ap=0.0)],
        [make_record(ap=None)],
        [make_record(1, ap=0.3), make_record(2, ap=0.3, latency_s=None)],
        [make_record(ap=0.2, latency_s=None)],
    ],
    ids=["all failed", "zero", "unmeasured", "equal", "no latency"],
)
@pytest.mark.parametrize("x", ["sampling_steps", "latency_s/total", "backbone"])
def test_degenerate_records_are_drawn(records: list, x: str) -> None:
    assert render(build_plot(records, x=x, y="segm/AP", lines="num_proposals"))["png"].startswith(b"\x89PNG")


def test_dollars_and_backslashes_are_no_formula() -> None:
    records = [make_record(1, note="$\\frac{$"), make_record(2, note="_$^")]
    render(build_plot(records, x="sampling_steps", y="segm/AP", lines="note", title="costs $5 or $6^"))


def test_pareto_front_by_hand() -> None:
    # (2, 5) beats (3, 4) and (2, 3); (1, 1) and (4, 6) are beaten by nobody.
    assert pareto_front([(3, 4), (1, 1), (2, 5), (2, 3), (4, 6), (4, 6)]) == [(1, 1), (2, 5), (4, 6)]
    assert pareto_front([]) == []


numbers = st.integers(0, 8).map(float)


@given(st.lists(st.tuples(numbers, numbers), max_size=12))
def test_pareto_front_equals_its_definition(points: list[tuple[float, float]]) -> None:
    def is_beaten(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] >= point[1] for other in points)

    assert pareto_front(points) == sorted({point for point in points if not is_beaten(point)})
