"""Masks: between the stride of the mask features, the network input and the original image."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Masks of larger images are pasted box by box on the CPU; for smaller ones the loop costs more than it saves.
_PASTE_WHOLE_UP_TO_PIXELS = 256 * 256
# Interpolated values alive at once when masks are pasted whole (256 MiB).
_MAX_PASTED_FLOATS = 2**26

ProbabilitiesOf = Callable[[int, slice, slice], Tensor]
Spans = tuple[list[int], list[int]]


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
    x = F.pad(_enlarged(x, factor), (factor // 2, 0, factor // 2, 0), mode="replicate")
    return x[..., : factor * height, : factor * width]


def add_aligned_bilinear_(x: Tensor, coarse: Tensor, factor: int) -> None:
    """Add `aligned_bilinear(coarse, factor)` to x, in less memory; without gradients.

    Args:
        x: (B, C, factor * H, factor * W).
        coarse: (B, C, H, W).
        factor: whole number, at least 2.
    """
    half = factor // 2
    enlarged = _enlarged(coarse, factor)[..., : x.shape[-2] - half, : x.shape[-1] - half]
    # The first rows and columns repeat what is beside them.
    for rows, its_rows in ((slice(half), slice(1)), (slice(half, None), slice(None))):
        for columns, its_columns in ((slice(half), slice(1)), (slice(half, None), slice(None))):
            x[..., rows, columns].add_(enlarged[..., its_rows, its_columns])


def _enlarged(x: Tensor, factor: int) -> Tensor:
    """(B, C, H, W) -> (B, C, factor * H + 1, factor * W + 1), feature pixel i on pixel factor * i."""
    height, width = x.shape[-2:]
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    return F.interpolate(x, size=(factor * height + 1, factor * width + 1), mode="bilinear", align_corners=True)


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
    size = (mask_probabilities.shape[1], mask_probabilities.shape[2])
    device = mask_probabilities.device
    rows, columns = _resize_matrices(size, stride, image_size, output_size, mirrored=mirrored, device=device)
    windows = _windows(boxes_xyxy, clip)
    # Half precision would move boundaries by whole pixels.
    with torch.autocast(device.type, enabled=False):
        masks = mask_probabilities.float()
        if prefers_windows(device, output_size):
            return _paste_windows(
                lambda i, source_y, source_x: masks[i, source_y, source_x],
                windows.long().tolist(),
                _source_spans(rows),
                _source_spans(columns),
                rows,
                columns,
                threshold,
            )
        return _paste_whole(masks, windows, rows, columns, threshold)


def prefers_windows(device: torch.device, output_size: tuple[int, int]) -> bool:
    """Whether masks of this size are pasted box by box: on the CPU the loop is cheap and most of an image is not."""
    return device.type == "cpu" and output_size[0] * output_size[1] > _PASTE_WHOLE_UP_TO_PIXELS


def paste_windows(
    probabilities_of: ProbabilitiesOf,
    boxes_xyxy: Tensor,
    *,
    mask_size: tuple[int, int],
    stride: int,
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    threshold: float,
    clip: str,
    mirrored: bool = False,
) -> Tensor:
    """`paste_masks` of masks that are computed only where they are looked at, one by one, on the CPU.

    Args:
        probabilities_of: (number of a mask, rows, columns) -> that part of it, float32 in [0, 1]; asked once a mask,
            and not at all for one that is nowhere.
        mask_size: (Hm, Wm) of the whole masks.
        boxes_xyxy, stride, image_size, output_size, threshold, clip, mirrored: as for `paste_masks`.
    Returns:
        As `paste_masks`.
    """
    device = boxes_xyxy.device
    rows, columns = _resize_matrices(mask_size, stride, image_size, output_size, mirrored=mirrored, device=device)
    windows = _windows(boxes_xyxy, clip).long().tolist()
    spans = _source_spans(rows), _source_spans(columns)
    with torch.autocast(device.type, enabled=False):
        return _paste_windows(probabilities_of, windows, *spans, rows, columns, threshold)


def _resize_matrices(
    mask_size: tuple[int, int],
    stride: int,
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    *,
    mirrored: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """(height, Hm) and (width, Wm): what brings a mask to the output, from the left and, transposed, from the right."""
    rows, columns = (_resize_matrix(mask_size[i], stride, image_size[i], output_size[i]).to(device) for i in (0, 1))
    return rows, columns.flip(0) if mirrored else columns


def _windows(boxes_xyxy: Tensor, clip: str) -> Tensor:
    """(D, 4) whole x1, y1, x2, y2 of the output pixels that a mask may have, the ends excluded."""
    if clip not in ("truncated", "covering"):
        raise ValueError(f"clip must be 'truncated' or 'covering', got {clip!r}")
    ends = boxes_xyxy[:, 2:].floor() if clip == "truncated" else boxes_xyxy[:, 2:].ceil()
    return torch.cat([boxes_xyxy[:, :2].floor(), ends], dim=1)


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


def _paste_windows(
    probabilities_of: ProbabilitiesOf,
    windows: Sequence[Sequence[int]],
    row_spans: Spans,
    column_spans: Spans,
    rows: Tensor,
    columns: Tensor,
    threshold: float,
) -> Tensor:
    """Mask by mask, only what lies in the window."""
    pasted = torch.zeros(len(windows), len(columns), len(rows), dtype=torch.bool, device=rows.device)
    for i, (x1, y1, x2, y2) in enumerate(windows):
        if x1 >= x2 or y1 >= y2:
            continue
        source_y, source_x = _source(row_spans, y1, y2), _source(column_spans, x1, x2)
        probabilities = probabilities_of(i, source_y, source_x)
        window = columns[x1:x2, source_x] @ (probabilities.T @ rows[y1:y2, source_y].T)
        torch.gt(window, threshold, out=pasted[i, x1:x2, y1:y2])
    return pasted.transpose(1, 2)


def _source_spans(matrix: Tensor) -> Spans:
    """First and last input pixel with a weight, for each output pixel."""
    has_weight = (matrix > 0).int()
    first = has_weight.argmax(dim=1)
    last = matrix.shape[1] - 1 - has_weight.flip(1).argmax(dim=1)
    return first.tolist(), last.tolist()


def _source(spans: Spans, start: int, end: int) -> slice:
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
