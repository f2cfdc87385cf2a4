"""Boxes as a signal to be diffused: normalised cxcywh in [0, 1] <-> signal in [-snr_scale, snr_scale]."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffinst.ops.boxes import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh

# Smallest normalised width and height of a box that is to stay a box; the release uses it for padding boxes.
MIN_BOX_SIZE = 1e-4


def boxes_to_signal(boxes_cxcywh: Tensor, snr_scale: float) -> Tensor:
    """Map (..., 4) normalised boxes to signal; boxes within [0, 1] land in [-snr_scale, snr_scale]."""
    return (boxes_cxcywh * 2 - 1) * snr_scale


def signal_to_boxes(signal: Tensor, snr_scale: float, *, min_size: float = 0.0) -> Tensor:
    """Map a (..., 4) signal, clamped to [-snr_scale, snr_scale], to normalised boxes.

    Args:
        signal: (..., 4) in cxcywh order, any range.
        snr_scale: half the range of the signal.
        min_size: least width and height of the result; 0 lets a clamped signal make boxes without area.
    Returns:
        (..., 4) cxcywh, centres in [0, 1], sizes in [min_size, 1].
    """
    boxes_cxcywh = (signal.clamp(-snr_scale, snr_scale) / snr_scale + 1) / 2
    if min_size > 0:
        centre, size = boxes_cxcywh.split(2, dim=-1)
        boxes_cxcywh = torch.cat([centre, size.clamp(min=min_size)], dim=-1)
    return boxes_cxcywh


def to_pixels(boxes_cxcywh: Tensor, whwh: Tensor) -> Tensor:
    """(B, N, 4) normalised cxcywh -> (B, N, 4) xyxy pixels; the rows of whwh (B, 4) are (w, h, w, h) of the images."""
    return box_cxcywh_to_xyxy(boxes_cxcywh) * whwh[:, None]


def to_normalised(boxes_xyxy: Tensor, whwh: Tensor) -> Tensor:
    """(B, N, 4) xyxy pixels -> (B, N, 4) normalised cxcywh; the rows of whwh (B, 4) are (w, h, w, h) of the images."""
    return box_xyxy_to_cxcywh(boxes_xyxy / whwh[:, None])


def pad_ground_truth(
    boxes_cxcywh: Tensor,
    num_proposals: int,
    *,
    method: Literal["concat", "repeat"] = "concat",
    generator: torch.Generator | None = None,
    placeholder_noise: Tensor | None = None,
    repeats: Tensor | None = None,
) -> Tensor:
    """Bring the instances of one image to a fixed number of boxes.

    "concat": the instances, then random boxes around the image centre (DiffusionDet, arXiv:2211.09788, section 3.3).
    "repeat": each instance as often as the others, the remainder spread at random. With more instances than
    `num_proposals` both take a random subset; without any, one box covering the whole image stands in.

    Args:
        boxes_cxcywh: (M, 4) normalised; M may be 0.
        num_proposals: N.
        method: see above.
        generator: CPU generator of the draws that are not given; None takes torch's global one.
        placeholder_noise: (N - max(M, 1), 4) standard normal draws of the random boxes ("concat", M < N).
        repeats: (M,) int64 counts with sum N: how often each instance is taken ("repeat", or M > N).
    Returns:
        (N, 4) normalised cxcywh, on the device of the boxes.
    Raises:
        ValueError: given draws have the wrong shape.
    """
    if len(boxes_cxcywh) == 0:
        boxes_cxcywh = boxes_cxcywh.new_tensor([[0.5, 0.5, 1.0, 1.0]])
    num_missing = num_proposals - len(boxes_cxcywh)
    if method == "repeat" or num_missing < 0:
        if repeats is None:
            repeats = draw_repeats(len(boxes_cxcywh), num_proposals, generator)
        if repeats.shape != (len(boxes_cxcywh),):
            raise ValueError(f"repeats must have shape ({len(boxes_cxcywh)},), got {tuple(repeats.shape)}")
        return boxes_cxcywh.repeat_interleave(repeats.to(boxes_cxcywh.device), dim=0, output_size=num_proposals)
    if placeholder_noise is None:
        placeholder_noise = torch.randn(num_missing, 4, generator=generator)
    if placeholder_noise.shape != (num_missing, 4):
        raise ValueError(f"placeholder_noise must have shape ({num_missing}, 4), got {tuple(placeholder_noise.shape)}")
    placeholders = placeholder_noise.to(boxes_cxcywh) / 6 + 0.5  # three sigma reach the image border
    centre, size = placeholders.split(2, dim=-1)
    return torch.cat([boxes_cxcywh, torch.cat([centre, size.clamp(min=MIN_BOX_SIZE)], dim=-1)])


def draw_repeats(num_instances: int, num_proposals: int, generator: torch.Generator | None = None) -> Tensor:
    """(M,) int64 counts with sum N, as equal as can be, the remainder at random (M > N: a random N of the M)."""
    base, remainder = divmod(num_proposals, num_instances)
    counts = torch.full((num_instances,), base)
    counts[torch.randperm(num_instances, generator=generator)[:remainder]] += 1
    return counts
