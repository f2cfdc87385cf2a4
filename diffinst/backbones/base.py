"""What every backbone is: an image in, feature maps of stated shapes out."""

from __future__ import annotations

from torch import Tensor, nn

from diffinst.structures import FeatureShape


class Backbone(nn.Module):
    """Base class that holds the contract.

    `forward` takes (B, 3, H, W) normalised RGB, H and W multiples of `size_divisor`, and returns one (B, C, H/s, W/s)
    map per entry (C, s) of `out_shapes`, finest first.

    Attributes:
        out_shapes: name -> channels and stride, strides 4, 8, 16, 32 under "res2".."res5".
        pixel_mean, pixel_std: per RGB channel, on the 0..255 scale; the network sees (pixel - mean) / std.
        size_divisor: images are padded to multiples of it.
    """

    out_shapes: dict[str, FeatureShape]
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    size_divisor: int = 32

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    # nn.Module types __call__ as returning Any.
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        features: dict[str, Tensor] = super().__call__(images)
        return features


def freeze(module: nn.Module) -> None:
    """Excludes all parameters of `module` from training."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
