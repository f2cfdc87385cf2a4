"""Student's t for whole degrees of freedom, and errors put together from parts that are known unequally well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist

_NORMAL_FROM = 1000  # degrees of freedom: from there on the normal distribution is close enough


def two_sided_p(t: float, degrees_of_freedom: float) -> float:
    """Chance that |T| is at least |t| (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    Args:
        degrees_of_freedom: at least 1; a fraction is rounded down, which errs to the side of larger chances.
    """
    t = abs(t)
    if degrees_of_freedom >= _NORMAL_FROM:
        return math.erfc(t / math.sqrt(2))
    count = max(1, math.floor(degrees_of_freedom))
    angle = math.atan(t / math.sqrt(count))
    squared = math.cos(angle) ** 2
    first = 2 if count % 2 == 0 else 3
    term = 1.0 if count % 2 == 0 else math.cos(angle)
    total = term if count > 1 else 0.0
    for k in range(first, count - 1, 2):
        term *= (k - 1) / k * squared
        total += term
    within = math.sin(angle) * total
    if count % 2:
        within = 2 / math.pi * (angle + within)
    return max(0.0, 1.0 - within)


@cache
def two_sided_quantile(level: float, degrees_of_freedom: float) -> float:
    """The t that |T| exceeds with chance `level`, in (0, 1)."""
    if degrees_of_freedom >= _NORMAL_FROM:
        return -NormalDist().inv_cdf(level / 2)
    low, high = 0.0, 1.0
    while two_sided_p(high, degrees_of_freedom) > level:
        low, high = high, 2 * high
        if high > 1e15:
            return high
    for _ in range(60):
        middle = (low + high) / 2
        if two_sided_p(middle, degrees_of_freedom) > level:
            low = middle
        else:
            high = middle
    return high


def combine(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Standard error and degrees of freedom of a sum of independent parts (Welch and Satterthwaite).

    Args:
        parts: (variance, degrees of freedom it was estimated with, inf where it is known).
    """
    total = math.fsum(variance for variance, _ in parts)
    if total <= 0:
        return 0.0, math.inf
    spent = math.fsum((variance / total) ** 2 / degrees for variance, degrees in parts)
    return math.sqrt(total), max(1.0, 1 / spent) if spent > 0 else math.inf
