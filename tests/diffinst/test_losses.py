from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import load_fixture
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from diffinst.federated import FederatedDraws
from diffinst.heads.mask_head import apply_mask_head
from diffinst.losses import LossTargets, compute_losses, prepare_targets
from diffinst.matching import match
from diffinst.structures import HeadOutput, Target

WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0, "loss_masks": 5.0}


def load_losses(name: str) -> tuple[HeadOutput, Tensor, list[Target], Tensor, dict[str, np.ndarray]]:
    """Leaves that need gradients, targets, whwh and the raw arrays of a losses fixture."""
    arrays = load_fixture(name)
    logits, boxes, filters, mask_features = (
        torch.from_numpy(arrays[key]).float().requires_grad_()
        for key in ("pred_logits", "pred_boxes", "pred_kernels", "mask_feat")
    )
    targets, whwh = [], []
    for image in ("img0", "img1"):
        height, width = arrays[f"{image}_size_hw"].tolist()
        labels = torch.from_numpy(arrays[f"{image}_labels"])
        bits = np.unpackbits(arrays[f"{image}_masks_packed"], axis=1)[:, : height * width]
        masks = torch.from_numpy(bits.reshape(-1, height, width) if len(labels) else np.zeros((0, height, width)))
        targets.append(Target(torch.from_numpy(arrays[f"{image}_gt_xyxy"]), labels, masks.bool()))
        whwh.append([width, height, width, height])
    return HeadOutput(logits, boxes, filters), mask_features, targets, torch.tensor(whwh).float(), arrays


def losses_of(
    output: HeadOutput, mask_features: Tensor | None, targets: list[Target], whwh: Tensor, **settings: object
) -> dict[str, Tensor]:
    size = None if mask_features is None else tuple(mask_features.shape[-2:])
    return compute_losses(output, mask_features, prepare_targets(targets, size), whwh, apply_mask_head, **settings)


def total_of(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


@pytest.mark.parametrize("fixture", ["losses_c5", "losses_c5_all_empty"])
def test_losses_and_gradients_of_the_release(fixture: str) -> None:
    output, mask_features, targets, whwh, arrays = load_losses(fixture)
    losses = losses_of(output, mask_features, targets, whwh, matcher="released", empty_batch_loss="released")
    for name, loss in losses.items():
        raw = torch.from_numpy(arrays[f"focal__{name}"])
        weight = 1 if "masks" in name else WEIGHTS[name.removesuffix("_0").removesuffix("_1")]
        torch.testing.assert_close(loss.detach(), weight * raw, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    # The fixture's model was configured for two stages and given three: all but the masks of the last auxiliary one are
    # in its total without their weights.
    total = total_of(losses) - sum(
        (1 - 1 / weight) * losses[f"{name}_1"] for name, weight in WEIGHTS.items() if name != "loss_masks"
    )
    torch.testing.assert_close(total.detach(), torch.from_numpy(arrays["focal__total_weighted"]), rtol=1e-5, atol=0)
    total.backward()
    leaves = {
        "logits": output.class_logits,
        "boxes": output.boxes_xyxy,
        "kernels": output.mask_params,
        "mask_feat": mask_features,
    }
    for name, leaf in leaves.items():
        if f"focal__grad_{name}" not in arrays:
            assert leaf.grad is None, name
            continue
        expected = torch.from_numpy(arrays[f"focal__grad_{name}"])
        largest = float(expected.abs().max())
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-6 * largest)


def released_draws(arrays: dict[str, np.ndarray], mode: str) -> FederatedDraws:
    """Draws in which the classes that the release sampled come first; it samples for the last stage first."""
    arrival = torch.full((2, 70), torch.inf)
    for stage, call in enumerate((1, 0)):
        classes = torch.from_numpy(arrays[f"{mode}__fed_classes_call{call}"])
        assert (len(classes), int(classes.max())) == (50, 70)  # the background index is one of the 50
        arrival[stage, classes[classes < 70]] = 1.0
    return FederatedDraws(arrival, 50)


@pytest.mark.parametrize("mode", ["focal", "focal_fed", "bce_fed"])
def test_federated_losses_and_gradients_of_the_release(mode: str) -> None:
    output, mask_features, targets, whwh, arrays = load_losses("losses_c70_fed")
    losses = losses_of(
        output,
        mask_features,
        targets,
        whwh,
        matcher="released",
        empty_batch_loss="released",
        class_loss="bce" if mode == "bce_fed" else "focal",
        federated=None if mode == "focal" else released_draws(arrays, mode),
    )
    assert len(losses) == 8
    for name, loss in losses.items():
        weight = WEIGHTS[name.removesuffix("_0")] if "masks" not in name else 1
        expected = torch.from_numpy(arrays[f"{mode}__{name}"])
        torch.testing.assert_close(
            loss.detach(), weight * expected, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
    total = total_of(losses)
    torch.testing.assert_close(total.detach(), torch.from_numpy(arrays[f"{mode}__total_weighted"]), rtol=1e-5, atol=0)
    total.backward()
    leaves = {
        "logits": output.class_logits,
        "boxes": output.boxes_xyxy,
        "kernels": output.mask_params,
        "mask_feat": mask_features,
    }
    for name, leaf in leaves.items():
        expected = torch.from_numpy(arrays[f"{mode}__grad_{name}"])
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_matches_of_the_release_by_stage() -> None:
    output, _, targets, whwh, arrays = load_losses("losses_c5")
    matched = match(
        output.class_logits, output.boxes_xyxy, prepare_targets(targets, None).padded, whwh, method="released"
    )
    for call, stage in enumerate((2, 0, 1)):  # the release matches the last stage first
        for image in range(2):
            key = f"focal__match_call{call}_img{image}"
            expected = torch.full((20,), -1)
            expected[torch.from_numpy(arrays[f"{key}_selected"])] = torch.from_numpy(arrays[f"{key}_gt_idx"])
            assert torch.equal(matched[stage, image], expected)


def random_batch(
    *, counts: tuple[int, ...] = (3, 0, 2), seed: int = 0
) -> tuple[HeadOutput, Tensor, list[Target], Tensor]:
    """2 stages, 10 proposals, 4 classes; images of 32 x 24 padded to 32 x 32; a mask head with 2 hidden channels."""
    generator = torch.Generator().manual_seed(seed)
    num_images = len(counts)

    def boxes(*shape: int) -> Tensor:
        corner = torch.rand(*shape, 2, generator=generator) * 12
        return torch.cat([corner, corner + 3 + torch.rand(*shape, 2, generator=generator) * 9], -1)

    output = HeadOutput(
        torch.randn(2, num_images, 10, 4, generator=generator).requires_grad_(),
        boxes(2, num_images, 10).requires_grad_(),
        torch.randn(2, num_images, 10, 11, generator=generator).requires_grad_(),
    )
    mask_features = torch.randn(num_images, 3, 8, 8, generator=generator).requires_grad_()
    targets = [
        Target(
            boxes(count),
            torch.randint(4, (count,), generator=generator),
            torch.rand(count, 32, 24, generator=generator) > 0.5,
        )
        for count in counts
    ]
    return output, mask_features, targets, torch.tensor([[24.0, 32.0, 24.0, 32.0]] * num_images)


def small_mask_head(mask_features: Tensor, mask_params: Tensor) -> Tensor:
    return apply_mask_head(mask_features, mask_params, channels=(2,))


def slow_losses(output: HeadOutput, mask_features: Tensor, targets: list[Target], whwh: Tensor) -> dict[str, Tensor]:
    """One stage, image and proposal after the other, with torchvision's focal and GIoU losses."""
    matched = match(output.class_logits, output.boxes_xyxy, prepare_targets(targets, None).padded, whwh)
    losses = {}
    for stage in range(len(matched)):
        sums = dict.fromkeys(WEIGHTS, torch.zeros(()))
        num_matched = max(int((matched[stage] >= 0).sum()), 1)
        for image, target in enumerate(targets):
            for proposal, instance in enumerate(matched[stage, image].tolist()):
                logits = output.class_logits[stage, image, proposal]
                one_hot = torch.zeros(len(logits))
                if instance >= 0:
                    one_hot[target.labels[instance]] = 1
                    box, wanted = output.boxes_xyxy[stage, image, proposal], target.boxes_xyxy[instance]
                    sums["loss_bbox"] = sums["loss_bbox"] + (box / whwh[image] - wanted / whwh[image]).abs().sum()
                    sums["loss_giou"] = sums["loss_giou"] + generalized_box_iou_loss(box[None], wanted[None])[0]
                    filters = output.mask_params[stage, image, proposal]
                    x = mask_features[image].flatten(1)
                    x = (filters[:6].view(2, 3) @ x + filters[8:10, None]).relu()
                    x = (filters[6:8] @ x + filters[10]).sigmoid()
                    y = torch.zeros(32, 32)
                    y[:, :24] = target.masks[instance]
                    y = y[2::4, 2::4].flatten()
                    dice = 1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum() + 1e-5)
                    sums["loss_masks"] = sums["loss_masks"] + dice
                focal = sigmoid_focal_loss(logits, one_hot, alpha=0.25, gamma=2, reduction="sum")
                sums["loss_ce"] = sums["loss_ce"] + focal
        suffix = "" if stage == len(matched) - 1 else f"_{stage}"
        losses |= {name + suffix: WEIGHTS[name] * value / num_matched for name, value in sums.items()}
    return losses


@pytest.mark.parametrize("counts", [(3, 0, 2), (1,), (0, 0)])
def test_equals_the_slow_losses(counts: tuple[int, ...]) -> None:
    output, mask_features, targets, whwh = random_batch(counts=counts)
    leaves = [output.class_logits, output.boxes_xyxy, output.mask_params, mask_features]
    found = compute_losses(output, mask_features, prepare_targets(targets, (8, 8)), whwh, small_mask_head)
    expected = slow_losses(output, mask_features, targets, whwh)
    assert list(found) == ["loss_ce", "loss_ce_0", "loss_bbox", "loss_bbox_0", "loss_giou", "loss_giou_0",
                           "loss_masks", "loss_masks_0"]  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(total_of(found), leaves)
    slow_gradients = torch.autograd.grad(total_of(expected), leaves, allow_unused=True)
    for gradient, leaf, slow in zip(gradients, leaves, slow_gradients):
        wanted = torch.zeros_like(leaf) if slow is None else slow
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_bands_of_pixels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    output, mask_features, targets, whwh = random_batch(counts=(3, 2))
    leaves = [mask_features.requires_grad_(), output.mask_params]

    def losses_and_gradients() -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        found = compute_losses(output, mask_features, prepare_targets(targets, (8, 8)), whwh, band_head)
        return found, torch.autograd.grad(total_of(found), leaves)

    heights = []

    def band_head(features: Tensor, params: Tensor) -> Tensor:
        heights.append(features.shape[2])
        return small_mask_head(features, params)

    whole = losses_and_gradients()
    assert set(heights) == {8}
    heights.clear()
    monkeypatch.setattr("diffinst.losses._BAND_ELEMENTS_CPU", 3 * 8 * 6)  # three rows of six pairs, or more of fewer
    banded = losses_and_gradients()
    assert max(heights) < 8
    assert any(8 % height for height in heights)  # the last band is smaller
    torch.testing.assert_close(banded, whole)


class HostReads(TorchFunctionMode):
    """Counts the calls after which the host waits for the device."""

    NAMES = frozenset(
        {"tolist", "item", "nonzero", "masked_select", "unique", "__bool__", "__int__", "__float__", "cpu"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in self.NAMES
        return func(*args, **(kwargs or {}))


def count_host_reads(counts: tuple[int, ...], *, apart: bool) -> int:
    """How often the host waits for the losses of a batch and their gradients.

    Args:
        apart: each instance has a proposal of its own; else all boxes are one, and repairs are needed.
    """
    output, mask_features, targets, whwh = random_batch(counts=counts)
    boxes = torch.tensor([1.0, 1.0, 3.0, 3.0]).repeat(2, len(counts), 10, 1)
    for image, target in enumerate(targets):
        for instance in range(len(target)):
            left = 4.0 * instance if apart else 1.0
            target.boxes_xyxy[instance] = torch.tensor([left, 8.0, left + 3, 12.0])
            boxes[:, image, instance] = target.boxes_xyxy[instance]
    output.boxes_xyxy = boxes.requires_grad_()
    prepared = prepare_targets(targets, (8, 8))
    with HostReads() as reads:
        total_of(compute_losses(output, mask_features, prepared, whwh, small_mask_head)).backward()
    return reads.count


@pytest.mark.parametrize("counts", [(3,), (3, 0, 2, 5)])
def test_the_host_waits_once_for_all_images_and_stages(counts: tuple[int, ...]) -> None:
    assert count_host_reads(counts, apart=True) == 1
    assert 2 < count_host_reads(counts, apart=False) <= 2 + max(counts)


def test_the_host_never_waits_for_a_batch_without_instances() -> None:
    assert count_host_reads((0, 0), apart=True) == 0


class TestByHand:
    # One image of 16 x 16, one class, one instance [4, 4, 12, 12] and one proposal.
    wanted = torch.tensor([[4.0, 4.0, 12.0, 12.0]])
    whwh = torch.full((1, 4), 16.0)

    def losses(self, box: list[float], logit: float = 0.0) -> dict[str, float]:
        mask = torch.zeros(1, 16, 16, dtype=torch.bool)
        mask[:, 4:12, 4:12] = True  # 4 of the 16 points at stride 4: (6, 6), (6, 10), (10, 6), (10, 10)
        output = HeadOutput(torch.full((1, 1, 1, 1), logit), torch.tensor([[[box]]]), torch.zeros(1, 1, 1, 9))
        targets = prepare_targets([Target(self.wanted, torch.zeros(1, dtype=torch.int64), mask)], (4, 4))
        # A linear head whose filters are all zero: every probability is a half.
        losses = compute_losses(output, torch.zeros(1, 8, 4, 4), targets, self.whwh, self.linear_head)
        return {name: float(loss) for name, loss in losses.items()}

    @staticmethod
    def linear_head(mask_features: Tensor, mask_params: Tensor) -> Tensor:
        return apply_mask_head(mask_features, mask_params, channels=())

    def test_perfect_box(self) -> None:
        losses = self.losses([4.0, 4.0, 12.0, 12.0])
        assert losses["loss_bbox"] == 0
        assert losses["loss_giou"] == pytest.approx(0, abs=1e-6)

    def test_shifted_box(self) -> None:
        # Shifted by 8 to the right: two sides 8 / 16 off, the IoU 0, the hull 16 x 8 = 128 just the union: GIoU 0.
        losses = self.losses([12.0, 4.0, 20.0, 12.0])
        assert losses["loss_bbox"] == pytest.approx(5 * 1.0)
        assert losses["loss_giou"] == pytest.approx(2 * 1.0)

    def test_focal_loss(self) -> None:
        # p = 1/2: alpha (1 - p)^gamma -ln p = 0.25 * 0.25 * ln 2.
        assert self.losses([4.0, 4.0, 12.0, 12.0])["loss_ce"] == pytest.approx(2 * 0.0625 * math.log(2))

    def test_dice_loss(self) -> None:
        # x = 1/2 at 16 points, y = 1 at 4: overlap 2, squares 4 and 4: 1 - 2 * 2 / 8 = 1/2.
        assert self.losses([4.0, 4.0, 12.0, 12.0])["loss_masks"] == pytest.approx(5 * 0.5, rel=1e-5)


def test_an_empty_image_changes_only_the_class_loss() -> None:
    output, mask_features, targets, whwh = random_batch(counts=(3, 0))
    both = compute_losses(output, mask_features, prepare_targets(targets, (8, 8)), whwh, small_mask_head)
    first = HeadOutput(output.class_logits[:, :1], output.boxes_xyxy[:, :1], output.mask_params[:, :1])
    alone = compute_losses(first, mask_features[:1], prepare_targets(targets[:1], (8, 8)), whwh[:1], small_mask_head)
    for name, loss in both.items():
        if "loss_ce" in name:
            assert loss > alone[name]
        else:
            torch.testing.assert_close(loss, alone[name])


@pytest.mark.parametrize(("empty_batch_loss", "has_gradient"), [("fixed", True), ("released", False)])
def test_batch_without_any_instance(empty_batch_loss: str, has_gradient: bool) -> None:
    output, mask_features, targets, whwh = random_batch(counts=(0, 0))
    losses = compute_losses(
        output,
        mask_features,
        prepare_targets(targets, (8, 8)),
        whwh,
        small_mask_head,
        empty_batch_loss=empty_batch_loss,
    )
    assert all(float(loss.detach()) == 0 for name, loss in losses.items() if "loss_ce" not in name)
    total_of(losses).backward()
    assert output.boxes_xyxy.grad is not None
    for leaf in (mask_features, output.mask_params):
        assert (leaf.grad is not None) == has_gradient
        assert leaf.grad is None or not leaf.grad.any()


def test_boxes_only() -> None:
    output, _, targets, whwh = random_batch()
    boxes_only = HeadOutput(output.class_logits, output.boxes_xyxy)
    targets = [Target(target.boxes_xyxy, target.labels) for target in targets]
    losses = compute_losses(boxes_only, None, prepare_targets(targets, None), whwh)
    assert not any("masks" in name for name in losses)
    with_masks = slow_losses(output, *random_batch()[1:])
    torch.testing.assert_close(losses, {name: with_masks[name] for name in losses}, rtol=1e-5, atol=1e-6)


def test_weights_scale_their_terms() -> None:
    output, mask_features, targets, whwh = random_batch(counts=(1,))
    prepared = prepare_targets(targets, (8, 8))
    base = compute_losses(output, mask_features, prepared, whwh, small_mask_head)
    halved = compute_losses(
        output, mask_features, prepared, whwh, small_mask_head,
        class_weight=1.0, l1_weight=2.5, giou_weight=1.0, mask_weight=2.5,
    )  # fmt: skip
    torch.testing.assert_close(halved, {name: loss / 2 for name, loss in base.items()})


def test_half_precision_predictions_give_float32_losses() -> None:
    output, mask_features, targets, whwh = random_batch()
    half = HeadOutput(output.class_logits.bfloat16(), output.boxes_xyxy, output.mask_params.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = compute_losses(half, mask_features.bfloat16(), prepare_targets(targets, (8, 8)), whwh, small_mask_head)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}


def test_extreme_logits_stay_finite() -> None:
    output, mask_features, targets, whwh = random_batch()
    extreme = HeadOutput(100 * output.class_logits, output.boxes_xyxy, 100 * output.mask_params)
    losses = compute_losses(extreme, mask_features, prepare_targets(targets, (8, 8)), whwh, small_mask_head)
    assert all(bool(loss.isfinite()) for loss in losses.values())
    total_of(losses).backward()
    assert output.class_logits.grad is not None
    assert output.class_logits.grad.isfinite().all()


def test_targets_hold_masks_at_the_stride_of_the_features() -> None:
    _, _, targets, _ = random_batch()
    prepared = prepare_targets(targets, (8, 8)).to("cpu")
    assert isinstance(prepared, LossTargets)
    assert prepared.masks is not None
    assert prepared.masks.shape == (5, 8, 8)
    assert torch.equal(prepared.masks[3, :, :6], targets[2].masks[0, 2::4, 2::4])
    assert not prepared.masks[:, :, 6:].any()
    assert prepared.first.tolist() == [0, 3, 3]
    assert prepared.padded.is_valid.tolist() == [[True] * 3, [False] * 3, [True, True, False]]


def test_missing_masks_are_refused() -> None:
    output, mask_features, targets, whwh = random_batch()
    without = [targets[0], Target(targets[1].boxes_xyxy, targets[1].labels), targets[2]]
    with pytest.raises(ValueError, match="target 1 of the batch has no masks"):
        prepare_targets(without, (8, 8))
    with pytest.raises(ValueError, match="needs mask_features, mask_head and targets with masks"):
        compute_losses(output, mask_features, prepare_targets(targets, None), whwh, small_mask_head)


def test_inputs_survive() -> None:
    output, mask_features, targets, whwh = random_batch()
    before = [x.clone() for x in (output.boxes_xyxy, output.class_logits, mask_features, targets[0].boxes_xyxy)]
    compute_losses(output, mask_features, prepare_targets(targets, (8, 8)), whwh, small_mask_head)
    for copy, value in zip(before, (output.boxes_xyxy, output.class_logits, mask_features, targets[0].boxes_xyxy)):
        assert torch.equal(copy, value)
