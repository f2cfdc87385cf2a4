"""Records compared image by image, and what seeds add."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.record import pack_resamples
from bench.stats.paired import image_sets, paired_difference, seed_parts, why_not_together


def scored(value: float, drawn: Any = None, *, images: str = "a", num_images: int = 100, **changes: Any) -> dict:
    metrics = {"segm/AP": {"value": value}, "num_images": {"value": num_images}}
    if drawn is None:
        return {"metrics": metrics}
    values = pack_resamples(list(drawn))
    entry = {"images": images, "num_images": num_images, "seed": 0, "count": len(drawn), "values": values}
    return {"metrics": metrics, "resamples": {"segm/AP": entry | changes}}


def test_what_images_have_in_common_cancels() -> None:
    common = np.random.default_rng(0).normal(0, 0.1, 1000)
    small = np.random.default_rng(1).normal(0, 0.001, 1000)
    found = paired_difference([scored(0.3, 0.3 + common)], [scored(0.32, 0.32 + common + small)], "segm/AP")
    assert found is not None
    assert (found.value, found.of, found.count) == (pytest.approx(0.02), "images", 100)
    assert found.standard_error == pytest.approx(0.001, rel=0.1)


def test_means_over_runs_by_hand() -> None:
    base, head = [scored(0.25, [0.25, 0.5])], [scored(0.5, [0.5, 0.5]), scored(0.75, [0.75, 1.0])]
    found = paired_difference(base, head, "segm/AP")
    assert found is not None
    # Differences 0.625 - 0.25 and 0.75 - 0.5 of the draws: 0.375 and 0.25.
    assert found.value == 0.375
    assert found.standard_error == pytest.approx(0.125 / np.sqrt(2))


def test_draws_without_an_instance_are_left_out() -> None:
    nan = float("nan")
    found = paired_difference([scored(0.5, [0.5, nan, 0.5])], [scored(0.5, [0.5, 0.5, 0.75])], "segm/AP")
    assert found is not None
    assert found.standard_error == pytest.approx(0.25 / np.sqrt(2))


@pytest.mark.parametrize("changes", [{"images": "b"}, {"seed": 1}, {"count": 3, "values": pack_resamples([0, 0, 0])}])
def test_what_was_not_drawn_together_is_not_paired(changes: dict[str, Any]) -> None:
    base, head = scored(0.5, [0.4, 0.6]), scored(0.5, [0.4, 0.6], **changes)
    assert paired_difference([base], [head], "segm/AP") is None
    assert paired_difference([base], [scored(0.5)], "segm/AP") is None
    assert paired_difference([base], [base], "bbox/AP") is None
    assert paired_difference([base], [base, head], "segm/AP") is None


def test_other_labels_are_another_set_and_older_records_do_not_tell_theirs() -> None:
    old, new, relabelled = (scored(0.5, [0.4, 0.6], images=name) for name in ("a", "a:1", "a:2"))
    assert image_sets([old, new]) == image_sets([new, old]) == [(100, "a:1")]
    assert why_not_together([old, new]) is None
    assert why_not_together([new, relabelled]) == "scored on the same 100 images, which are not labelled the same"
    assert paired_difference([new], [new], "segm/AP") is not None
    assert paired_difference([old], [old], "segm/AP") is not None
    assert paired_difference([new], [relabelled], "segm/AP") is None
    # What is called comparable is compared image by image, too.
    assert paired_difference([new], [old], "segm/AP") is not None
    assert paired_difference([old], [new, new], "segm/AP") is not None
    assert paired_difference([new], [scored(0.5, [0.4, 0.6], images="b")], "segm/AP") is None


def test_one_image_tells_nothing() -> None:
    one = scored(0.5, [0.5, 0.5], num_images=1)
    assert paired_difference([one], [one], "segm/AP") is None


def test_sets_of_images() -> None:
    assert image_sets([scored(0.1), scored(0.2)]) == [(100, "")]
    assert image_sets([scored(0.1), scored(0.2, [0.1])]) == [(100, "a")]
    assert why_not_together([scored(0.1), scored(0.2, [0.1]), {"metrics": {}}]) is None
    two_sizes = why_not_together([scored(0.1), scored(0.2, num_images=50)])
    assert two_sizes == "scored on 50 and 100 images: AP depends on how many there are"
    others = why_not_together([scored(0.1, [0.1]), scored(0.1, [0.1], images="b")])
    assert others == "scored on 100 images each, which are not the same ones"


class TestSeedParts:
    def test_one_run(self) -> None:
        assert seed_parts({(0, 0): 0.5}) == []
        assert seed_parts({}) == []

    def test_evaluation_seeds_of_one_training(self) -> None:
        # Variance of 1, 2, 3 is 1; of their mean 1/3.
        assert seed_parts({(0, 0): 1.0, (0, 1): 2.0, (0, 2): 3.0}) == [
            (pytest.approx(1 / 3), 2.0, "3 evaluation seeds")
        ]

    def test_trainings(self) -> None:
        assert seed_parts({(0, 0): 1.0, (1, 0): 3.0}) == [(1.0, 1.0, "2 trainings")]

    def test_trainings_with_evaluation_seeds_of_their_own(self) -> None:
        # Means 2 and 4; what the evaluation seeds do is in them.
        numbers = {(0, 0): 1.0, (0, 1): 3.0, (1, 2): 3.0, (1, 3): 5.0}
        assert seed_parts(numbers) == [(1.0, 1.0, "2 trainings")]
        assert seed_parts({(0, 0): 1.0, (1, 1): 3.0}) == [(1.0, 1.0, "2 trainings")]

    def test_trainings_and_evaluation_seeds_crossed(self) -> None:
        # By training 1.5 and 3.5, by evaluation seed 2 and 3.
        numbers = {(0, 0): 1.0, (0, 1): 2.0, (1, 0): 3.0, (1, 1): 4.0}
        assert seed_parts(numbers) == [(1.0, 1.0, "2 trainings"), (0.25, 1.0, "2 evaluation seeds")]

    def test_the_sum_covers_what_varies(self) -> None:
        """Variance of a mean of 3 x 4 runs: that of trainings / 3 + of seeds / 4 + of both together / 12."""
        generator = np.random.default_rng(0)
        found, means = [], []
        for _ in range(2000):
            trainings, seeds = generator.normal(0, 1.0, 3), generator.normal(0, 0.5, 4)
            both = generator.normal(0, 0.3, (3, 4))
            numbers = {(t, e): trainings[t] + seeds[e] + both[t, e] for t in range(3) for e in range(4)}
            means.append(np.mean(list(numbers.values())))
            found.append(sum(variance for variance, _, _ in seed_parts(numbers)))
        exact = 1 / 3 + 0.25 / 4 + 0.09 / 12
        assert np.var(means) == pytest.approx(exact, rel=0.1)
        assert exact * 0.95 < np.mean(found) < (exact + 0.09 / 12) * 1.05
