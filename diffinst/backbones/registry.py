"""The backbones by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diffinst.backbones.base import Backbone
from diffinst.backbones.efficientnet import EfficientNetLite0, load_imagenet_weights
from diffinst.backbones.resnet import ResNet
from diffinst.backbones.tiny import Tiny
from diffinst.config import BackboneName

# name -> constructor; takes `freeze_at`. Tiny has no pretrained stages, so nothing of it is ever frozen.
BACKBONES: dict[BackboneName, Callable[[int], Backbone]] = {
    "resnet50": lambda freeze_at: ResNet(depth=50, freeze_at=freeze_at),
    "resnet101": lambda freeze_at: ResNet(depth=101, freeze_at=freeze_at),
    "efficientnet_lite0": lambda freeze_at: EfficientNetLite0(freeze_at=freeze_at),
    "tiny": lambda _: Tiny(),
}

# name -> state dict with ImageNet weights, where an installable package carries them.
IMAGENET_WEIGHTS: dict[BackboneName, Callable[[], dict[str, Tensor]]] = {"efficientnet_lite0": load_imagenet_weights}
