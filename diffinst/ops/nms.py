"""Non-maximum suppression within each class."""

from __future__ import annotations

from torch import Tensor
from torchvision.ops import batched_nms


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
