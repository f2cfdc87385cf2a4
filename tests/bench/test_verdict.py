from __future__ import annotations

from typing import Any

import pytest

from bench.claims import Claim, ClaimFields, Source, Superseded
from bench.verdict import Judgement, Measured, Verdict, judge, spread

SOURCE = Source(name="a README", kind="readme", url="https://example.org", place="its table")
OLD = Superseded(value=35.1, since="2022-12-09", until="2022-12-22")


def make_claim(**changes: Any) -> Claim:
    """37.3 AP, to be checked with published weights; the same within 0.4, explained by sampling within 1.0."""
    fields = {
        "value": 37.3,
        "evidence": "weights",
        "config": "public",
        "tolerance_within": 0.4,
        "tolerance_sampling": 1.0,
    }
    return Claim("one", ClaimFields(**(fields | changes)), SOURCE, (OLD,))


def measured(value: float, half: float | None = None, *objections: str) -> Measured:
    interval = None if half is None else (value - half, value + half)
    return Measured(value, interval, "3 runs" if interval else "", 3, objections)


def verdict(value: float, half: float | None = None, *objections: str, **changes: Any) -> Verdict:
    return judge(make_claim(**changes), measured(value, half, *objections)).verdict


class TestWithAnInterval:
    @pytest.mark.parametrize("value", [37.3, 37.7, 36.9, 37.5])
    def test_near_and_narrow_is_reproduced(self, value: float) -> None:
        assert verdict(value, 0.2) is Verdict.REPRODUCED

    def test_within_is_inclusive_to_the_last_digit(self) -> None:
        assert verdict(37.7, 0.1) is Verdict.REPRODUCED
        assert verdict(37.700002, 0.1) is Verdict.INCONCLUSIVE
        assert verdict(36.9, 0.1) is Verdict.REPRODUCED
        assert verdict(36.899998, 0.1) is Verdict.INCONCLUSIVE

    def test_an_interval_wider_than_sampling_reproduces_nothing(self) -> None:
        assert verdict(37.3, 1.0) is Verdict.REPRODUCED
        judgement = judge(make_claim(), measured(37.3, 1.01))
        assert judgement.verdict is Verdict.INCONCLUSIVE
        assert "it takes a half-width of at most 1, so more runs or images" in judgement.reason

    def test_all_of_the_interval_off_is_not_reproduced(self) -> None:
        # From 37.8 on, above 37.7 = 37.3 + 0.4; and up to 36.8, below 36.9.
        assert verdict(38.0, 0.2) is Verdict.NOT_REPRODUCED
        assert verdict(36.6, 0.2) is Verdict.NOT_REPRODUCED

    def test_an_interval_that_touches_is_inconclusive(self) -> None:
        assert verdict(37.9, 0.2) is Verdict.INCONCLUSIVE
        assert verdict(37.9, 0.199) is Verdict.NOT_REPRODUCED
        assert verdict(36.7, 0.2) is Verdict.INCONCLUSIVE
        assert verdict(36.7, 0.199) is Verdict.NOT_REPRODUCED

    def test_a_wide_interval_may_still_refute(self) -> None:
        assert verdict(30.0, 3.0) is Verdict.NOT_REPRODUCED

    def test_an_interval_of_one_point(self) -> None:
        assert verdict(37.4, 0.0) is Verdict.REPRODUCED
        assert verdict(37.71, 0.0) is Verdict.NOT_REPRODUCED


class TestWithoutAnInterval:
    @pytest.mark.parametrize("value", [37.3, 37.4, 38.3, 36.3])
    def test_at_most_inconclusive(self, value: float) -> None:
        judgement = judge(make_claim(), measured(value))
        assert judgement.verdict is Verdict.INCONCLUSIVE
        assert "no interval: it takes several runs" in judgement.reason

    @pytest.mark.parametrize("value", [38.301, 36.299, 0.0, 99.0])
    def test_more_than_sampling_explains_is_not_reproduced(self, value: float) -> None:
        judgement = judge(make_claim(), measured(value))
        assert judgement.verdict is Verdict.NOT_REPRODUCED
        assert "no interval" in judgement.reason


class TestBeforeTheNumbers:
    @pytest.mark.parametrize("value", [37.3, 0.0])
    @pytest.mark.parametrize("half", [None, 0.1])
    def test_a_measurement_of_something_else_decides_nothing(self, value: float, half: float | None) -> None:
        judgement = judge(make_claim(), measured(value, half, "100 of 5000 images", "split val, not test"))
        assert judgement.verdict is Verdict.INCONCLUSIVE
        assert judgement.reason == "another measurement: 100 of 5000 images; split val, not test"

    def test_nothing_measured(self) -> None:
        assert judge(make_claim(), None, needs="it takes COCO") == Judgement(Verdict.NOT_ATTEMPTED, "it takes COCO")

    @pytest.mark.parametrize("found", [None, measured(37.3, 0.1)])
    def test_not_checkable_stays_so(self, found: Measured | None) -> None:
        claim = make_claim(evidence="none", why_not="only a server scores it")
        assert judge(claim, found) == Judgement(Verdict.NOT_CHECKABLE, "only a server scores it")

    @pytest.mark.parametrize("found", [None, measured(37.3, 0.1)])
    def test_contradicted_by_its_own_source(self, found: Measured | None) -> None:
        judgement = judge(make_claim(contradicted="the next revision says 40.0"), found)
        assert judgement == Judgement(Verdict.CONTRADICTED, "the next revision says 40.0")

    def test_a_superseded_value_is_contradicted(self) -> None:
        (old,) = make_claim().earlier()
        assert (old.id, old.fields.value, old.is_superseded) == ("one@2022-12-22", 35.1, True)
        judgement = judge(old, None)
        assert judgement.verdict is Verdict.CONTRADICTED
        assert judgement.reason == "given from 2022-12-09 to 2022-12-22; the source says 37.3 since"


class TestAnAssumedConfiguration:
    changes = {"evidence": "training", "config": "not public", "assumed": "that of Swin-B"}

    def test_agreement_counts_and_names_the_assumption(self) -> None:
        judgement = judge(make_claim(**self.changes), measured(37.4, 0.2))
        assert judgement.verdict is Verdict.REPRODUCED
        assert judgement.reason.endswith("Assumed: that of Swin-B")

    @pytest.mark.parametrize("half", [None, 0.2])
    def test_a_departure_may_be_the_assumption(self, half: float | None) -> None:
        judgement = judge(make_claim(**self.changes), measured(33.0, half))
        assert judgement.verdict is Verdict.INCONCLUSIVE
        assert "It takes the configuration that was used; assumed here: that of Swin-B" in judgement.reason

    def test_published_weights_need_no_assumption(self) -> None:
        assert verdict(33.0, 0.2, **(self.changes | {"evidence": "weights"})) is Verdict.NOT_REPRODUCED


def test_agreement_with_an_earlier_value_is_said() -> None:
    said = "It agrees with 35.1, which the same source gave from 2022-12-09 to 2022-12-22"
    assert said in judge(make_claim(), measured(35.2, 0.1)).reason
    assert said not in judge(make_claim(), measured(34.6, 0.1)).reason
    assert said not in judge(make_claim(), measured(37.3, 0.1)).reason


def test_reasons_are_one_line_with_the_numbers() -> None:
    reason = judge(make_claim(), measured(37.4, 0.2)).reason
    assert reason == "+0.10 from the published value, 95 % interval 37.20 to 37.60 (3 runs), within 0.4"


class TestSpread:
    def test_by_hand(self) -> None:
        # Mean 2, standard deviation 1, t = 4.303 for 2 degrees of freedom: 4.303 / sqrt(3) = 2.4843.
        low, high = spread([1.0, 2.0, 3.0]) or (0.0, 0.0)
        assert (low, high) == pytest.approx((2 - 2.4843, 2 + 2.4843), abs=1e-4)

    def test_two_runs(self) -> None:
        # Standard deviation sqrt(0.5), over sqrt(2) it is 0.5; t = 12.706.
        assert spread([1.0, 2.0]) == pytest.approx((1.5 - 6.353, 1.5 + 6.353), abs=1e-3)

    @pytest.mark.parametrize("values", [[], [37.3]])
    def test_one_run_has_none(self, values: list[float]) -> None:
        assert spread(values) is None

    def test_equal_runs_have_no_width_and_many_runs_an_end(self) -> None:
        assert spread([5.0] * 3) == (5.0, 5.0)
        assert spread([5.0] * 40) == (5.0, 5.0)
