"""Convolution followed by a batch norm that is never trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffinst.ops.convolution import convolve_into
from diffinst.ops.recompute import computed_again


class _FrozenNorm(nn.Module):
    """A batch norm whose statistics and affine map are constants, under a batch norm's names; (B, C, H, W) either way.

    torchvision's `FrozenBatchNorm2d`, here because of what importing that one costs, see `diffinst.ops.library`.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class ConvFrozenNorm(nn.Conv2d):
    """Convolution without bias and a batch norm whose statistics and affine map are constants.

    A constant affine map after a convolution is a convolution with other weights, so the norm is folded into them on
    each call: that costs a pass over the weights instead of two over the activations. In training on a CPU it is folded
    again in the backward, until when the weights must not change.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, groups=groups, bias=False
        )
        self.norm = _FrozenNorm(out_channels, norm_eps)
        # Kaiming normal by fan-out, which torch's own function takes `groups` times too large.
        fan_out = out_channels * kernel_size**2 // groups
        nn.init.normal_(self.weight, std=math.sqrt(2 / fan_out))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight (out, in / groups, k, k) and bias (out,) of the equivalent single convolution."""
        scale = self.norm.weight * torch.rsqrt(self.norm.running_var + self.norm.eps)
        return self.weight * scale[:, None, None, None], self.norm.bias - self.norm.running_mean * scale

    def rectified_sum(self, x: Tensor, total: Tensor) -> Tensor:
        """relu(self(x) + total), which in inference takes the place of `total`; for stride 1."""
        if torch.is_grad_enabled():
            return functional.relu(self(x).add_(total), inplace=True)
        assert isinstance(self.padding, tuple)
        return convolve_into(total, x, *self.folded(), padding=self.padding, groups=self.groups)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.folded()
        if not weight.requires_grad or weight.device.type != "cpu":
            return self._conv_forward(x, weight, bias)
        with computed_again(weight, lambda: self.folded()[0]):
            return self._conv_forward(x, weight, bias)
