"""The model's sizes, read off the shapes of its weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from diffinst.backbones.registry import BACKBONES
from diffinst.config import BackboneName, ModelConfig

# What no shape tells: the released values, which are the defaults.
ASSUMED = ("num_attention_heads", "pooler_sampling_ratio", "snr_scale", "num_train_timesteps")
_BACKBONE = "backbone."


@cache
def backbone_shapes(name: BackboneName) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a backbone's weights, without making them."""
    with torch.device("meta"):
        backbone = BACKBONES[name](2)
    return {key: tuple(value.shape) for key, value in backbone.state_dict().items()}


def nearest_backbone(
    shapes: Mapping[str, tuple[int, ...]], *, optional: frozenset[str] = frozenset()
) -> tuple[BackboneName, list[str]]:
    """The backbone whose weights look most like these, and the names that still differ; none: it is the one.

    Args:
        shapes: names as in `Backbone.state_dict()`.
        optional: names that may be missing.
    """
    differences: dict[BackboneName, list[str]] = {}
    for name in BACKBONES:
        own = backbone_shapes(name)
        names = [key for key in own if key not in shapes and key not in optional]
        names += [key for key, shape in shapes.items() if own.get(key) != shape]
        differences[name] = names
    best = min(differences, key=lambda name: len(differences[name]))
    return best, differences[best]


def count_layers(names: Mapping[str, Any], prefix: str) -> int:
    """How many numbered parts there are under `prefix`: "stages.0.x", "stages.1.y" are two under "stages."."""
    numbers = {match.group(1) for name in names if (match := re.match(re.escape(prefix) + r"(\d+)\.", name))}
    return len(numbers)


def _tower_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return sum(name.startswith(prefix) and value.dim() == 2 for name, value in state.items())


def _mask_head_channels(num_params: int, in_channels: int) -> tuple[int, int] | None:
    """Two hidden layers of equal width c, as released: in c + c c + c weights and 2 c + 1 biases."""
    half = in_channels + 3
    width = (math.isqrt(half * half + 4 * (num_params - 1)) - half) // 2
    return (width, width) if width > 0 and width * width + half * width + 1 == num_params else None


def _shape(state: Mapping[str, Tensor], name: str, num_dims: int) -> tuple[int, ...]:
    shape = tuple(state[name].shape)
    if len(shape) != num_dims or 0 in shape:
        raise ValueError(name)
    return shape


def read_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of `ModelConfig` that the weights of a whole model determine.

    Args:
        state: under our names.
    Returns:
        name -> value; 'backbone' only where it is one of ours.
    Raises:
        KeyError: a weight that tells a size is missing; its name.
        ValueError: such a weight has an impossible shape; its name.
    """
    first = "box_head.stages.0."
    hidden_dim = _shape(state, "fpn.output.0.weight", 4)[0]
    out_features = _shape(state, f"{first}dynamic_conv.out.weight", 2)[1]
    shapes = {
        name.removeprefix(_BACKBONE): tuple(value.shape) for name, value in state.items() if name.startswith(_BACKBONE)
    }
    backbone, differences = nearest_backbone(shapes)
    found: dict[str, Any] = {} if differences else {"backbone": backbone}
    found |= {
        "num_classes": _shape(state, f"{first}class_logits.weight", 2)[0],
        "hidden_dim": hidden_dim,
        "num_stages": count_layers(state, "box_head.stages."),
        "dim_feedforward": _shape(state, f"{first}feedforward.0.weight", 2)[0],
        "dim_dynamic": _shape(state, f"{first}dynamic_conv.norm1.weight", 1)[0],
        "num_class_layers": _tower_layers(state, f"{first}class_tower."),
        "num_box_layers": _tower_layers(state, f"{first}box_tower."),
        "pooler_resolution": math.isqrt(out_features // hidden_dim),
        "mask": "dynamic" if "mask_branch.project.weight" in state else "none",
    }
    if found["mask"] == "none":
        return found
    mask_features, channels = _shape(state, "mask_branch.project.weight", 4)[:2]
    head = _mask_head_channels(_shape(state, f"{first}mask_params.weight", 2)[0], mask_features)
    return found | {
        "mask_branch_channels": channels,
        "mask_branch_layers": count_layers(state, "mask_branch.tower."),
        "mask_feature_channels": mask_features,
        "mask_norm": "batch" if "mask_branch.refine.0.1.running_mean" in state else "group",
        **({} if head is None else {"mask_head_channels": head}),
    }


def assumed_settings(found: Mapping[str, Any]) -> dict[str, Any]:
    """The released values of what `found` does not tell."""
    return {name: ModelConfig.model_fields[name].default for name in ASSUMED if name not in found}
