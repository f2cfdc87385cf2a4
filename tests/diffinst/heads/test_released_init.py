"""Which parameters each initialisation makes constant."""

from __future__ import annotations

import pytest
import torch

from diffinst.build import build_model
from diffinst.config import ModelConfig
from diffinst.heads.box_head import PRIOR_BIAS
from diffinst.model import DiffusionInst

CLASS_BIASES = {"box_head.stages.0.class_logits.bias", "box_head.stages.1.class_logits.bias"}
BOX_BIASES = {"box_head.stages.0.box_deltas.bias", "box_head.stages.1.box_deltas.bias"}
MASK_CONVS = {f"mask_branch.refine.{level}.0.weight" for level in range(3)} | {
    f"mask_branch.tower.{layer}.0.weight" for layer in range(4)
}


def _model(num_classes: int, init: str) -> DiffusionInst:
    torch.manual_seed(0)
    return build_model(
        ModelConfig(
            backbone="tiny",
            num_classes=num_classes,
            hidden_dim=32,
            num_stages=2,
            num_attention_heads=4,
            dim_feedforward=48,
            dim_dynamic=24,
            mask_branch_channels=16,
            init=init,
        )
    )


def _constant(model: DiffusionInst) -> set[str]:
    return {
        name
        for name, p in model.named_parameters()
        if name.startswith(("box_head.", "mask_branch.")) and torch.equal(p, torch.full_like(p, PRIOR_BIAS))
    }


@pytest.mark.parametrize("num_classes", [1, 2, 3, 4, 80])
def test_fixed_sets_the_class_bias_alone(num_classes: int) -> None:
    assert _constant(_model(num_classes, "fixed")) == CLASS_BIASES


@pytest.mark.parametrize(
    ("num_classes", "others"),
    [
        (1, {"mask_branch.project.weight"}),
        (2, MASK_CONVS),
        (3, MASK_CONVS | BOX_BIASES),
        (4, BOX_BIASES),
        (80, set()),
    ],
)
def test_released_goes_by_shape(num_classes: int, others: set[str]) -> None:
    assert _constant(_model(num_classes, "released")) == CLASS_BIASES | others


@pytest.mark.parametrize("init", ["fixed", "released"])
def test_both_spread_matrices_alike(init: str) -> None:
    """Xavier uniform: bound sqrt(6 / (fan in + fan out)); for 48 x 32 that is 0.274."""
    weight = _model(80, init).box_head.stages[0].feedforward[0].weight
    assert weight.shape == (48, 32)
    assert 0.26 < weight.abs().max().item() <= (6 / 80) ** 0.5
