"""Test-time augmentation: detect in resized and mirrored views of an image, and merge what was found.

As the release means it (its own stops with an error): views of many sizes, each as it is and mirrored; of each size
only detections of a fitting size count; boxes go back to the image, where overlapping ones of a class vote. The release
drops masks. Here each merged detection has the mask that its best member has in its own view, cut to the merged box.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffinst.config import SamplerConfig
from diffinst.data.transforms import View, plan_views, view_image
from diffinst.engine.inference import Timer, find_candidates, untimed
from diffinst.model import DiffusionInst
from diffinst.ops.boxes import clip_boxes, has_area, scale_boxes
from diffinst.ops.nms import classwise_nms
from diffinst.ops.voting import Votes, soft_vote, vote
from diffinst.postprocess import decode_masks
from diffinst.structures import Candidates, Detections, Sample

_MASK_STRIDE = 4


@dataclass
class _Found:
    """Candidates of one view, their boxes in pixels of the original image; mask_features: (C, Hm, Wm) or None."""

    view: View
    candidates: Candidates
    mask_features: Tensor | None


@torch.inference_mode()
def detect_augmented(
    model: DiffusionInst, sample: Sample, settings: SamplerConfig, *, timer: Timer = untimed
) -> Detections:
    """Detections of one image, merged over its views; `settings.tta` itself is not looked at.

    Views go through the network one by one. What is kept of each until the end are its candidates with their filters,
    and its mask features: at the default sizes 84 MB in all for a 3:2 photograph. Masks are decoded for merged
    detections only, so their cost is that of one view.

    Each view has noise of its own, a function of (evaluation seed, image id, step, number of the view); the first has
    that of `detect`. So a single view of the test size, merged by suppression, is plain detection.

    Args:
        model: in evaluation mode.
        sample: image (3, h, w) uint8 RGB as in its file, not resized.
        settings: views and merging (`tta_*`); sampling, suppression and score threshold within each view. The score
            threshold holds for merged scores too. Without `max_detections` there are at most `num_proposals`.
        timer: as for `detect`; "preprocess" is called, too, and each scope once a view.
    Returns:
        Detections in original-image pixels, on the model's device, best score first.
    Raises:
        ValueError: the image is not of its original size, or the model is in training mode.
    """
    size = sample.original_size
    if tuple(sample.image.shape[1:]) != size:
        raise ValueError(f"augmentation needs the image as in its file, {size}, not {tuple(sample.image.shape[1:])}")
    image = sample.image.permute(1, 2, 0).numpy()
    found = []
    for view in plan_views(size, settings):
        with timer("preprocess"):
            batch = model.make_batch([Sample(view_image(image, view), sample.image_id, size)])
        features, (candidates,) = find_candidates(model, batch, settings, view=view.number, timer=timer)
        with timer("head"):
            mask_features = None if features.mask_features is None else features.mask_features[0]
            found.append(_Found(view, _to_original(_of_fitting_size(candidates, view), view, size), mask_features))
    with timer("head"):
        merged = _merge(found, settings, size)
    with timer("masks"):
        masks = _masks(model, found, merged, settings, size)
    return Detections(merged.boxes_xyxy, merged.scores, merged.labels, masks)


def _of_fitting_size(candidates: Candidates, view: View) -> Candidates:
    """Without those too small or too large for this view; boxes are looked at before they are clipped, as released."""
    if view.box_sizes is None:
        return candidates
    low, high = view.box_sizes
    side = (candidates.boxes_xyxy[:, 2:] - candidates.boxes_xyxy[:, :2]).clamp(min=0).prod(dim=1).sqrt()
    kept = (side > low) & (side < high)
    return Candidates(
        boxes_xyxy=candidates.boxes_xyxy[kept],
        scores=candidates.scores[kept],
        labels=candidates.labels[kept],
        mask_params=None if candidates.mask_params is None else candidates.mask_params[kept],
    )


def _to_original(candidates: Candidates, view: View, size: tuple[int, int]) -> Candidates:
    """With boxes in pixels of the original image, which has `size`; not clipped."""
    boxes_xyxy = candidates.boxes_xyxy
    if view.mirrored:
        x1, y1, x2, y2 = boxes_xyxy.unbind(1)
        boxes_xyxy = torch.stack([view.size[1] - x2, y1, view.size[1] - x1, y2], dim=1)
    return Candidates(
        scale_boxes(boxes_xyxy, view.size, size), candidates.scores, candidates.labels, candidates.mask_params
    )


def _merge(found: list[_Found], settings: SamplerConfig, size: tuple[int, int]) -> Votes:
    """The detections that stay, clipped; `source` counts through the candidates of all views."""
    boxes_xyxy = torch.cat([item.candidates.boxes_xyxy for item in found])
    scores = torch.cat([item.candidates.scores for item in found])
    labels = torch.cat([item.candidates.labels for item in found])
    if settings.tta_merge == "nms":
        if settings.nms_iou_threshold is None:
            kept = scores.argsort(descending=True, stable=True)
        else:
            kept = classwise_nms(boxes_xyxy, scores, labels, iou_threshold=settings.nms_iou_threshold)
        votes = Votes(boxes_xyxy[kept], scores[kept], labels[kept], kept)
    else:
        merge = soft_vote if settings.tta_merge == "soft_vote" else vote
        votes = merge(boxes_xyxy, scores, labels, iou_threshold=settings.tta_vote_iou_threshold)
    clipped = clip_boxes(votes.boxes_xyxy, size)
    stays = has_area(clipped)
    if settings.score_threshold > 0:
        stays &= votes.scores > settings.score_threshold
    limit = settings.max_detections or settings.num_proposals
    rows = stays.nonzero().squeeze(1)[:limit]
    return Votes(clipped[rows], votes.scores[rows], votes.labels[rows], votes.source[rows])


def _masks(
    model: DiffusionInst, found: list[_Found], merged: Votes, settings: SamplerConfig, size: tuple[int, int]
) -> Tensor | None:
    """(D, *size) bool, each decoded in the view that its source is from; None for a model without masks."""
    if model.mask_branch is None:
        return None
    # Column by column, as `decode_masks` gives them.
    masks = torch.zeros(len(merged.source), size[1], size[0], dtype=torch.bool, device=merged.source.device)
    first = 0
    for item in found:
        in_view = merged.source - first
        rows = ((in_view >= 0) & (in_view < len(item.candidates))).nonzero().squeeze(1)
        first += len(item.candidates)
        if len(rows) == 0 or item.candidates.mask_params is None or item.mask_features is None:
            continue
        decoded = decode_masks(
            model.mask_logits,
            item.mask_features,
            item.candidates.mask_params[in_view[rows]],
            merged.boxes_xyxy[rows],
            stride=_MASK_STRIDE,
            image_size=item.view.size,
            original_size=size,
            settings=settings,
            mirrored=item.view.mirrored,
        )
        masks[rows] = decoded.transpose(1, 2)
    return masks.transpose(1, 2)
