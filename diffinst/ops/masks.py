"""Masks: between the stride of the mask features, the network input and the original image."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# Masks of larger images are pasted box by box on the CPU; for smaller ones the loop costs more than it saves.
_PASTE_WHOLE_UP_TO_PIXELS = 256 * 256
# Interpolated values alive at once when masks are pasted whole (256 MiB).
_MAX_PASTED_FLOATS = 2**26


def aligned_bilinear(x: Tensor, factor: int) -> Tensor:
    """Enlarge so that feature pixel i lands on pixel factor * i + factor // 2 (CondInst, arXiv:2003.05664).

    Args:
        x: (B, C, H, W).
        factor: whole number, at least 1.
    Returns:
        (B, C, factor * H, factor * W); beyond the outermost pixels their values are repeated.
    """
    if factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    if factor == 1:
        return x
    height, width = x.shape[-2:]
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    x = F.interpolate(x, size=(factor * height + 1, factor * width + 1), mode="bilinear", align_corners=True)
    x = F.pad(x, (factor // 2, 0, factor // 2, 0), mode="replicate")
    return x[..., : factor * height, : factor * width]


def subsample_masks(masks: Tensor, size: tuple[int, int], *, stride: int = 4) -> Tensor:
    """Targets for mask logits: every stride-th pixel of the masks, starting at stride // 2, no averaging.

    Args:
        masks: (M, h, w) bool at the resized, unpadded image size.
        size: (height, width) of the mask features; stride times that covers (h, w).
        stride: image pixels per mask feature pixel.
    Returns:
        (M, *size) bool; False in the padding right and bottom.
    """
    sampled = masks[:, stride // 2 :: stride, stride // 2 :: stride]
    bottom, right = size[0] - sampled.shape[1], size[1] - sampled.shape[2]
    if bottom < 0 or right < 0:
        raise ValueError(f"masks of {tuple(masks.shape[1:])} do not fit into {size} at stride {stride}")
    return F.pad(sampled, (0, right, 0, bottom))


def paste_masks(
    mask_probabilities: Tensor,
    boxes_xyxy: Tensor,
    *,
    stride: int,
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    threshold: float,
    clip: str,
    mirrored: bool = False,
) -> Tensor:
    """Bring masks to the size of the original image, binary and cut to their boxes.

    Aligned bilinear to the network input, cut to the unpadded image, bilinear to the output, threshold. Both resizes
    are linear and separate into rows and columns, so together they are one matrix on each side of a mask, of which
    only the part under the box is needed.

    Args:
        mask_probabilities: (D, Hm, Wm) in [0, 1], at `stride` of the padded network input.
        boxes_xyxy: (D, 4) pixels of the output, clipped to it.
        stride: input pixels per mask feature pixel.
        image_size: (height, width) of the resized, unpadded image.
        output_size: (height, width) of the original image.
        threshold: pixels above it belong to the mask.
        clip: "truncated" cuts both box corners to whole pixels, so that right and bottom lose part of a pixel;
            "covering" keeps every pixel that the box touches.
        mirrored: the network saw the image mirrored, left to right; boxes and results are those of the image.
    Returns:
        (D, *output_size) bool, laid out column by column: what run-length encoding reads fastest.
    """
    if clip not in ("truncated", "covering"):
        raise ValueError(f"clip must be 'truncated' or 'covering', got {clip!r}")
    height, width = output_size
    device = mask_probabilities.device
    rows = _resize_matrix(mask_probabilities.shape[1], stride, image_size[0], height).to(device)
    columns = _resize_matrix(mask_probabilities.shape[2], stride, image_size[1], width).to(device)
    if mirrored:
        columns = columns.flip(0)
    starts = boxes_xyxy[:, :2].floor()
    ends = boxes_xyxy[:, 2:].floor() if clip == "truncated" else boxes_xyxy[:, 2:].ceil()
    windows = torch.cat([starts, ends], dim=1)
    # Half precision would move boundaries by whole pixels.
    with torch.autocast(device.type, enabled=False):
        if device.type == "cpu" and height * width > _PASTE_WHOLE_UP_TO_PIXELS:
            return _paste_windows(mask_probabilities.float(), windows, rows, columns, threshold)
        return _paste_whole(mask_probabilities.float(), windows, rows, columns, threshold)


def _paste_whole(masks: Tensor, windows: Tensor, rows: Tensor, columns: Tensor, threshold: float) -> Tensor:
    """Whole masks, as many at once as memory allows; windows (D, 4) are whole x1, y1, x2, y2, the ends excluded."""
    pasted = masks.new_empty(len(masks), len(columns), len(rows), dtype=torch.bool)
    chunk = max(1, _MAX_PASTED_FLOATS // (len(columns) * len(rows)))
    for canvas, part in zip(pasted.split(chunk), masks.split(chunk)):
        torch.gt(columns @ (part.transpose(1, 2) @ rows.T), threshold, out=canvas)
    x = torch.arange(len(columns), device=masks.device)
    y = torch.arange(len(rows), device=masks.device)
    in_columns = (x >= windows[:, 0:1]) & (x < windows[:, 2:3])
    in_rows = (y >= windows[:, 1:2]) & (y < windows[:, 3:4])
    pasted &= in_columns[:, :, None]
    pasted &= in_rows[:, None, :]
    return pasted.transpose(1, 2)


def _paste_windows(masks: Tensor, windows: Tensor, rows: Tensor, columns: Tensor, threshold: float) -> Tensor:
    """Mask by mask, only what lies in the window: on the CPU the loop is cheap and most of an image is not."""
    pasted = masks.new_zeros(len(masks), len(columns), len(rows), dtype=torch.bool)
    row_spans, column_spans = _source_spans(rows), _source_spans(columns)
    for canvas, mask, (x1, y1, x2, y2) in zip(pasted, masks, windows.long().tolist()):
        if x1 >= x2 or y1 >= y2:
            continue
        source_y, source_x = _source(row_spans, y1, y2), _source(column_spans, x1, x2)
        window = columns[x1:x2, source_x] @ (mask[source_y, source_x].T @ rows[y1:y2, source_y].T)
        torch.gt(window, threshold, out=canvas[x1:x2, y1:y2])
    return pasted.transpose(1, 2)


def _source_spans(matrix: Tensor) -> tuple[list[int], list[int]]:
    """First and last input pixel with a weight, for each output pixel."""
    has_weight = (matrix > 0).int()
    first = has_weight.argmax(dim=1)
    last = matrix.shape[1] - 1 - has_weight.flip(1).argmax(dim=1)
    return first.tolist(), last.tolist()


def _source(spans: tuple[list[int], list[int]], start: int, end: int) -> slice:
    """Input pixels that the output pixels start..end-1 are made from; both rise along an axis, or both fall."""
    first, last = spans
    return slice(min(first[start], first[end - 1]), max(last[start], last[end - 1]) + 1)


@functools.lru_cache(maxsize=64)
def _resize_matrix(length: int, stride: int, image_length: int, output_length: int) -> Tensor:
    """(output_length, length): both resizes along one axis, read off by resizing each unit vector."""
    with torch.inference_mode(False), torch.no_grad():
        units = torch.eye(length)[None, :, :, None]  # one channel per unit vector, one pixel wide
        enlarged = aligned_bilinear(units, stride)[:, :, :image_length, :1]
        resized = F.interpolate(enlarged, size=(output_length, 1), mode="bilinear", align_corners=False)
        return resized[0, :, :, 0].T.contiguous()
