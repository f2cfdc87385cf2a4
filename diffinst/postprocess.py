"""From the sampler's predictions to detections in the pixels of the original image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diffinst.config import SamplerConfig
from diffinst.diffusion.sampler import StepPrediction
from diffinst.ops.boxes import clip_boxes, has_area, scale_boxes
from diffinst.ops.masks import paste_masks, paste_windows, prefers_windows
from diffinst.ops.nms import classwise_nms
from diffinst.ops.paths import note_path
from diffinst.ops.rle import encode_masks
from diffinst.structures import Candidates, Detections

# Mask logits at the stride of the mask features alive at once (256 MiB): 1,100 masks of an 800 x 1216 input.
_MAX_MASK_FLOATS = 2**26
# Masks at the size of the original image alive at once where they are encoded as they come (16 MiB).
_MAX_UNENCODED_PIXELS = 2**24

MaskHead = Callable[[Tensor, Tensor], Tensor]
MaskForm = Literal["bitmaps", "rle"]


def select_candidates(steps: Sequence[StepPrediction], settings: SamplerConfig) -> list[Candidates]:
    """The best (proposal, class) pairs of each image, pooled over sampling steps, without near-duplicates.

    Each pooled step gives its N best of the N x K pairs, whatever the proposals they belong to.

    Args:
        steps: predictions of the sampler for a batch.
        settings: which steps are pooled, the suppression and score thresholds.
    Returns:
        B candidates, best score first. `max_detections` is not applied yet: boxes that turn out empty must not count.
    """
    pooled = _pooled_steps(steps, settings.ensemble)
    best = [_best_pairs(step) for step in pooled]
    boxes_xyxy, scores, labels = (torch.cat(parts, dim=1) for parts in zip(*[pairs[:3] for pairs in best]))
    proposals = [pairs[3] for pairs in best]
    filters = [step.mask_params for step in pooled if step.mask_params is not None]
    num_proposals = pooled[0].boxes_xyxy.shape[1]
    candidates = []
    for image in range(len(scores)):
        if settings.nms_iou_threshold is None:
            kept = scores[image].argsort(descending=True, stable=True)
        else:
            kept = classwise_nms(
                boxes_xyxy[image], scores[image], labels[image], iou_threshold=settings.nms_iou_threshold
            )
        if settings.score_threshold > 0:
            kept = kept[scores[image, kept] > settings.score_threshold]
        mask_params = None
        if filters:
            # Step s, proposal p is row s * N + p: filters are fetched for what is kept, never tiled over classes.
            rows = torch.cat([index[image] + step * num_proposals for step, index in enumerate(proposals)])
            mask_params = torch.cat([of_step[image] for of_step in filters])[rows[kept]]
        candidates.append(
            Candidates(
                boxes_xyxy=boxes_xyxy[image, kept],
                scores=scores[image, kept],
                labels=labels[image, kept],
                mask_params=mask_params,
            )
        )
    return candidates


def finish(
    candidates: Candidates,
    mask_features: Tensor | None,
    *,
    image_size: tuple[int, int],
    original_size: tuple[int, int],
    settings: SamplerConfig,
    mask_head: MaskHead | None,
    mask_stride: int = 4,
    mask_form: MaskForm = "bitmaps",
) -> Detections:
    """Scale boxes to the original image, drop empty ones, keep the best, and decode masks for those alone.

    Args:
        candidates: of one image, best score first.
        mask_features: (C, Hm, Wm) of that image; None without masks.
        image_size: (height, width) of the resized, unpadded image.
        original_size: (height, width) of the file.
        settings: number of detections, mask threshold and clipping.
        mask_head: (mask_features (C, Hm, Wm), mask_params (D, P)) -> (D, Hm, Wm) logits; None without masks.
        mask_stride: network input pixels per mask feature pixel.
        mask_form: "rle" encodes masks as they come, so that memory does not grow with their number.
    Returns:
        At most `settings.max_detections` detections, best score first.
    """
    boxes_xyxy = clip_boxes(scale_boxes(candidates.boxes_xyxy, image_size, original_size), original_size)
    kept = has_area(boxes_xyxy).nonzero().squeeze(1)[: settings.max_detections]
    boxes_xyxy = boxes_xyxy[kept]
    masks, encodings = None, None
    if candidates.mask_params is not None and mask_features is not None and mask_head is not None:
        parts = iterate_masks(
            mask_head,
            mask_features,
            candidates.mask_params[kept],
            boxes_xyxy,
            stride=mask_stride,
            image_size=image_size,
            original_size=original_size,
            settings=settings,
            max_pixels=_MAX_UNENCODED_PIXELS if mask_form == "rle" else None,
        )
        if mask_form == "rle":
            encodings = [encoding for part in parts for encoding in encode_masks(part)]
        else:
            masks = join_masks(list(parts))
    return Detections(
        boxes_xyxy=boxes_xyxy,
        scores=candidates.scores[kept],
        labels=candidates.labels[kept],
        masks=masks,
        encodings=encodings,
    )


def _pooled_steps(steps: Sequence[StepPrediction], ensemble: str) -> Sequence[StepPrediction]:
    """The steps whose detections count; of a single step nothing is left out."""
    if ensemble == "none":
        return steps[-1:]
    return steps[:-1] if ensemble == "all_but_last" and len(steps) > 1 else steps


def _best_pairs(step: StepPrediction) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, N, 4) boxes and (B, N) scores, labels and proposal indices of the N best pairs of each image."""
    num_proposals, num_classes = step.class_logits.shape[1:]
    scores, pairs = step.class_logits.sigmoid().flatten(1).topk(num_proposals, dim=1)
    proposals = pairs // num_classes
    boxes_xyxy = step.boxes_xyxy.gather(1, proposals[..., None].expand(-1, -1, 4))
    return boxes_xyxy, scores, pairs % num_classes, proposals


def decode_masks(
    mask_head: MaskHead,
    mask_features: Tensor,
    mask_params: Tensor,
    boxes_xyxy: Tensor,
    *,
    stride: int,
    image_size: tuple[int, int],
    original_size: tuple[int, int],
    settings: SamplerConfig,
    mirrored: bool = False,
) -> Tensor:
    """Masks of boxes (D, 4) in pixels of the original image, as (D, *original_size) bool; D may be 0.

    Args:
        mirrored: the network saw the image mirrored, left to right; boxes and masks are those of the image.
        mask_head, mask_features, mask_params, stride, image_size, original_size, settings: as for `finish`.
    """
    return join_masks(
        list(
            iterate_masks(
                mask_head,
                mask_features,
                mask_params,
                boxes_xyxy,
                stride=stride,
                image_size=image_size,
                original_size=original_size,
                settings=settings,
                mirrored=mirrored,
            )
        )
    )


def join_masks(parts: Sequence[Tensor]) -> Tensor:
    """Parts of `iterate_masks` as one tensor, laid out as they are in memory, column by column."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([masks.transpose(1, 2) for masks in parts]).transpose(1, 2)


def iterate_masks(
    mask_head: MaskHead,
    mask_features: Tensor,
    mask_params: Tensor,
    boxes_xyxy: Tensor,
    *,
    stride: int,
    image_size: tuple[int, int],
    original_size: tuple[int, int],
    settings: SamplerConfig,
    mirrored: bool = False,
    max_pixels: int | None = None,
) -> Iterator[Tensor]:
    """Masks as those of `decode_masks`, some at a time, (d, *original_size) bool each; at least one part.

    On a CPU the mask head sees only the mask features that lie under a box, for all but small images.

    Args:
        max_pixels: of a part, over all its masks; None sets no limit but that of the mask head's memory.
        mask_head, mask_features, mask_params, boxes_xyxy, stride, image_size, original_size, settings, mirrored: as
            for `decode_masks`.
    """
    height, width = mask_features.shape[1:]
    by_window = prefers_windows(mask_features.device, original_size)
    note_path("masks", "under_their_boxes" if by_window else "whole")
    chunk = max(len(mask_params), 1) if by_window else max(1, _MAX_MASK_FLOATS // (height * width))
    if max_pixels is not None:
        chunk = min(chunk, max(1, max_pixels // (original_size[0] * original_size[1])))
    options: dict[str, Any] = {
        "stride": stride,
        "image_size": image_size,
        "output_size": original_size,
        "threshold": settings.mask_threshold,
        "clip": settings.mask_clip,
        "mirrored": mirrored,
    }
    for params, boxes in zip(mask_params.split(chunk), boxes_xyxy.split(chunk)):
        if not by_window:
            yield paste_masks(mask_head(mask_features, params).sigmoid(), boxes, **options)
            continue

        def probabilities_of(i: int, rows: slice, columns: slice, params: Tensor = params) -> Tensor:
            return mask_head(mask_features[:, rows, columns], params[i : i + 1])[0].float().sigmoid()

        yield paste_windows(probabilities_of, boxes, mask_size=(height, width), **options)
