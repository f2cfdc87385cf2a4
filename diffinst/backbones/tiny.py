"""A small residual network that trains from scratch on a CPU in minutes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from diffinst.backbones.base import Backbone
from diffinst.structures import FeatureShape


class _BatchNorm(nn.BatchNorm2d):
    """Batch norm that falls back on its running statistics where a batch has one value per channel.

    One value has no variance; torch refuses it. It is met in training on a single image of at most 32 x 32.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(x)


class _Block(nn.Module):
    """Two 3x3 convolutions, the first one downsampling, beside a pooled 1x1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.norm1 = _BatchNorm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = _BatchNorm(out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(functional.avg_pool2d(x, 2))
        x = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(x)) + shortcut)


class Tiny(Backbone):
    """One residual block per stride. Batch norm is trained: there are no published weights to stay close to.

    Args:
        stem_channels: channels at stride 2.
        widths: channels at strides 4, 8, 16, 32.
    """

    def __init__(self, *, stem_channels: int = 16, widths: Sequence[int] = (32, 48, 80, 112)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, stem_channels, 3, stride=2, padding=1, bias=False)
        self.stem_norm = _BatchNorm(stem_channels)
        in_widths = (stem_channels, *widths[:-1])
        self.stages = nn.ModuleList(_Block(before, after) for before, after in zip(in_widths, widths))
        self.out_shapes = {f"res{i + 2}": FeatureShape(width, 4 * 2**i) for i, width in enumerate(widths)}
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = functional.relu(self.stem_norm(self.stem(images)))
        features = {}
        for name, stage in zip(self.out_shapes, self.stages):
            x = features[name] = stage(x)
        return features
