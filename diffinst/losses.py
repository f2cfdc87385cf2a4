"""Training losses of every head stage: classes, boxes and masks (arXiv:2212.02773, section 3.3; arXiv:2211.09788)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffinst.federated import FederatedDraws, choose_classes
from diffinst.matching import Claims, PaddedTargets, claim, pad_targets, repair
from diffinst.ops.boxes import paired_giou
from diffinst.ops.masks import subsample_masks
from diffinst.structures import HeadOutput, Target

# Keeps the dice ratio finite for an empty mask; part of the loss's definition.
_DICE_EPS = 1e-5
# Mask logits of an image's pairs that are alive at once; their hidden activations are some 16 times as many. What has
# more pixels is cut into bands, each computed again in the backward: on a CPU a band stays in the cache, on a GPU it
# fills the device.
_BAND_ELEMENTS_CPU = 2**17
_BAND_ELEMENTS_GPU = 2**24
# (mask_features (1, C, h, W) of some rows of one image, mask_params (P, F)) -> (P, h, W) logits, each pixel by itself;
# `DiffusionInst.mask_logits`.
MaskHead = Callable[[Tensor, Tensor], Tensor]


class LossTargets(NamedTuple):
    """Ground truth of a batch as the losses read it; no larger on the device than the masks at the features' stride.

    padded: instances of each image, padded to the largest count. first: (B,) int64, where an image's instances start in
    the list of all. masks: (sum of M, H/4, W/4) bool, None without masks. num_instances: sum of M.
    """

    padded: PaddedTargets
    first: Tensor
    masks: Tensor | None
    num_instances: int

    def to(self, device: torch.device | str) -> LossTargets:
        """The same on another device, without waiting for it."""
        return LossTargets(
            padded=PaddedTargets(*(part.to(device, non_blocking=True) for part in self.padded)),
            first=self.first.to(device, non_blocking=True),
            masks=None if self.masks is None else self.masks.to(device, non_blocking=True),
            num_instances=self.num_instances,
        )


def prepare_targets(
    targets: Sequence[Target], mask_size: tuple[int, int] | None, *, mask_stride: int = 4
) -> LossTargets:
    """Pad and subsample the ground truth of a batch; cheapest on the CPU, before moving it.

    Args:
        targets: of B images, at least one; with masks unless `mask_size` is None.
        mask_size: (height, width) of the mask features; None for a model without masks.
        mask_stride: image pixels per pixel of the mask features.
    """
    counts = torch.tensor([0, *(len(target) for target in targets)])
    masks = None
    if mask_size is not None:
        parts = []
        for image, target in enumerate(targets):
            if target.masks is None:
                raise ValueError(f"target {image} of the batch has no masks, but the model predicts them")
            parts.append(subsample_masks(target.masks, mask_size, stride=mask_stride))
        masks = torch.cat(parts)
    first = counts[:-1].cumsum(0).to(targets[0].labels.device)
    return LossTargets(pad_targets(targets), first, masks, int(counts.sum()))


def compute_losses(
    output: HeadOutput,
    mask_features: Tensor | None,
    targets: LossTargets,
    whwh: Tensor,
    mask_head: MaskHead | None = None,
    *,
    matcher: Literal["released", "fixed"] = "fixed",
    empty_batch_loss: Literal["released", "fixed"] = "fixed",
    class_loss: Literal["focal", "bce"] = "focal",
    federated: FederatedDraws | None = None,
    ota_k: int = 5,
    class_weight: float = 2.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    mask_weight: float = 5.0,
    focal_alpha: float = 0.25,
    focal_gamma: float = 2.0,
) -> dict[str, Tensor]:
    """Match every stage's proposals to the instances and compute the weighted losses; the total is their plain sum.

    All are sums over the batch divided by the number of matched proposals of that stage (at least 1):
    "loss_ce" sigmoid focal loss (arXiv:1708.02002) or cross-entropy of all proposals and classes, or of the classes
    that `diffinst.federated.choose_classes` takes, and over the matched proposals
    "loss_bbox" L1 of boxes in units of the image, "loss_giou" 1 - GIoU, "loss_masks" 1 - dice of the mask probabilities
    at the stride of the mask features. The dynamic mask head runs on the matched proposals only, once for all stages,
    and of its maps none is kept whole. The host waits for the device once, and again only where instances that are left
    without a proposal have to be helped.

    Args:
        output: predictions of all stages; without `mask_params` there is no mask loss.
        mask_features: (B, C, H/4, W/4); None without masks.
        targets: of the B images, on the same device, masks at the size of the mask features.
        whwh: (B, 4) width, height, width, height of the unpadded images.
        mask_head: runs the filters; needed with masks.
        matcher, class_loss, ota_k, focal_alpha, focal_gamma: see `diffinst.matching.match`; the weights also weigh its
            costs.
        federated: of the same stages, on the same device; None lets all classes take part.
        empty_batch_loss: in a batch without any instance 'fixed' gives mask features and filters a gradient of zero,
            'released' none at all, so that an optimiser leaves their parameters alone.
    Returns:
        Float32 scalars: "loss_ce", "loss_bbox", "loss_giou", "loss_masks" of the last stage, the same with "_0", "_1",
        ... of the stages before it.
    """
    num_stages = len(output.class_logits)
    with torch.autocast(output.boxes_xyxy.device.type, enabled=False):
        claims = claim(
            output.class_logits,
            output.boxes_xyxy,
            targets.padded,
            whwh,
            class_loss=class_loss,
            ota_k=ota_k,
            class_weight=class_weight,
            l1_weight=l1_weight,
            giou_weight=giou_weight,
            focal_alpha=focal_alpha,
            focal_gamma=focal_gamma,
        )
        matched_gt, num_pairs = _settle(claims, matcher)
        # (S, B, N) -> the P matched pairs, image by image
        is_matched = (matched_gt >= 0).transpose(0, 1)
        chosen = is_matched.flatten().argsort(descending=True, stable=True)[: sum(num_pairs)]
        image, stage, proposal = torch.unravel_index(chosen, is_matched.shape)
        instance = matched_gt[stage, image, proposal]
        by_stage = stage == torch.arange(num_stages, device=stage.device)[:, None]  # (S, P) bool
        num_matched = by_stage.sum(1).clamp(min=1)

        labels = _labels_of(matched_gt, targets.padded.labels, background=output.class_logits.shape[-1])
        by_class = _class_loss(
            output.class_logits.float(), labels, None if class_loss == "bce" else (focal_alpha, focal_gamma)
        )
        if federated is not None:
            takes_part = choose_classes(federated, labels.flatten(1))
            by_class = torch.where(takes_part[:, None, None], by_class, 0)
        predicted = output.boxes_xyxy[stage, image, proposal].float()
        wanted = targets.padded.boxes_xyxy[image, instance]
        per_pair = {
            "loss_bbox": l1_weight * ((predicted - wanted) / whwh[image]).abs().sum(1),
            "loss_giou": giou_weight * (1 - paired_giou(predicted, wanted)),
        }
        if output.mask_params is not None:
            if mask_features is None or targets.masks is None or mask_head is None:
                raise ValueError("a model with masks needs mask_features, mask_head and targets with masks")
            if targets.num_instances == 0 and empty_batch_loss == "released":
                per_pair["loss_masks"] = 0 * per_pair["loss_bbox"]
            else:
                filters = output.mask_params[stage, image, proposal].float()
                per_pair["loss_masks"] = mask_weight * _dice_losses(
                    mask_head,
                    mask_features.float(),
                    filters,
                    targets.masks,
                    targets.first[image] + instance,
                    num_pairs,
                )
        # A masked sum adds in a fixed order, unlike index_add on a GPU.
        sums = {name: torch.where(by_stage, loss, 0).sum(1) for name, loss in per_pair.items()}
        sums = {"loss_ce": class_weight * by_class.sum((1, 2, 3))} | sums
        losses = {}
        for name, value in sums.items():
            *earlier, last = (value / num_matched).unbind()
            losses[name] = last
            losses |= {f"{name}_{number}": loss for number, loss in enumerate(earlier)}
    return losses


def _settle(claims: Claims, matcher: Literal["released", "fixed"]) -> tuple[Tensor, list[int]]:
    """(S, B, N) matched instance or -1, and how many pairs each image has: what the host has to wait for."""
    matched_gt = claims.matched_gt()
    if not claims.claims.numel():
        return matched_gt, [0] * matched_gt.shape[1]
    num_needy = claims.needy().sum().unsqueeze(0)
    num_needy, *num_pairs = torch.cat([num_needy, (matched_gt >= 0).sum((0, 2))]).tolist()
    if num_needy:
        matched_gt = repair(claims, matcher).matched_gt()
        num_pairs = (matched_gt >= 0).sum((0, 2)).tolist()
    return matched_gt, num_pairs


def _labels_of(matched_gt: Tensor, labels: Tensor, background: int) -> Tensor:
    """(S, B, N) matched instance or -1, (B, G) labels -> (S, B, N) class of each proposal."""
    if labels.shape[1] == 0:
        return torch.full_like(matched_gt, background)
    label = labels.expand(len(matched_gt), -1, -1).gather(2, matched_gt.clamp(min=0))
    return torch.where(matched_gt >= 0, label, background)


def _class_loss(class_logits: Tensor, labels: Tensor, focal: tuple[float, float] | None) -> Tensor:
    """(S, B, N, K) logits, (S, B, N) labels, K for none -> (S, B, N, K). focal: alpha, gamma; None: cross-entropy."""
    is_class = labels.unsqueeze(-1) == torch.arange(class_logits.shape[-1], device=labels.device)
    # With y the logit of the wrong answer, cross-entropy is softplus(y), and focal loss weighs it so.
    wrong = torch.where(is_class, -class_logits, class_logits)
    if focal is None:
        return F.softplus(wrong)
    alpha, gamma = focal
    weight = torch.where(is_class, alpha, 1 - alpha)
    return weight * wrong.sigmoid() ** gamma * F.softplus(wrong)


def _dice_losses(
    mask_head: MaskHead, mask_features: Tensor, filters: Tensor, masks: Tensor, mask_of: Tensor, num_pairs: list[int]
) -> Tensor:
    """One minus dice with squared terms (V-Net, arXiv:1606.04797) of each pair.

    Args:
        mask_features: (B, C, H, W). filters: (P, F), image by image. masks: (sum of M, H, W) bool. mask_of: (P,) the
            one that each pair has to predict. num_pairs: of each image.
    Returns:
        (P,) in [0, 1].
    """
    sums = [
        _mask_sums(mask_head, features, part, masks[wanted])
        for features, part, wanted in zip(
            mask_features.split(1), filters.split(num_pairs), mask_of.split(num_pairs), strict=True
        )
    ]
    overlap, squares = torch.cat(sums, dim=1)
    return 1 - 2 * overlap / (squares + masks.flatten(1).sum(1)[mask_of] + _DICE_EPS)


def _mask_sums(mask_head: MaskHead, mask_features: Tensor, filters: Tensor, masks: Tensor) -> Tensor:
    """(1, C, H, W) features, (P, F) filters, (P, H, W) bool masks -> (2, P) sums over the pixels, see `_band_sums`."""
    height, width = mask_features.shape[-2:]
    limit = _BAND_ELEMENTS_GPU if mask_features.is_cuda else _BAND_ELEMENTS_CPU
    rows = max(limit // max(len(filters) * width, 1), 1)
    if rows >= height or not len(filters):
        return _band_sums(mask_head, mask_features, filters, masks)
    bands = [
        checkpoint(_band_sums, mask_head, features, filters, wanted, use_reentrant=False, preserve_rng_state=False)
        for features, wanted in zip(mask_features.split(rows, dim=2), masks.split(rows, dim=1), strict=True)
    ]
    return torch.stack(bands).sum(0)


def _band_sums(mask_head: MaskHead, mask_features: Tensor, filters: Tensor, masks: Tensor) -> Tensor:
    """The probability of each pair's mask summed over the pixels of the mask to predict, and its square over all."""
    probability = mask_head(mask_features, filters).flatten(1).sigmoid()
    return torch.stack([torch.where(masks.flatten(1), probability, 0).sum(1), probability.square().sum(1)])
