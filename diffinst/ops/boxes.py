"""Boxes: formats, overlap, deltas, scaling. Tensor[N, 4] in xyxy unless a name says otherwise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A box may grow to the longest image side ever expected, 100,000 px, from a base of 16 px; larger steps overflow exp.
MAX_LOG_SCALE = math.log(100_000 / 16)


def box_cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """(..., 4) centre and size -> (..., 4) corners."""
    centre, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=-1)


def box_xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) corners -> (..., 4) centre and size."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def box_area(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) -> (...) width times height."""
    x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
    return (x2 - x1) * (y2 - y1)  # not prod(): its gradient waits for the device


def box_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """(N, 4) and (M, 4) boxes -> (N, M) overlaps; NaN of two boxes without area."""
    top_left = torch.maximum(boxes1_xyxy[:, None, :2], boxes2_xyxy[:, :2])
    bottom_right = torch.minimum(boxes1_xyxy[:, None, 2:], boxes2_xyxy[:, 2:])
    overlap = (bottom_right - top_left).clamp(min=0)
    intersection = overlap[..., 0] * overlap[..., 1]
    return intersection / (box_area(boxes1_xyxy)[:, None] + box_area(boxes2_xyxy) - intersection)


def paired_giou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """Generalised IoU of each pair of boxes (arXiv:1902.09630), not of all combinations.

    Boxes without area are allowed: where a ratio would be 0/0 it is 0, and so is its gradient. (torchvision has the
    paired loss, but its masked assignment waits for the device.)

    Args:
        boxes1_xyxy, boxes2_xyxy: (..., 4), any one unit.
    Returns:
        (...) in [-1, 1].
    """
    top_left = torch.maximum(boxes1_xyxy[..., :2], boxes2_xyxy[..., :2])
    bottom_right = torch.minimum(boxes1_xyxy[..., 2:], boxes2_xyxy[..., 2:])
    overlap = (bottom_right - top_left).clamp(min=0)
    intersection = overlap[..., 0] * overlap[..., 1]
    union = box_area(boxes1_xyxy) + box_area(boxes2_xyxy) - intersection

    hull_top_left = torch.minimum(boxes1_xyxy[..., :2], boxes2_xyxy[..., :2])
    hull_bottom_right = torch.maximum(boxes1_xyxy[..., 2:], boxes2_xyxy[..., 2:])
    hull = box_area(torch.cat([hull_top_left, hull_bottom_right], dim=-1))
    return _safe_ratio(intersection, union) - _safe_ratio(hull - union, hull)


def apply_deltas(
    deltas: Tensor,
    boxes_xyxy: Tensor,
    *,
    weights: tuple[float, float, float, float] = (2.0, 2.0, 1.0, 1.0),
    max_log_scale: float = MAX_LOG_SCALE,
) -> Tensor:
    """Move and scale boxes by predicted deltas (R-CNN, arXiv:1311.2524, appendix C).

    Args:
        deltas: (..., 4) as (dx, dy, dw, dh), before division by the weights.
        boxes_xyxy: (..., 4).
        weights: what each delta is divided by.
        max_log_scale: upper bound of dw and dh after that.
    Returns:
        (..., 4) xyxy, not clipped; a box without width or height keeps that.
    """
    dx, dy, dw, dh = (delta / weight for delta, weight in zip(deltas.unbind(-1), weights))
    x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
    width, height = x2 - x1, y2 - y1
    centre_x = x1 + 0.5 * width + dx * width
    centre_y = y1 + 0.5 * height + dy * height
    half_width = 0.5 * width * dw.clamp(max=max_log_scale).exp()
    half_height = 0.5 * height * dh.clamp(max=max_log_scale).exp()
    corners = (centre_x - half_width, centre_y - half_height, centre_x + half_width, centre_y + half_height)
    return torch.stack(corners, dim=-1)


def scale_boxes(boxes_xyxy: Tensor, from_size: tuple[int, int], to_size: tuple[int, int]) -> Tensor:
    """(..., 4) boxes of an image of `from_size` in pixels of the same image at `to_size`; sizes are (height, width)."""
    y, x = to_size[0] / from_size[0], to_size[1] / from_size[1]
    return torch.stack([side * ratio for side, ratio in zip(boxes_xyxy.unbind(-1), (x, y, x, y))], dim=-1)


def clip_boxes(boxes_xyxy: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., 4) boxes with x in [0, width] and y in [0, height] of `size`, given as (height, width)."""
    height, width = size
    x1, y1, x2, y2 = boxes_xyxy.unbind(-1)
    sides = ((x1, width), (y1, height), (x2, width), (y2, height))
    return torch.stack([place.clamp(0, end) for place, end in sides], dim=-1)


def has_area(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) -> (...) bool: wider and higher than zero."""
    return (boxes_xyxy[..., 2:] > boxes_xyxy[..., :2]).all(dim=-1)


def _safe_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 (with gradient 0) where the denominator is not positive."""
    is_positive = denominator > 0
    return torch.where(is_positive, numerator / torch.where(is_positive, denominator, 1), 0)
