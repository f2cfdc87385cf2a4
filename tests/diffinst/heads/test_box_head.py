from __future__ import annotations

import math

import pytest
import torch
from helpers import load_fixture, load_json_fixture, needs_compiler
from released_tiny_model import pyramid_of, released_tiny_model
from torch import Tensor
from torch.testing import assert_close

from diffinst.heads.box_head import BoxHead
from diffinst.heads.mask_branch import MaskBranch
from diffinst.released_names import to_released_name


def _box_head(**changes: object) -> BoxHead:
    sizes: dict = {
        "num_stages": 2,
        "num_classes": 3,
        "num_mask_params": 11,
        "dim": 8,
        "dim_feedforward": 12,
        "dim_dynamic": 4,
        "num_attention_heads": 2,
        "num_class_layers": 1,
        "num_box_layers": 2,
        "strides": [4, 8],
        "pooler_resolution": 3,
    }
    torch.manual_seed(0)
    return BoxHead(**(sizes | changes))


def _inputs(batch: int = 2, num_proposals: int = 5) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pyramid = [torch.randn(batch, 8, 64 // stride, 96 // stride, generator=generator) for stride in (4, 8)]
    boxes = torch.rand(batch, num_proposals, 4, generator=generator) * 30
    boxes[..., 2:] += boxes[..., :2] + 1
    return pyramid, boxes, torch.randint(0, 1000, (batch,), generator=generator)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_parity_of_every_stage(compiled: bool) -> None:
    fixture = load_fixture("head_io")
    with torch.no_grad():
        out = released_tiny_model().box_head(
            pyramid_of(fixture), torch.from_numpy(fixture["boxes"]), torch.from_numpy(fixture["t"]), compiled=compiled
        )
    ours = {"class_logits": out.class_logits, "pred_boxes": out.boxes_xyxy, "kernels": out.mask_params}
    for name, value in ours.items():
        expected = torch.from_numpy(fixture[name])
        for stage in range(2):
            scale = expected[stage].abs().max().item()
            assert_close(value[stage], expected[stage], rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("stage", [0, 1])
def test_parity_inside_a_stage(stage: int) -> None:
    fixture = {name: torch.from_numpy(array) for name, array in load_fixture("head_io").items()}
    module = released_tiny_model().box_head.stages[stage]
    attention_in = fixture[f"stage{stage}_self_attn_in"].transpose(0, 1)  # (N, B, D) -> (B, N, D)
    with torch.no_grad():
        attended = module.self_attention(attention_in, attention_in, attention_in, need_weights=False)[0]
        assert_close(attended, fixture[f"stage{stage}_self_attn_out"].transpose(0, 1), rtol=1e-4, atol=1e-5)

        x = module.self_attention_norm(attention_in + attended)
        x = module.dynamic_conv_norm(x + fixture[f"stage{stage}_dynconv_out"].unflatten(0, x.shape[:2]))
        x = module.feedforward_norm(x + module.feedforward(x))
    assert_close(x.reshape(1, 40, 32), fixture[f"stage{stage}_obj_features"], rtol=1e-4, atol=1e-5)


def test_first_proposal_features_are_the_mean_of_the_roi() -> None:
    fixture = {name: torch.from_numpy(array) for name, array in load_fixture("head_io").items()}
    mean = fixture["stage0_roi_features"].mean(dim=(2, 3)).unflatten(0, (2, 20))
    assert_close(mean, fixture["stage0_self_attn_in"].transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_full_size_head_has_the_released_names_and_shapes() -> None:
    keys = load_json_fixture("keys_full_diffinst_coco_r50")
    info = load_json_fixture("backbone_info")["full_r50"]
    with torch.device("meta"):
        box_head = BoxHead(
            num_stages=6,
            num_classes=80,
            num_mask_params=153,
            dim=256,
            dim_feedforward=2048,
            dim_dynamic=64,
            num_attention_heads=8,
            num_class_layers=1,
            num_box_layers=3,
            strides=[4, 8, 16, 32],
        )
        mask_branch = MaskBranch(in_channels=256)
    parts = {"box_head": box_head, "mask_branch": mask_branch}
    ours = {
        to_released_name(f"{part}.{key}"): list(value.shape)
        for part, module in parts.items()
        for key, value in module.state_dict().items()
    }
    assert ours == {key: shape for key, (shape, _) in keys.items() if key.startswith("head.")}
    assert sum(p.numel() for p in box_head.stages[0].parameters()) == info["head_stage_params"]
    assert sum(p.numel() for p in mask_branch.parameters()) == info["mask_branch_params"]
    total = sum(p.numel() for module in parts.values() for p in module.parameters())
    assert total == info["head_params"]


@pytest.mark.parametrize("num_classes", [1, 2, 3, 80])
def test_any_class_count(num_classes: int) -> None:
    out = _box_head(num_classes=num_classes)(*_inputs())
    assert out.class_logits.shape == (2, 2, 5, num_classes)
    assert out.boxes_xyxy.shape == (2, 2, 5, 4)
    assert out.mask_params is not None
    assert out.mask_params.shape == (2, 2, 5, 11)


def test_boxes_only() -> None:
    box_head = _box_head(num_mask_params=None)
    assert box_head(*_inputs()).mask_params is None
    assert not [name for name, _ in box_head.named_parameters() if "mask" in name]


@pytest.mark.parametrize(("batch", "num_proposals"), [(1, 1), (2, 0)])
def test_few_proposals(batch: int, num_proposals: int) -> None:
    out = _box_head().eval()(*_inputs(batch, num_proposals))
    assert out.boxes_xyxy.shape == (2, batch, num_proposals, 4)
    assert out.boxes_xyxy.isfinite().all()


def test_a_batch_equals_its_images_one_by_one() -> None:
    box_head = _box_head().eval()
    pyramid, boxes, t = _inputs(batch=3)
    with torch.no_grad():
        together = box_head(pyramid, boxes, t)
        for image in range(3):
            one = slice(image, image + 1)
            alone = box_head([level[one] for level in pyramid], boxes[one], t[one])
            assert_close(together.class_logits[:, one], alone.class_logits, rtol=1e-4, atol=1e-5)
            assert_close(together.boxes_xyxy[:, one], alone.boxes_xyxy, rtol=1e-4, atol=1e-3)
            assert_close(together.mask_params[:, one], alone.mask_params, rtol=1e-4, atol=1e-5)


def test_order_of_proposals_does_not_matter() -> None:
    box_head = _box_head().eval()
    pyramid, boxes, t = _inputs()
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        out, shuffled = box_head(pyramid, boxes, t), box_head(pyramid, boxes[:, order], t)
    assert_close(shuffled.class_logits, out.class_logits[:, :, order], rtol=1e-4, atol=1e-5)
    assert_close(shuffled.boxes_xyxy, out.boxes_xyxy[:, :, order], rtol=1e-4, atol=1e-3)


def test_inputs_survive() -> None:
    pyramid, boxes, t = _inputs()
    before = [x.clone() for x in (*pyramid, boxes, t)]
    _box_head()(pyramid, boxes, t)
    assert all(torch.equal(now, then) for now, then in zip((*pyramid, boxes, t), before))


def test_every_parameter_has_a_gradient() -> None:
    box_head = _box_head()
    pyramid, boxes, t = _inputs()
    pyramid = [level.requires_grad_() for level in pyramid]
    out = box_head(pyramid, boxes, t)
    (out.class_logits.square().sum() + out.boxes_xyxy.square().sum() + out.mask_params.square().sum()).backward()
    without = [name for name, p in box_head.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    assert all(level.grad is not None for level in pyramid)


def test_boxes_pass_between_stages_without_gradient() -> None:
    box_head = _box_head()
    out = box_head(*_inputs())
    out.boxes_xyxy[1].sum().backward()
    assert not box_head.stages[0].box_deltas.weight.grad.any()
    assert box_head.stages[0].feedforward[0].weight.grad.any()  # through the proposal features


def test_time_changes_the_output() -> None:
    box_head = _box_head().eval()
    pyramid, boxes, t = _inputs()
    assert not torch.allclose(box_head(pyramid, boxes, t).class_logits, box_head(pyramid, boxes, t + 1).class_logits)


def test_outputs_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = _box_head()(*_inputs())
    assert out.class_logits.dtype == out.boxes_xyxy.dtype == out.mask_params.dtype == torch.float32


def test_class_probability_starts_at_one_percent() -> None:
    for stage in _box_head(num_classes=3).stages:
        assert_close(stage.class_logits.bias.sigmoid(), torch.full((3,), 0.01))


def test_initial_spread_is_the_released_one() -> None:
    """Xavier uniform has standard deviation sqrt(2 / (fan in + fan out)); here 2048 x 256 gives 0.02946."""
    stats = load_json_fixture("init_stats_head_r50")
    torch.manual_seed(0)
    box_head = BoxHead(
        num_stages=1,
        num_classes=80,
        num_mask_params=153,
        dim=256,
        dim_feedforward=2048,
        dim_dynamic=16,  # the two layers whose size depends on it are left out below
        num_attention_heads=8,
        num_class_layers=1,
        num_box_layers=3,
        strides=[4, 8, 16, 32],
        pooler_resolution=7,
    )
    assert_close(stats["head_series.0.linear1.weight"]["std"], math.sqrt(2 / (2048 + 256)), rtol=0.01, atol=0)
    compared = 0
    for name, parameter in box_head.named_parameters():
        expected = stats[to_released_name(f"box_head.{name}").removeprefix("head.")]
        if list(parameter.shape) != expected["shape"]:
            continue
        compared += 1
        assert_close(parameter.std().item(), expected["std"], rtol=0.15 if parameter.numel() > 100 else 0.8, atol=1e-6)
        bound = max(abs(expected["min"]), abs(expected["max"]))
        assert parameter.abs().max().item() <= 1.2 * bound + 1e-6 or parameter.numel() < 100
    assert compared == len(list(box_head.parameters())) - 4
