"""Which proposal learns which instance: dynamic-k matching by cost ("simOTA", arXiv:2107.08430, section 2.1).

Everything is batched over stages and images with padded instances. Claims are made without waiting for the device; the
repair waits once a round, whatever the number of images, stages and instances, and who knows that no instance is left
without a proposal (`Claims.needy`) need not call it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffinst.structures import Target

# The centre region reaches 2.5 widths and heights from an instance's centre, so it holds the whole box, and the extra
# cost for proposals not in both is one for proposals not in the box (the original simOTA has 2.5 strides).
_CENTRE_RADIUS = 2.5
_OUTSIDE_BOX_COST = 100.0
_NO_INSTANCE_NEAR_COST = 10_000.0
_TAKEN_COST = 100_000.0
# Keeps log(0) finite; part of the cost's definition.
_LOG_EPS = 1e-8
# Of 3040 crowded scenes (20 proposals, 1 to 19 instances) it ended within 2 rounds in 3038, never in 2.
RELEASED_MAX_ROUNDS = 100


class MatcherWarning(RuntimeWarning):
    """The released matcher met a scene on which it would not end."""


class PaddedTargets(NamedTuple):
    """Instances of a batch, padded to the largest count G (which may be 0).

    boxes_xyxy: (B, G, 4) float32 pixels. labels: (B, G) int64. is_valid: (B, G) bool, False where padded.
    """

    boxes_xyxy: Tensor
    labels: Tensor
    is_valid: Tensor


def pad_targets(targets: Sequence[Target]) -> PaddedTargets:
    """Stack the instances of B images (at least one), padding with empty boxes of class 0."""
    counts = torch.tensor([len(target) for target in targets])
    is_valid = torch.arange(int(counts.max())) < counts[:, None]
    return PaddedTargets(
        boxes_xyxy=pad_sequence([target.boxes_xyxy for target in targets], batch_first=True),
        labels=pad_sequence([target.labels for target in targets], batch_first=True),
        is_valid=is_valid.to(targets[0].labels.device, non_blocking=True),
    )


class Claims(NamedTuple):
    """The proposals of each instance, stages and images side by side (L of them), each proposal with at most one claim.

    claims: (L, G, N) bool. cost: (L, G, N) float32. is_valid: (L, G) bool, False where padded. was_contested: (L, N)
    bool, proposals that several instances claimed before the cheapest got them. lead: (..., B, N), of the result.
    """

    claims: Tensor
    cost: Tensor
    is_valid: Tensor
    was_contested: Tensor
    lead: torch.Size

    def needy(self) -> Tensor:
        """(L, G) bool: instances without a proposal, which a repair would help."""
        return self.is_valid & ~self.claims.any(2)

    def matched_gt(self) -> Tensor:
        """(..., B, N) int64 index of the instance within its image, -1 for background."""
        if not self.claims.numel():
            return torch.full(self.lead, -1, dtype=torch.int64, device=self.claims.device)
        # The first instance where the released repair left several on one proposal.
        return torch.where(self.claims.any(1), self.claims.to(torch.uint8).argmax(1), -1).reshape(self.lead)


def match(
    class_logits: Tensor,
    boxes_xyxy: Tensor,
    targets: PaddedTargets,
    whwh: Tensor,
    *,
    method: Literal["released", "fixed"] = "fixed",
    **settings: Any,
) -> Tensor:
    """Give each proposal the instance it has to predict, or none: `claim`, which takes the settings, and `repair`.

    Returns:
        (..., B, N) int64 index of the instance within its image, -1 for background.
    """
    return repair(claim(class_logits, boxes_xyxy, targets, whwh, **settings), method).matched_gt()


@torch.no_grad()
def claim(
    class_logits: Tensor,
    boxes_xyxy: Tensor,
    targets: PaddedTargets,
    whwh: Tensor,
    *,
    class_loss: Literal["focal", "bce"] = "focal",
    ota_k: int = 5,
    class_weight: float = 2.0,
    l1_weight: float = 5.0,
    giou_weight: float = 2.0,
    focal_alpha: float = 0.25,
    focal_gamma: float = 2.0,
) -> Claims:
    """What each instance claims by cost; some may be left without a proposal. Does not wait for the device.

    An instance claims its k cheapest proposals; k is the whole part of the sum of its `ota_k` largest IoUs, at least 1.
    A proposal claimed by several goes to the cheapest of all.

    Args:
        class_logits: (..., B, N, K) with any leading dimensions, usually the stages.
        boxes_xyxy: (..., B, N, 4) predicted, in pixels; may be empty or outside the image.
        targets: padded instances of the B images.
        whwh: (B, 4) width, height, width, height of the unpadded images.
        class_loss: the class cost follows the loss: focal, or cross-entropy, which alpha and gamma do not touch.
        ota_k: how many IoUs are summed; fewer when there are fewer proposals (where the release raises).
    """
    lead = boxes_xyxy.shape[:-1]
    num_proposals, num_instances = lead[-1], targets.labels.shape[1]
    if num_instances == 0 or 0 in lead:
        cost = torch.zeros(0, num_instances, num_proposals, device=boxes_xyxy.device)
        return Claims(cost.bool(), cost, cost.sum(2).bool(), cost.sum(1).bool(), lead)
    cost, iou = _cost_and_iou(
        class_logits.float(),
        boxes_xyxy.float(),
        targets,
        whwh,
        weights=(class_weight, l1_weight, giou_weight),
        focal=None if class_loss == "bce" else (focal_alpha, focal_gamma),
    )
    is_valid = targets.is_valid.expand(cost.shape[:-1]).flatten(0, -2)
    cost, iou = cost.flatten(0, -3), iou.flatten(0, -3)  # (..., B, G, N) -> (L, G, N)
    claims = _dynamic_k_claims(cost, iou, is_valid, min(ota_k, num_proposals))
    was_contested = claims.sum(1) > 1
    claims = torch.where(was_contested.unsqueeze(1), _one_hot(cost.argmin(1), num_instances, dim=1), claims)
    return Claims(claims, cost, is_valid, was_contested, lead)


@torch.no_grad()
def repair(claims: Claims, method: Literal["released", "fixed"] = "fixed") -> Claims:
    """Give instances without a proposal one. Waits for the device once a round, and at least once.

    - 'fixed': in rounds, each takes its cheapest free proposal; where an image has none free, the cheapest of those
      that are not the best one of the instance holding them. Several on one proposal: the cheapest instance gets it.
      A round helps at least one instance, so it ends, and min(M, N) instances of every image have a proposal.
    - 'released': the conflict test inside the loop uses the claims from before it, so instances may be lost or the loop
      may not end; here it ends after `RELEASED_MAX_ROUNDS` rounds with a `MatcherWarning`.
    """
    if method not in ("released", "fixed"):
        raise ValueError(f"method must be 'released' or 'fixed', not {method!r}")
    if not claims.claims.numel():
        return claims
    if method == "released":
        repaired = _repair_released(claims.claims, claims.cost, claims.is_valid, was_contested=claims.was_contested)
    else:
        repaired = _repair_fixed(claims.claims, claims.cost, claims.is_valid)
    return claims._replace(claims=repaired)


def _cost_and_iou(
    class_logits: Tensor,
    boxes_xyxy: Tensor,
    targets: PaddedTargets,
    whwh: Tensor,
    *,
    weights: tuple[float, float, float],
    focal: tuple[float, float] | None,
) -> tuple[Tensor, Tensor]:
    """Cost (inf for padding) and IoU of every instance with every proposal, each (..., B, G, N).

    focal: alpha and gamma of the class cost, None for cross-entropy.
    """
    predicted = [side.unsqueeze(-2) for side in boxes_xyxy.unbind(-1)]  # 4 x (..., B, 1, N)
    wanted = [side.unsqueeze(-1) for side in targets.boxes_xyxy.unbind(-1)]  # 4 x (B, G, 1)
    sizes = [side.reshape(-1, 1, 1) for side in whwh.unbind(-1)]  # 4 x (B, 1, 1)

    iou, giou = _pairwise_iou(predicted, wanted)
    l1 = sum((p / s - w / s).abs() for p, w, s in zip(predicted, wanted, sizes))

    labels = targets.labels.expand(*boxes_xyxy.shape[:-2], -1)  # (..., B, G)
    logits = class_logits.gather(-1, labels.unsqueeze(-2).expand(*boxes_xyxy.shape[:-1], -1)).transpose(-1, -2)
    probability = logits.sigmoid()
    negative, positive = -(1 - probability + _LOG_EPS).log(), -(probability + _LOG_EPS).log()
    if focal is not None:
        alpha, gamma = focal
        negative = (1 - alpha) * probability**gamma * negative
        positive = alpha * (1 - probability) ** gamma * positive

    in_box, in_region = _centre_inside(predicted, wanted)
    class_weight, l1_weight, giou_weight = weights
    cost = l1_weight * l1 + class_weight * (positive - negative) + giou_weight * -giou
    cost = cost + _OUTSIDE_BOX_COST * ~(in_box & in_region)
    valid = targets.is_valid.unsqueeze(-1)
    is_near = ((in_box | in_region) & valid).any(-2, keepdim=True)
    cost = torch.where(is_near, cost, cost + _NO_INSTANCE_NEAR_COST)
    return cost.masked_fill(~valid, torch.inf), iou


def _pairwise_iou(predicted: list[Tensor], wanted: list[Tensor]) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (arXiv:1902.09630) of boxes given as sides x1, y1, x2, y2 that broadcast; 0/0 is 0."""
    (px1, py1, px2, py2), (wx1, wy1, wx2, wy2) = predicted, wanted
    width = torch.minimum(px2, wx2) - torch.maximum(px1, wx1)
    height = torch.minimum(py2, wy2) - torch.maximum(py1, wy1)
    intersection = width.clamp(min=0) * height.clamp(min=0)
    union = (px2 - px1) * (py2 - py1) + (wx2 - wx1) * (wy2 - wy1) - intersection
    hull = (torch.maximum(px2, wx2) - torch.minimum(px1, wx1)) * (torch.maximum(py2, wy2) - torch.minimum(py1, wy1))
    iou = (intersection / union).masked_fill(union == 0, 0)
    return iou, iou - ((hull - union) / hull).masked_fill(hull == 0, 0)


def _centre_inside(predicted: list[Tensor], wanted: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Whether the centre of a prediction lies strictly inside an instance's box, and inside its centre region."""
    (px1, py1, px2, py2), (wx1, wy1, wx2, wy2) = predicted, wanted
    x, y = (px1 + px2) / 2, (py1 + py2) / 2
    in_box = (x > wx1) & (x < wx2) & (y > wy1) & (y < wy2)
    centre_x, centre_y = (wx1 + wx2) / 2, (wy1 + wy2) / 2
    reach_x, reach_y = _CENTRE_RADIUS * (wx2 - wx1), _CENTRE_RADIUS * (wy2 - wy1)
    in_region = (
        (x > centre_x - reach_x) & (x < centre_x + reach_x) & (y > centre_y - reach_y) & (y < centre_y + reach_y)
    )
    return in_box, in_region


def _one_hot(index: Tensor, size: int, *, dim: int) -> Tensor:
    """Bool tensor with a new axis of `size` at `dim`, True where that axis' position equals `index`."""
    positions = torch.arange(size, device=index.device)
    return index.unsqueeze(dim) == (positions[:, None] if dim == 1 else positions)


def _dynamic_k_claims(cost: Tensor, iou: Tensor, is_valid: Tensor, num_candidates: int) -> Tensor:
    """(L, G, N) bool: the k cheapest proposals of each instance, k from the sum of its largest IoUs."""
    k = iou.topk(num_candidates, dim=2).values.sum(2).int().clamp(min=1)  # (L, G), at most num_candidates
    candidates = cost.topk(num_candidates, dim=2, largest=False).indices
    is_claimed = (torch.arange(num_candidates, device=cost.device) < k.unsqueeze(2)) & is_valid.unsqueeze(2)
    return torch.zeros_like(cost, dtype=torch.bool).scatter_(2, candidates, is_claimed)


def _repair_fixed(claims: Tensor, cost: Tensor, is_valid: Tensor) -> Tensor:
    """Give instances without a proposal one; `claims` (L, G, N) holds at most one instance per proposal."""
    num_instances, num_proposals = cost.shape[1:]
    for _ in range(num_instances):  # enough, as every round helps at least one
        is_taken = claims.any(1)  # (L, N)
        has_free = ~is_taken.all(1, keepdim=True)
        best = _one_hot(cost.masked_fill(~claims, torch.inf).argmin(2), num_proposals, dim=2)  # (L, G, N)
        is_spare = is_taken & ~(best & claims).any(1)
        offered = torch.where(has_free, ~is_taken, is_spare)
        # Images without an offer have more instances than proposals, and every proposal its own instance.
        needy = is_valid & ~claims.any(2) & offered.any(1, keepdim=True)  # (L, G)
        if not needy.any():  # the one synchronisation of a round
            break
        wish = cost.masked_fill(~offered.unsqueeze(1), torch.inf).argmin(2)
        wishes = _one_hot(wish, num_proposals, dim=2) & needy.unsqueeze(2)
        winner = _one_hot(cost.masked_fill(~wishes, torch.inf).argmin(1), num_instances, dim=1)
        claims = torch.where(wishes.any(1, keepdim=True), winner, claims)
    return claims


def _repair_released(claims: Tensor, cost: Tensor, is_valid: Tensor, *, was_contested: Tensor) -> Tensor:
    """The release's repair, images side by side; `was_contested` (L, N) marks the proposals of several first claims."""
    num_instances, num_proposals = cost.shape[1:]
    for _ in range(RELEASED_MAX_ROUNDS):
        needy = is_valid & ~claims.any(2)  # (L, G)
        if not needy.any():  # the one synchronisation of a round
            break
        unfinished = needy.any(1)[:, None, None]
        cost = torch.where(claims.any(1, keepdim=True) & unfinished, cost + _TAKEN_COST, cost)
        claims = claims | (_one_hot(cost.argmin(2), num_proposals, dim=2) & needy.unsqueeze(2))
        resets = was_contested.unsqueeze(1) & (claims.sum(1) > 1).any(1)[:, None, None] & unfinished
        claims = torch.where(resets, _one_hot(cost.argmin(1), num_instances, dim=1), claims)
    else:
        warnings.warn(
            f"the released matcher left instances without a proposal after {RELEASED_MAX_ROUNDS} rounds; "
            "train.matcher: fixed never does",
            MatcherWarning,
            stacklevel=3,
        )
    return claims
