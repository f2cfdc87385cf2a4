"""Average precision of resampled images: how much AP owes to the images that happen to be in the split.

A resample is a vector of image weights, how often each image was drawn. Detections keep their order, so for every
resample only cumulative weights are needed, and precision only at the right detections (between two of them,
interpolated precision is that of the later one). Unit weights give the AP of the COCO evaluation to the last bit.

Intervals are AP +- 1.96 standard errors of the resamples. Percentiles would be wrong: a resample holds images twice,
and interpolated precision over fewer distinct images is higher, so AP of resamples lies above AP itself
(tests/bench/stats/test_bootstrap.py simulates both).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

RECALLS = np.linspace(0.0, 1.0, 101)
_EPSILON = np.spacing(1)
_Z_95 = 1.959963984540054  # of the standard normal: 95 % lie within
_CHUNK = 250  # resamples at a time, to bound memory
_NUM_THREADS = 2

_Found = TypeVar("_Found")


class Matches(Protocol):
    """What is read of a match table; see `diffinst.evaluation.matches.MatchTable`."""

    @property
    def image_ids(self) -> np.ndarray: ...
    @property
    def category_ids(self) -> np.ndarray: ...
    @property
    def thresholds(self) -> np.ndarray: ...
    @property
    def image(self) -> np.ndarray: ...
    @property
    def category(self) -> np.ndarray: ...
    @property
    def matched(self) -> np.ndarray: ...
    @property
    def ignored(self) -> np.ndarray: ...
    @property
    def num_instances(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Interval:
    """A value and how sure it is.

    value: of all images as they are. standard_error: of the resamples, None where it cannot be had. of: what was
    resampled ('images', 'seeds', ...). count: how many of them there are.
    """

    value: float
    standard_error: float | None
    of: str
    count: int

    @property
    def low(self) -> float | None:
        """Lower end of the 95 % interval."""
        return None if self.standard_error is None else self.value - _Z_95 * self.standard_error

    @property
    def high(self) -> float | None:
        """Upper end of the 95 % interval."""
        return None if self.standard_error is None else self.value + _Z_95 * self.standard_error


@dataclass(frozen=True)
class _Threshold:
    """right: (P,) positions of right detections in the category's ranking; ignored: (Q,) of those that do not count."""

    right: np.ndarray
    ignored: np.ndarray


class Resampler:
    """AP of weighted images from a match table.

    Args:
        matches: of one evaluation, all sizes.
    """

    def __init__(self, matches: Matches) -> None:
        self.num_images = len(matches.image_ids)
        self.num_thresholds = len(matches.thresholds)
        self._categories: list[tuple[np.ndarray, list[_Threshold], np.ndarray]] = []
        self._ranks: list[np.ndarray] = []
        ends = np.searchsorted(matches.category, np.arange(len(matches.category_ids) + 1))
        for category, (first, end) in enumerate(zip(ends, ends[1:])):
            image = matches.image[first:end]
            matched, ignored = matches.matched[:, first:end], matches.ignored[:, first:end]
            # Neither what never counts nor what comes after the last right detection changes anything.
            last = np.flatnonzero((matched & ~ignored).any(axis=0))[-1:]
            kept = np.flatnonzero(~ignored.all(axis=0))
            kept = kept[kept <= last] if len(last) else kept[:0]
            self._ranks.append(_ranks(image)[kept])
            image, matched, ignored = image[kept], matched[:, kept], ignored[:, kept]
            thresholds = [
                _Threshold(np.flatnonzero(found & ~out), np.flatnonzero(out)) for found, out in zip(matched, ignored)
            ]
            self._categories.append((image, thresholds, matches.num_instances[category]))

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """AP of each category, threshold and resample.

        Args:
            weights: (I, B) how often each image counts; whole numbers, or real ones of at least 0.
        Returns:
            (K, T, B) fractions; NaN where a category has no instance in a resample.
        """
        weights = np.asarray(weights)
        kind = np.int64 if weights.dtype.kind in "iu" else np.float64
        # Half the bytes: counts of detections stay far below the limit.
        compact = np.int32 if kind is np.int64 else np.float64
        weights, narrow = weights.astype(kind), weights.astype(compact)
        found = np.full((len(self._categories), self.num_thresholds, weights.shape[1]), np.nan)
        for category, (image, thresholds, num_instances) in enumerate(self._categories):
            holders = np.flatnonzero(num_instances)
            total = num_instances[holders].astype(kind) @ weights[holders]
            has_any = total > 0
            if not has_any.any():
                continue
            ranked = np.cumsum(narrow[image], axis=0, dtype=compact)
            before: _Threshold | None = None
            for index, threshold in enumerate(thresholds):
                if before is not None and _is_same(before, threshold):
                    found[category, index] = found[category, index - 1]
                    continue
                before = threshold
                areas = self._areas(threshold, ranked, narrow[image], total, has_any)
                found[category, index, has_any] = areas[has_any]
        return found

    def recall(self, weights: np.ndarray, *, max_detections: int | None = None) -> np.ndarray:
        """Share of the instances that are found, mean over the thresholds.

        Args:
            weights: (I, B), as for `average_precision`.
            max_detections: best detections of each image and category that count; None for all of the table.
        Returns:
            (K, B) fractions; NaN where a category has no instance in a resample.
        """
        weights = np.asarray(weights).astype(np.float64)
        found = np.full((len(self._categories), weights.shape[1]), np.nan)
        for category, (image, thresholds, num_instances) in enumerate(self._categories):
            holders = np.flatnonzero(num_instances)
            total = num_instances[holders].astype(np.float64) @ weights[holders]
            has_any = total > 0
            if not has_any.any():
                continue
            is_early = np.ones(len(image), dtype=bool)
            if max_detections is not None:
                is_early = self._ranks[category] < max_detections
            right = np.zeros(self.num_images)
            for threshold in thresholds:
                np.add.at(right, image[threshold.right[is_early[threshold.right]]], 1.0)
            places = np.flatnonzero(right)
            share = right[places] @ weights[places]
            found[category, has_any] = share[has_any] / total[has_any] / self.num_thresholds
        return found

    @staticmethod
    def _areas(
        threshold: _Threshold, ranked: np.ndarray, weights: np.ndarray, total: np.ndarray, has_any: np.ndarray
    ) -> np.ndarray:
        """(B,) area under the interpolated precision at the recalls of the COCO evaluation."""
        if not len(threshold.right):
            return np.zeros(len(total))
        right = np.cumsum(weights[threshold.right], axis=0, dtype=ranked.dtype)
        counted = ranked[threshold.right]
        if len(threshold.ignored):
            out = np.cumsum(weights[threshold.ignored], axis=0, dtype=ranked.dtype)
            out = np.concatenate([np.zeros_like(out[:1]), out])
            counted = counted - out[np.searchsorted(threshold.ignored, threshold.right)]
        precision = right / (counted + _EPSILON)
        precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            recall = np.where(has_any, right / total, 0.0)
        reached = np.diff(_recalls_reached(recall), axis=0, prepend=0)
        areas: np.ndarray = (precision * reached).sum(axis=0) / len(RECALLS)
        return areas


def _ranks(image: np.ndarray) -> np.ndarray:
    """(D,) how many detections of the same image come before each one."""
    order = np.argsort(image, kind="stable")
    ordered = image[order]
    is_first = np.diff(ordered, prepend=-1) != 0
    starts = np.maximum.accumulate(np.where(is_first, np.arange(len(image)), 0))
    ranks = np.empty(len(image), dtype=np.int64)
    ranks[order] = np.arange(len(image)) - starts
    return ranks


def _is_same(one: _Threshold, other: _Threshold) -> bool:
    return np.array_equal(one.right, other.right) and np.array_equal(one.ignored, other.ignored)


def _recalls_reached(recall: np.ndarray) -> np.ndarray:
    """How many of `RECALLS` are at most as high, exactly, without a search."""
    count = np.clip((recall * (len(RECALLS) - 1)).astype(np.int64) + 1, 1, len(RECALLS))
    count = count + ((count < len(RECALLS)) & (RECALLS[np.minimum(count, len(RECALLS) - 1)] <= recall))
    return count - (RECALLS[count - 1] > recall)


def draw_weights(num_images: int, num_resamples: int, seed: int) -> np.ndarray:
    """(I, B) int32: how often each image is in each resample of I images with replacement."""
    generator = np.random.default_rng(seed)
    weights = np.empty((num_images, num_resamples), dtype=np.int32)
    for resample in range(num_resamples):
        weights[:, resample] = np.bincount(generator.integers(0, num_images, num_images), minlength=num_images)
    return weights


def summarise(average_precision: np.ndarray) -> dict[str, np.ndarray]:
    """'AP', 'AP50' and 'AP75' (B,) from (K, T, B): means over the categories that have instances.

    NaN where a resample has no instance at all.
    """
    has_any = ~np.isnan(average_precision[:, 0])
    count = has_any.sum(axis=0)

    def mean(values: np.ndarray) -> np.ndarray:
        total = np.where(has_any, values, 0.0).sum(axis=0)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    return {
        "AP": mean(average_precision.mean(axis=1)),
        "AP50": mean(average_precision[:, 0]),
        "AP75": mean(average_precision[:, 5]),
    }


def bootstrap(matches: Matches, *, num_resamples: int = 1000, seed: int = 0) -> dict[str, Interval]:
    """Intervals of AP, AP50 and AP75 over images.

    Args:
        matches: of one evaluation.
        num_resamples: B; the standard error itself is known to about 1 / sqrt(2 B).
        seed: of the resamples: the same for evaluations that are to be compared.
    """
    resampler = Resampler(matches)
    points = _resample(resampler, np.ones((resampler.num_images, 1), dtype=np.int32))
    drawn = _resample(resampler, draw_weights(resampler.num_images, num_resamples, seed))
    return {name: _interval(float(points[name][0]), drawn[name], resampler.num_images) for name in points}


def bootstrap_difference(
    base: Matches, head: Matches, *, num_resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Intervals of the differences head - base over the same images, drawn together.

    Raises:
        ValueError: the evaluations are of different images: AP depends on the set, so there is nothing to compare.
    """
    if not np.array_equal(base.image_ids, head.image_ids):
        raise ValueError(
            f"evaluations of different images ({len(base.image_ids)} and {len(head.image_ids)}) are not comparable"
        )
    resamplers = Resampler(base), Resampler(head)
    num_images = len(base.image_ids)
    unit = np.ones((num_images, 1), dtype=np.int32)
    weights = draw_weights(num_images, num_resamples, seed)
    points, drawn = ([_resample(r, w) for r in resamplers] for w in (unit, weights))
    return {
        name: _interval(float(points[1][name][0] - points[0][name][0]), drawn[1][name] - drawn[0][name], num_images)
        for name in points[0]
    }


def in_chunks(compute: Callable[[np.ndarray], _Found], weights: np.ndarray) -> list[_Found]:
    """`compute` of the resamples (I, B), some at a time and two at once (NumPy lets threads run), in their order."""
    parts = [weights[:, first : first + _CHUNK] for first in range(0, weights.shape[1], _CHUNK)]
    if len(parts) < 2:
        return [compute(part) for part in parts]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(compute, parts))


def _resample(resampler: Resampler, weights: np.ndarray) -> dict[str, np.ndarray]:
    parts = in_chunks(lambda part: summarise(resampler.average_precision(part)), weights)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _interval(value: float, drawn: np.ndarray, num_images: int) -> Interval:
    defined = drawn[~np.isnan(drawn)]
    # One image gives the same resample again and again: its error is unknown, not 0.
    error = float(np.std(defined, ddof=1)) if num_images > 1 and len(defined) > 1 else None
    return Interval(value, error, "images", num_images)


def holm(p_values: Sequence[float], *, level: float = 0.05) -> list[bool]:
    """Which hypotheses are rejected when the chance of any false rejection is to stay below `level` (Holm, 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    rejected = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > level / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected
