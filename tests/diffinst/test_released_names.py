from __future__ import annotations

import pytest
import torch
from helpers import load_fixture, load_json_fixture
from released_tiny_model import released_tiny_model

from diffinst.backbones.fpn import FPN
from diffinst.backbones.registry import BACKBONES
from diffinst.build import build_model
from diffinst.config import ModelConfig
from diffinst.model import DiffusionInst
from diffinst.released_names import (
    from_pretrained_name,
    from_released_name,
    rename_pretrained,
    rename_released,
    rename_to_released,
    to_released_name,
)

Shapes = dict[str, tuple[int, ...]]


def released_keys(name: str, *, prefix: str = "") -> Shapes:
    """Name -> shape of a stored list of a released state dict."""
    return {prefix + key: tuple(shape) for key, (shape, _) in load_json_fixture(name).items()}


def shapes_of(model: torch.nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def our_backbone(name: str) -> torch.nn.ModuleDict:
    """Of a whole model, without memory for it."""
    with torch.device("meta"):
        backbone = BACKBONES[name](2)  # type: ignore[index]
        return torch.nn.ModuleDict({"backbone": backbone, "fpn": FPN(backbone.out_shapes, out_channels=256)})


def small_model(**settings: object) -> DiffusionInst:
    sizes: dict = {"hidden_dim": 8, "num_attention_heads": 2, "dim_feedforward": 8, "mask_branch_channels": 8}
    return build_model(ModelConfig(num_classes=80, **sizes, **settings))


def mapped(released: Shapes) -> Shapes:
    """Under our names; no two become one."""
    pairs = [(from_released_name(name), shape) for name, shape in released.items()]
    kept = {name: shape for name, shape in pairs if name is not None}
    assert len(kept) == sum(name is not None for name, _ in pairs)
    return kept


@pytest.mark.parametrize(
    ("keys", "backbone", "constants"), [("r50", "resnet50", 0), ("r101", "resnet101", 0), ("swinb", "swin_b", 24)]
)
def test_every_name_and_shape_of_the_backbones_with_fpn(keys: str, backbone: str, constants: int) -> None:
    released = released_keys(f"keys_backbone_{keys}_fpn", prefix="backbone.")
    ours = shapes_of(our_backbone(backbone))
    assert mapped(released) == ours
    assert len(released) - len(ours) == constants
    assert {to_released_name(name): shape for name, shape in ours.items()} == {
        name: shape for name, shape in released.items() if not name.endswith("relative_position_index")
    }


def test_every_name_and_shape_of_the_whole_released_model() -> None:
    released = released_keys("keys_full_diffinst_coco_r50")
    ours = shapes_of(build_model(ModelConfig(num_classes=80)))
    assert mapped(released) == ours
    assert len(released) == 605
    constants = [name for name in released if from_released_name(name) is None]
    assert len(constants) == 12
    assert all("." not in name for name in constants)  # the noise schedule's
    assert {to_released_name(name) for name in ours} == released.keys() - set(constants)


def test_every_name_and_shape_of_the_tiny_released_model() -> None:
    assert mapped(released_keys("tiny_model_state_keys")) == shapes_of(released_tiny_model())


def test_boxes_alone_are_diffusiondet() -> None:
    released = released_keys("keys_full_diffinst_coco_r50")
    boxes = {
        name: shape
        for name, shape in released.items()
        if not name.startswith(("head.mask_head.", "head.mask_refine.")) and ".controller." not in name
    }
    assert mapped(boxes).keys() == shapes_of(small_model(mask="none")).keys()


def test_renaming_there_and_back_keeps_the_tensors() -> None:
    state = {name: torch.from_numpy(array) for name, array in load_fixture("tiny_model_state").items()}
    back = rename_to_released(rename_released(state))
    assert back.keys() == state.keys()
    assert all(back[name] is value for name, value in state.items())


@pytest.mark.parametrize(
    "name",
    [
        "betas",
        "sqrt_recipm1_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "posterior_mean_coef2",
        "backbone.bottom_up.layers.3.blocks.1.attn.relative_position_index",
        "backbone.bottom_up.layers.0.blocks.1.attn_mask",
    ],
)
def test_constants_are_computed_here(name: str) -> None:
    assert from_released_name(name) is None


def test_projection_counts_the_layers_before_it() -> None:
    assert to_released_name("mask_branch.project.bias") == "head.mask_head.4.bias"
    assert to_released_name("mask_branch.project.bias", mask_branch_layers=1) == "head.mask_head.1.bias"
    assert from_released_name("head.mask_head.1.bias") == "mask_branch.project.bias"


@pytest.mark.parametrize(
    "name",
    [
        "head.nothing.weight",
        "teacher.head.time_mlp.1.bias",
        "backbone.bottom_up.nothing.weight",
        "backbone.bottom_up.norm.weight",  # of a classifier; the release's backbone has norm0 to norm3
        "betas.weight",
        "",
    ],
)
def test_unknown_released_names_are_refused(name: str) -> None:
    with pytest.raises(KeyError, match="not a name of the released model"):
        from_released_name(name)


@pytest.mark.parametrize("name", ["schedule.betas", "backbone.blocks.0.weight", "nothing"])
def test_unknown_own_names_are_refused(name: str) -> None:
    with pytest.raises(KeyError, match="no name in the released model"):
        to_released_name(name)


def test_names_stay_unique() -> None:
    names = [
        name for name in small_model(backbone="tiny", mask_branch_layers=2).state_dict() if "backbone." not in name
    ]
    assert len({to_released_name(name, mask_branch_layers=2) for name in names}) == len(names)


class TestPretrained:
    """Classifiers as published: their names without a prefix, their classifier besides."""

    @pytest.mark.parametrize(("keys", "backbone"), [("r50", "resnet50"), ("r101", "resnet101"), ("swinb", "swin_b")])
    def test_fills_the_backbone(self, keys: str, backbone: str) -> None:
        prefix = "bottom_up."
        names = [name for name in released_keys(f"keys_backbone_{keys}_fpn") if name.startswith(prefix)]
        state = {name.removeprefix(prefix): torch.zeros(()) for name in names}
        outputs = {f"norm{index}.{kind}" for index in range(4) for kind in ("weight", "bias")}
        if backbone == "swin_b":
            # No classifier has them, and each has these.
            state = {name: value for name, value in state.items() if name not in outputs}
            state |= dict.fromkeys(["norm.weight", "norm.bias", "head.weight", "head.bias"], torch.zeros(()))
            state["layers.2.blocks.1.attn_mask"] = torch.zeros(())
            missing = {f"norms.{index}.{kind}" for index in range(4) for kind in ("weight", "bias")}
        else:
            state |= dict.fromkeys(["stem.fc.weight", "stem.fc.bias"], torch.zeros(()))
            state["res2.0.conv1.norm.num_batches_tracked"] = torch.zeros(())
            missing = set()
        ours = our_backbone(backbone)["backbone"].state_dict()
        assert rename_pretrained(state).keys() == ours.keys() - missing

    def test_some_names(self) -> None:
        assert from_pretrained_name("stem.conv1.norm.running_var") == "stem.norm.running_var"
        assert from_pretrained_name("res5.2.conv3.weight") == "res5.2.conv3.weight"
        assert from_pretrained_name("layers.2.blocks.17.mlp.fc2.bias") == "stages.2.17.mlp.3.bias"
        assert from_pretrained_name("layers.2.downsample.reduction.weight") == "merges.2.reduction.weight"

    @pytest.mark.parametrize("name", ["res2_0_branch2a_w", "conv1_w", "layer1.0.conv1.weight", "fc.weight", ""])
    def test_other_networks_are_refused(self, name: str) -> None:
        with pytest.raises(KeyError, match="not a name of a published ResNet or Swin classifier"):
            from_pretrained_name(name)
