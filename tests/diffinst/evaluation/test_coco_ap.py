from __future__ import annotations

import contextlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import block, block_mask, rle_of
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from diffinst.errors import DataError
from diffinst.evaluation.coco_ap import METRIC_NAMES, CocoScores, score_coco
from diffinst.evaluation.predictions import to_coco_results

SIZE = (120, 160)
Box = tuple[int, int, int, int]
NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def _truth(*annotations: Any, num_images: int = 1) -> dict[str, Any]:
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]} for i in range(num_images)],
        "categories": [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}],
        "annotations": list(annotations),
    }


def _record(image_id: int, *detections: tuple[int, float, Box], masks: bool = True) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "category_id": [category for category, _, _ in detections],
        "score": [score for _, score, _ in detections],
        "bbox": [[x1, y1, x2 - x1, y2 - y1] for _, _, (x1, y1, x2, y2) in detections],
        "segmentation": [rle_of(block_mask(SIZE, box)) for _, _, box in detections] if masks else None,
    }


# By hand


def test_one_perfect_detection() -> None:
    scores = score_coco(_truth(block(1, 0, 3, (10, 10, 50, 50))), [_record(0, (3, 0.9, (10, 10, 50, 50)))])
    assert tuple(scores.metrics) == METRIC_NAMES
    for kind in ("bbox", "segm"):
        for name in NAMES:
            # 40 x 40 = 1600 pixels lie between 32^2 and 96^2: of medium size
            expected = None if name in {"APs", "APl", "ARs", "ARl"} else pytest.approx(1.0)
            assert scores.metrics[f"{kind}/{name}"] == expected
        assert scores.reasons[f"{kind}/APs"] == "no ground truth of size 'small'"
        assert scores.per_class[kind] == {"dog": pytest.approx(1.0), "cat": None}
    assert scores.reasons.keys() == {name for name, value in scores.metrics.items() if value is None}
    assert (scores.num_images, scores.num_instances) == (1, 1)
    json.dumps(scores.as_dict())


def test_an_iou_of_seven_tenths() -> None:
    """A detection of 40 x 28 inside a box of 40 x 40 has IoU 0.7: right at thresholds .5 to .65, and at .7 (>=)."""
    scores = score_coco(_truth(block(1, 0, 3, (10, 10, 50, 50))), [_record(0, (3, 0.9, (10, 10, 50, 38)))])
    for kind in ("bbox", "segm"):
        assert scores.metrics[f"{kind}/AP"] == pytest.approx(0.5)
        assert scores.metrics[f"{kind}/AP50"] == pytest.approx(1.0)
        assert scores.metrics[f"{kind}/AP75"] == 0.0


def test_a_false_positive_ranked_first() -> None:
    """Precision is 1/2 at every recall."""
    record = _record(0, (3, 0.9, (100, 80, 140, 110)), (3, 0.8, (10, 10, 50, 50)))
    scores = score_coco(_truth(block(1, 0, 3, (10, 10, 50, 50))), [record])
    assert scores.metrics["bbox/AP"] == pytest.approx(0.5)
    assert scores.metrics["bbox/AR1"] == 0.0
    assert scores.metrics["bbox/AR10"] == pytest.approx(1.0)


def test_masks_are_not_scored_as_boxes() -> None:
    """A mask that fills half of its box: box AP 1, mask IoU 1/2 at best."""
    record = _record(0, (3, 0.9, (10, 10, 50, 50)))
    record["segmentation"] = [rle_of(block_mask(SIZE, (10, 10, 30, 50)))]
    scores = score_coco(_truth(block(1, 0, 3, (10, 10, 50, 50))), [record])
    assert scores.metrics["bbox/AP"] == pytest.approx(1.0)
    assert scores.metrics["segm/AP"] == pytest.approx(0.1)  # right at 0.5 only
    assert scores.metrics["segm/AP50"] == pytest.approx(1.0)


def test_the_size_of_a_mask_result_is_that_of_its_mask() -> None:
    """A small false positive with a box of medium size counts as small, so that medium AP is untouched."""
    record = _record(0, (3, 0.9, (10, 10, 70, 70)), (3, 0.8, (10, 10, 50, 50)))
    record["segmentation"][0] = rle_of(block_mask(SIZE, (100, 100, 110, 110)))
    scores = score_coco(_truth(block(1, 0, 3, (10, 10, 50, 50))), [record])
    assert scores.metrics["segm/APm"] == pytest.approx(1.0)
    assert scores.metrics["segm/AP"] == pytest.approx(0.5)


def test_annotation_id_zero_counts() -> None:
    """pycocotools takes a match with annotation 0 for none."""
    scores = score_coco(_truth(block(0, 0, 3, (10, 10, 50, 50))), [_record(0, (3, 0.9, (10, 10, 50, 50)))])
    assert scores.metrics["segm/AP"] == pytest.approx(1.0)


def test_class_agnostic() -> None:
    truth = _truth(block(1, 0, 3, (10, 10, 50, 50)), block(2, 0, 7, (60, 10, 100, 50)))
    record = _record(0, (7, 0.9, (10, 10, 50, 50)), (7, 0.8, (60, 10, 100, 50)))
    by_class = score_coco(truth, [record])
    assert by_class.per_class["bbox"] == {"dog": 0.0, "cat": pytest.approx(0.5)}
    agnostic = score_coco(truth, [record], class_agnostic=True)
    assert agnostic.per_class["bbox"] == {"object": pytest.approx(1.0)}
    assert agnostic.metrics["segm/AP"] == pytest.approx(1.0)
    labelled_so = score_coco(truth, [record | {"category_id": [1, 1]}], class_agnostic=True)
    assert labelled_so == agnostic


# Against pycocotools


def _scene(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Twelve images: ground truth of all sizes, crowds, near misses, false positives, equal scores, empty images."""
    draws = np.random.default_rng(seed)
    annotations: list[Any] = []
    records = []
    for image_id in range(12):
        detections: list[tuple[int, float, Box]] = []
        for _ in range(int(draws.integers(0, 6)) if image_id % 5 else 0):
            width, height = (int(side) for side in draws.integers(4, 115, 2))
            x, y = int(draws.integers(0, SIZE[1] - width + 1)), int(draws.integers(0, SIZE[0] - height + 1))
            box = (x, y, x + width, y + height)
            category = int(draws.choice([3, 7]))
            crowd = draws.random() < 0.15
            changes: dict[str, Any] = {"iscrowd": 1, "segmentation": rle_of(block_mask(SIZE, box))} if crowd else {}
            annotations.append(block(len(annotations) + 1, image_id, category, box, **changes))
            for _ in range(int(draws.integers(0, 4))):
                dx, dy = (int(shift) for shift in draws.integers(-4, 5, 2))
                moved = (
                    min(max(x + dx, 0), SIZE[1] - 2),
                    min(max(y + dy, 0), SIZE[0] - 2),
                    min(x + width + dx, SIZE[1]),
                    min(y + height + dy, SIZE[0]),
                )
                if moved[0] < moved[2] and moved[1] < moved[3]:
                    label = category if draws.random() < 0.8 else 10 - category
                    detections.append((label, float(np.float32(draws.integers(1, 20) / 20)), moved))
        for _ in range(int(draws.integers(0, 3))):
            detections.append((3, float(draws.random()), (5, 5, 30, 60)))
        records.append(_record(image_id, *detections))
    return _truth(*annotations, num_images=12), records


def _pycocotools(
    truth: dict[str, Any], records: list[dict[str, Any]], kind: str, ids: list[int]
) -> tuple[np.ndarray, dict[str, float]]:
    dropped = "bbox" if kind == "segm" else "segmentation"
    results = [{key: value for key, value in result.items() if key != dropped} for result in to_coco_results(records)]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools 2.0.11 on NumPy 2
        reference = COCO()
        reference.dataset = json.loads(json.dumps(truth))
        reference.createIndex()
        evaluator = COCOeval(reference, reference.loadRes(results), kind)
        evaluator.params.imgIds = ids
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    precision = evaluator.eval["precision"]
    per_class = {}
    for position, category in enumerate(evaluator.params.catIds):
        values = precision[:, :, position, 0, 2]
        per_class[reference.cats[category]["name"]] = float(values[values > -1].mean()) if (values > -1).any() else -1
    return evaluator.stats, per_class


def _assert_equal(scores: CocoScores, kind: str, stats: np.ndarray, per_class: dict[str, float]) -> None:
    for name, expected in zip(NAMES, stats):
        value = scores.metrics[f"{kind}/{name}"]
        assert (-1 if value is None else value) == pytest.approx(expected, abs=1e-9), (kind, name)
    for name, expected in per_class.items():
        value = scores.per_class[kind][name]
        assert (-1 if value is None else value) == pytest.approx(expected, abs=1e-9), (kind, name)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(6))
def test_equal_to_pycocotools(seed: int, kind: str) -> None:
    truth, records = _scene(seed)
    scores = score_coco(truth, records)
    assert 0 < (scores.metrics[f"{kind}/AP"] or 0) < 1
    _assert_equal(scores, kind, *_pycocotools(truth, records, kind, [*range(12)]))


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_equal_to_pycocotools_on_some_images(kind: str) -> None:
    truth, records = _scene(1)
    ids = [1, 4, 8, 11]
    chosen = [records[i] for i in ids]
    scores = score_coco(truth, chosen, image_ids=ids)
    assert scores.num_images == 4
    _assert_equal(scores, kind, *_pycocotools(truth, chosen, kind, ids))


def test_the_order_of_records_does_not_matter() -> None:
    truth, records = _scene(2)
    assert score_coco(truth, records[::-1]) == score_coco(truth, records)


def test_more_than_a_hundred_detections() -> None:
    """Only the best hundred an image and class count."""
    detections = [(3, 0.5 + 0.001 * i, (100, 80, 140, 110)) for i in range(100)] + [(3, 0.1, (10, 10, 50, 50))]
    truth = _truth(block(1, 0, 3, (10, 10, 50, 50)))
    assert score_coco(truth, [_record(0, *detections)]).metrics["bbox/AP"] == 0.0
    assert (score_coco(truth, [_record(0, *detections[1:])]).metrics["bbox/AP"] or 0) > 0


# Nothing there


def test_nothing_detected() -> None:
    scores = score_coco(_truth(block(1, 0, 3, (10, 10, 50, 50))), [_record(0)])
    assert scores.metrics["segm/AP"] == 0.0
    assert scores.metrics["segm/AR100"] == 0.0
    assert scores.metrics["segm/APl"] is None


def test_no_ground_truth() -> None:
    scores = score_coco(_truth(), [_record(0, (3, 0.5, (1, 1, 5, 5)))])
    assert set(scores.metrics.values()) == {None}
    assert scores.reasons["bbox/AP"] == "no ground truth"
    assert scores.num_instances == 0


def test_neither() -> None:
    assert set(score_coco(_truth(), [_record(0)]).metrics.values()) == {None}


def test_predictions_without_masks() -> None:
    truth = _truth(block(1, 0, 3, (10, 10, 50, 50)))
    scores = score_coco(truth, [_record(0, (3, 0.9, (10, 10, 50, 50)), masks=False)])
    assert scores.metrics["bbox/AP"] == pytest.approx(1.0)
    assert {value for name, value in scores.metrics.items() if name.startswith("segm/")} == {None}
    assert scores.reasons["segm/AP"] == "the predictions have no masks"
    only_boxes = score_coco(truth, [_record(0, masks=False)], iou_types=["bbox"])
    assert all(name.startswith("bbox/") for name in only_boxes.metrics)


def test_ground_truth_without_masks() -> None:
    truth = _truth(block(1, 0, 3, (10, 10, 50, 50), segmentation=...))
    scores = score_coco(truth, [_record(0, (3, 0.9, (10, 10, 50, 50)))])
    assert scores.metrics["bbox/AP"] == pytest.approx(1.0)
    assert scores.reasons["segm/AP"] == "the ground truth has no masks"


def test_classes_of_one_name_are_told_apart() -> None:
    truth = _truth(block(1, 0, 3, (10, 10, 50, 50)))
    truth["categories"][1]["name"] = "dog"
    assert score_coco(truth, [_record(0)]).per_class["bbox"] == {"dog (3)": 0.0, "dog (7)": None}


# What does not belong together


def test_incomplete_and_foreign_predictions(tmp_path: Path) -> None:
    truth = _truth(block(1, 0, 3, (10, 10, 50, 50)), num_images=3)
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    records = [_record(i) for i in range(3)]
    assert score_coco(path, records).num_images == 3
    with pytest.raises(
        DataError, match=r"predictions of image 1 are missing \(2 of 3 images of .*truth.json have none\)"
    ):
        score_coco(path, records[:1])
    with pytest.raises(DataError, match=r"predictions of image 9 are not of an image to be scored"):
        score_coco(path, [*records, _record(9)])
    with pytest.raises(DataError, match=r"predictions of image 2 are not of an image"):
        score_coco(path, records, image_ids=[0, 1])
    with pytest.raises(DataError, match=r"image 1 has 2 prediction records"):
        score_coco(path, [*records, records[1]])
    with pytest.raises(DataError, match=r"truth.json: image 5 is to be scored but not in this file \(1 of 2 are not\)"):
        score_coco(path, records, image_ids=[0, 5])
    foreign = _record(0, (4, 0.5, (1, 1, 5, 5)))
    with pytest.raises(DataError, match=r"image 0: category id 4 is not listed in .*truth.json"):
        score_coco(path, [foreign, *records[1:]])


def test_malformed_ground_truth() -> None:
    truth = _truth(block(1, 0, 3, (10, 10, 50, 50)), block(2, 0, 3, (1, 1, 5, 5), bbox=[1, 1, 0, 4]))
    with pytest.raises(DataError, match="annotation 2 .*zero width"):
        score_coco(truth, [_record(0)])
    assert score_coco(truth, [_record(0)], skip_invalid=True).num_instances == 1
    with pytest.raises(DataError, match=r"annotation 1 \(image 0\): has no 'area'"):
        score_coco(_truth(block(1, 0, 3, (10, 10, 50, 50), area=...)), [_record(0)])
