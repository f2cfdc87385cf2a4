"""Feature pyramid network (arXiv:1612.03144) over the four maps of a backbone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffinst.structures import FeatureShape


class FPN(nn.Module):
    """1x1 laterals, nearest x2 top-down sum, 3x3 outputs, no norm.

    Args:
        in_shapes: `out_shapes` of a backbone, finest first; each stride twice the one before.
        out_channels: channels of every output map.

    Attributes:
        out_shapes: "p2".."p5", at the strides of the input maps.
    """

    def __init__(self, in_shapes: Mapping[str, FeatureShape], *, out_channels: int) -> None:
        super().__init__()
        self.in_names = list(in_shapes)
        self.out_shapes = {
            name.replace("res", "p"): FeatureShape(out_channels, shape.stride) for name, shape in in_shapes.items()
        }
        self.lateral = nn.ModuleList(nn.Conv2d(shape.channels, out_channels, 1) for shape in in_shapes.values())
        self.output = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in in_shapes)
        for conv in [*self.lateral, *self.output]:
            # With a = 1 this is Caffe2's Xavier fill, which FPN is trained with everywhere.
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Maps of a backbone -> {"p2": (B, C, H/4, W/4), ..., "p5": (B, C, H/32, W/32)}."""
        maps = list(self.from_coarsest(dict(features)))
        return dict(zip(self.out_shapes, reversed(maps)))

    def from_coarsest(self, features: dict[str, Tensor]) -> Iterator[Tensor]:
        """The maps that `forward` gives, coarsest first, with little alive at once.

        Args:
            features: maps of a backbone, each taken out when it has been used.
        """
        above: Tensor | None = None
        for name, lateral, output in zip(reversed(self.in_names), reversed(self.lateral), reversed(self.output)):
            x = lateral(features.pop(name))
            if above is not None:
                _add_enlarged_(x, above)
            above = x
            yield output(x)


def _add_enlarged_(x: Tensor, coarse: Tensor) -> None:
    """Add a map (B, C, H, W) to each of the four pixels of x (B, C, 2H, 2W) that it covers."""
    if torch.is_grad_enabled():  # a sum by parts would have a graph of parts
        x.add_(functional.interpolate(coarse, scale_factor=2.0, mode="nearest"))
        return
    for row in (0, 1):
        for column in (0, 1):
            x[..., row::2, column::2].add_(coarse)
