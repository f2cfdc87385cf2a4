"""The tiny model behind most fixtures: ResNet-50 at an eighth of its width, 2 stages, 32 channels, stored weights."""

from __future__ import annotations

import torch
from helpers import load_fixture
from torch import Tensor

from diffinst.backbones.fpn import FPN
from diffinst.backbones.resnet import ResNet
from diffinst.heads.box_head import BoxHead
from diffinst.heads.mask_branch import MaskBranch
from diffinst.heads.mask_head import num_mask_params
from diffinst.model import DiffusionInst
from diffinst.released_names import rename_released


def released_tiny_model() -> DiffusionInst:
    """The model that made most fixtures, in evaluation mode; 128x160 images, 5 classes, 20 proposals."""
    backbone = ResNet(depth=50, stem_channels=8, res2_channels=32, width_per_group=8)
    fpn = FPN(backbone.out_shapes, out_channels=32)
    box_head = BoxHead(
        num_stages=2,
        num_classes=5,
        num_mask_params=num_mask_params(8, (8, 8)),
        dim=32,
        dim_feedforward=64,
        dim_dynamic=8,
        num_attention_heads=4,
        num_class_layers=1,
        num_box_layers=3,
        strides=[shape.stride for shape in fpn.out_shapes.values()],
    )
    model = DiffusionInst(
        backbone=backbone, fpn=fpn, box_head=box_head, mask_branch=MaskBranch(in_channels=32), num_classes=5
    )
    state = {name: torch.from_numpy(array) for name, array in load_fixture("tiny_model_state").items()}
    model.load_state_dict(rename_released(state))
    return model.eval()


def pyramid_of(fixture: dict) -> list[Tensor]:
    """The stored p2..p5 in float32."""
    return [torch.from_numpy(fixture[f"p{level}"]).float() for level in (2, 3, 4, 5)]
