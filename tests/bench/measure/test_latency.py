"""Timing with a clock of our own, so that every number can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.measure.disturbances import Probe, Watch
from bench.measure.latency import (
    WARMUP_IMAGES,
    ScopeTimer,
    Timer,
    measure_latency,
    percentile,
    summarise_latency,
)


class Clock:
    """A clock that moves only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_scope_entered_twice_adds_up() -> None:
    clock = Clock()
    timer = ScopeTimer("cpu", clock)
    for seconds in (1.0, 2.0):
        with timer("head"):
            clock.now += seconds
        clock.now += 10.0
    assert timer.elapsed_s == {"head": 3.0}


def test_a_scope_that_raises_is_timed_too() -> None:
    clock = Clock()
    timer = ScopeTimer("cpu", clock)

    def fail() -> None:
        with timer("head"):
            clock.now += 1.0
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert timer.elapsed_s == {"head": 1.0}


def run(min_images: int, min_seconds: float, stop_after: int | None = None) -> tuple[dict[str, list[float]], list[int]]:
    """Image i of 4 takes 0.25 s in the backbone and 0.5 s in the head, and 0.25 s outside all scopes."""
    clock, seen = Clock(), []

    def run_one(index: int, timer: Timer) -> None:
        seen.append(index)
        with timer("backbone"):
            clock.now += 0.25
        with timer("head"):
            clock.now += 0.5
        clock.now += 0.25

    samples = measure_latency(
        run_one,
        4,
        device="cpu",
        min_images=min_images,
        min_seconds=min_seconds,
        clock=clock,
        stop=lambda: stop_after is not None and len(seen) >= stop_after,
    )
    return samples, seen


@pytest.mark.parametrize(("min_images", "min_seconds", "timed"), [(10, 3.0, 10), (2, 7.5, 8), (1, 0.0, 1)])
def test_both_minima_are_reached_and_warm_up_does_not_count(min_images: int, min_seconds: float, timed: int) -> None:
    samples, seen = run(min_images, min_seconds)
    assert len(seen) == WARMUP_IMAGES + timed
    assert samples["backbone"] == [0.25] * timed
    assert samples["head"] == [0.5] * timed
    assert samples["preprocess"] == samples["masks"] == [0.0] * timed
    assert samples["total"] == [1.0] * timed
    assert seen[WARMUP_IMAGES:][:6] == [0, 1, 2, 3, 0, 1][:timed]


def test_timed_images_are_marked_and_the_watch_costs_them_nothing() -> None:
    """A watch that takes 10 s to look, in a run where image 2 of 4 waits 0.3 of its 1 s for a core."""
    clock, waited, seen = Clock(), [0.0], []

    def probe() -> Probe:
        clock.now += 10.0
        return Probe(waited_s={1: waited[0]})

    def run_one(index: int, timer: Timer) -> None:
        seen.append(index)
        clock.now += 1.0
        waited[0] += 0.3 if index == 2 else 0.0

    watch = Watch("cpu", probe=probe)
    samples = measure_latency(run_one, 4, device="cpu", min_images=8, min_seconds=0, clock=clock, watch=watch)
    assert samples["total"] == [1.0] * 8
    # Warm-up images, of which one was the third, are not among them.
    assert len(seen) == WARMUP_IMAGES + 8
    assert watch.marks()["contended"]["samples"] == [2, 6]


def test_a_stop_ends_it() -> None:
    assert run(10, 3.0, stop_after=1)[1] == [0]
    assert len(run(10, 3.0, stop_after=5)[1]) == 5


def test_percentiles_by_hand() -> None:
    # Of 1, 2, 4: the median is the middle; 25 % lies halfway between 1 and 2.
    assert percentile([4.0, 1.0, 2.0], 50) == 2.0
    assert percentile([4.0, 1.0, 2.0], 25) == 1.5
    assert percentile([7.0], 95) == 7.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=30), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], q: float) -> None:
    assert percentile(values, q) == pytest.approx(float(np.percentile(values, q)), abs=1e-9)


def test_the_summary_is_median_and_both_ends() -> None:
    summary = summarise_latency({"total": [float(value) for value in range(1, 22)]})
    # 21 values 1..21: the median is 11; 5 % and 95 % lie one from the ends.
    assert summary == {"latency_s/total": 11.0, "latency_s/total/p5": 2.0, "latency_s/total/p95": 20.0}
