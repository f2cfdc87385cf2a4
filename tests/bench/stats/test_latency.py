"""Intervals of medians and percentiles: by hand, and how often they are right."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bench.stats.latency import (
    count_outliers,
    effective_count,
    is_outlier,
    log_error,
    paired_ratio,
    quantile,
    quantiles,
    ratio,
)

TIMES = st.lists(st.floats(1e-4, 10.0), min_size=5, max_size=40)


def row(generator: np.random.Generator, count: int, correlation: float = 0.0) -> np.ndarray:
    """Log-normal timings with median 1, each like the one before to the given degree."""
    steps = generator.standard_normal(count) * math.sqrt(1 - correlation**2)
    values = np.empty(count)
    values[0] = generator.standard_normal()
    for index in range(1, count):
        values[index] = correlation * values[index - 1] + steps[index]
    return np.exp(0.2 * values)


def test_median_by_hand() -> None:
    # Of 9 samples, fewer than 2 lie below the median with chance (1 + 9) / 512 = 0.0195: ranks 2 and 8.
    found = quantile([3, 1, 2, 9, 8, 7, 6, 5, 4])
    assert (found.value, found.low, found.high) == (5, 2, 8)
    assert (found.count, found.effective_count) == (9, 9)


def test_six_samples_reach_to_their_extremes_and_five_do_not() -> None:
    # 2 / 64 = 0.03 is missed by six samples, 2 / 32 = 0.06 by five.
    assert (quantile([1, 2, 3, 4, 5, 6]).low, quantile([1, 2, 3, 4, 5, 6]).high) == (1, 6)
    assert (quantile([1, 2, 3, 4, 5]).low, quantile([1, 2, 3, 4, 5]).high) == (None, None)


def test_high_percentiles_need_many_samples() -> None:
    few = quantile(np.random.default_rng(0).permutation(60).tolist(), 0.95)
    assert few.value == pytest.approx(56.05)
    assert few.low is not None
    assert few.high is None
    many = quantile(np.random.default_rng(0).permutation(200).tolist(), 0.95)
    assert many.high is not None


def test_no_samples() -> None:
    with pytest.raises(ValueError, match="no samples"):
        quantile([])


def test_many_percentiles_at_once_are_those_of_one_by_one() -> None:
    generator = np.random.default_rng(0)
    rows = [(row(generator, count, 0.8), q) for count in (300, 1, 9, 10, 61, 10) for q in (0.05, 0.5, 0.95)]
    rows += [(row(generator, 12), 0.5) for _ in range(300)]
    rows += [(np.ones(12), 0.5)]
    rows = [rows[place] for place in generator.permutation(len(rows))]
    found = quantiles(rows)
    assert found == [quantile(samples, q) for samples, q in rows]
    assert {entry.effective_count for entry in found if entry.count in (1, 9)} == {1.0, 9.0}
    with pytest.raises(ValueError, match="no samples"):
        quantiles([*rows, ([], 0.5)])


def test_log_error_by_hand() -> None:
    # The whole range of three samples holds the median with chance 3/4, which is 1.1503 standard errors each way.
    found = log_error([1.0, math.e, math.e**2])
    assert found is not None
    assert found.standard_error == pytest.approx(2 / (2 * 1.1503493803760079))
    assert found.degrees_of_freedom == 2


@pytest.mark.parametrize("samples", [[], [1.0], [1.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
def test_too_few_or_zero_samples_have_no_log_error(samples: list[float]) -> None:
    assert log_error(samples) is None
    assert ratio(samples, [1.0, 2.0, 3.0]) is None


def test_ratio_by_hand() -> None:
    base = [1.0, math.e, math.e**2]
    found = ratio(base, [2 * value for value in base], noise=0.3)
    assert found is not None
    assert found.value == pytest.approx(2.0)
    within = 2 * (1 / 1.1503493803760079) ** 2
    assert found.log_standard_error == pytest.approx(math.sqrt(within + 2 * 0.09))
    assert found.low * found.high == pytest.approx(4.0)  # the interval is even on the logarithmic scale


@given(TIMES, TIMES, st.floats(0, 0.2))
def test_swapping_inverts_the_ratio(base: list[float], head: list[float], noise: float) -> None:
    one, other = ratio(base, head, noise=noise), ratio(head, base, noise=noise)
    if one is None or other is None:
        assert one is other
        return
    assert one.value == pytest.approx(1 / other.value)
    assert one.low == pytest.approx(1 / other.high)
    assert one.p_value == pytest.approx(other.p_value)


@given(TIMES)
def test_interval_holds_the_median_and_scales_with_the_unit(samples: list[float]) -> None:
    found, scaled = quantile(samples), quantile([1024 * value for value in samples])
    assert (found.low or 0) <= found.value <= (found.high or math.inf)
    assert scaled.value == pytest.approx(1024 * found.value)
    assert scaled.low == (None if found.low is None else 1024 * found.low)


def test_coverage_of_independent_samples() -> None:
    generator = np.random.default_rng(0)
    for count, q in ((10, 0.5), (40, 0.5), (210, 0.5), (210, 0.9)):
        truth = math.exp(0.2 * {0.5: 0.0, 0.9: 1.2815515655446004}[q])
        found = [quantile(row(generator, count), q) for _ in range(600)]
        known = [one for one in found if one.low is not None and one.high is not None]
        assert len(known) > 500
        held = sum(one.low <= truth <= one.high for one in known) / len(known)
        assert 0.93 <= held <= 0.995, (count, q, held)


def test_coverage_of_ratios_where_neighbours_are_alike() -> None:
    # Taken as independent, these 210 samples would be right about 75 % of the time.
    generator = np.random.default_rng(1)
    found = [ratio(row(generator, 210, 0.6), row(generator, 210, 0.6)) for _ in range(300)]
    held = [one.low <= 1 <= one.high for one in found if one is not None]
    assert len(held) == 300
    assert 0.93 <= np.mean(held) <= 0.99


def test_noise_from_run_to_run_widens_the_ratio_to_its_due() -> None:
    generator = np.random.default_rng(2)

    def run() -> np.ndarray:
        return row(generator, 60) * math.exp(0.1 * generator.standard_normal())

    pairs = [(run(), run()) for _ in range(300)]
    blind = [ratio(base, head) for base, head in pairs]
    told = [ratio(base, head, noise=0.1) for base, head in pairs]
    assert np.mean([one.low <= 1 <= one.high for one in blind if one]) < 0.75
    assert 0.93 <= np.mean([one.low <= 1 <= one.high for one in told if one]) <= 0.99


# -- sides that were timed by turns ------------------------------------------------------------------------------------


def turns(
    generator: np.random.Generator, factor: float = 1.0, blocks: int = 20, noise: float = 0.03
) -> tuple[list, list]:
    """Two samples a side and block, A B B A: images cost from 1 to 3, and everything slows down by half on the way."""
    base, head = [], []
    for block in range(blocks):
        cost = 1 + 2 * generator.random()
        for place, side in enumerate((base, head, head, base)):
            drift = 1 + 0.5 * (4 * block + place) / (4 * blocks)
            side.append(cost * drift * (factor if side is head else 1) * math.exp(noise * generator.standard_normal()))
    return base, head


def test_paired_ratio_by_hand() -> None:
    # Blocks of two: the geometric means are 2, 4, 8 and 2, 8, 32, so the ratios are 1, 2 and 4.
    found = paired_ratio([1, 4, 4, 4, 2, 32], [2, 2, 8, 8, 32, 32])
    assert found is not None
    assert found.value == pytest.approx(2.0)
    # Three blocks: their range, log 1 to log 4, holds the median with a chance of 3/4, so it is 2 * 1.1503 errors wide.
    assert found.log_standard_error == pytest.approx(math.log(4) / (2 * 1.1503493803760079))
    assert found.degrees_of_freedom == 2
    assert found.low * found.high == pytest.approx(4.0)


def test_a_steady_drift_cancels_within_a_block() -> None:
    # Each sample takes 10 % longer than the one before, in the order A B B A: 1, 1.1, 1.21, 1.331.
    times = [1.1**place for place in range(24)]
    base = [times[place] for place in range(24) if place % 4 in (0, 3)]
    head = [times[place] for place in range(24) if place % 4 in (1, 2)]
    found = paired_ratio(base, head)
    assert found is not None
    assert found.value == pytest.approx(1.0)
    assert found.log_standard_error == pytest.approx(0.0, abs=1e-12)


def test_unequal_sides_are_refused_and_too_few_or_zero_times_say_nothing() -> None:
    for base, head in (([1.0, 1.0], [1.0]), ([1.0] * 3, [1.0] * 3)):
        with pytest.raises(ValueError, match="no pairs of blocks of 2"):
            paired_ratio(base, head)
    assert paired_ratio([], []) is None
    assert paired_ratio([1.0] * 2, [1.0] * 2) is None
    assert paired_ratio([0.0] * 8, [1.0] * 8) is None


@example([(1.0, 1.0, 1.0, 2.0)] * 3 + [(1.0, 0.5, 1.0, 1.0)] * 2 + [(1.0,) * 4] * 6)  # six on the median
@given(st.lists(st.tuples(*[st.floats(1e-4, 10.0)] * 4), min_size=3, max_size=20))
def test_swapping_inverts_the_paired_ratio(blocks: list[tuple[float, float, float, float]]) -> None:
    base = [value for block in blocks for value in block[:2]]
    head = [value for block in blocks for value in block[2:]]
    one, other = paired_ratio(base, head), paired_ratio(head, base)
    if one is None or other is None:
        assert one is other
        return
    assert one.value == pytest.approx(1 / other.value)
    assert one.low == pytest.approx(1 / other.high)
    assert one.p_value == pytest.approx(other.p_value)


def test_paired_intervals_hold_and_are_narrow_where_images_differ() -> None:
    generator = np.random.default_rng(3)
    found, apart = [], []
    for _ in range(300):
        base, head = turns(generator, 1.1)
        found.append(paired_ratio(base, head))
        apart.append(ratio(base, head))
    held = [one.low <= 1.1 <= one.high for one in found if one is not None]
    assert len(held) == 300
    assert 0.93 <= np.mean(held) <= 0.995
    widths = [np.median([math.log(one.high / one.low) for one in side if one is not None]) for side in (found, apart)]
    assert widths[0] < widths[1] / 5


def test_effective_count() -> None:
    generator = np.random.default_rng(3)
    independent = np.mean([effective_count(row(generator, 400)) for _ in range(50)])
    alike = np.mean([effective_count(row(generator, 400, 0.8)) for _ in range(50)])
    assert 330 < independent <= 400
    assert 40 < alike < 160  # 400 (1 - r) / (1 + r) = 60 to 80 for the signs of such a row
    assert effective_count([1, 2, 1, 2]) == 4
    assert effective_count(np.arange(100.0)) < 5  # a drift is worth next to nothing
    assert effective_count([1.0] * 50) == 50


def test_outliers_by_hand() -> None:
    # Logarithms 0, 1, ..., 6 and 20: median 3.5, distances 3.5, 2.5, 1.5, 0.5, 0.5, 1.5, 2.5, 16.5, MAD 2.
    samples = [math.exp(power) for power in (0, 1, 2, 3, 4, 5, 6, 20)]
    assert is_outlier(samples).tolist() == [False] * 7 + [True]
    # 0.6745 * 10.37 / 2 < 3.5
    assert not is_outlier([*samples[:-1], math.exp(13.8)]).any()


def test_many_rows_have_the_outliers_of_each() -> None:
    generator = np.random.default_rng(0)
    rows = [generator.standard_cauchy(count) ** 2 for count in (20, 7, 1, 0, 20, 20, 7) for _ in range(80)]
    rows += [np.ones(7), np.zeros(20), np.array([0.0, *np.exp(generator.standard_cauchy(19))])]
    rows = [rows[place] for place in generator.permutation(len(rows))]
    found = count_outliers(rows)
    assert found == [int(is_outlier(samples).sum()) for samples in rows]
    assert sum(found) > 100


def test_outliers_of_odd_rows() -> None:
    assert is_outlier([]).tolist() == []
    assert is_outlier([1.0]).tolist() == [False]
    assert is_outlier([1.0, 1.0, 1.0, 9.0]).tolist() == [False] * 4
    assert is_outlier([0.0, 0.0]).tolist() == [False, False]
