"""Every verdict and every exit code, false alarms by simulation, and what holds for any two sets of records."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from compare_records import MACHINE, raced, timed_record, timed_run, with_marks
from hypothesis import given
from hypothesis import strategies as st
from report_records import with_error

import bench.compare
from bench.calibration import Floor, Noise, calibrate
from bench.compare import UNLIKE_SHARES, Comparison, ExitCode, Outcome, Row, compare
from bench.gates import DEFAULT_GATES, Gate, Gates, load_gates
from bench.measure.latency import measure_latency

AP_ONLY = Gates({"segm/AP": Gate(relative=0.01, absolute=0.005)})
LATENCY = Gates({"latency_s/total": Gate(relative=0.05, absolute=0.0005)})


def floor(noise: float, metric: str = "latency_s/total", degrees: int = 5) -> Noise:
    scale = "absolute" if metric.startswith(("segm", "bbox")) else "log"
    entry = Floor.model_validate({"noise": noise, "degrees_of_freedom": degrees, "scale": scale})
    return Noise({MACHINE: {metric: entry}})


def only(comparison: Comparison) -> Row:
    (row,) = comparison.rows
    return row


def with_value(metric: str, value: float | None, **extra: Any) -> dict[str, Any]:
    record = timed_record()
    record["metrics"][metric] |= {"value": value, **extra}
    return record


# -- verdicts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "outcome", "code"),
    [
        (1.0, Outcome.SAME, ExitCode.FINE),
        (1.03, Outcome.SAME, ExitCode.FINE),
        (1.2, Outcome.WORSE, ExitCode.REGRESSION),
        (1 / 1.2, Outcome.BETTER, ExitCode.FINE),
    ],
)
def test_latency(factor: float, outcome: Outcome, code: ExitCode) -> None:
    base = timed_record(spread=0.01, generator=np.random.default_rng(0))
    head = timed_record(spread=0.01, median_s=0.01 * factor, generator=np.random.default_rng(1))
    found = compare([base], [head], LATENCY, floor(0.001))
    assert (only(found).outcome, found.exit_code) == (outcome, code)
    assert only(found).change == pytest.approx(factor - 1, abs=0.01)
    assert only(found).reason == "samples, noise floor"


def test_a_change_within_the_noise_cannot_be_told_and_says_what_could_have_been() -> None:
    base, head = (timed_record(median_s=median, spread=0.01) for median in (0.010, 0.0112))
    found = compare([base], [head], LATENCY, floor(0.10))
    row = only(found)
    assert (row.outcome, found.exit_code) == (Outcome.NOISY, ExitCode.INCONCLUSIVE)
    # 2.571 standard errors of sqrt(2) * 0.1 with 5 degrees of freedom (the samples' share is small): exp(0.36) - 1
    assert row.smallest == pytest.approx(math.expm1(2.571 * math.sqrt(2) * 0.1), rel=0.05)
    assert row.low is not None
    assert row.high is not None
    assert row.low < 0 < row.high


def test_a_run_alone_says_nothing_about_the_next_one() -> None:
    found = compare([timed_record(median_s=0.01)], [timed_record(median_s=0.02)], LATENCY)
    assert (only(found).outcome, found.exit_code) == (Outcome.NOISY, ExitCode.INCONCLUSIVE)
    assert only(found).reason == "one run a side and no noise floor (diffbench calibrate, or noise in the gate)"
    assert only(found).smallest is None


def test_the_gates_own_noise_serves_as_a_floor_and_the_wider_one_counts() -> None:
    records = [timed_record(median_s=0.010)], [timed_record(median_s=0.012)]
    told = Gates({"latency_s/*": Gate(relative=0.05, absolute=0.0, noise=0.01)})
    assert {row.metric: row.outcome for row in compare(*records, told).rows}["latency_s/total"] is Outcome.WORSE
    row = compare(*records, told, floor(0.2)).rows[0]
    assert row.outcome is Outcome.NOISY


def test_several_runs_stand_in_for_a_floor() -> None:
    def side(factor: float) -> list[dict[str, Any]]:
        return [timed_record(seed=seed, median_s=0.010 * factor * (1 + 0.002 * seed)) for seed in range(4)]

    found = compare(side(1.0), side(1.2), LATENCY)
    assert (only(found).outcome, only(found).reason) == (Outcome.WORSE, "runs")
    assert only(found).change == pytest.approx(0.2, abs=0.001)


@pytest.mark.parametrize(
    "gate", [Gate(relative=0.5, absolute=0.0), Gate(relative=0.0, absolute=0.5)], ids=["relative", "absolute"]
)
def test_a_threshold_that_is_not_reached_is_no_regression(gate: Gate) -> None:
    base, head = timed_record(median_s=0.01), timed_record(median_s=0.013)
    found = compare([base], [head], Gates({"latency_s/total": gate}), floor(0.001))
    assert (only(found).outcome, found.exit_code) == (Outcome.SAME, ExitCode.FINE)


def test_percentiles_are_compared_from_the_same_samples() -> None:
    base = timed_record(num_samples=400, spread=0.01, generator=np.random.default_rng(0))
    head = timed_record(num_samples=400, spread=0.01, median_s=0.013, generator=np.random.default_rng(1))
    gates = Gates({"latency_s/total/p95": Gate(relative=0.05, absolute=0.0, noise=0.01)})
    assert only(compare([base], [head], gates)).outcome is Outcome.WORSE


def test_a_scope_that_was_entered_on_one_side_only() -> None:
    row = only(compare([with_value("latency_s/total", 0.0)], [timed_record()], LATENCY, floor(0.01)))
    assert (row.outcome, row.reason) == (Outcome.NOT_COMPARABLE, "timing scope entered on one side only")


def test_counts_are_exact() -> None:
    gates = Gates({"num_parameters": Gate(relative=0.0, absolute=0.0), "flops": Gate(relative=0.5, absolute=0.0)})
    base, head = timed_record(), timed_record()
    head["metrics"]["num_parameters"]["value"] += 1
    head["metrics"]["flops"]["value"] *= 1.2
    found = compare([base], [head], gates)
    assert {row.metric: row.outcome for row in found.rows} == {
        "num_parameters": Outcome.WORSE,
        "flops": Outcome.SAME,
    }
    assert compare([head], [base], gates).exit_code is ExitCode.FINE


def test_memory_needs_a_floor() -> None:
    gates = Gates({"peak_memory_bytes/rss": Gate(relative=0.05, absolute=2**20)})
    base, head = timed_record(), with_value("peak_memory_bytes/rss", 800 * 2**20)
    assert only(compare([base], [head], gates)).outcome is Outcome.NOISY
    metric = "peak_memory_bytes/rss"
    assert only(compare([base], [head], gates, floor(0.01, metric))).outcome is Outcome.WORSE
    assert only(compare([base], [head], gates, floor(0.0, metric))).outcome is Outcome.WORSE


# -- samples that were disturbed, and races ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "head", "is_judged"),
    [
        ((0, 0), (15, 0), True),  # of 60: a quarter
        ((0, 0), (16, 0), False),
        ((0, 0), (10, 16), False),  # throttled counts like contended, and who was both counts once
        ((20, None), (0, None), False),
        ((50, 0), (60, 0), True),  # both alike: the noise floor has to know
    ],
)
def test_times_of_sides_that_were_disturbed_unlike_are_not_judged(base: Any, head: Any, is_judged: bool) -> None:
    for factor in (1.0, 1.3, 0.7):
        old = with_marks(timed_record(spread=0.01), *base)
        new = with_marks(timed_record(spread=0.01, median_s=0.01001 * factor), *head)
        for pair in ((old, new), (new, old)):
            row = only(compare([pair[0]], [pair[1]], LATENCY, floor(0.001)))
            assert (not row.reason.startswith("disturbed unlike")) is is_judged
            assert is_judged or row.outcome is Outcome.NOISY
    assert UNLIKE_SHARES == 0.25


def test_a_side_that_does_not_tell_is_judged_and_ap_never_minds() -> None:
    old, new = timed_record(spread=0.01), with_marks(timed_record(spread=0.01, median_s=0.013), 60)
    assert only(compare([old], [new], LATENCY, floor(0.001))).outcome is Outcome.WORSE
    marked = with_marks(timed_record(ap=0.25), 0)
    assert only(compare([marked], [new], AP_ONLY)).outcome is Outcome.SAME


def test_a_race_is_judged_image_by_image_by_its_rounds() -> None:
    base, head = raced(np.random.default_rng(0), factor=1.1)
    found = compare(base, head, LATENCY)
    row = only(found)
    assert (row.outcome, row.reason, found.exit_code) == (
        Outcome.WORSE,
        "image by image, rounds",
        ExitCode.REGRESSION,
    )
    assert row.cell == "race=one against another"
    assert row.change == pytest.approx(0.10, abs=0.03)
    assert row.low is not None
    assert row.high is not None
    assert row.low < 0.10 < row.high
    # Without the race, what is left are the ratios of medians, over images that differ threefold.
    for record in (*base, *head):
        del record["measure"]["race"]
    apart = only(compare(base, head, LATENCY))
    assert (apart.reason, apart.change == row.change) == ("runs", False)


def test_a_race_of_few_rounds_says_nothing() -> None:
    base, head = raced(np.random.default_rng(0), factor=1.5, rounds=2)
    row = only(compare(base, head, LATENCY))
    assert (row.outcome, row.reason) == (Outcome.NOISY, "a race of 2 rounds, at least 3 are needed")
    assert row.change == pytest.approx(0.5, abs=0.1)


def test_settings_may_differ_in_a_race_and_are_noted_and_machines_may_not() -> None:
    base, head = raced(np.random.default_rng(0), factor=1.3)
    for record in head:
        record["config"]["sampler"]["sampling_steps"] = 4
    found = compare(base, head, LATENCY)
    assert (only(found).outcome, found.notes) == (Outcome.WORSE, ("sampler.sampling_steps 1 and 4",))
    for record in head:
        record["measure"] = {"latency": True, "race": {"id": "another"}}
    assert only(compare(base, head, LATENCY)).outcome is Outcome.NOT_COMPARABLE
    _, elsewhere = raced(np.random.default_rng(0))
    for record in elsewhere:
        record["environment"] = record["environment"] | {"machine": "elsewhere"}
    assert only(compare(base, elsewhere, LATENCY)).outcome is Outcome.NOT_COMPARABLE


def test_races_of_equals_alarm_seldom_and_a_slowdown_is_found() -> None:
    """Processes with 2 % of luck each, five rounds of 20 images; the statistical reason alone."""
    generator = np.random.default_rng(4)
    gates = Gates({"latency_s/total": Gate(relative=0.0, absolute=0.0)})
    called = {
        factor: np.mean(
            [
                only(compare(*raced(generator, factor=factor), gates)).outcome in (Outcome.WORSE, Outcome.BETTER)
                for _ in range(count)
            ]
        )
        for factor, count in ((1.0, 400), (1.1, 100))
    }
    assert called[1.0] <= 0.07  # 5 % of 400, and what 400 can miss it by
    assert called[1.1] >= 0.95


# -- AP ----------------------------------------------------------------------------------------------------------------


def table(is_right: Any, image_ids: Any = None) -> Any:
    """One instance and one detection an image, right or wrong at all thresholds."""
    right = np.asarray(is_right, dtype=bool)
    count = len(right)
    return SimpleNamespace(
        image_ids=np.arange(count) if image_ids is None else np.asarray(image_ids),
        category_ids=np.array([1]),
        thresholds=np.linspace(0.5, 0.95, 10),
        image=np.arange(count, dtype=np.int32),
        category=np.zeros(count, dtype=np.int32),
        matched=np.tile(right, (10, 1)),
        ignored=np.zeros((10, count), dtype=bool),
        num_instances=np.ones((1, count), dtype=np.int32),
    )


def test_ap_without_any_measure_of_uncertainty_cannot_be_told() -> None:
    found = compare([timed_record(ap=0.3)], [timed_record(ap=0.2)], AP_ONLY)
    assert (only(found).outcome, found.exit_code) == (Outcome.NOISY, ExitCode.INCONCLUSIVE)
    assert only(found).reason == "one run a side, no interval and no noise floor"


def test_ap_is_compared_image_by_image_where_match_tables_are_at_hand() -> None:
    generator = np.random.default_rng(0)
    good = generator.random(300) < 0.7
    bad = good & (generator.random(300) < 0.8)
    tables = {0.30: {"segm": table(good)}, 0.24: {"segm": table(bad)}}

    def read(record: Any) -> Any:
        return tables[record["metrics"]["segm/AP"]["value"]]

    base, head = timed_record(ap=0.30), timed_record(ap=0.24)
    found = compare([base], [head], AP_ONLY, read_matches=read, num_resamples=200)
    assert (only(found).outcome, only(found).reason) == (Outcome.WORSE, "images, paired")
    assert only(compare([head], [base], AP_ONLY, read_matches=read, num_resamples=200)).outcome is Outcome.BETTER
    # A floor of the training's own noise comes on top.
    noisy = compare([base], [head], AP_ONLY, floor(0.05, "segm/AP"), read_matches=read, num_resamples=200)
    assert (only(noisy).outcome, only(noisy).reason) == (Outcome.NOISY, "images, paired, noise floor")


def test_ap_of_other_images_is_never_compared() -> None:
    tables = iter([{"segm": table([1] * 20)}, {"segm": table([1] * 19)}])
    found = compare(
        [timed_record(ap=0.3)], [timed_record(ap=0.3)], AP_ONLY, read_matches=lambda record: next(tables, None)
    )
    assert (only(found).outcome, found.exit_code) == (Outcome.NOT_COMPARABLE, ExitCode.NOT_COMPARABLE)
    assert only(found).reason == "scored on 20 and 19 images, which are not the same ones"


def test_a_match_table_of_one_side_only_is_of_no_use() -> None:
    tables = iter([{"segm": table([1] * 20)}])
    found = compare(
        [timed_record(ap=0.3)], [timed_record(ap=0.2)], AP_ONLY, read_matches=lambda record: next(tables, None)
    )
    assert only(found).outcome is Outcome.NOISY


def test_stored_standard_errors_serve_where_there_are_no_tables() -> None:
    sure = [with_value("segm/AP", value, standard_error=0.005) for value in (0.30, 0.25)]
    assert only(compare(sure[:1], sure[1:], AP_ONLY)).outcome is Outcome.WORSE
    unsure = [with_value("segm/AP", value, standard_error=0.05) for value in (0.30, 0.25)]
    row = only(compare(unsure[:1], unsure[1:], AP_ONLY))
    assert (row.outcome, row.reason) == (Outcome.NOISY, "images")
    assert row.smallest == pytest.approx(1.96 * 0.05 * math.sqrt(2), rel=1e-3)


@pytest.mark.parametrize(
    "gate", [Gate(relative=0.2, absolute=0.0), Gate(relative=0.0, absolute=0.06)], ids=["relative", "absolute"]
)
def test_a_threshold_of_ap_that_is_not_reached_is_no_regression(gate: Gate) -> None:
    # A loss of 0.05, a sixth of the better value: certain, and within either threshold.
    sure = [with_value("segm/AP", value, standard_error=0.001) for value in (0.30, 0.25)]
    assert only(compare(sure[:1], sure[1:], Gates({"segm/AP": gate}))).outcome is Outcome.SAME
    stricter = Gate(relative=gate.relative * 0.8, absolute=gate.absolute * 0.8)
    assert only(compare(sure[:1], sure[1:], Gates({"segm/AP": stricter}))).outcome is Outcome.WORSE


def test_resamples_that_records_carry_serve_where_there_are_no_tables() -> None:
    common = np.random.default_rng(0).normal(0, 0.05, 300)
    own = np.random.default_rng(1).normal(0, 0.005, 300)
    base, head = (
        with_error(timed_record(ap=ap), 0.05, ap + noise) for ap, noise in ((0.30, common), (0.27, common + own))
    )
    row = only(compare([base], [head], AP_ONLY))
    assert (row.outcome, row.reason) == (Outcome.WORSE, "images, paired")
    assert row.low == pytest.approx(-0.03 - 1.96 * 0.005, abs=1e-3)
    # Drawn otherwise, the standard errors are all there is.
    head["resamples"]["segm/AP"]["seed"] = 1
    assert only(compare([base], [head], AP_ONLY)).reason == "images"
    head["resamples"]["segm/AP"]["images"] = "others"
    assert only(compare([base], [head], AP_ONLY)).outcome is Outcome.NOT_COMPARABLE
    assert only(compare([base], [head], AP_ONLY)).reason == "scored on 200 images each, which are not the same ones"


def test_several_seeds_are_paired() -> None:
    base = [timed_record(seed=seed, ap=0.30 + 0.05 * seed) for seed in range(3)]
    head = [timed_record(seed=seed, ap=0.27 + 0.05 * seed + 0.001 * seed) for seed in range(3)]
    row = only(compare(base, head, AP_ONLY))
    assert (row.outcome, row.reason) == (Outcome.WORSE, "runs")
    assert row.change == pytest.approx(-0.029)
    assert row.base == pytest.approx(0.35)
    assert row.cell == "sampling_steps=1 num_proposals=20"


def test_a_floor_of_zero_does_not_hide_what_the_seeds_show() -> None:
    """Runs of one seed are equal to the last bit on a CPU: their floor is 0, and other seeds differ all the same."""
    base = [timed_record(seed=seed, ap=ap) for seed, ap in enumerate((0.30, 0.31, 0.32))]
    head = [timed_record(seed=seed, ap=ap) for seed, ap in enumerate((0.33, 0.28, 0.27))]
    alone = only(compare(base, head, AP_ONLY))
    assert alone.outcome is Outcome.NOISY
    for noise in (0.0, 0.001):
        found = compare(base, head, AP_ONLY, floor(noise, "segm/AP"))
        assert (only(found), found.exit_code) == (alone, ExitCode.INCONCLUSIVE)
    # The other way round: seeds that happen to agree do not hide a large floor.
    agreeing = [timed_record(seed=seed, ap=ap) for seed, ap in enumerate((0.28, 0.29, 0.3001))]
    assert only(compare(base, agreeing, AP_ONLY)).outcome is Outcome.WORSE
    row = only(compare(base, agreeing, AP_ONLY, floor(0.05, "segm/AP")))
    assert (row.outcome, row.reason) == (Outcome.NOISY, "noise floor")


@pytest.mark.parametrize("settings", [{}, {"standard_error": 0.0}], ids=["no errors", "errors of 0"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_ap_where_nothing_varies_cannot_be_told(settings: dict[str, float], seeds: int) -> None:
    # Seeds of which each loses the same, but for rounding.
    sides = [[timed_record(seed=seed, ap=ap + 0.01 * seed) for seed in range(seeds)] for ap in (0.30, 0.29)]
    for record in (*sides[0], *sides[1]):
        record["metrics"]["segm/AP"] |= settings
    for gates in (AP_ONLY, Gates({"segm/AP": Gate(relative=0.01, absolute=0.005, noise=0.0)})):
        found = compare(*sides, gates, floor(0.0, "segm/AP"))
        assert (only(found).outcome, found.exit_code) == (Outcome.NOISY, ExitCode.INCONCLUSIVE)
        assert only(found).reason.startswith("nothing varies")


# -- what cannot be judged ---------------------------------------------------------------------------------------------


def test_failed_runs_are_neither_better_nor_worse() -> None:
    failed = timed_record() | {"status": "failed", "reason": "out of memory\ntrace", "metrics": {}}
    for pair, said in (([timed_record()], [failed]), "head failed"), (([failed], [timed_record()]), "base failed"):
        found = compare(*pair)
        assert (only(found).outcome, found.exit_code) == (Outcome.FAILED, ExitCode.FAILED)
        assert only(found).reason == f"{said}: out of memory"


def test_missing_and_extra_cells() -> None:
    one, two = timed_record(1), timed_record(2)
    lost, gained = compare([one, two], [one], AP_ONLY), compare([one], [one, two], AP_ONLY)
    assert [row.outcome for row in lost.rows] == [Outcome.SAME, Outcome.MISSING]
    assert [row.outcome for row in gained.rows] == [Outcome.SAME, Outcome.EXTRA]
    assert lost.exit_code == gained.exit_code == ExitCode.MISSING_OR_EXTRA
    assert lost.rows[1].cell == "sampling_steps=2 num_proposals=20 seed=0"


def test_a_seed_that_is_missing_is_a_missing_cell() -> None:
    found = compare([timed_record(seed=0), timed_record(seed=1)], [timed_record(seed=0)], AP_ONLY)
    assert [row.outcome for row in found.rows] == [Outcome.MISSING, Outcome.SAME]


def test_missing_and_extra_metrics() -> None:
    unmeasured = with_value("segm/AP", None, reason="no masks")
    lost = compare([timed_record()], [unmeasured], AP_ONLY)
    assert (only(lost).outcome, lost.exit_code) == (Outcome.MISSING, ExitCode.MISSING_OR_EXTRA)
    assert only(lost).reason == "not measured in head: no masks"
    assert only(compare([unmeasured], [timed_record()], AP_ONLY)).outcome is Outcome.EXTRA


def test_nothing_measured_is_never_fine() -> None:
    assert compare([], []).exit_code is ExitCode.MISSING_OR_EXTRA
    unmeasured = with_value("segm/AP", None, reason="no masks")
    assert compare([unmeasured], [unmeasured], AP_ONLY).exit_code is ExitCode.MISSING_OR_EXTRA
    assert compare([timed_record()], [timed_record()], Gates({})).exit_code is ExitCode.MISSING_OR_EXTRA


def without_values(record: dict[str, Any]) -> dict[str, Any]:
    for entry in record["metrics"].values():
        entry |= {"value": None, "reason": "not asked for"}
    return record


@pytest.mark.parametrize("gates", [AP_ONLY, DEFAULT_GATES])
def test_a_cell_in_which_nothing_is_judged_is_missing_beside_others_that_are(gates: Gates) -> None:
    records = [timed_record(1), without_values(timed_record(2))]
    found = compare(records, copy.deepcopy(records), gates)
    last = found.rows[-1]
    assert (last.outcome, last.cell, last.metric) == (Outcome.MISSING, "sampling_steps=2 num_proposals=20", "")
    assert last.reason == "nothing that a gate judges was measured on either side"
    assert {row.outcome for row in found.rows[:-1]} == {Outcome.SAME}
    assert found.exit_code is ExitCode.MISSING_OR_EXTRA


def gates_file(folder: Path, *patterns: str) -> Gates:
    lines = [f"  {pattern}: {{relative: 0.05, absolute: 0}}\n" for pattern in patterns]
    (folder / "gates.yaml").write_text("gates:\n" + "".join(lines))
    return load_gates(folder / "gates.yaml")


def test_a_gate_of_a_file_that_judges_nothing_is_missing(tmp_path: Path) -> None:
    records = [timed_record(1), timed_record(2)]
    found = compare(records, records, gates_file(tmp_path, "segm/AP", "latency_s/totl"))
    assert [(row.cell, row.metric) for row in found.rows if row.outcome is Outcome.MISSING] == [
        ("every cell", "latency_s/totl")
    ]
    assert found.rows[-1].reason == (
        f"this gate of {tmp_path / 'gates.yaml'} matches nothing that was measured, in any cell. Correct its name or "
        "remove it. Did you mean 'latency_s/total'?"
    )
    assert found.exit_code is ExitCode.MISSING_OR_EXTRA
    # One cell that measures it is enough, and a wider pattern behind a narrow one is no mistake.
    records[0] = timed_record(1, ap=None)
    found = compare(records, records, gates_file(tmp_path, "segm/AP", "segm/*", "latency_s/*"))
    assert found.exit_code is ExitCode.FINE
    assert compare([], [], gates_file(tmp_path, "segm/AP")).rows == ()


def test_a_race_may_have_the_gates_file_of_the_runs(tmp_path: Path) -> None:
    base, head = raced(np.random.default_rng(0), factor=1.0)
    rows = compare(base, head, gates_file(tmp_path, "segm/AP", "latency_s/total", "latency_s/mask")).rows
    assert [row.metric for row in rows if row.outcome is Outcome.MISSING] == ["latency_s/mask"]


def test_gates_of_benchmarks_and_of_runs_may_stand_in_one_file(tmp_path: Path) -> None:
    records = [timed_record(1)]
    gates = gates_file(tmp_path, "segm/AP", "latency_s/total", "benchmark_s/*")
    assert compare(records, records, gates).exit_code is ExitCode.FINE
    # What a suite measures is not excused so.
    without = [timed_record(1, ap=None)]
    assert compare(without, without, gates).exit_code is ExitCode.MISSING_OR_EXTRA


def test_what_is_required_must_be_there() -> None:
    unmeasured = with_value("segm/AP", None, reason="no masks")
    gates = Gates({"*": Gate(relative=0.01, absolute=0.0)}, require=("segm/AP", "latency_s/*"))
    found = compare([unmeasured], [unmeasured], gates)
    assert [(row.metric, row.reason) for row in found.rows if row.outcome is not Outcome.SAME] == [
        ("segm/AP", "required, and measured on neither side")
    ]
    assert found.exit_code is ExitCode.MISSING_OR_EXTRA


def test_other_conditions_are_refused_by_name() -> None:
    other = timed_record(median_s=0.02, machine="faster-cpu-8c-ffffff")
    found = compare([timed_record()], [other], LATENCY, floor(0.01))
    assert (only(found).outcome, found.exit_code) == (Outcome.NOT_COMPARABLE, ExitCode.NOT_COMPARABLE)
    assert only(found).reason == f"machine {MACHINE} and faster-cpu-8c-ffffff"
    # AP does not depend on the machine.
    assert only(compare([timed_record()], [other], AP_ONLY)).outcome is Outcome.SAME


def test_another_number_of_images_is_refused_even_where_ap_is_equal() -> None:
    assert only(compare([timed_record()], [with_value("num_images", 100)], AP_ONLY)).outcome is Outcome.NOT_COMPARABLE


def test_a_unit_or_direction_that_changed_is_refused() -> None:
    head = with_value("latency_s/total", 10.0, unit="ms")
    assert only(compare([timed_record()], [head], LATENCY)).reason == "unit or direction differs"


def test_what_may_differ_is_noted() -> None:
    head = timed_record()
    head["config"]["model"]["num_stages"] = 6
    assert compare([timed_record()], [head], AP_ONLY).notes == ("model.num_stages 3 and 6",)


def test_each_machine_is_compared_with_itself_and_the_latest_record_counts() -> None:
    fast, slow = (timed_record(machine=name) for name in ("fast", "slow"))
    old = timed_record(machine="fast", median_s=0.5) | {"finished_at": "2020-01-01T00:00:00Z"}
    found = compare([fast, slow], [slow, old, fast], LATENCY)
    assert [(row.machine, row.outcome) for row in found.rows] == [("fast", Outcome.SAME), ("slow", Outcome.SAME)]
    lost = compare([fast, slow], [fast], LATENCY)
    assert sorted((row.machine, row.outcome) for row in lost.rows) == [
        ("fast", Outcome.SAME),
        ("slow", Outcome.MISSING),
    ]


def test_a_regression_is_said_before_anything_else() -> None:
    slow = [timed_record(1, median_s=0.02), timed_record(3)]
    base = [timed_record(1), timed_record(2)]
    found = compare(base, slow, LATENCY, floor(0.01))
    assert {row.outcome for row in found.rows} == {Outcome.WORSE, Outcome.MISSING, Outcome.EXTRA}
    assert found.exit_code is ExitCode.REGRESSION


def test_precedence_of_exit_codes() -> None:
    order = [Outcome.WORSE, Outcome.FAILED, Outcome.MISSING, Outcome.NOT_COMPARABLE, Outcome.NOISY, Outcome.BETTER]
    rows = tuple(Row("s", "c", "m", outcome) for outcome in order)
    assert [int(Comparison(rows[first:]).exit_code) for first in range(len(rows))] == [1, 4, 3, 5, 6, 0]


# -- false alarms and caught regressions -------------------------------------------------------------------------------


def test_alarms_of_runs_that_do_not_differ() -> None:
    """The whole chain: floors from five runs, then pairs of runs that vary by luck alone; four cells each."""
    generator = np.random.default_rng(0)
    gates = Gates({"latency_s/total": Gate(relative=0.0, absolute=0.0)})  # the statistical reason alone
    alarms = 0
    for _ in range(150):
        runs = [timed_run(generator) for _ in range(7)]
        found = compare(runs[5], runs[6], gates, calibrate(runs[:5], "abcde"))
        alarms += any(row.outcome in (Outcome.WORSE, Outcome.BETTER) for row in found.rows)
    assert alarms / 150 <= 0.05


def test_an_injected_slowdown_is_caught() -> None:
    generator = np.random.default_rng(1)
    noise = calibrate([timed_run(generator, between=0.01) for _ in range(5)], "abcde")
    caught = 0
    for _ in range(40):
        base, head = timed_run(generator, between=0.01), timed_run(generator, between=0.01, factor=1.10)
        caught += compare(base, head, LATENCY, noise).exit_code is ExitCode.REGRESSION
    assert caught >= 38


def test_a_slowdown_is_caught_through_the_measurement() -> None:
    """measure_latency on a clock that an image moves by 10 ms, and by 11 ms where the slowdown is."""

    def record(image_s: float, seed: int) -> dict[str, Any]:
        generator, now = np.random.default_rng(seed), [0.0]

        def run_one(index: int, timer: Any) -> None:
            now[0] += image_s * float(np.exp(0.05 * generator.standard_normal()))

        samples = measure_latency(run_one, 5, device="cpu", min_images=50, min_seconds=0.5, clock=lambda: now[0])
        found = timed_record()
        found["samples"] = {"latency_s": {"total": samples["total"]}}
        found["metrics"]["latency_s/total"]["value"] = float(np.median(samples["total"]))
        return found

    runs = [[record(0.010, seed)] for seed in range(5)]
    noise = calibrate(runs, "abcde")
    assert compare([record(0.010, 5)], [record(0.010, 6)], LATENCY, noise).exit_code in (
        ExitCode.FINE,
        ExitCode.INCONCLUSIVE,
    )
    assert compare([record(0.010, 5)], [record(0.011, 6)], LATENCY, noise).exit_code is ExitCode.REGRESSION


def test_twice_the_time_on_another_machine_is_no_alarm() -> None:
    generator = np.random.default_rng(2)
    slow = timed_run(generator, factor=2.0, machine="another")
    found = compare(timed_run(generator), slow, LATENCY, floor(0.01))
    assert {row.outcome for row in found.rows} == {Outcome.NOT_COMPARABLE}
    # Machines of one class, of which some are twice as fast: the floor knows, and without one nothing is said.
    factors = generator.permutation([1.0, 2.0] * 4)
    fleet = [timed_run(generator, factor=factor) for factor in factors]
    noise = calibrate(fleet[:6], "abcdef")
    for base, head in ((fleet[6], fleet[7]), (timed_run(generator), timed_run(generator, factor=2.0))):
        for known in (noise, Noise()):
            outcomes = {row.outcome for row in compare(base, head, LATENCY, known).rows}
            assert outcomes <= {Outcome.NOISY, Outcome.SAME}


def test_many_tests_are_corrected_for() -> None:
    """One run in a hundred cells lies 2.5 standard errors off: expected, and no alarm; alone it would be one."""
    gates = Gates({"latency_s/total": Gate(relative=0.0, absolute=0.0, noise=0.02)})
    base = [timed_record(cell, spread=1e-6) for cell in range(100)]
    head = [timed_record(cell, spread=1e-6, median_s=0.0109 if cell == 0 else 0.010001) for cell in range(100)]
    assert only(compare(base[:1], head[:1], gates)).outcome is Outcome.WORSE
    assert all(row.outcome is not Outcome.WORSE for row in compare(base, head, gates).rows)


# -- laws --------------------------------------------------------------------------------------------------------------

MIRROR = {
    Outcome.WORSE: Outcome.BETTER,
    Outcome.BETTER: Outcome.WORSE,
    Outcome.MISSING: Outcome.EXTRA,
    Outcome.EXTRA: Outcome.MISSING,
}
SIDES = st.lists(
    st.tuples(
        st.integers(1, 4),
        st.floats(0.5, 2.0),
        st.sampled_from([0.2, 0.25, 0.3, None]),
        st.sampled_from(["ok", "ok", "ok", "failed"]),
    ),
    max_size=5,
    unique_by=lambda cell: cell[0],
)


def side(cells: list[tuple[int, float, float | None, str]]) -> list[dict[str, Any]]:
    records = []
    for steps, factor, ap, status in cells:
        record = timed_record(steps, median_s=0.01 * factor, ap=ap, num_samples=20)
        if status != "ok":
            record |= {"status": status, "reason": "killed"}
        records.append(record)
    return records


@given(SIDES, SIDES, st.floats(0, 0.2), st.floats(0, 0.2), st.floats(0, 0.005))
def test_swapping_base_and_head_mirrors_the_verdicts(one: Any, two: Any, noise: float, rel: float, low: float) -> None:
    gates = Gates({name: Gate(relative=rel, absolute=low, noise=noise) for name in ("latency_s/total", "segm/AP")})
    there, back = compare(side(one), side(two), gates), compare(side(two), side(one), gates)

    def verdicts(comparison: Comparison) -> dict[tuple[str, str], Outcome]:
        return {(row.cell, row.metric): row.outcome for row in comparison.rows}

    assert verdicts(there) == {key: MIRROR.get(outcome, outcome) for key, outcome in verdicts(back).items()}


@given(SIDES, st.floats(0, 0.2))
def test_a_comparison_with_itself_finds_no_change(cells: Any, noise: float) -> None:
    records = side(cells)
    gates = Gates({"*": Gate(relative=0.0, absolute=0.0, noise=noise)})
    found = compare(records, copy.deepcopy(records), gates)
    assert {row.outcome for row in found.rows} <= {Outcome.SAME, Outcome.FAILED}
    if all(record["status"] == "ok" for record in records) and records:
        assert found.exit_code is ExitCode.FINE


@given(SIDES, SIDES, st.randoms())
def test_the_order_of_records_does_not_matter(one: Any, two: Any, random: Any) -> None:
    base, head = side(one), side(two)
    expected = compare(base, head)
    random.shuffle(base)
    random.shuffle(head)
    assert sorted(map(repr, compare(base, head).rows)) == sorted(map(repr, expected.rows))


def test_every_gated_metric_of_every_cell_has_one_row() -> None:
    records = [timed_record(cell) for cell in range(1, 31)]
    gates = Gates({"latency_s/*": Gate(relative=0.1, absolute=0.0), "*/AP": Gate(relative=0.1, absolute=0.0)})
    found = compare(records, records, gates)
    assert len(found.rows) == 30 * (3 + 2)
    assert found.counts[Outcome.SAME] == len(found.rows)


@pytest.mark.parametrize("count", [10, 200])
def test_the_work_grows_with_the_records_and_no_faster(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each record is looked at a fixed number of times; tests/benchmarks has the time of 10,000."""
    calls = Counter[str]()

    def counted(name: str) -> Callable[..., Any]:
        function = getattr(bench.compare, name)

        def call(*arguments: Any, **settings: Any) -> Any:
            calls[name] += 1
            return function(*arguments, **settings)

        return call

    for name in ("axes_of", "differences", "log_error", "machine_of"):
        monkeypatch.setattr(bench.compare, name, counted(name))
    base, head = ([timed_record(cell, median_s=median, num_samples=10) for cell in range(count)] for median in (1, 2))
    compare(base, head, LATENCY, floor(0.01))
    assert (calls["differences"], calls["log_error"]) == (count, 2 * count)
    assert max(calls.values()) <= 10 * count
