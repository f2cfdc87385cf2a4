from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from report_records import make_record, with_error

from bench.report.cells import (
    Record,
    Records,
    _value_of_runs,
    axis_value,
    group_by,
    latest,
    metric_names,
    once,
    ordered,
    sort_records,
    value_of,
    varying_axes,
)
from bench.report.conditions import conditions
from bench.report.tables import long_table


def test_seeds_are_averaged_by_hand() -> None:
    # mean (0.40 + 0.44 + 0.48) / 3 = 0.44; deviations -0.04, 0, 0.04; variance 0.0032 / 2 = 0.0016; deviation 0.04
    records = [make_record(seed=seed, ap=ap) for seed, ap in enumerate((0.40, 0.44, 0.48))]
    value = value_of(records, "segm/AP")
    assert value.state == "ok"
    assert value.mean == pytest.approx(0.44)
    assert value.spread == pytest.approx(0.04)
    assert (value.count, value.total) == (3, 3)


def test_one_run_has_no_deviation() -> None:
    value = value_of([make_record(ap=0.4)], "segm/AP")
    assert (value.mean, value.spread) == (0.4, None)


@pytest.mark.parametrize(
    "metric", ["segm/AP", "segm/AP75", "latency_s/total", "flops", "peak_memory_bytes/cuda_allocated", "none"]
)
@pytest.mark.parametrize(
    "record",
    [
        make_record(),
        make_record(ap=None, latency_s=None),
        make_record(status="failed", reason="out of memory"),
        make_record(status="skipped"),
        with_error(make_record(ap=0.1234567), 0.0123),
    ],
)
def test_one_run_is_read_as_several_would_be(record: dict[str, object], metric: str) -> None:
    """The short way of large tables says what the long way of runs says."""
    assert value_of([record], metric) == _value_of_runs([record], metric)


def test_latency_brings_its_percentiles() -> None:
    value = value_of([make_record(latency_s=0.010)], "latency_s/total")
    assert (value.low, value.mean, value.high) == pytest.approx((0.009, 0.010, 0.0125))


def test_a_failed_seed_does_not_hide_the_others_and_is_counted() -> None:
    value = value_of([make_record(seed=0, ap=0.3), make_record(seed=1, status="failed", reason="crash")], "segm/AP")
    assert (value.state, value.mean, value.count, value.total) == ("ok", 0.3, 1, 2)


@pytest.mark.parametrize(
    ("record", "state", "reason"),
    [
        (make_record(status="failed", reason="out of memory\nlog"), "failed", "out of memory"),
        (make_record(status="skipped", reason="its training failed"), "skipped", "its training failed"),
        (make_record(status="missing"), "missing", "no record yet"),
        (make_record(ap=None), "unmeasured", "not asked for"),
    ],
)
def test_states_are_told_apart(record: dict, state: str, reason: str) -> None:
    value = value_of([record], "segm/AP")
    assert (value.state, value.mean, value.reason) == (state, None, reason)


def test_no_runs_at_all_is_a_state_of_its_own() -> None:
    assert value_of([], "segm/AP").state == "absent"


def test_zero_is_a_measurement() -> None:
    assert value_of([make_record(ap=0.0)], "segm/AP").mean == 0.0


def test_unknown_status_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown status 'odd'"):
        value_of([make_record(status="odd")], "segm/AP")


def test_values_are_ordered_as_numbers_or_as_they_come() -> None:
    assert ordered([10, 2, 1, 2]) == [1, 2, 10]
    assert ordered(["tiny", "resnet50", "tiny"]) == ["tiny", "resnet50"]
    assert ordered([None, 0.5, None]) == [None, 0.5]


def test_records_are_sorted_as_numbers() -> None:
    records = [make_record(steps) for steps in (16, 2, 4)]
    assert [record["axes"]["sampling_steps"] for record in sort_records(records)] == [2, 4, 16]


def test_seeds_never_count_as_varying_axes() -> None:
    assert varying_axes([make_record(steps, seed=seed) for steps in (1, 2) for seed in (0, 1)]) == ["sampling_steps"]


def test_axis_is_found_bare_dotted_and_in_the_configuration() -> None:
    record = make_record(4)
    record["axes"] = {"sampler.num_proposals": 7}
    assert axis_value(record, "num_proposals") == axis_value(record, "sampler.num_proposals") == 7
    assert axis_value(record, "backbone") == "tiny"
    assert axis_value(record, "nowhere") is None


def test_lists_and_mappings_can_be_axis_values() -> None:
    records = [make_record(sampler={"renewal": False}, sizes=[1, 2]), make_record(sampler="released", sizes=[1, 2])]
    assert varying_axes(records) == ["sampler"]
    assert list(group_by(records, ["sampler", "sizes"])) == [("{renewal: false}", (1, 2)), ("released", (1, 2))]


def test_of_two_versions_of_a_cell_the_later_counts() -> None:
    old, new = make_record(ap=0.1), make_record(ap=0.2)
    old["run_id"], new["started_at"] = "old", "2026-02-01T00:00:00Z"
    other = make_record(2)
    assert latest([new, old, other]) == ([new, other], 1)


class TestIntervals:
    def test_one_run_is_over_images(self) -> None:
        value = value_of([with_error(make_record(), 0.01)], "segm/AP")
        assert value.over == ("images",)
        assert value.half == pytest.approx(1.96 * 0.01, rel=1e-4)
        assert value_of([make_record()], "segm/AP").half is None

    def test_evaluation_seeds_add_to_the_images_and_do_not_divide_them(self) -> None:
        records = [with_error(make_record(ap=ap), 0.01) for ap in (0.24, 0.25, 0.26)]
        for seed, record in enumerate(records):
            record["config"]["sampler"]["eval_seed"] = seed
        value = value_of(records, "segm/AP")
        assert value.over == ("images", "3 evaluation seeds")
        # Variances 1e-4 and 1e-4 / 3; degrees of freedom (4/3)^2 / ((1/3)^2 / 2) = 32, rounded down: t = 2.04.
        assert value.half == pytest.approx(2.04 * math.sqrt(4e-4 / 3), rel=2e-3)

    def test_two_trainings_pay_with_student(self) -> None:
        records = [with_error(make_record(seed=seed, ap=ap), 1e-6) for seed, ap in enumerate((0.24, 0.26))]
        value = value_of(records, "segm/AP")
        assert value.over == ("images", "2 trainings")
        assert value.half == pytest.approx(12.706 * 0.01, rel=1e-3)

    def test_a_run_without_an_error_leaves_the_deviation_alone(self) -> None:
        records = [with_error(make_record(seed=0, ap=0.24), 0.01), make_record(seed=1, ap=0.26)]
        value = value_of(records, "segm/AP")
        assert (value.half, value.over) == (None, ())
        assert value.spread == pytest.approx(0.02 / math.sqrt(2))

    def test_ap_of_different_images_is_not_averaged(self) -> None:
        records = [make_record(seed=0), make_record(seed=1)]
        records[1]["metrics"]["num_images"]["value"] = 50
        value = value_of(records, "segm/AP")
        assert (value.state, value.mean) == ("incomparable", None)
        assert value.reason == "scored on 50 and 200 images: AP depends on how many there are"
        assert value_of(records, "latency_s/total").state == "ok"
        digests = [with_error(make_record(seed=seed), 0.1, [0.1], images=str(seed)) for seed in (0, 1)]
        assert value_of(digests, "segm/AP").state == "incomparable"


def test_records_of_a_report_are_asked_once() -> None:
    asked = []

    @once
    def count(records: Sequence[Record]) -> int:
        asked.append(records)
        return len(records)

    report, other = Records([make_record(1), make_record(2)]), Records([make_record(1)])
    assert [count(report), count(other), count(report), count(other)] == [2, 1, 2, 1]
    assert len(asked) == 2
    plain = [make_record(1)]
    assert count(plain) == 1
    plain.append(make_record(2))  # a list may change, so it is asked again
    assert count(plain) == 2


def test_records_of_a_report_say_what_a_list_of_them_says() -> None:
    records = [make_record(steps, proposals) for steps in (1, 2) for proposals in (10, 20)]
    report = Records(records)
    for metrics in (["segm/AP"], ["latency_s/total"]) * 2:
        assert conditions(report, metrics) == conditions(records, metrics)
    for ask in (varying_axes, metric_names, long_table):
        assert ask(report) == ask(report) == ask(records)
