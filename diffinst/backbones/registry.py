"""The backbones by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diffinst.backbones.base import Backbone
from diffinst.backbones.efficientnet import EfficientNetLite0, load_imagenet_weights
from diffinst.backbones.resnet import ResNet
from diffinst.backbones.swin import swin_b, swin_l, swin_s, swin_t
from diffinst.backbones.tiny import Tiny
from diffinst.config import BackboneName

# name -> constructor; takes `freeze_at`. Tiny has no pretrained stages, and the release trains all of a Swin whatever
# its FREEZE_AT says: nothing of these is ever frozen.
BACKBONES: dict[BackboneName, Callable[[int], Backbone]] = {
    "resnet50": lambda freeze_at: ResNet(depth=50, freeze_at=freeze_at),
    "resnet101": lambda freeze_at: ResNet(depth=101, freeze_at=freeze_at),
    "swin_t": lambda _: swin_t(),
    "swin_s": lambda _: swin_s(),
    "swin_b": lambda _: swin_b(),
    "swin_l": lambda _: swin_l(),
    "swin_b_384": lambda _: swin_b(window_size=12),
    "swin_l_384": lambda _: swin_l(window_size=12),
    "efficientnet_lite0": lambda freeze_at: EfficientNetLite0(freeze_at=freeze_at),
    "tiny": lambda _: Tiny(),
}

# name -> state dict with ImageNet weights, where an installable package carries them.
IMAGENET_WEIGHTS: dict[BackboneName, Callable[[], dict[str, Tensor]]] = {"efficientnet_lite0": load_imagenet_weights}
