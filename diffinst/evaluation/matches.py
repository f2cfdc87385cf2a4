"""Which detections are right, image by image: what average precision is made of, for resampling images.

An evaluator of its own, written from the definition of the COCO numbers (greedy matching by score, one IoU threshold at
a time), so that it also checks the one that the scores come from. IoU itself is pycocotools'.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
# Just below 1, as in pycocotools: a detection must be able to match itself.
_HIGHEST_THRESHOLD = 1 - 1e-10


@dataclass(frozen=True)
class MatchTable:
    """Detections of all images, by category and then by falling score, and whether each is right.

    image_ids: (I,) int64. category_ids: (K,) int64. thresholds: (T,) IoU.
    image: (D,) int32, index into image_ids. category: (D,) int32, index into category_ids, rising. score: (D,) float64.
    matched: (T, D) bool, the detection has found an instance. ignored: (T, D) bool, it counts neither as right nor as
    wrong. num_instances: (K, I) int32 instances to be found.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    thresholds: np.ndarray
    image: np.ndarray
    category: np.ndarray
    score: np.ndarray
    matched: np.ndarray
    ignored: np.ndarray
    num_instances: np.ndarray


def build_matches(
    content: dict[str, Any],
    results: Sequence[dict[str, Any]],
    image_ids: Sequence[int],
    iou_type: str,
    *,
    max_detections: int = 100,
) -> MatchTable:
    """Match detections with the ground truth of their image and category, all sizes.

    Args:
        content: COCO ground truth: 'images' (with sizes, for masks), 'annotations' and 'categories'.
        results: COCO results of these images.
        image_ids: images to evaluate, in the order that breaks ties of score.
        iou_type: 'bbox' or 'segm'.
        max_detections: per image and category, the best by score.
    """
    field = "bbox" if iou_type == "bbox" else "segmentation"
    category_ids = sorted(category["id"] for category in content["categories"])
    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in content["images"]}
    truth: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        truth[annotation["category_id"], annotation["image_id"]].append(annotation)
    found: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        found[result["category_id"], result["image_id"]].append(result)

    num_instances = np.zeros((len(category_ids), len(image_ids)), dtype=np.int32)
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    for category, category_id in enumerate(category_ids):
        of_category: dict[str, list[np.ndarray]] = defaultdict(list)
        for image, image_id in enumerate(image_ids):
            instances = truth.get((category_id, image_id), [])
            is_crowd = np.array([bool(instance.get("iscrowd", 0)) for instance in instances], dtype=bool)
            num_instances[category, image] = (~is_crowd).sum()
            detections = found.get((category_id, image_id))
            if not detections:
                continue
            score = np.array([detection["score"] for detection in detections], dtype=np.float64)
            ranked = np.argsort(-score, kind="stable")[:max_detections]
            regions = [detections[rank][field] for rank in ranked]
            overlaps = _iou(regions, [instance[field] for instance in instances], is_crowd, sizes[image_id], iou_type)
            matched, ignored = match_greedily(overlaps, is_crowd, IOU_THRESHOLDS)
            of_category["score"].append(score[ranked])
            of_category["image"].append(np.full(len(ranked), image, dtype=np.int32))
            of_category["matched"].append(matched)
            of_category["ignored"].append(ignored)
        if not of_category:
            continue
        score = np.concatenate(of_category["score"])
        order = np.argsort(-score, kind="stable")
        parts["score"].append(score[order])
        parts["image"].append(np.concatenate(of_category["image"])[order])
        parts["category"].append(np.full(len(order), category, dtype=np.int32))
        for name in ("matched", "ignored"):
            parts[name].append(np.concatenate(of_category[name], axis=1)[:, order])
    num_thresholds = len(IOU_THRESHOLDS)
    empty = {
        "score": np.zeros(0),
        "image": np.zeros(0, dtype=np.int32),
        "category": np.zeros(0, dtype=np.int32),
        "matched": np.zeros((num_thresholds, 0), dtype=bool),
        "ignored": np.zeros((num_thresholds, 0), dtype=bool),
    }
    joined = {name: np.concatenate([none, *parts[name]], axis=-1) for name, none in empty.items()}
    return MatchTable(
        image_ids=np.array(image_ids, dtype=np.int64),
        category_ids=np.array(category_ids, dtype=np.int64),
        thresholds=IOU_THRESHOLDS,
        num_instances=num_instances,
        **joined,
    )


def match_greedily(overlaps: np.ndarray, is_crowd: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each detection, best score first, takes the instance it overlaps most among those still free.

    An instance is taken before a crowd region, and a crowd region by as many detections as overlap it, which then count
    as neither right nor wrong. Of equal overlaps the later instance is taken, as in pycocotools.

    Args:
        overlaps: (D, G) IoU, detections by falling score.
        is_crowd: (G,) bool.
        thresholds: (T,) least IoU of a match.
    Returns:
        (T, D) bool found an instance or a crowd region; (T, D) bool found a crowd region.
    """
    num_detections, num_regions = overlaps.shape
    matched = np.zeros((len(thresholds), num_detections), dtype=bool)
    ignored = np.zeros_like(matched)
    if not num_regions:
        return matched, ignored
    least = np.minimum(thresholds, _HIGHEST_THRESHOLD)[:, None]
    is_free = np.ones((len(thresholds), num_regions), dtype=bool)
    rows = np.arange(len(thresholds))
    for detection, overlap in enumerate(overlaps):
        is_match = is_free & (overlap >= least)
        if not is_match.any():
            continue
        # Instances win over crowd regions whatever the overlap.
        has_instance = (is_match & ~is_crowd).any(axis=1, keepdims=True)
        eligible = is_match & (is_crowd != has_instance)
        best = num_regions - 1 - np.where(eligible, overlap, -1.0)[:, ::-1].argmax(axis=1)
        has_match = is_match[rows, best]
        matched[:, detection] = has_match
        ignored[:, detection] = has_match & is_crowd[best]
        taken = has_match & ~is_crowd[best]
        is_free[rows[taken], best[taken]] = False
    return matched, ignored


def _iou(
    regions: list[Any],
    instances: list[Any],
    is_crowd: np.ndarray,
    size: tuple[int | None, int | None],
    iou_type: str,
) -> np.ndarray:
    """(D, G) IoU; with a crowd region, the share of the detection that lies in it."""
    if not instances:
        return np.zeros((len(regions), 0))
    if iou_type == "segm":
        regions, instances = [_rle(region, size) for region in regions], [_rle(region, size) for region in instances]
    overlaps = coco_mask.iou(regions, instances, is_crowd.astype(np.uint8).tolist())
    return np.asarray(overlaps, dtype=np.float64).reshape(len(regions), len(instances))


def _rle(segmentation: Any, size: tuple[int | None, int | None]) -> dict[str, Any]:
    """Polygons, uncompressed or compressed RLE as compressed RLE."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, *size)
    return segmentation
