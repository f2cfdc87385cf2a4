"""The COCO numbers: average precision and recall for boxes and masks, as pycocotools computes them.

Evaluated by hotcoco, whose precision and recall tables equal pycocotools' exactly; the means over them are taken here.
Two traps of the COCO tools are avoided: ground truth is renumbered from 1 (pycocotools, not hotcoco, takes a match with
annotation 0 for none), and mask results are handed over without their boxes (else size bins go by box area).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import hotcoco
import numpy as np

from diffinst.data.annotations import (
    CLASS_AGNOSTIC_NAME,
    CocoAnnotations,
    parse_annotations,
    read_annotations,
)
from diffinst.errors import DataError
from diffinst.evaluation.predictions import Record, to_coco_results

IouType = Literal["bbox", "segm"]
IOU_TYPES: tuple[IouType, ...] = ("bbox", "segm")

MAX_DETECTIONS = (1, 10, 100)
_IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_SIZES = ("all", "small", "medium", "large")  # areas below 32**2, below 96**2, above; in the order of the tables

# name -> (table, IoU threshold or None for all, size, detections an image)
_METRICS: dict[str, tuple[Literal["precision", "recall"], float | None, str, int]] = {
    "AP": ("precision", None, "all", 100),
    "AP50": ("precision", 0.5, "all", 100),
    "AP75": ("precision", 0.75, "all", 100),
    "APs": ("precision", None, "small", 100),
    "APm": ("precision", None, "medium", 100),
    "APl": ("precision", None, "large", 100),
    "AR1": ("recall", None, "all", 1),
    "AR10": ("recall", None, "all", 10),
    "AR100": ("recall", None, "all", 100),
    "ARs": ("recall", None, "small", 100),
    "ARm": ("recall", None, "medium", 100),
    "ARl": ("recall", None, "large", 100),
}
METRIC_NAMES = tuple(f"{iou_type}/{name}" for iou_type in IOU_TYPES for name in _METRICS)


@dataclass(frozen=True)
class CocoScores:
    """Scores of a set of predictions; every value is a fraction in [0, 1].

    metrics: by name ("bbox/AP", ..., "segm/ARl"); None where undefined, and then `reasons` says why.
    per_class: AP by IoU type and class name; None where the class has no ground truth.
    num_instances: ground truth that is not a crowd.
    """

    metrics: dict[str, float | None]
    reasons: dict[str, str]
    per_class: dict[str, dict[str, float | None]]
    num_images: int
    num_instances: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a json file."""
        return asdict(self)


def score_coco(
    annotations: str | Path | dict[str, Any],
    predictions: Iterable[Record],
    *,
    iou_types: Sequence[IouType] = IOU_TYPES,
    class_agnostic: bool = False,
    image_ids: Iterable[int] | None = None,
    skip_invalid: bool = False,
) -> CocoScores:
    """Score predictions against a COCO annotation file.

    Args:
        annotations: path of the json file, or its content.
        predictions: one record for each scored image (`predictions.iter_predictions`), also where nothing was detected.
        class_agnostic: all categories count as one, in ground truth and predictions.
        image_ids: the images to score; None for all of the file.
        skip_invalid: leave out malformed ground truth instead of stopping.

    Raises:
        DataError: the ground truth is malformed or has no areas, or predictions of other images or categories.
    """
    if isinstance(annotations, dict):
        truth = parse_annotations(annotations, "annotations", skip_invalid=skip_invalid)
    else:
        truth = read_annotations(annotations, skip_invalid=skip_invalid)
    ids = sorted(truth.images) if image_ids is None else sorted(set(image_ids))
    records = list(predictions)
    check_images(truth, ids, records)
    content = ground_truth(truth, ids, class_agnostic=class_agnostic)
    results = to_coco_results(records)
    if class_agnostic:
        results = [{**result, "category_id": 1} for result in results]
    check_categories(truth, content, results)

    metrics: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    per_class: dict[str, dict[str, float | None]] = {}
    for iou_type in iou_types:
        missing = why_not_scored(iou_type, truth, records)
        if missing:
            metrics |= {f"{iou_type}/{name}": None for name in _METRICS}
            reasons |= {f"{iou_type}/{name}": missing for name in _METRICS}
            per_class[iou_type] = {}
            continue
        tables = _evaluate(content, results, ids, iou_type)
        for name, (kind, threshold, size, limit) in _METRICS.items():
            value = mean_defined(_select(tables[kind], threshold, size, limit))
            metrics[f"{iou_type}/{name}"] = value
            if value is None:
                reasons[f"{iou_type}/{name}"] = "no ground truth" + ("" if size == "all" else f" of size '{size}'")
        precision = _select(tables["precision"], None, "all", 100)
        per_class[iou_type] = {
            name: mean_defined(precision[:, :, position])
            for position, name in enumerate(unique_names(content["categories"]))
        }
    num_instances = sum(not annotation["iscrowd"] for annotation in content["annotations"])
    return CocoScores(metrics, reasons, per_class, len(ids), num_instances)


def check_images(truth: CocoAnnotations, ids: list[int], records: list[Record]) -> None:
    """Refuse ids that are not in the file, and records that are not one for each id."""
    unknown = [image_id for image_id in ids if image_id not in truth.images]
    if unknown:
        raise DataError(
            f"{truth.source}: image {unknown[0]} is to be scored but not in this file ({len(unknown)} of {len(ids)} "
            "are not); give the annotations that belong to the id list"
        )
    found = Counter(record["image_id"] for record in records)
    missing = [image_id for image_id in ids if image_id not in found]
    if missing:
        raise DataError(
            f"predictions of image {missing[0]} are missing ({len(missing)} of {len(ids)} images of {truth.source} "
            "have none); finish the prediction, or restrict the image ids"
        )
    extra = sorted(set(found) - set(ids))
    if extra:
        raise DataError(
            f"predictions of image {extra[0]} are not of an image to be scored ({len(extra)} are not); they belong to "
            f"another split or data set than {truth.source}"
        )
    twice = [image_id for image_id, count in found.items() if count > 1]
    if twice:
        raise DataError(f"image {twice[0]} has {found[twice[0]]} prediction records; give one an image")


def ground_truth(truth: CocoAnnotations, ids: list[int], *, class_agnostic: bool = False) -> dict[str, Any]:
    """The content of a COCO file with these images only; annotation ids count from 1."""
    annotations: list[dict[str, Any]] = []
    for image_id in ids:
        for item in truth.instances.get(image_id, ()):
            if item.area is None:
                raise DataError(
                    f"{truth.source}: annotation {item.id} (image {image_id}): has no 'area', which the size bins of "
                    "the COCO numbers go by; add it (pixels of the mask)"
                )
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": 1 if class_agnostic else item.category_id,
                "bbox": list(item.bbox),
                "area": item.area,
                "iscrowd": int(item.is_crowd),
            }
            if item.segmentation is not None:
                annotation["segmentation"] = item.segmentation
            annotations.append(annotation)
    categories = {1: CLASS_AGNOSTIC_NAME} if class_agnostic else truth.categories
    return {
        "images": [{"id": i, "height": truth.images[i].height, "width": truth.images[i].width} for i in ids],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
    }


def check_categories(truth: CocoAnnotations, content: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Refuse results of categories that the content does not list."""
    allowed = {category["id"] for category in content["categories"]}
    for result in results:
        if result["category_id"] not in allowed:
            raise DataError(
                f"predictions of image {result['image_id']}: category id {result['category_id']} is not listed in "
                f"{truth.source}; they were made with another data set"
            )


def why_not_scored(iou_type: IouType, truth: CocoAnnotations, records: list[Record]) -> str | None:
    """What is missing for scores of this kind, if anything is."""
    if iou_type == "segm" and any(record["segmentation"] is None for record in records):
        return "the predictions have no masks"
    if iou_type == "segm" and not truth.has_masks:
        return "the ground truth has no masks"
    return None


def _evaluate(
    content: dict[str, Any], results: list[dict[str, Any]], ids: list[int], iou_type: IouType
) -> dict[str, np.ndarray]:
    """Precision (T, R, K, A, L) and recall (T, K, A, L): IoU thresholds, recalls, classes, sizes, detection limits."""
    dropped = "bbox" if iou_type == "segm" else "segmentation"
    results = [{key: value for key, value in result.items() if key != dropped} for result in results]
    truth = hotcoco.COCO(content)
    evaluator = hotcoco.COCOeval(truth, truth.load_res(results), iou_type)
    evaluator.params.img_ids = ids
    evaluator.params.cat_ids = [category["id"] for category in content["categories"]]
    evaluator.params.max_dets = list(MAX_DETECTIONS)
    evaluator.evaluate()
    evaluator.accumulate()
    tables = evaluator.eval
    assert tables is not None  # accumulate has just filled it
    return {"precision": np.asarray(tables["precision"]), "recall": np.asarray(tables["recall"])}


def _select(table: np.ndarray, threshold: float | None, size: str, limit: int) -> np.ndarray:
    """The part of a table for one IoU threshold (None: all), size and detection limit; leading axes kept."""
    part = table[..., _SIZES.index(size), MAX_DETECTIONS.index(limit)]
    return part if threshold is None else part[np.isclose(_IOU_THRESHOLDS, threshold)]


def mean_defined(values: np.ndarray) -> float | None:
    """Mean over the defined entries; the tables hold -1 where there is no ground truth."""
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else None


def unique_names(categories: list[dict[str, Any]]) -> list[str]:
    """Names in the order of the categories, with the id where a name is there twice."""
    counts = Counter(category["name"] for category in categories)
    return [
        category["name"] if counts[category["name"]] == 1 else f"{category['name']} ({category['id']})"
        for category in categories
    ]
