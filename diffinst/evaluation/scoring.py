"""Scores of a split, in the way that belongs to its annotations: COCO's or LVIS's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from diffinst.config import DataConfig
from diffinst.data.catalog import annotation_format
from diffinst.evaluation import coco_ap, lvis_ap
from diffinst.evaluation.coco_ap import IOU_TYPES, CocoScores, IouType, Scorable
from diffinst.evaluation.matches import MatchTable, build_size_matches
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
    return evaluate(data, prepare(data, annotations, predictions, image_ids=image_ids), iou_types)


def prepare(
    data: DataConfig, annotations: str | Path, predictions: Iterable[Record], *, image_ids: Iterable[int] | None = None
) -> Scorable:
    """Read and check what is to be scored, once for all evaluators; arguments as for `score_split`."""
    if annotation_format(data) == "lvis":
        return lvis_ap.prepare_lvis(annotations, predictions, image_ids=image_ids, skip_invalid=data.skip_invalid)
    return coco_ap.prepare_coco(
        annotations,
        predictions,
        class_agnostic=data.class_agnostic,
        image_ids=image_ids,
        skip_invalid=data.skip_invalid,
    )


def evaluate(data: DataConfig, scorable: Scorable, iou_types: Sequence[IouType] = IOU_TYPES) -> CocoScores:
    """The scores of what `prepare` has read."""
    run = lvis_ap.evaluate_lvis if annotation_format(data) == "lvis" else coco_ap.evaluate_coco
    return run(scorable, iou_types)


def match(data: DataConfig, scorable: Scorable, iou_type: IouType) -> dict[str, MatchTable]:
    """Match tables by size ('all', 'small', 'medium', 'large') of what `prepare` has read."""
    is_lvis = annotation_format(data) == "lvis"
    # Of LVIS, the best of an image over all its categories are left already.
    limit = lvis_ap.MAX_DETECTIONS if is_lvis else max(coco_ap.MAX_DETECTIONS)
    return build_size_matches(
        scorable.content,
        scorable.results,
        scorable.image_ids,
        iou_type,
        max_detections=limit,
        federated=is_lvis,
    )
