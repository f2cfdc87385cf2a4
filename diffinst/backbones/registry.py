"""The backbones by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from diffinst.backbones.base import Backbone
from diffinst.backbones.efficientnet import EfficientNetLite0, load_imagenet_weights
from diffinst.backbones.resnet import ResNet
from diffinst.backbones.tiny import Tiny
from diffinst.config import BackboneName


def _swin(size: Literal["t", "s", "b", "l"], window_size: int = 7) -> Backbone:
    from diffinst.backbones import swin  # late: it imports torchvision's models, see diffinst.ops.library

    if size in ("t", "s"):
        return swin.swin_t() if size == "t" else swin.swin_s()
    return (swin.swin_b if size == "b" else swin.swin_l)(window_size=window_size)


# name -> constructor; takes `freeze_at`. Tiny has no pretrained stages, and the release trains all of a Swin whatever
# its FREEZE_AT says: nothing of these is ever frozen.
BACKBONES: dict[BackboneName, Callable[[int], Backbone]] = {
    "resnet50": lambda freeze_at: ResNet(depth=50, freeze_at=freeze_at),
    "resnet101": lambda freeze_at: ResNet(depth=101, freeze_at=freeze_at),
    "swin_t": lambda _: _swin("t"),
    "swin_s": lambda _: _swin("s"),
    "swin_b": lambda _: _swin("b"),
    "swin_l": lambda _: _swin("l"),
    "swin_b_384": lambda _: _swin("b", window_size=12),
    "swin_l_384": lambda _: _swin("l", window_size=12),
    "efficientnet_lite0": lambda freeze_at: EfficientNetLite0(freeze_at=freeze_at),
    "tiny": lambda _: Tiny(),
}

# name -> state dict with ImageNet weights, where an installable package carries them.
IMAGENET_WEIGHTS: dict[BackboneName, Callable[[], dict[str, Tensor]]] = {"efficientnet_lite0": load_imagenet_weights}
