"""Scores of a split, in the way that belongs to its annotations: COCO's or LVIS's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from diffinst.config import DataConfig
from diffinst.data.catalog import annotation_format
from diffinst.evaluation import coco_ap, lvis_ap
from diffinst.evaluation.coco_ap import IOU_TYPES, CocoScores, IouType
from diffinst.evaluation.predictions import Record


def metric_names(data: DataConfig) -> tuple[str, ...]:
    """What `score_split` computes, all IoU types included: 'bbox/AP', ..."""
    return lvis_ap.METRIC_NAMES if annotation_format(data) == "lvis" else coco_ap.METRIC_NAMES


def score_split(
    data: DataConfig,
    annotations: str | Path,
    predictions: Iterable[Record],
    *,
    iou_types: Sequence[IouType] = IOU_TYPES,
    image_ids: Iterable[int] | None = None,
) -> CocoScores:
    """Score predictions; see `coco_ap.score_coco` and `lvis_ap.score_lvis`.

    Args:
        data: the data set; what it says of classes and of malformed annotations is followed.
    """
    if annotation_format(data) == "lvis":
        return lvis_ap.score_lvis(
            annotations, predictions, iou_types=iou_types, image_ids=image_ids, skip_invalid=data.skip_invalid
        )
    return coco_ap.score_coco(
        annotations,
        predictions,
        iou_types=iou_types,
        class_agnostic=data.class_agnostic,
        image_ids=image_ids,
        skip_invalid=data.skip_invalid,
    )
