from __future__ import annotations

import pytest
import torch
from helpers import load_fixture, load_json_fixture
from released_tiny_model import released_tiny_model
from torch.testing import assert_close

from diffinst.backbones.fpn import FPN
from diffinst.backbones.resnet import ResNet
from diffinst.released_names import to_released_name


def test_parity_with_the_released_resnet_and_fpn() -> None:
    fixture = load_fixture("resnet_fpn_tiny")
    model = released_tiny_model()
    with torch.no_grad():
        features = model.backbone(torch.from_numpy(fixture["x"]).float())
        pyramid = model.fpn(features)
    for name, x in (features | pyramid).items():
        expected = torch.from_numpy(fixture[name])
        assert_close(
            x, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item(), msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(("depth", "name"), [(50, "r50_fpn"), (101, "r101_fpn")])
def test_names_shapes_and_counts_are_detectron2s(depth: int, name: str) -> None:
    keys = load_json_fixture(f"keys_backbone_{name.replace('_fpn', '')}_fpn")
    info = load_json_fixture("backbone_info")[name]
    with torch.device("meta"):
        backbone = ResNet(depth=depth)
        fpn = FPN(backbone.out_shapes, out_channels=256)
    parts = {"backbone": backbone, "fpn": fpn}
    ours = {
        to_released_name(f"{part}.{key}").removeprefix("backbone."): list(value.shape)
        for part, module in parts.items()
        for key, value in module.state_dict().items()
    }
    assert ours == {key: shape for key, (shape, _) in keys.items()}

    parameters = {f"{part}.{key}": p for part, module in parts.items() for key, p in module.named_parameters()}
    assert sum(p.numel() for p in parameters.values()) == info["n_params"]
    frozen = [to_released_name(key).removeprefix("backbone.") for key, p in parameters.items() if not p.requires_grad]
    assert sorted(frozen) == sorted(info["trainable_keys_excluded"])
    assert sum(p.numel() for p in parameters.values() if p.requires_grad) == info["trainable"]


@pytest.mark.parametrize("freeze_at", range(6))
def test_freeze_at_counts_stages(freeze_at: int) -> None:
    with torch.device("meta"):
        backbone = ResNet(depth=50, freeze_at=freeze_at)
    frozen = {name.split(".")[0] for name, p in backbone.named_parameters() if not p.requires_grad}
    trained = {name.split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}
    stages = ["stem", "res2", "res3", "res4", "res5"]
    assert frozen == set(stages[:freeze_at])
    assert trained == set(stages[freeze_at:])
