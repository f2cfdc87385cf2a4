"""Marks of counters that are told, so that every one can be checked by hand; and what this machine really tells."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.measure import disturbances
from bench.measure.disturbances import (
    DISTURBED_SHARE,
    MARKS,
    Disturbance,
    Probe,
    Watch,
    held_back,
    mark_samples,
    read_probe,
)


def probes(*found: Probe) -> Callable[[], Probe]:
    waiting: Iterator[Probe] = iter(found)
    return lambda: next(waiting)


def one(start: Probe, end: Probe, elapsed_s: float = 1.0, device: str = "cpu") -> Disturbance:
    watch = Watch(device, probe=probes(start, end))
    watch.before()
    return watch.after(elapsed_s)


@pytest.mark.parametrize(
    ("start", "end", "contended"),
    [
        # A twentieth of the sample's second is 50 ms; the thread that waited longest counts, not the sum.
        ({1: 3.0, 2: 0.0}, {1: 3.06, 2: 0.0}, True),
        ({1: 3.0, 2: 0.0}, {1: 3.04, 2: 0.04}, False),
        # A thread that began meanwhile has waited since then; one that ended is not asked.
        ({1: 3.0}, {1: 3.0, 2: 0.06}, True),
        ({1: 3.0, 2: 9.0}, {1: 3.0}, False),
        (None, {1: 3.0}, None),
        ({1: 3.0}, None, None),
    ],
)
def test_contended_by_hand(
    start: dict[int, float] | None, end: dict[int, float] | None, contended: bool | None
) -> None:
    assert one(Probe(waited_s=start), Probe(waited_s=end)).contended is contended


@pytest.mark.parametrize(("end", "contended"), [(2.06, True), (2.04, False), (None, None)])
def test_time_that_the_hypervisor_took(end: float | None, contended: bool | None) -> None:
    assert one(Probe(stolen_s=2.0), Probe(stolen_s=end)).contended is contended


@pytest.mark.parametrize(
    ("start", "end", "throttled"),
    [
        (Probe(held_back_s=1.0), Probe(held_back_s=1.06), True),
        (Probe(held_back_s=1.0), Probe(held_back_s=1.04), False),
        (Probe(heat_events=4), Probe(heat_events=5), True),
        (Probe(heat_events=4), Probe(heat_events=4), False),
        (Probe(held_back_s=1.0, heat_events=4), Probe(held_back_s=1.0, heat_events=5), True),
        (Probe(), Probe(), None),
    ],
)
def test_throttled_by_hand(start: Probe, end: Probe, throttled: bool | None) -> None:
    assert one(start, end).throttled is throttled


@pytest.mark.parametrize(
    ("before", "after", "throttled"),
    [([], [], False), (["heat"], [], True), ([], ["power"], True), (None, [], None), ([], None, None)],
)
def test_a_gpu_is_asked_before_and_after(
    before: Sequence[str] | None, after: Sequence[str] | None, throttled: bool | None
) -> None:
    answers = iter([before, after])
    watch = Watch("cuda:0", throttle=lambda: next(answers), probe=Probe)
    watch.before()
    assert watch.after(1.0).throttled is throttled


def test_an_idle_gpu_and_chosen_clocks_are_not_held_back() -> None:
    assert held_back(None) is None
    assert held_back(["gpu_idle", "applications_clocks_setting"]) == []
    assert held_back(["gpu_idle", "sw_power_cap", "bit 0x800"]) == ["sw_power_cap", "bit 0x800"]


def test_what_holds_a_cpu_back_is_not_said_of_a_gpu() -> None:
    # The quota of the process says nothing about the GPU's clocks.
    assert one(Probe(held_back_s=0.0), Probe(held_back_s=1.0), device="cuda").throttled is None


def test_marks_are_the_numbers_of_samples() -> None:
    waits = [Probe(waited_s={1: wait}) for wait in (0.0, 0.0, 0.0, 0.5, 0.5, 0.5)]
    watch = Watch("cpu", probe=probes(*waits), clock=lambda: next(seconds))
    seconds = itertools.count()
    for _ in range(3):
        watch.before()
        watch.after(1.0)
    assert watch.marks()["contended"] == {"samples": [1], "reason": None}
    assert watch.marks()["throttled"]["samples"] is None
    assert "CPU quota" in watch.marks()["throttled"]["reason"]


def test_the_end_of_a_sample_is_the_start_of_one_that_follows_at_once() -> None:
    waits = [Probe(waited_s={1: wait}) for wait in (0.0, 0.0, 0.5, 0.9, 0.9)]
    reasons = iter([[], ["heat"], [], [], []])
    seconds = iter([0.0, 0.0, 1.0, 1.0001, 2.0, 2.001, 3.0, 4.0])
    watch = Watch("cuda", probe=probes(*waits), throttle=lambda: next(reasons), clock=lambda: next(seconds))
    for _ in range(3):
        watch.before()
        watch.after(1.0)
    # The third begins a millisecond later: it is looked at again, and did not wait from 0.5 to 0.9.
    assert watch.marks()["contended"]["samples"] == [1]
    assert watch.marks()["throttled"]["samples"] == [0, 1]


@given(st.lists(st.tuples(st.sampled_from([True, False, None]), st.booleans())), st.booleans())
def test_marks_are_told_of_all_samples_or_of_none(found: list[tuple[bool | None, bool]], on_cpu: bool) -> None:
    marks = mark_samples([Disturbance(*one) for one in found], on_cpu=on_cpu)
    assert tuple(marks) == MARKS
    for position, entry in enumerate(marks.values()):
        values = [one[position] for one in found]
        assert (entry["samples"] is None) == (None in values) == (entry["reason"] is not None)
        if entry["samples"] is not None:
            assert [number in entry["samples"] for number in range(len(values))] == values


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_counters_of_this_machine_only_rise() -> None:
    start = read_probe()
    sum(range(200_000))
    end = read_probe()
    if start.waited_s is not None:
        assert end.waited_s is not None
        assert all(end.waited_s[thread] >= wait for thread, wait in start.waited_s.items() if thread in end.waited_s)
    for name in ("stolen_s", "held_back_s", "heat_events"):
        old, new = getattr(start, name), getattr(end, name)
        assert (old is None) == (new is None)
        assert old is None or new >= old


def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disturbances.sys, "platform", "darwin")
    assert read_probe() == Probe()
    watch = Watch("cpu")
    watch.before()
    assert watch.after(1.0) == Disturbance(None, None)


def test_the_share_is_that_of_the_built_in_gate_for_times() -> None:
    from bench.gates import DEFAULT_GATES

    assert DEFAULT_GATES.gates["latency_s/total"].relative == DISTURBED_SHARE
