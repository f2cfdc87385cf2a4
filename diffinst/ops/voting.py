"""Merging detections of one image that were made several times: boxes that overlap vote on where the box is."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffinst.ops.boxes import box_iou
from diffinst.ops.nms import batched_nms

# Soft voting drops what is left of a box once its score is below this (a constant of the release).
MIN_SOFT_SCORE = 0.05

# Overlaps of boxes with cluster heads that are alive at once (64 MiB in float64).
_MAX_OVERLAPS = 2**23


class Votes(NamedTuple):
    """Merged detections, best score first.

    boxes_xyxy: (V, 4). scores: (V,). labels: (V,) int64. source: (V,) int64, of the given detections the one that each
    stands for: the best of its cluster, or in soft voting a member that stays itself.
    """

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor
    source: Tensor


def vote(boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, *, iou_threshold: float) -> Votes:
    """One box for each cluster: the mean of its boxes, weighted by score, with the best score.

    A cluster is the best box that is in none yet, and all boxes of its class in none yet that overlap it by
    `iou_threshold` or more. So its best boxes are those that non-maximum suppression keeps, and each other box belongs
    to the first of them that it overlaps so far: no loop over clusters is needed.

    Args:
        boxes_xyxy: (D, 4), any one unit.
        scores: (D,) in [0, 1].
        labels: (D,) int64.
        iou_threshold: in [0, 1]; boxes that do not overlap at all never vote together.
    Returns:
        One detection per cluster.
    """
    return _merge(boxes_xyxy, scores, labels, iou_threshold, soft=False)


def soft_vote(boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, *, iou_threshold: float) -> Votes:
    """As `vote`; beside each cluster's box its other members stay, with scores multiplied by 1 - IoU with the best one.

    Those whose score falls below `MIN_SOFT_SCORE` are dropped. (A mean of Soft-NMS, arXiv:1704.04503, and box voting,
    arXiv:1505.01749: neighbours hidden in a cluster are not lost.)
    """
    return _merge(boxes_xyxy, scores, labels, iou_threshold, soft=True)


def _merge(boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, *, soft: bool) -> Votes:
    if len(boxes_xyxy) == 0:
        return Votes(boxes_xyxy, scores, labels, labels)
    # In float64 a comparison with the threshold means what it says, also where suppression moves classes far apart.
    boxes, weights = boxes_xyxy.double(), scores.double()
    heads, cluster, overlap = _clusters(boxes, weights, labels, iou_threshold)
    total = weights.new_zeros(len(heads)).index_add(0, cluster, weights)
    summed = boxes.new_zeros(len(heads), 4).index_add(0, cluster, boxes * weights[:, None])
    mean = torch.where(total[:, None] > 0, summed / total[:, None], boxes[heads])
    merged_scores, source = weights[heads], heads
    if soft:
        softened = weights * (1 - overlap)  # a head overlaps itself by 1, so it does not stay a second time
        stay = (softened >= MIN_SOFT_SCORE).nonzero().squeeze(1)
        mean, merged_scores = torch.cat([mean, boxes[stay]]), torch.cat([merged_scores, softened[stay]])
        source = torch.cat([source, stay])
    order = merged_scores.argsort(descending=True, stable=True)
    source = source[order]
    return Votes(mean[order].to(boxes_xyxy.dtype), merged_scores[order].to(scores.dtype), labels[source], source)


def _clusters(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster heads (C,), best first; of each box its cluster (D,) and IoU with the head of that (D,)."""
    # Suppression asks for more than its threshold, clusters for at least as much.
    below = math.nextafter(iou_threshold, 0.0)
    heads = batched_nms(boxes, scores, labels, below)
    cluster, overlap = torch.zeros_like(labels), torch.ones_like(scores)
    cluster[heads] = torch.arange(len(heads), device=boxes.device)
    is_member = torch.ones_like(labels, dtype=torch.bool)
    is_member[heads] = False
    for rows in is_member.nonzero().squeeze(1).split(max(1, _MAX_OVERLAPS // len(heads))):
        ious = torch.where(labels[rows, None] == labels[heads], box_iou(boxes[rows], boxes[heads]), -1.0)
        joins = ious > below
        # The first it overlaps enough; where rounding says there is none, the one it overlaps most.
        cluster[rows] = torch.where(joins.any(dim=1), joins.int().argmax(dim=1), ious.argmax(dim=1))
        overlap[rows] = ious.gather(1, cluster[rows, None]).squeeze(1)
    return heads, cluster, overlap
