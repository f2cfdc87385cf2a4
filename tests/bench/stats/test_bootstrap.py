"""Resampled AP: by hand, against resampling for real, and how often the intervals are right."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.stats.bootstrap import (
    RECALLS,
    Interval,
    Resampler,
    bootstrap,
    bootstrap_difference,
    draw_weights,
    holm,
    in_chunks,
    summarise,
)

THRESHOLDS = np.linspace(0.5, 0.95, 10)


def matches(*, image: Any, is_right: Any, num_instances: Any, is_ignored: Any = None, category: Any = None) -> Any:
    """A table whose detections, given by falling score, are right or wrong at all thresholds alike."""
    image = np.asarray(image, dtype=np.int32)
    num_instances = np.atleast_2d(np.asarray(num_instances, dtype=np.int32))
    right = np.asarray(is_right, dtype=bool)
    ignored = np.zeros_like(right) if is_ignored is None else np.asarray(is_ignored, dtype=bool)
    return SimpleNamespace(
        image_ids=np.arange(1, num_instances.shape[1] + 1),
        category_ids=np.arange(1, len(num_instances) + 1),
        thresholds=THRESHOLDS,
        image=image,
        category=np.zeros(len(image), dtype=np.int32) if category is None else np.asarray(category, dtype=np.int32),
        matched=np.tile(right | ignored, (10, 1)),
        ignored=np.tile(ignored, (10, 1)),
        num_instances=num_instances,
    )


def population(generator: np.random.Generator, num_images: int, skill: float = 0.6) -> Any:
    """Images of one class with 0 to 5 instances, some harder than others, and detections that are right or not."""
    num_instances = generator.integers(0, 6, num_images)
    ease = generator.normal(skill, 0.25, num_images).clip(0.05, 0.95)
    rows = []
    for image, (count, chance) in enumerate(zip(num_instances, ease)):
        is_found = generator.random(count) < chance
        for found in is_found:
            if found:
                rows.append((generator.beta(4, 2), image, True))
        for _ in range(generator.poisson(2.5 * (1 - chance))):
            rows.append((generator.beta(2, 4), image, False))
    rows.sort(reverse=True)
    scores, image, right = (np.array(column) for column in zip(*rows))
    table = matches(image=image, is_right=right, num_instances=num_instances)
    table.score = scores
    return table


def subset(table: Any, images: np.ndarray) -> Any:
    """The table of these images, given once each."""
    place = np.full(len(table.image_ids), -1)
    place[images] = np.arange(len(images))
    kept = place[table.image] >= 0
    part = copy.copy(table)
    part.image_ids = table.image_ids[images]
    part.image, part.category = place[table.image][kept].astype(np.int32), table.category[kept]
    part.matched, part.ignored = table.matched[:, kept], table.ignored[:, kept]
    part.num_instances = table.num_instances[:, images]
    return part


def ap_of(table: Any, weights: Any = None) -> np.ndarray:
    num_images = len(table.image_ids)
    weights = np.ones((num_images, 1), dtype=np.int32) if weights is None else np.asarray(weights)
    return summarise(Resampler(table).average_precision(weights))["AP"]


def test_by_hand() -> None:
    # right, wrong, right, of 4 instances: precision 1 up to recall 1/4, 2/3 up to 1/2; 26 and 25 of 101 recalls.
    table = matches(image=[0, 1, 1], is_right=[1, 0, 1], num_instances=[2, 2])
    assert ap_of(table)[0] == pytest.approx((26 + 25 * 2 / 3) / 101)


def test_weights_by_hand() -> None:
    # The second image twice: wrong and right count double, 6 instances: 1/6 at precision 1, then 3/5 up to 1/2.
    table = matches(image=[0, 1, 1], is_right=[1, 0, 1], num_instances=[2, 2])
    assert ap_of(table, [[1], [2]])[0] == pytest.approx((17 + 34 * 3 / 5) / 101)
    assert ap_of(table, [[1], [0]])[0] == pytest.approx(51 / 101)
    assert np.isnan(ap_of(table, [[0], [0]])[0])


def test_detections_that_do_not_count() -> None:
    table = matches(image=[0, 0, 0], is_right=[1, 0, 1], is_ignored=[0, 1, 0], num_instances=[2])
    assert ap_of(table)[0] == pytest.approx(1.0)


def test_thresholds_differ() -> None:
    table = matches(image=[0, 0], is_right=[1, 1], num_instances=[2])
    table.matched[5:, 1] = False
    found = summarise(Resampler(table).average_precision(np.ones((1, 1), dtype=np.int32)))
    assert found["AP50"][0] == pytest.approx(1.0)
    assert found["AP75"][0] == pytest.approx(51 / 101)
    assert found["AP"][0] == pytest.approx((1 + 51 / 101) / 2)


def test_categories_without_instances_in_a_resample_are_left_out() -> None:
    table = matches(image=[0, 1], is_right=[1, 0], category=[0, 1], num_instances=[[1, 0], [0, 1]])
    assert ap_of(table, [[1, 1, 0], [1, 0, 1]]).tolist() == pytest.approx([0.5, 1.0, 0.0])


@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_equals_putting_images_there_several_times(seed: int, num_images: int) -> None:
    generator = np.random.default_rng(seed)
    num_instances = generator.integers(0, 4, num_images)
    num_instances[0] += 1
    image = generator.integers(0, num_images, 12)
    right = generator.random(12) < 0.5
    weights = generator.integers(0, 4, num_images)
    weights[0] += 1
    table = matches(image=image, is_right=right, num_instances=num_instances)
    # Copies of an image have detections of equal score: a block in which rights and wrongs come alike.
    repeated = np.repeat(np.arange(12), weights[image])
    cumulative_right = np.cumsum(right[repeated])
    precision = cumulative_right / np.arange(1, len(repeated) + 1) if len(repeated) else np.zeros(0)
    recall = cumulative_right / (num_instances * weights).sum()
    reached = [precision[recall >= least].max(initial=0.0) for least in RECALLS]
    assert ap_of(table, weights[:, None])[0] == pytest.approx(np.mean(reached), abs=1e-12)


@given(st.integers(0, 2**32 - 1))
def test_real_weights_equal_whole_ones_in_proportion(seed: int) -> None:
    generator = np.random.default_rng(seed)
    table = population(generator, 15)
    weights = draw_weights(15, 4, seed)
    np.testing.assert_allclose(ap_of(table, weights * 0.25), ap_of(table, weights), rtol=0, atol=1e-9)


def test_resamples_are_drawn_with_replacement_and_repeat() -> None:
    weights = draw_weights(50, 200, 3)
    assert (weights.sum(axis=0) == 50).all()
    assert weights.max() > 2
    assert np.array_equal(weights, draw_weights(50, 200, 3))
    assert not np.array_equal(weights, draw_weights(50, 200, 4))


def test_intervals_cover_and_percentiles_would_not() -> None:
    """Subsets of a large population: how often 95 % intervals hold the AP that subsets of their size have."""
    generator = np.random.default_rng(0)
    whole = population(generator, 4000)
    size, num_subsets, num_resamples = 150, 400, 200
    covered = {"standard error": 0, "percentile": 0}
    values, intervals, percentiles = [], [], []
    for trial in range(num_subsets):
        part = subset(whole, generator.choice(4000, size, replace=False))
        resampler = Resampler(part)
        value = float(ap_of(part)[0])
        drawn = summarise(resampler.average_precision(draw_weights(size, num_resamples, trial)))["AP"]
        values.append(value)
        interval = Interval(value, float(np.std(drawn, ddof=1)), "images", size)
        intervals.append((interval.low, interval.high))
        percentiles.append(np.percentile(drawn, [2.5, 97.5]))
    expected = float(np.mean(values))
    covered["standard error"] = np.mean([low <= expected <= high for low, high in intervals])
    covered["percentile"] = np.mean([low <= expected <= high for low, high in percentiles])
    assert 0.93 <= covered["standard error"] <= 0.97
    assert covered["percentile"] < covered["standard error"]


def test_equal_models_seldom_differ() -> None:
    """A/A: two evaluations of equal skill on the same images, whose difference should exclude 0 in 5 % of cases."""
    alarms = 0
    num_trials = 200
    for trial in range(num_trials):
        generator = np.random.default_rng([7, trial])
        # The same images and instances for both, other detections.
        num_instances = generator.integers(0, 6, 150)
        tables = []
        for _ in range(2):
            table = population(generator, 150)
            table.num_instances = num_instances[None].astype(np.int32)
            kept = _at_most(table, num_instances)
            tables.append(kept)
        found = bootstrap_difference(*tables, num_resamples=200, seed=trial)["AP"]
        assert found.low is not None
        assert found.high is not None
        alarms += not found.low <= 0 <= found.high
    assert alarms / num_trials <= 0.075  # 5 %, and two standard errors of 200 trials


def _at_most(table: Any, num_instances: np.ndarray) -> Any:
    """No image has more right detections than instances: what is too many becomes wrong."""
    seen = np.zeros(len(num_instances), dtype=int)
    for position, image in enumerate(table.image):
        if table.matched[0, position]:
            seen[image] += 1
            table.matched[:, position] = seen[image] <= num_instances[image]
    return table


def test_a_difference_is_that_of_the_same_images() -> None:
    table = population(np.random.default_rng(1), 60)
    found = bootstrap_difference(table, table, num_resamples=50)["AP"]
    assert (found.value, found.standard_error) == (0.0, 0.0)


def test_a_real_difference_is_seen() -> None:
    worse, better = (population(np.random.default_rng(1), 400, skill=skill) for skill in (0.4, 0.7))
    better.num_instances = worse.num_instances
    found = bootstrap_difference(worse, _at_most(better, worse.num_instances[0]), num_resamples=200)["AP"]
    assert found.low is not None
    assert found.low > 0


def test_different_images_are_not_compared() -> None:
    tables = [population(np.random.default_rng(1), count) for count in (10, 11)]
    with pytest.raises(ValueError, match="different images"):
        bootstrap_difference(*tables)


def test_too_few_images_have_a_value_and_no_error() -> None:
    found = bootstrap(matches(image=[0], is_right=[1], num_instances=[1]), num_resamples=20)["AP"]
    assert found.value == pytest.approx(1.0)
    assert (found.standard_error, found.low, found.high) == (None, None, None)


def test_intervals_repeat() -> None:
    table = population(np.random.default_rng(2), 40)
    assert bootstrap(table, num_resamples=50) == bootstrap(table, num_resamples=50)


def test_many_resamples_some_at_a_time_are_those_at_once() -> None:
    resampler, weights = Resampler(population(np.random.default_rng(2), 40)), draw_weights(40, 600, 0)
    parts = in_chunks(lambda part: summarise(resampler.average_precision(part))["AP"], weights)
    assert len(parts) == 3
    assert np.array_equal(np.concatenate(parts), summarise(resampler.average_precision(weights))["AP"])


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.04 against 0.05 / 4, / 3, / 2, / 1: the second fails, so all after it.
    assert holm([0.02, 0.01, 0.04, 0.03]) == [False, True, False, False]
    assert holm([0.01, 0.001]) == [True, True]
    assert holm([]) == []
