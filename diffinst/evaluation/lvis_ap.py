"""The LVIS numbers: average precision for boxes and masks under federated annotations, as lvis 0.5.3 computes them.

Three things differ from the COCO numbers (arXiv:1908.03195): 300 detections an image count, over all classes; a
detection of a class of whose presence in its image nothing is known is left out, and one of a class that is not
annotated exhaustively there is no mistake if it matches nothing; there are means over rare, common, frequent classes.

Evaluated by hotcoco, whose tables equal those of lvis exactly once what lvis leaves out is left out beforehand: results
and ground truth of area 0 (hotcoco counts an empty mask as a mistake).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import hotcoco
import hotcoco.mask
import numpy as np

from diffinst.data.lvis import Frequency, LvisAnnotations, parse_lvis, read_lvis
from diffinst.evaluation.coco_ap import (
    IOU_TYPES,
    CocoScores,
    IouType,
    Scorable,
    check_categories,
    check_images,
    ground_truth,
    mean_defined,
    unique_names,
    why_not_scored,
)
from diffinst.evaluation.predictions import Record, to_coco_results

MAX_DETECTIONS = 300
_IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_SIZES = ("all", "small", "medium", "large")  # in the order of the tables
_FREQUENCY_WORDS = {"r": "rare", "c": "common", "f": "frequent"}

# name -> (IoU threshold or None for all, size, frequency of the classes or None for all)
_METRICS: dict[str, tuple[float | None, str, Frequency | None]] = {
    "AP": (None, "all", None),
    "AP50": (0.5, "all", None),
    "AP75": (0.75, "all", None),
    "APs": (None, "small", None),
    "APm": (None, "medium", None),
    "APl": (None, "large", None),
    "APr": (None, "all", "r"),
    "APc": (None, "all", "c"),
    "APf": (None, "all", "f"),
}
METRIC_NAMES = tuple(f"{iou_type}/{name}" for iou_type in IOU_TYPES for name in _METRICS)


def score_lvis(
    annotations: str | Path | dict[str, Any],
    predictions: Iterable[Record],
    *,
    iou_types: Sequence[IouType] = IOU_TYPES,
    image_ids: Iterable[int] | None = None,
    skip_invalid: bool = False,
) -> CocoScores:
    """Score predictions against an LVIS annotation file.

    `per_class` has the classes with ground truth only.

    Args:
        annotations, predictions, iou_types, image_ids, skip_invalid: as for `coco_ap.score_coco`.

    Raises:
        DataError: the ground truth is malformed or has no areas, or predictions of other images or categories.
    """
    scorable = prepare_lvis(annotations, predictions, image_ids=image_ids, skip_invalid=skip_invalid)
    return evaluate_lvis(scorable, iou_types)


def prepare_lvis(
    annotations: str | Path | dict[str, Any],
    predictions: Iterable[Record],
    *,
    image_ids: Iterable[int] | None = None,
    skip_invalid: bool = False,
) -> Scorable:
    """Read and check what is to be scored; arguments and errors are those of `score_lvis`."""
    if isinstance(annotations, dict):
        truth = parse_lvis(annotations, "annotations", skip_invalid=skip_invalid)
    else:
        truth = read_lvis(annotations, skip_invalid=skip_invalid)
    ids = sorted(truth.images) if image_ids is None else sorted(set(image_ids))
    records = list(predictions)
    check_images(truth, ids, records)
    content = _federated_truth(truth, ids)
    results = to_coco_results(records)
    check_categories(truth, content, results)
    return Scorable(content, _best_of_each_image(results), ids, why_not_scored(truth, records))


def evaluate_lvis(scorable: Scorable, iou_types: Sequence[IouType] = IOU_TYPES) -> CocoScores:
    """The scores of what `prepare_lvis` has read."""
    content = scorable.content
    metrics: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    per_class: dict[str, dict[str, float | None]] = {}
    groups = [category["frequency"] for category in content["categories"]]
    for iou_type in iou_types:
        missing = scorable.missing.get(iou_type)
        if missing:
            metrics |= {f"{iou_type}/{name}": None for name in _METRICS}
            reasons |= {f"{iou_type}/{name}": missing for name in _METRICS}
            per_class[iou_type] = {}
            continue
        precision = _evaluate(content, scorable.results, iou_type)
        for name, (threshold, size, frequency) in _METRICS.items():
            part = precision[..., _SIZES.index(size)]
            if threshold is not None:
                part = part[np.isclose(_IOU_THRESHOLDS, threshold)]
            if frequency is not None:
                part = part[..., [group == frequency for group in groups]]
            value = mean_defined(part)
            metrics[f"{iou_type}/{name}"] = value
            if value is None:
                of_size = "" if size == "all" else f" of size '{size}'"
                of_group = "" if frequency is None else f" of {_FREQUENCY_WORDS[frequency]} classes"
                reasons[f"{iou_type}/{name}"] = f"no ground truth{of_size}{of_group}"
        by_class = {
            name: mean_defined(precision[:, :, position, 0])
            for position, name in enumerate(unique_names(content["categories"]))
        }
        per_class[iou_type] = {name: value for name, value in by_class.items() if value is not None}
    return CocoScores(metrics, reasons, per_class, len(scorable.image_ids), len(content["annotations"]))


def _federated_truth(truth: LvisAnnotations, ids: list[int]) -> dict[str, Any]:
    content = ground_truth(truth, ids)
    content["annotations"] = [annotation for annotation in content["annotations"] if annotation["area"] > 0]
    for image in content["images"]:
        image["neg_category_ids"] = sorted(truth.negative[image["id"]])
        image["not_exhaustive_category_ids"] = sorted(truth.not_exhaustive[image["id"]])
    for category in content["categories"]:
        category["frequency"] = truth.frequency[category["id"]]
    return content


def _best_of_each_image(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The highest scores of each image, of equal ones those that come first; `results` are sorted by image."""
    kept: list[dict[str, Any]] = []
    for _, group in groupby(results, key=lambda result: result["image_id"]):
        of_image = list(group)
        if len(of_image) > MAX_DETECTIONS:
            of_image = sorted(of_image, key=lambda result: -result["score"])[:MAX_DETECTIONS]
        kept += of_image
    return kept


def _evaluate(content: dict[str, Any], results: list[dict[str, Any]], iou_type: IouType) -> np.ndarray:
    """Precision (T, R, K, A): IoU thresholds, recalls, classes, sizes; -1 where there is no ground truth."""
    field: Literal["bbox", "segmentation"] = "bbox" if iou_type == "bbox" else "segmentation"
    # A result with a box and a mask would be sorted into the size bins by its box.
    results = [
        {"image_id": item["image_id"], "category_id": item["category_id"], "score": item["score"], field: item[field]}
        for item in results
    ]
    if field == "bbox":
        results = [item for item in results if item["bbox"][2] * item["bbox"][3] > 0]
    elif results:
        # Of hotcoco: that of pycocotools fails on more than 255 masks with NumPy 2.
        areas = hotcoco.mask.area([item["segmentation"] for item in results])
        results = [item for item, area in zip(results, areas) if area > 0]
    truth = hotcoco.COCO(content)
    evaluator = hotcoco.LVISeval(truth, truth.load_res(results), iou_type)
    evaluator.params.img_ids = [image["id"] for image in content["images"]]
    evaluator.params.cat_ids = [category["id"] for category in content["categories"]]
    evaluator.evaluate()
    evaluator.accumulate()
    tables = evaluator.eval
    assert tables is not None  # accumulate has just filled it
    return np.asarray(tables["precision"])[..., 0]
