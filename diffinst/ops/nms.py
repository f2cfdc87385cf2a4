"""Non-maximum suppression within each class."""

from __future__ import annotations

import torch
from torch import Tensor

from diffinst.ops.library import operators

# Coordinates of all boxes, from which on the classes are gone through one by one instead of being moved apart.
_ONE_BY_ONE_CPU, _ONE_BY_ONE_GPU = 4_000, 100_000


def classwise_nms(boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, *, iou_threshold: float) -> Tensor:
    """Drop each box that overlaps a better one of its class by more than `iou_threshold`.

    Args:
        boxes_xyxy: (D, 4); boxes without area suppress nothing and are never suppressed. Boxes are not clipped before
            (as released), and torchvision moves classes apart by the largest coordinate: a box that lies
            wholly left of or above the image may meet one of the class before.
        scores: (D,).
        labels: (D,) int64.
        iou_threshold: in [0, 1].
    Returns:
        (D',) int64 indices of the kept boxes, best score first. Its length waits for the device.
    """
    return batched_nms(boxes_xyxy.float(), scores, labels, iou_threshold)


def batched_nms(boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    """`torchvision.ops.batched_nms`, to the last index: arguments and result as of `classwise_nms`, of any float type.

    Here because of what importing that one costs, see `diffinst.ops.library`.
    """
    nms = operators().nms
    if not len(boxes_xyxy):
        return labels.new_zeros(0, dtype=torch.int64)
    if boxes_xyxy.numel() <= (_ONE_BY_ONE_CPU if boxes_xyxy.device.type == "cpu" else _ONE_BY_ONE_GPU):
        apart = labels.to(boxes_xyxy) * (boxes_xyxy.max() + 1)
        moved: Tensor = nms(boxes_xyxy + apart[:, None], scores, iou_threshold)
        return moved
    is_kept = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        own = (labels == label).nonzero()[:, 0]
        is_kept[own[nms(boxes_xyxy[own], scores[own], iou_threshold)]] = True
    kept = is_kept.nonzero()[:, 0]
    return kept[scores[kept].argsort(descending=True)]
