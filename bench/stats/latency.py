"""Medians and percentiles of raw timings with intervals, outliers, and how two sets of timings compare.

Intervals lie between two order statistics: no shape of the distribution is assumed, and for independent samples they
cover at least as often as they say. Timings in a row are not independent (clocks, caches, neighbours on the machine):
the ranks are those of as many independent samples as the row is worth (`effective_count`), and a row that drifts is
worth few. What changes from one run to the next cannot be seen in one run: it is added to a comparison as `noise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

from bench.stats.student import combine, two_sided_p, two_sided_quantile

LEVEL = 0.95
# The least chance that two order statistics enclose the percentile, for a standard error to be read from them.
_MIN_COVERAGE = 0.7
_MIN_ROW = 10  # samples, to look for dependence among them
_MAX_EXACT = 2000  # samples; beyond, the normal approximation of the binomial gives the ranks
_AT_ONCE = 256  # rows, whose percentiles are worked out together
# Modified z-scores beyond this mark outliers (Iglewicz and Hoaglin, 1993).
OUTLIER_LIMIT = 3.5
_MAD_OF_NORMAL = 0.6744897501960817


@dataclass(frozen=True)
class Quantile:
    """q in (0, 1); value, low and high in the samples' unit. low or high is None where the samples are too few.

    count: of samples; effective_count: of independent ones that they are worth.
    """

    q: float
    value: float
    low: float | None
    high: float | None
    count: int
    effective_count: float


@dataclass(frozen=True)
class LogError:
    """Standard error of the logarithm of a percentile, and with how many degrees of freedom it is known."""

    standard_error: float
    degrees_of_freedom: float


@dataclass(frozen=True)
class Ratio:
    """How many times head is base, with a 95 % interval; p_value of no difference."""

    value: float
    low: float
    high: float
    p_value: float
    log_standard_error: float
    degrees_of_freedom: float


def quantile(samples: Sequence[float], q: float = 0.5) -> Quantile:
    """A percentile of `samples`, linear between neighbours, with a 95 % interval.

    Raises:
        ValueError: there are no samples.
    """
    return quantiles([(samples, q)])[0]


def quantiles(rows: Sequence[tuple[Sequence[float], float]]) -> list[Quantile]:
    """`quantile` of many (samples, q), in a fraction of the time where rows are of the same length.

    Raises:
        ValueError: there are no samples in one of them.
    """
    if any(not len(samples) for samples, _ in rows):
        raise ValueError("no samples")
    found: dict[int, Quantile] = {}
    for some in _alike([samples for samples, _ in rows]):
        found |= zip(some, _quantiles([rows[place][0] for place in some], [rows[place][1] for place in some]))
    return [found[place] for place in range(len(rows))]


def _alike(rows: Sequence[Sequence[float]]) -> Iterator[list[int]]:
    """The places of rows of one length, `_AT_ONCE` at most."""
    by_length: dict[int, list[int]] = {}
    for place, samples in enumerate(rows):
        by_length.setdefault(len(samples), []).append(place)
    for places in by_length.values():
        for start in range(0, len(places), _AT_ONCE):
            yield places[start : start + _AT_ONCE]


def _quantiles(samples: Sequence[Sequence[float]], qs: Sequence[float]) -> list[Quantile]:
    """Of rows of one length."""
    values = np.array(samples, dtype=np.float64)
    ordered = np.sort(values, axis=1)
    count = values.shape[1]
    points = _points(ordered, np.array(qs))
    found = []
    for row, q, point, effective in zip(ordered, qs, points.tolist(), _effective_counts(values, points)):
        low, high = _ends(int(effective), q, count)
        ends = None if low is None else float(row[low]), None if high is None else float(row[high])
        found.append(Quantile(q, point, *ends, count, effective))
    return found


@cache
def _ends(effective: int, q: float, count: int) -> tuple[int | None, int | None]:
    """Where in `count` ordered samples, which are worth `effective` ones, the interval of a percentile ends."""
    low, high, _ = _ranks(effective, q)
    return (
        None if low is None else _stretch(low, effective, count, math.floor),
        None if high is None else _stretch(high, effective, count, math.ceil),
    )


def log_error(samples: Sequence[float], q: float = 0.5) -> LogError | None:
    """How sure the logarithm of a percentile is within one run.

    None where that cannot be told: too few samples for the percentile, or some that are not above 0.
    """
    values = np.asarray(samples, dtype=np.float64)
    return _error(np.log(values), q) if len(values) > 1 and values.min() > 0 else None


def _error(values: np.ndarray, q: float) -> LogError | None:
    """How sure the q-th quantile of `values`, which are logarithms, is; None if they are too few."""
    if len(values) < 2:
        return None
    ordered = np.sort(values)
    effective = int(_effective_count(values, _point(ordered, q)))
    low, high, coverage = _ranks(effective, q)
    if low is None or high is None:
        # Short rows: the whole range, which is as sure as it happens to be.
        low, high, coverage = 1, effective, 1 - q**effective - (1 - q) ** effective
        if effective < 2 or coverage < _MIN_COVERAGE:
            return None
    lower = ordered[_stretch(low, effective, len(ordered), math.floor)]
    upper = ordered[_stretch(high, effective, len(ordered), math.ceil)]
    return LogError(float(upper - lower) / (2 * NormalDist().inv_cdf((1 + coverage) / 2)), effective - 1)


def paired_ratio(base: Sequence[float], head: Sequence[float], *, block: int = 2) -> Ratio | None:
    """The ratio head / base of two sides that were timed by turns on the same images.

    Each block of `block` samples a side is of one image: its ratio is that of the geometric means, in which a drift
    over a block of the order base, head, head, base cancels. The value is the median of the blocks' ratios. What is
    common to both sides of a block, above all the image, is no part of its error, as it is of the ratio of two medians.

    Args:
        base, head: timings in the order in which they were taken, block by block.
    Returns:
        None where the blocks are too few, or a timing is not above 0.
    Raises:
        ValueError: the sides differ in length, or do not consist of whole blocks.
    """
    sides = [np.asarray(side, dtype=np.float64) for side in (base, head)]
    if len(sides[0]) != len(sides[1]) or len(sides[0]) % block:
        raise ValueError(f"{len(sides[0])} and {len(sides[1])} timings are no pairs of blocks of {block}")
    if not len(sides[0]) or min(side.min() for side in sides) <= 0:
        return None
    logs = [np.log(side).reshape(-1, block).mean(axis=1) for side in sides]
    effects = logs[1] - logs[0]
    found = _error(effects, 0.5)
    if found is None:
        return None
    effect, error, degrees = _point(np.sort(effects), 0.5), found.standard_error, found.degrees_of_freedom
    half = two_sided_quantile(1 - LEVEL, degrees) * error
    ends = math.exp(effect - half), math.exp(effect + half)
    return Ratio(math.exp(effect), *ends, p_of(effect, error, degrees), error, degrees)


def ratio(
    base: Sequence[float], head: Sequence[float], *, q: float = 0.5, noise: float = 0.0, noise_degrees: float = math.inf
) -> Ratio | None:
    """The ratio head / base of a percentile, on the logarithmic scale: swapping the two inverts it.

    Args:
        base, head: raw timings of one run each.
        noise: standard deviation of the percentile's logarithm from run to run; each of the two runs has its own.
        noise_degrees: of freedom, with which `noise` is known.
    Returns:
        None where the samples are too few; see `log_error`.
    """
    errors = log_error(base, q), log_error(head, q)
    if errors[0] is None or errors[1] is None:
        return None
    effect = math.log(_point(np.sort(head), q) / _point(np.sort(base), q))
    within = [(error.standard_error**2, error.degrees_of_freedom) for error in errors if error is not None]
    error, degrees = combine([*within, (2 * noise**2, noise_degrees)])
    half = two_sided_quantile(1 - LEVEL, degrees) * error
    ends = math.exp(effect - half), math.exp(effect + half)
    return Ratio(math.exp(effect), *ends, p_of(effect, error, degrees), error, degrees)


def p_of(effect: float, standard_error: float, degrees_of_freedom: float) -> float:
    """Two-sided chance of an effect at least as large where there is none."""
    if standard_error == 0:
        return 1.0 if effect == 0 else 0.0
    return two_sided_p(effect / standard_error, degrees_of_freedom)


def is_outlier(samples: Sequence[float]) -> np.ndarray:
    """Which samples are outliers; they are marked, and stay in every statistic (medians hardly notice them).

    The rule: 0.6745 |x - median| / MAD > 3.5 for the logarithms x, MAD being the median of |x - median|. Where more
    than half of the samples are equal, MAD is 0 and nothing is marked.

    Returns:
        (N,) bool. Samples that are not above 0 (a scope never entered) are never marked.
    """
    values = np.asarray(samples, dtype=np.float64)
    marks = np.zeros(len(values), dtype=bool)
    positive = values > 0
    if not positive.any():
        return marks
    logs = np.log(values[positive])
    away = np.abs(logs - _point(np.sort(logs), 0.5))
    spread = _point(np.sort(away), 0.5)
    if spread > 0:
        marks[positive] = _MAD_OF_NORMAL * away / spread > OUTLIER_LIMIT
    return marks


def count_outliers(rows: Sequence[Sequence[float]]) -> list[int]:
    """How many samples of each row `is_outlier` marks, in a fraction of the time where rows are of the same length."""
    found: dict[int, int] = {}
    for some in _alike(rows):
        values = np.array([rows[place] for place in some], dtype=np.float64)
        if not values.size or values.min() <= 0:
            found |= ((place, int(is_outlier(rows[place]).sum())) for place in some)
            continue
        logs = np.log(values)
        away = np.abs(logs - _medians(logs))
        spread = _medians(away)
        marks = _MAD_OF_NORMAL * away / np.where(spread > 0, spread, np.inf) > OUTLIER_LIMIT
        found |= zip(some, marks.sum(axis=1).tolist())
    return [found[place] for place in range(len(rows))]


def effective_count(samples: Sequence[float] | np.ndarray, q: float = 0.5) -> float:
    """How many independent samples are worth as much as this row, for its q-th quantile; at most its length.

    From the autocorrelations of "lies below the quantile", summed in pairs for as long as the pairs are positive
    (Geyer, 1992, initial positive sequence). Too short a row shows no dependence: it counts as it is.
    """
    values = np.asarray(samples, dtype=np.float64)
    return _effective_count(values, _point(np.sort(values), q))


def _effective_count(values: np.ndarray, point: float) -> float:
    return _effective_counts(values[None], np.array([point]))[0]


def _effective_counts(values: np.ndarray, points: np.ndarray) -> list[float]:
    """Of rows (R, N) and the quantile (R,) of each."""
    count = values.shape[1]
    if count < _MIN_ROW:
        return [float(count)] * len(values)
    # Half for what lies on the quantile, so that reversing the order of all values changes nothing.
    below = ((values <= points[:, None]) + (values < points[:, None]).astype(np.float64)) / 2
    below -= below.mean(axis=1, keepdims=True)
    spectrum = np.fft.rfft(below, 1 << (2 * count - 1).bit_length())
    products = np.fft.irfft(spectrum.real**2 + spectrum.imag**2)[:, :count]
    varies = products[:, 0] > 0
    correlations = products / np.where(varies, products[:, 0], 1.0)[:, None]
    pairs = correlations[:, : count - count % 2].reshape(len(values), -1, 2).sum(axis=2)
    # The first pair that is not positive; the place after the last where all are.
    ends = np.where((pairs <= 0).any(axis=1), (pairs <= 0).argmax(axis=1), pairs.shape[1])
    totals = np.where(np.arange(pairs.shape[1]) < ends[:, None], pairs, 0.0).sum(axis=1)
    worth: list[float] = np.where(varies, count / np.maximum(1.0, 2 * totals - 1), float(count)).tolist()
    return worth


def _point(ordered: np.ndarray, q: float) -> float:
    """The q-th quantile of ordered values, linear between neighbours: numpy's default, in a tenth of its time."""
    place = (len(ordered) - 1) * q
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))


def _points(ordered: np.ndarray, qs: np.ndarray) -> np.ndarray:
    """`_point` of each row (R, N) for its own q (R,)."""
    count = ordered.shape[1]
    places = (count - 1) * qs
    lows = np.floor(places).astype(np.intp)
    rows = np.arange(len(qs))
    left, right = ordered[rows, lows], ordered[rows, np.minimum(lows + 1, count - 1)]
    points: np.ndarray = left + (right - left) * (places - lows)
    return points


def _medians(values: np.ndarray) -> np.ndarray:
    """(R, 1), of each row."""
    return _points(np.sort(values, axis=1), np.full(len(values), 0.5))[:, None]


@cache
def _ranks(count: int, q: float) -> tuple[int | None, int | None, float]:
    """Ranks (from 1) of the order statistics around the q-th quantile of `count` independent samples.

    Each end is missed with a chance of at most (1 - LEVEL) / 2; None where even the extreme is missed more often.

    Returns:
        low, high, and the chance that the quantile lies between them.
    """
    tail = (1 - LEVEL) / 2
    if count > _MAX_EXACT:
        spread = NormalDist().inv_cdf(1 - tail) * math.sqrt(count * q * (1 - q))
        low, high = math.floor(count * q - spread), math.ceil(count * q + spread) + 1
        return (low if low >= 1 else None), (high if high <= count else None), LEVEL
    chances = [
        math.exp(
            math.lgamma(count + 1)
            - math.lgamma(k + 1)
            - math.lgamma(count - k + 1)
            + k * math.log(q)
            + (count - k) * math.log1p(-q)
        )
        for k in range(count + 1)
    ]
    up_to = np.cumsum(chances)  # up_to[k]: at most k samples lie below the quantile
    low = int(np.searchsorted(up_to, tail, side="right"))  # the largest rank with up_to[rank - 1] <= tail
    high = int(np.searchsorted(up_to, 1 - tail, side="left")) + 1  # the smallest with up_to[rank - 1] >= 1 - tail
    known_low, known_high = (low if low >= 1 else None), (high if high <= count else None)
    coverage = (float(up_to[high - 1]) if known_high else 1.0) - (float(up_to[low - 1]) if known_low else 0.0)
    return known_low, known_high, coverage


def _stretch(rank: int, effective: int, count: int, rounding: Callable[[float], int]) -> int:
    """The index into `count` ordered samples that belongs to a rank of `effective` ones, rounded outwards."""
    # 8 / 9 * 9 is not 8 in floating point.
    place = round(rank / (effective + 1) * (count + 1), 9)
    return min(max(rounding(place), 1), count) - 1
