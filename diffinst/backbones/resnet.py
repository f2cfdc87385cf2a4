"""ResNet-50 and ResNet-101 (arXiv:1512.03385) with frozen batch norm, as in detectron2."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from diffinst.backbones.base import Backbone, freeze
from diffinst.backbones.frozen_norm import ConvFrozenNorm
from diffinst.structures import FeatureShape

BLOCKS_PER_STAGE = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a residual; the stride is in the 3x3, as torchvision and the released configs have it.

    In inference the output may be in the memory of an input that has as many channels.
    """

    def __init__(self, in_channels: int, out_channels: int, *, width: int, stride: int, num_groups: int) -> None:
        super().__init__()
        self.shortcut = (
            ConvFrozenNorm(in_channels, out_channels, 1, stride=stride) if in_channels != out_channels else None
        )
        self.conv1 = ConvFrozenNorm(in_channels, width, 1)
        self.conv2 = ConvFrozenNorm(width, width, 3, stride=stride, padding=1, groups=num_groups)
        self.conv3 = ConvFrozenNorm(width, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        # In place: no convolution needs its own output again, and a new map costs as much as what is done to it.
        x = functional.relu(self.conv1(x), inplace=True)
        x = functional.relu(self.conv2(x), inplace=True)
        return self.conv3.rectified_sum(x, shortcut)


class ResNet(Backbone):
    """ResNet of bottleneck blocks.

    Args:
        depth: 50 or 101.
        stem_channels: of the 7x7 stem.
        res2_channels: outputs of the first stage; each stage doubles them.
        width_per_group: bottleneck width of the first stage per group; each stage doubles it.
        num_groups: groups of the 3x3 convolutions.
        freeze_at: stages without training: 0 none, 1 the stem, 2 the stem and res2, ..., 5 all.
    """

    def __init__(
        self,
        *,
        depth: Literal[50, 101],
        stem_channels: int = 64,
        res2_channels: int = 256,
        width_per_group: int = 64,
        num_groups: int = 1,
        freeze_at: int = 2,
    ) -> None:
        super().__init__()
        self.stem = ConvFrozenNorm(3, stem_channels, 7, stride=2, padding=3)
        self.out_shapes = {}
        in_channels = stem_channels
        for index, num_blocks in enumerate(BLOCKS_PER_STAGE[depth]):
            channels, stride = res2_channels * 2**index, 1 if index == 0 else 2
            blocks = []
            for block in range(num_blocks):
                blocks.append(
                    Bottleneck(
                        in_channels,
                        channels,
                        width=width_per_group * num_groups * 2**index,
                        stride=stride if block == 0 else 1,
                        num_groups=num_groups,
                    )
                )
                in_channels = channels
            name = f"res{index + 2}"
            self.add_module(name, nn.Sequential(*blocks))
            self.out_shapes[name] = FeatureShape(channels, 4 * 2**index)
        for part in [self.stem, *(getattr(self, name) for name in self.out_shapes)][:freeze_at]:
            freeze(part)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = functional.relu(self.stem(images), inplace=True)
        x = functional.max_pool2d(x, 3, stride=2, padding=1)
        features = {}
        for name in self.out_shapes:
            x = features[name] = getattr(self, name)(x)
        return features
