from __future__ import annotations

import pytest

from bench.report.metrics import axis_label, axis_text, style_of


@pytest.mark.parametrize(
    ("metric", "value", "heading", "text"),
    [
        ("segm/AP", 0.4123, "mask AP", "41.2"),
        ("bbox/AP50", 1.0, "box AP50", "100.0"),
        ("segm/APr", 0.125, "mask APr", "12.5"),
        ("segm/AR100", 0.5, "mask AR100", "50.0"),
        ("latency_s/total", 0.01234, "latency (ms)", "12.3"),
        ("latency_s/head/p95", 0.002, "head latency p95 (ms)", "2.0"),
        ("peak_memory_bytes/rss", 2**20 * 3, "peak memory (MiB)", "3"),
        ("num_parameters", 1_234_567, "params (M)", "1.23"),
        ("flops", 2.5e9, "GFLOPs", "2.50"),
        ("watts", 3.0, "watts (W)", "3.000"),
    ],
)
def test_a_metric_is_written_for_people(metric: str, value: float, heading: str, text: str) -> None:
    style = style_of(metric, "W")
    assert (style.heading, style.format(value)) == (heading, text)


def test_no_minus_before_zero() -> None:
    assert style_of("segm/AP").format(-0.0001) == "0.0"


def test_axes_are_written_for_people() -> None:
    assert axis_label("sampler.num_proposals") == "proposals"
    assert axis_label("learning_rate") == "learning rate"
    values = [None, True, 0.5, 1e-4, 3, [1, 2], {"a": None}, "tiny"]
    assert [axis_text(value) for value in values] == [
        "null",
        "true",
        "0.5",
        "0.0001",
        "3",
        "[1, 2]",
        "{a: null}",
        "tiny",
    ]
