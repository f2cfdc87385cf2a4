"""The mask branch: one map of mask features per image, shared by all its instances (CondInst, arXiv:2003.05664)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from diffinst.ops.masks import add_aligned_bilinear_, aligned_bilinear

# Levels of the pyramid that are fused, finest first. The release lists p3, p4, p5 but computes with p2, p3, p4.
NUM_LEVELS = 3
_GROUP_SIZE = 8


class _ConvNorm(nn.Sequential):
    """3x3 convolution, norm, ReLU.

    In inference a batch norm is an affine map, and goes into the convolution's weights: equal to 1e-6, and a pass over
    the weights costs less than one over the map.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: Literal["batch", "group"]) -> None:
        if norm == "batch":
            norm_layer: nn.Module = nn.BatchNorm2d(out_channels)
        else:
            norm_layer = nn.GroupNorm(out_channels // math.gcd(out_channels, _GROUP_SIZE), out_channels)
        super().__init__(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), norm_layer, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self[0], self[1]
        if not isinstance(norm, nn.BatchNorm2d) or norm.training or torch.is_grad_enabled():
            mapped: Tensor = super().forward(x)
            return mapped
        assert isinstance(conv, nn.Conv2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        return functional.relu(functional.conv2d(x, weight, bias, padding=1), inplace=True)


class MaskBranch(nn.Module):
    """Fuses the three finest levels at the finest stride, then a tower of 3x3 convolutions and a 1x1 projection.

    Args:
        in_channels: channels of the pyramid.
        channels: width of the branch.
        num_layers: 3x3 convolutions after the fusion.
        out_channels: channels of the mask features.
        norm: "batch" (trained, as released) or "group" (independent of the batch, groups of 8 channels).
    """

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int = 128,
        num_layers: int = 4,
        out_channels: int = 8,
        norm: Literal["batch", "group"] = "batch",
    ) -> None:
        super().__init__()
        self.refine = nn.ModuleList(_ConvNorm(in_channels, channels, norm) for _ in range(NUM_LEVELS))
        self.tower = nn.Sequential(*(_ConvNorm(channels, channels, norm) for _ in range(num_layers)))
        self.project = nn.Conv2d(channels, out_channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, pyramid: list[Tensor]) -> Tensor:
        """Pyramid, finest level first, each half the size of the one before -> (B, out_channels, H/4, W/4)."""
        x = self.refine[0](pyramid[0])
        for level in range(1, NUM_LEVELS):
            coarse = self.refine[level](pyramid[level])
            # Under autocast the enlarged map is float32, and so is the sum.
            if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
                x = x + aligned_bilinear(coarse, 2**level)
            else:
                add_aligned_bilinear_(x, coarse, 2**level)
        for layer in self.tower:  # one by one, so that no more than two maps are alive
            x = layer(x)
        mask_features: Tensor = self.project(x)
        return mask_features
