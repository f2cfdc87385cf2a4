from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.stats.bootstrap import RECALLS, Resampler
from bench.stats.breakdown import (
    ERROR_KINDS,
    IGNORED,
    RIGHT,
    Scene,
    average_precision,
    best_threshold,
    classify_errors,
    error_breakdown,
    image_f1,
    precision_at_recalls,
)
from diffinst.evaluation.matches import build_matches, match_greedily


def _scene(
    detections: list[tuple[float, int]],
    truth: list[int],
    overlaps: list[list[float]],
    *,
    crowd: tuple[int, ...] = (),
    open_categories: frozenset[int] = frozenset(),
) -> Scene:
    """detections: (score, class). truth: classes. crowd: positions of crowd regions."""
    return Scene(
        score=np.array([score for score, _ in detections], dtype=float),
        category=np.array([category for _, category in detections], dtype=int),
        truth_category=np.array(truth, dtype=int),
        is_crowd=np.isin(np.arange(len(truth)), crowd),
        overlaps=np.array(overlaps, dtype=float).reshape(len(detections), len(truth)),
        open_categories=open_categories,
    )


def _kinds(scene: Scene) -> list[str]:
    names = {RIGHT: "right", IGNORED: "ignored"} | dict(enumerate(ERROR_KINDS))
    return [names[int(kind)] for kind in classify_errors(scene, match_greedily).kind]


@pytest.mark.parametrize(
    ("own", "other", "kind"),
    [
        (0.5, 0.0, "right"),  # a match needs at least 0.5
        (0.49, 0.0, "localisation"),
        (0.1, 0.0, "localisation"),
        (0.09, 0.0, "background"),
        (0.0, 0.5, "class"),
        (0.0, 0.49, "both"),
        (0.0, 0.11, "both"),
        (0.0, 0.1, "background"),
        (0.3, 0.9, "localisation"),  # localisation is tried before class
        (0.05, 0.3, "both"),
        (0.0, 0.0, "background"),
    ],
)
def test_the_kind_of_one_detection_beside_one_instance_of_its_class_and_one_of_another(
    own: float, other: float, kind: str
) -> None:
    assert _kinds(_scene([(0.9, 1)], [1, 2], [[own, other]])) == [kind]


def test_the_second_detection_of_an_instance_is_a_duplicate_unless_it_fits_another_class() -> None:
    assert _kinds(_scene([(0.9, 1), (0.8, 1)], [1], [[0.6], [0.9]])) == ["right", "duplicate"]
    # The better score takes the instance, wherever it stands in the list.
    assert _kinds(_scene([(0.8, 1), (0.9, 1)], [1], [[0.9], [0.6]])) == ["duplicate", "right"]
    assert _kinds(_scene([(0.9, 1), (0.8, 1)], [1, 2], [[0.6, 0], [0.9, 0.5]])) == ["right", "class"]


def test_crowds_and_classes_that_are_not_annotated_exhaustively_are_no_mistakes() -> None:
    assert _kinds(_scene([(0.9, 1), (0.8, 1)], [1], [[0.9], [0.6]], crowd=(0,))) == ["ignored", "ignored"]
    assert _kinds(_scene([(0.9, 1), (0.8, 2)], [], [[], []], open_categories=frozenset({1}))) == [
        "ignored",
        "background",
    ]


def test_missed_is_what_nothing_found_and_nothing_came_near() -> None:
    scene = _scene(
        [(0.9, 1), (0.8, 2), (0.7, 1)],
        [1, 1, 1, 1],
        [[0.7, 0, 0, 0], [0, 0.6, 0, 0], [0, 0, 0.3, 0]],  # found; wrong class; badly placed; nothing
    )
    errors = classify_errors(scene, match_greedily)
    assert errors.found.tolist() == [True, False, False, False]
    assert errors.missed.tolist() == [False, False, False, True]
    assert errors.target.tolist() == [0, 1, 2]


def test_which_instance_a_right_detection_has_taken_follows_the_matching() -> None:
    # Of equal overlaps the later instance; the next detection gets the one that is left.
    errors = classify_errors(_scene([(0.9, 1), (0.8, 1)], [1, 1], [[0.7, 0.7], [0.6, 0.9]]), match_greedily)
    assert errors.target.tolist() == [1, 0]


def test_costs_by_hand() -> None:
    # One instance, found by the second detection: precision 1/2 up to recall 1. Without the first, AP is 1.
    found = error_breakdown([_scene([(0.9, 1), (0.8, 1)], [1], [[0.0], [0.7]])], match_greedily)
    assert found.ap == pytest.approx(0.5)
    assert found.cost == pytest.approx(dict.fromkeys(ERROR_KINDS, 0.0) | {"background": 0.5})
    assert found.counts == dict.fromkeys(ERROR_KINDS, 0) | {"background": 1}
    assert (found.num_right, found.num_instances) == (1, 1)


def test_costs_of_a_wrong_class_and_of_a_missed_instance_by_hand() -> None:
    # Class 1: its instance is called 2. Class 2: its instance is missed, and it has a wrong detection.
    # AP is 0 in both. With the right name class 1 has AP 1, class 2 has an instance and no detection: 0. Mean 0.5.
    # Without the missed instance class 2 has none left and a wrong detection: it stays in the mean with 0.
    found = error_breakdown([_scene([(0.9, 2)], [1, 2], [[0.8, 0.0]])], match_greedily)
    assert found.ap == 0.0
    assert found.counts["class"] == found.counts["missed"] == 1
    assert found.cost["class"] == pytest.approx(0.5)
    assert found.cost["missed"] == 0.0
    # With both put right, class 2 has nothing left and leaves the mean.
    assert found.ap_of_all == pytest.approx(1.0)


def test_two_bad_places_of_one_instance_are_put_right_once() -> None:
    # Instances 0 and 1; both detections lie badly on 0. Put right, the better finds it and the other goes:
    # one of two instances at precision 1 is read at the recalls 0 to 0.5, 51 of 101.
    scene = _scene([(0.9, 1), (0.8, 1)], [1, 1], [[0.3, 0], [0.4, 0]])
    found = error_breakdown([scene], match_greedily)
    assert found.cost["localisation"] == pytest.approx(51 / 101)


def test_a_badly_placed_detection_of_a_found_instance_goes_when_put_right() -> None:
    scene = _scene([(0.9, 1), (0.95, 1)], [1], [[0.8], [0.3]])
    found = error_breakdown([scene], match_greedily)
    assert found.ap == pytest.approx(0.5)
    assert found.cost["localisation"] == pytest.approx(0.5)


def test_nothing_there() -> None:
    nothing = error_breakdown([], match_greedily)
    assert (nothing.ap, nothing.ap_of_all, nothing.num_instances) == (None, None, 0)
    assert set(nothing.cost.values()) == {0.0}
    no_truth = error_breakdown([_scene([(0.5, 1)], [], [[]])], match_greedily)
    assert (no_truth.ap, no_truth.counts["background"]) == (None, 1)
    no_detections = error_breakdown([_scene([], [1, 2], [])], match_greedily)
    assert (no_detections.ap, no_detections.counts["missed"], no_detections.cost["missed"]) == (0.0, 2, 1.0)


def _random_scenes(generator: np.random.Generator) -> list[Scene]:
    """Up to four images with equal scores, crowds, and overlaps at and beside both thresholds."""
    scenes = []
    for _ in range(generator.integers(1, 5)):
        num_detections, num_truth = int(generator.integers(0, 7)), int(generator.integers(0, 5))
        detections = [
            (float(generator.integers(1, 6)) / 5, int(generator.integers(1, 4))) for _ in range(num_detections)
        ]
        overlaps = generator.choice([0.0, 0.05, 0.1, 0.3, 0.5, 0.6, 0.9], (num_detections, num_truth))
        crowd = (0,) if generator.random() < 0.3 else ()
        scenes.append(_scene(detections, generator.integers(1, 4, num_truth).tolist(), overlaps.tolist(), crowd=crowd))
    return scenes


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 1_000_000))
def test_the_kinds_part_all_detections_and_putting_all_right_gives_1(seed: int) -> None:
    scenes = _random_scenes(np.random.default_rng(seed))
    found = error_breakdown(scenes, match_greedily)
    errors = [classify_errors(scene, match_greedily) for scene in scenes]
    ignored = sum(int((error.kind == IGNORED).sum()) for error in errors)
    wrong = sum(count for kind, count in found.counts.items() if kind != "missed")
    assert found.num_right + ignored + wrong == sum(len(scene.score) for scene in scenes)
    for scene, error in zip(scenes, errors):
        assert ((error.kind >= IGNORED) & (error.kind < len(ERROR_KINDS) - 1)).all()
        # An instance is found, or missed, or aimed at by an error that can be put right.
        aimed = np.isin(np.arange(len(scene.truth_category)), error.target)
        assert (error.found | error.missed | aimed | scene.is_crowd).all()
        assert not (error.found & error.missed).any()
    assert all(gain >= 0 for gain in found.cost.values())
    if found.num_instances:
        assert found.ap_of_all == pytest.approx(1.0)
        assert all((found.ap or 0.0) + gain <= 1 + 1e-12 for gain in found.cost.values())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_ap_is_that_of_the_evaluator(seed: int) -> None:
    generator = np.random.default_rng(seed)
    content, results, scenes = _random_boxes(generator)
    ids = [image["id"] for image in content["images"]]
    resampler = Resampler(build_matches(content, results, ids, "bbox"))
    by_class = resampler.average_precision(np.ones((len(ids), 1), dtype=int))[:, 0, 0]
    found = error_breakdown(scenes, match_greedily)
    if np.isnan(by_class).all():
        assert found.ap is None
    else:
        assert found.ap == pytest.approx(np.nanmean(by_class), abs=1e-12)


def _random_boxes(generator: np.random.Generator) -> tuple[dict, list[dict], list[Scene]]:
    """COCO content and results of three images, and the same as scenes."""
    from pycocotools import mask as coco_mask

    content: dict = {"images": [{"id": i} for i in range(3)], "categories": [{"id": 1}, {"id": 2}], "annotations": []}
    results, scenes = [], []
    for image in range(3):
        boxes = {"truth": generator.integers(0, 3), "found": generator.integers(0, 6)}
        drawn = {
            name: [[*generator.integers(0, 6, 2).tolist(), *generator.integers(4, 9, 2).tolist()] for _ in range(count)]
            for name, count in boxes.items()
        }
        labels = {name: generator.integers(1, 3, count).tolist() for name, count in boxes.items()}
        scores = generator.random(boxes["found"]).round(1).tolist()
        crowd = [int(value) for value in generator.random(boxes["truth"]) < 0.2]
        for box, label, is_crowd in zip(drawn["truth"], labels["truth"], crowd):
            place = {"bbox": [float(v) for v in box], "area": float(box[2] * box[3])}
            content["annotations"].append({"image_id": image, "category_id": label, "iscrowd": is_crowd, **place})
        for box, label, score in zip(drawn["found"], labels["found"], scores):
            results.append({"image_id": image, "category_id": label, "bbox": [float(v) for v in box], "score": score})
        overlaps = coco_mask.iou(np.array(drawn["found"], float), np.array(drawn["truth"], float), crowd)
        scenes.append(
            Scene(
                score=np.array(scores, dtype=float),
                category=np.array(labels["found"], dtype=int),
                truth_category=np.array(labels["truth"], dtype=int),
                is_crowd=np.array(crowd, dtype=bool),
                overlaps=np.asarray(overlaps, dtype=float).reshape(boxes["found"], boxes["truth"]),
            )
        )
    return content, results, scenes


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), max_size=20), st.integers(1, 20))
def test_precision_at_recalls_against_a_loop(is_right: list[bool], more: int) -> None:
    total = sum(is_right) + more - 1 or 1
    expected = []
    for step in range(101):
        best, right = 0.0, 0
        for rank, hit in enumerate(is_right, start=1):
            right += hit
            if right / total >= RECALLS[step]:
                best = max(best, right / rank)
        expected.append(best)
    assert precision_at_recalls(np.array(is_right, dtype=bool), total) == pytest.approx(expected)
    assert average_precision(np.array(is_right, dtype=bool), total) == pytest.approx(np.mean(expected))


def test_f1_of_images_by_hand() -> None:
    # Image 0: of 3 instances 1 found at both thresholds, 1 at the lower only, 1 wrong, 1 ignored.
    matched = np.array([[True, True, False, True], [True, False, False, True]])
    ignored = np.array([[False, False, False, True], [False, False, False, True]])
    found = image_f1(matched, ignored, np.array([0, 0, 0, 0]), np.array([3, 0, 2]))
    # 2 right / (2 right + wrong + missed): 4 / (4 + 1 + 1), then 2 / (2 + 2 + 2).
    assert found[0] == pytest.approx((4 / 6 + 2 / 6) / 2)
    assert np.isnan(found[1])
    assert found[2] == 0.0


def test_the_best_threshold_by_hand() -> None:
    # Taking 1, 2, 3, 4 detections of 2 instances: 2*1/(1+2), 2*1/(2+2), 2*2/(3+2), 2*2/(4+2).
    score = np.array([0.2, 0.9, 0.7, 0.8])
    matched = np.array([False, True, True, False])
    assert best_threshold(score, matched, np.zeros(4, dtype=bool), 2) == 0.7
    assert best_threshold(np.zeros(0), np.zeros(0, dtype=bool), np.zeros(0, dtype=bool), 2) == 0.0
