from __future__ import annotations

from typing import Any

import pytest
from report_records import make_record

from bench.report.latency import describe_samples, disturbed_share, marked, quantile_of, quantiles_of

SAMPLES = [0.003, 0.001, 0.002, 0.009, 0.008, 0.007, 0.006, 0.005, 0.004]


def timed(contended: list[int] | None = None, throttled: list[int] | None = None, **samples: Any) -> dict[str, Any]:
    record = make_record()
    record["samples"] = {"latency_s": samples or {"total": SAMPLES}}
    record["sample_marks"] = {
        "latency_s": {
            name: {"samples": marks, "reason": "untold" if marks is None else None}
            for name, marks in (("contended", contended), ("throttled", throttled))
        }
    }
    return record


def test_the_interval_of_a_median_by_hand() -> None:
    # As in tests/bench/stats/test_latency.py: ranks 2 and 8 of nine.
    found = quantile_of(timed())
    assert found is not None
    assert (found.value, found.low, found.high, found.count) == (0.005, 0.002, 0.008, 9)


def test_percentiles_and_scopes_have_their_own() -> None:
    record = timed(total=SAMPLES, head=[value / 2 for value in SAMPLES])
    found = quantile_of(record, "latency_s/head/p95")
    assert found is not None
    assert found.value == pytest.approx(0.0043)  # 0.6 of the way from the 8th to the 9th
    assert found.high is None  # nine samples do not reach beyond their 95th percentile
    assert quantile_of(record, "latency_s/masks") is None
    assert quantile_of(record, "segm/AP") is None
    assert quantile_of(make_record()) is None


def test_many_are_asked_for_at_once() -> None:
    record = timed(total=SAMPLES, head=[value / 2 for value in SAMPLES])
    names = ["latency_s/total", "segm/AP", "latency_s/head", "latency_s/masks", "latency_s/total/p95"]
    found = quantiles_of([(record, name) for name in names])
    assert found == [quantile_of(record, name) for name in names]
    assert [entry and round(entry.value, 4) for entry in found] == [0.005, None, 0.0025, None, 0.0086]


def test_shares_are_of_images_that_somebody_looked_at() -> None:
    assert disturbed_share([timed([0, 1, 2], [2, 3])]) == pytest.approx(4 / 9)  # image 2 was both
    assert disturbed_share([timed([0, 1, 2], None), timed([], None)]) == pytest.approx(3 / 18)
    assert disturbed_share([timed(), make_record()]) is None
    assert disturbed_share([]) is None
    assert marked(make_record(), "contended") is None


def test_words_for_captions() -> None:
    assert describe_samples([make_record()]) == ""
    assert describe_samples([timed([0], [])]) == "9 timed images, 1 contended, 0 throttled, 0 outliers"
    slow = timed([], None, total=[0.010, 0.0101, 0.0099, 0.0102, 0.0098, 0.5])
    assert describe_samples([slow]) == "6 timed images, 0 contended, throttled not told, 1 outlier"
    both = [timed([0], []), timed(None, [1])]
    assert describe_samples(both) == "18 timed images, contended not told, 1 throttled, 0 outliers"
