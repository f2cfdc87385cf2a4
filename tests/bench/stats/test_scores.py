"""The COCO and LVIS numbers from match tables, against hotcoco, and what their resamples say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from coco_files import block
from lvis_files import federated_scene, record

from bench.stats.bootstrap import Resampler
from bench.stats.scores import (
    Resampled,
    digest_of_images,
    digest_of_labels,
    largest_difference,
    number_names,
    resample_scores,
)
from diffinst.evaluation.coco_ap import METRIC_NAMES, Scorable, evaluate_coco, prepare_coco
from diffinst.evaluation.lvis_ap import METRIC_NAMES as LVIS_NAMES
from diffinst.evaluation.lvis_ap import evaluate_lvis, prepare_lvis
from diffinst.evaluation.matches import build_size_matches

KINDS = ("bbox", "segm")


def coco_scene(seed: int) -> Scorable:
    """The images of a federated scene as plain COCO, every seventh instance a crowd region."""
    content, records = federated_scene(seed)
    for image in content["images"]:
        image["file_name"] = "x.jpg"
    for annotation in content["annotations"][::7]:
        annotation["iscrowd"] = 1
    return prepare_coco(content, records)


def our_numbers(scorable: Scorable, kind: str, *, federated: bool = False) -> dict[str, float | None]:
    tables = build_size_matches(
        scorable.content,
        scorable.results,
        scorable.image_ids,
        kind,
        federated=federated,
        max_detections=300 if federated else 100,
    )
    frequencies = [category["frequency"] for category in scorable.content["categories"]] if federated else None
    found, _ = resample_scores(tables, frequencies=frequencies, num_resamples=2)
    assert tuple(found) == number_names(frequencies)
    return {f"{kind}/{name}": number.value for name, number in found.items()}


def assert_equal(ours: dict[str, float | None], theirs: dict[str, float | None]) -> None:
    assert largest_difference(ours, theirs)[0] < 1e-12, largest_difference(ours, theirs)


@pytest.mark.parametrize("seed", range(6))
def test_the_twelve_numbers_of_coco(seed: int) -> None:
    scorable = coco_scene(seed)
    scores = evaluate_coco(scorable)
    ours = {name: value for kind in KINDS for name, value in our_numbers(scorable, kind).items()}
    assert set(ours) == set(METRIC_NAMES)
    assert_equal(ours, scores.metrics)
    assert len(set(scores.metrics.values())) > 8  # the scene tells them apart


@pytest.mark.parametrize("seed", range(6))
def test_the_nine_numbers_of_lvis(seed: int) -> None:
    scorable = prepare_lvis(*federated_scene(seed))
    ours = {name: value for kind in KINDS for name, value in our_numbers(scorable, kind, federated=True).items()}
    assert set(ours) == set(LVIS_NAMES)
    assert_equal(ours, evaluate_lvis(scorable).metrics)
    # Without the rules of LVIS the numbers are others.
    plain = our_numbers(scorable, "bbox")
    assert plain["bbox/AP"] != pytest.approx(ours["bbox/AP"], abs=1e-4)


def truth_of(*annotations: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "1.png", "height": 120, "width": 160}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": list(annotations),
    }


def test_more_than_a_hundred_detections_of_a_class() -> None:
    boxes = [(x, y, x + 4, y + 4) for x in range(0, 150, 10) for y in range(0, 110, 10)]
    content = truth_of(*(block(place + 1, 1, 1, box) for place, box in enumerate(boxes)))
    scorable = prepare_coco(content, [record(1, *((1, 1 - place / 1000, box) for place, box in enumerate(boxes)))])
    ours = our_numbers(scorable, "bbox")
    assert ours["bbox/AR1"] == pytest.approx(1 / len(boxes))
    assert ours["bbox/AR10"] == pytest.approx(10 / len(boxes))
    assert ours["bbox/AR100"] == pytest.approx(100 / len(boxes))
    assert_equal(ours, evaluate_coco(scorable).metrics)


def test_more_instances_than_a_byte_counts() -> None:
    boxes = [(x, y, x + 4, y + 4) for x in range(0, 150, 6) for y in range(0, 110, 6)]
    assert len(boxes) > 400
    content = truth_of(*(block(place + 1, 1, 1, box) for place, box in enumerate(boxes)))
    scorable = prepare_coco(content, [record(1, *((1, 0.5, box) for box in boxes))])
    assert_equal(our_numbers(scorable, "segm"), evaluate_coco(scorable).metrics)


@pytest.mark.parametrize("has_truth", [True, False])
@pytest.mark.parametrize("has_detections", [True, False])
def test_nothing_there(has_truth: bool, has_detections: bool) -> None:
    box = (10, 10, 50, 50)
    content = truth_of(*([block(1, 1, 1, box)] if has_truth else []))
    scorable = prepare_coco(content, [record(1, *([(1, 0.9, box)] if has_detections else []))])
    ours = our_numbers(scorable, "bbox")
    assert_equal(ours, evaluate_coco(scorable).metrics)
    assert (ours["bbox/AP"] is None) == (not has_truth)


def test_only_crowd_regions() -> None:
    box = (10, 10, 50, 50)
    scorable = prepare_coco(truth_of(block(1, 1, 1, box, iscrowd=1)), [record(1, (1, 0.9, box))])
    ours = our_numbers(scorable, "segm")
    assert set(ours.values()) == {None}
    assert_equal(ours, evaluate_coco(scorable).metrics)


def test_unit_weights_give_the_numbers_themselves() -> None:
    scorable = coco_scene(1)
    tables = build_size_matches(scorable.content, scorable.results, scorable.image_ids, "bbox")
    resampler = Resampler(tables["all"])
    unit = np.ones((len(scorable.image_ids), 3), dtype=np.int32)
    precision = resampler.average_precision(unit)
    assert np.array_equal(precision[..., 0], precision[..., 2], equal_nan=True)
    assert float(np.nanmean(precision[..., 0])) == pytest.approx(evaluate_coco(scorable).metrics["bbox/AP"], abs=1e-15)
    assert np.array_equal(resampler.recall(2 * unit), resampler.recall(unit), equal_nan=True)


def test_recall_of_resamples_by_hand() -> None:
    # Image 1: two instances, one found; image 2: one instance, found. Weights (1, 1), (2, 1), (0, 3).
    boxes = (10, 10, 50, 50), (60, 60, 100, 100)
    content = truth_of(block(1, 1, 1, boxes[0]), block(2, 1, 1, boxes[1]), block(3, 2, 1, boxes[0]))
    content["images"].append({**content["images"][0], "id": 2})
    scorable = prepare_coco(content, [record(1, (1, 0.9, boxes[0])), record(2, (1, 0.8, boxes[0]))])
    table = build_size_matches(content, scorable.results, [1, 2], "bbox")["all"]
    found = Resampler(table).recall(np.array([[1, 2, 0], [1, 1, 3]]))
    assert found[0].tolist() == pytest.approx([2 / 3, 3 / 5, 1.0])


def test_errors_are_those_of_the_resamples_that_have_a_value() -> None:
    number = Resampled(0.5, np.array([0.4, 0.6, np.nan]))
    assert number.standard_error == pytest.approx(math.sqrt(0.02))
    assert Resampled(0.5, np.zeros(0)).standard_error is None
    assert Resampled(None, np.array([0.4, 0.6])).standard_error is None


def test_one_image_has_no_error() -> None:
    box = (10, 10, 50, 50)
    scorable = prepare_coco(truth_of(block(1, 1, 1, box)), [record(1, (1, 0.9, box))])
    tables = build_size_matches(scorable.content, scorable.results, [1], "bbox")
    found, _ = resample_scores(tables, num_resamples=10)
    assert found["AP"].value == pytest.approx(1.0)
    assert found["AP"].standard_error is None


def test_classes_are_drawn_with_the_same_images_as_their_mean() -> None:
    box = (10, 10, 50, 50)
    truth = truth_of(*(block(i, i, 1, box) for i in (1, 2, 3)))
    truth["images"] = [truth["images"][0] | {"id": i} for i in (1, 2, 3)]
    records = [record(i, *([(1, 0.9, box)] if i < 3 else [])) for i in (1, 2, 3)]
    scorable = prepare_coco(truth, records)
    tables = build_size_matches(scorable.content, scorable.results, [1, 2, 3], "bbox")
    found, of_categories = resample_scores(tables, num_resamples=50)
    with_instances = [number for number in of_categories if number.value is not None]
    assert len(with_instances) == 1
    # The mean over one class is that class.
    np.testing.assert_array_equal(with_instances[0].drawn, found["AP"].drawn)
    assert with_instances[0].standard_error == found["AP"].standard_error > 0
    assert all(number.standard_error is None for number in of_categories if number.value is None)


def test_the_largest_difference() -> None:
    assert largest_difference({"a": 1.0, "b": None, "c": 2.0}, {"a": 1.25, "b": None, "d": 9.0}) == (0.25, "a")
    assert largest_difference({"a": 1.0, "b": None}, {"a": 1.0, "b": 0.0}) == (math.inf, "b")
    assert largest_difference({"a": 1.0}, {"a": 1.0}) == (0.0, None)


def test_a_digest_is_of_the_ids_in_their_order() -> None:
    assert digest_of_images(np.array([1, 2])) == digest_of_images(np.array([1, 2], dtype=np.int32))
    assert digest_of_images(np.array([1, 2])) != digest_of_images(np.array([2, 1]))
    assert digest_of_images(np.array([1, 2])) != digest_of_images(np.array([1, 2, 3]))


@pytest.mark.parametrize("change", [{"category_id": 2}, {"bbox": [0, 0, 9, 9]}, {"area": 7}, {"iscrowd": 1}])
def test_labels_count_and_ids_of_annotations_do_not(change: dict[str, Any]) -> None:
    item = {"id": 1, "image_id": 5, "category_id": 1, "bbox": [0, 0, 2, 2], "area": 4, "iscrowd": 0}
    other = item | {"id": 2, "image_id": 6}

    def digest(*annotations: dict[str, Any], **image: Any) -> str:
        return digest_of_labels({"images": [{"id": 5, **image}, {"id": 6}], "annotations": list(annotations)})

    whole = digest(item, other)
    assert whole == digest(other | {"id": 1}, item | {"id": 9})
    assert whole != digest(item | change, other)
    assert whole != digest(item, other, neg_category_ids=[3])
    assert len(whole) == 16
