"""Does a published number hold? One verdict for a claim from what was measured, its interval and the claim's tolerance.

Pure functions, numbers in the claim's unit. The rule, in order; p is the published value, m the measured one:

1. contradicted: another revision of the same source says otherwise. Nothing is measured for such a value.
2. not checkable: nothing here can decide it (an evaluation server, other hardware), whatever was measured.
3. not attempted: no measurement.
4. inconclusive: the measurement is of something else (other data, images, weights, settings; too short a training).
   It neither confirms nor refutes, however near or far it is.
5. With an interval: reproduced if |m - p| <= within and the interval's half-width is at most `sampling`; not
   reproduced if the whole interval lies more than `within` from p; otherwise inconclusive. Without one: not reproduced
   if |m - p| > sampling, as no sampling explains that; otherwise inconclusive, however near.
6. Where a training stands in for weights that were never published, with a configuration that is not public, a
   departure may come from what was assumed: what 5 calls not reproduced is inconclusive.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from bench.claims import Claim, Superseded

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; the last one serves from there on.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
# Far below any digit that is published: sums of binary fractions must not decide at a boundary.
_RESOLUTION = Decimal("1e-6")


class Verdict(StrEnum):
    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    INCONCLUSIVE = "inconclusive"
    CONTRADICTED = "contradicted by another revision of the same source"
    NOT_CHECKABLE = "not checkable"
    NOT_ATTEMPTED = "not attempted"


@dataclass(frozen=True)
class Measured:
    """What was measured for a claim, in the claim's unit.

    value: the mean over `runs` runs. interval: 95 %, (low, high); None where there is none. basis: of the interval, for
    people. objections: why it is a measurement of something else than the claim; empty if it is none.
    """

    value: float
    interval: tuple[float, float] | None = None
    basis: str = ""
    runs: int = 1
    objections: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """reason: why, and for `inconclusive` and `not attempted` what it would take; one line."""

    verdict: Verdict
    reason: str


def judge(claim: Claim, measured: Measured | None, *, needs: str = "") -> Judgement:
    """The verdict on a claim; see the module.

    Args:
        claim: its `tolerance_*` are set unless its evidence is none.
        measured: None where nothing was.
        needs: what an attempt takes, for people.
    """
    fields = claim.fields
    if fields.contradicted:
        return Judgement(Verdict.CONTRADICTED, fields.contradicted)
    if fields.evidence == "none":
        return Judgement(Verdict.NOT_CHECKABLE, fields.why_not)
    if measured is None:
        return Judgement(Verdict.NOT_ATTEMPTED, needs)
    assert fields.tolerance_within is not None
    assert fields.tolerance_sampling is not None
    if measured.objections:
        return Judgement(Verdict.INCONCLUSIVE, f"another measurement: {'; '.join(measured.objections)}")
    verdict, reason = _compare(
        fields.value, measured, within=fields.tolerance_within, sampling=fields.tolerance_sampling
    )
    if verdict is not Verdict.REPRODUCED:
        reason += _agrees_with_earlier(claim.superseded, measured.value, fields.tolerance_within)
    if fields.evidence == "training" and fields.config != "public":
        if verdict is Verdict.NOT_REPRODUCED:
            verdict = Verdict.INCONCLUSIVE
            reason += ". It takes the configuration that was used; assumed here: " + fields.assumed
        elif verdict is Verdict.REPRODUCED:
            reason += ". Assumed: " + fields.assumed
    return Judgement(verdict, reason)


def _compare(published: float, measured: Measured, *, within: float, sampling: float) -> tuple[Verdict, str]:
    """Rule 5."""
    deviation = _apart(measured.value, published)
    off = f"{measured.value - published:+.2f} from the published value"
    if measured.interval is None:
        if deviation > _exact(sampling):
            return Verdict.NOT_REPRODUCED, f"{off}, more than sampling explains ({sampling:g}); no interval"
        return Verdict.INCONCLUSIVE, f"{off}, no interval: it takes several runs with other seeds, or a bootstrap"
    low, high = measured.interval
    half = _apart(high, low) / 2
    shown = f"{off}, 95 % interval {low:.2f} to {high:.2f} ({measured.basis})"
    nearest = max(_exact(low) - _exact(published), _exact(published) - _exact(high), Decimal(0))
    if nearest > _exact(within):
        return Verdict.NOT_REPRODUCED, f"{shown}, all of it more than {within:g} off"
    if half > _exact(sampling):
        return Verdict.INCONCLUSIVE, f"{shown}: it takes a half-width of at most {sampling:g}, so more runs or images"
    if deviation <= _exact(within):
        return Verdict.REPRODUCED, f"{shown}, within {within:g}"
    return Verdict.INCONCLUSIVE, f"{shown}: more than {within:g} off, but not all of it; it takes more runs or images"


def _agrees_with_earlier(superseded: Sequence[Superseded], value: float, within: float) -> str:
    for old in superseded:
        if _apart(value, old.value) <= _exact(within):
            return f". It agrees with {old.value}, which the same source gave from {old.since} to {old.until}"
    return ""


def spread(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of runs that differ in seeds only (Student's t); None for fewer than two."""
    count = len(values)
    if count < 2:
        return None
    mean = statistics.fmean(values)
    half = _T[min(count - 1, len(_T)) - 1] * statistics.stdev(values) / math.sqrt(count)
    return mean - half, mean + half


def _exact(value: float) -> Decimal:
    return Decimal(repr(value)).quantize(_RESOLUTION)


def _apart(first: float, second: float) -> Decimal:
    return abs(_exact(first) - _exact(second))
