"""Parameter names of the released DiffusionInst code (detectron2) <-> ours. Shapes are the same on both sides."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# Buffers of the noise schedule, which is computed here.
_SCHEDULE = re.compile(r"(betas|(log_|sqrt_)?\w*alphas_cumprod\w*|posterior_\w+)")

# (released, ours), tried in order; {n} stands for a number that both names share.
_RULES: tuple[tuple[str, str], ...] = (
    ("backbone.bottom_up.stem.conv1.", "backbone.stem."),
    ("backbone.bottom_up.", "backbone."),
    ("head.time_mlp.1.", "box_head.time_embedding.mlp.0."),
    ("head.time_mlp.3.", "box_head.time_embedding.mlp.2."),
    ("head.head_series.{n}.self_attn.", "box_head.stages.{n}.self_attention."),
    ("head.head_series.{n}.norm1.", "box_head.stages.{n}.self_attention_norm."),
    ("head.head_series.{n}.inst_interact.dynamic_layer.", "box_head.stages.{n}.dynamic_conv.generate."),
    ("head.head_series.{n}.inst_interact.out_layer.", "box_head.stages.{n}.dynamic_conv.out."),
    ("head.head_series.{n}.inst_interact.norm3.", "box_head.stages.{n}.dynamic_conv.out_norm."),
    ("head.head_series.{n}.inst_interact.", "box_head.stages.{n}.dynamic_conv."),
    ("head.head_series.{n}.norm2.", "box_head.stages.{n}.dynamic_conv_norm."),
    ("head.head_series.{n}.linear1.", "box_head.stages.{n}.feedforward.0."),
    ("head.head_series.{n}.linear2.", "box_head.stages.{n}.feedforward.3."),
    ("head.head_series.{n}.norm3.", "box_head.stages.{n}.feedforward_norm."),
    ("head.head_series.{n}.block_time_mlp.", "box_head.stages.{n}.time_affine."),
    ("head.head_series.{n}.cls_module.", "box_head.stages.{n}.class_tower."),
    ("head.head_series.{n}.reg_module.", "box_head.stages.{n}.box_tower."),
    ("head.head_series.{n}.class_logits.", "box_head.stages.{n}.class_logits."),
    ("head.head_series.{n}.bboxes_delta.", "box_head.stages.{n}.box_deltas."),
    ("head.head_series.{n}.controller.", "box_head.stages.{n}.mask_params."),
    ("head.mask_refine.", "mask_branch.refine."),
    # mask_head.<i>.<0 conv | 1 norm>.* are the tower, mask_head.<last>.* the projection.
    ("head.mask_head.{n}.0.", "mask_branch.tower.{n}.0."),
    ("head.mask_head.{n}.1.", "mask_branch.tower.{n}.1."),
)
_FPN_FIRST_LEVEL = 2


def _substitute(name: str, source: str, target: str) -> str | None:
    pattern = re.escape(source).replace(r"\{n\}", r"(\d+)")
    match = re.match(pattern, name)
    if match is None:
        return None
    number = match.group(1) if match.groups() else ""
    return target.replace("{n}", number) + name[match.end() :]


def from_released_name(name: str) -> str | None:
    """Our name of a released parameter or buffer; None for the noise schedule's buffers, which are not stored here.

    Raises:
        KeyError: no such name in the released model.
    """
    if _SCHEDULE.fullmatch(name):
        return None
    if match := re.fullmatch(r"backbone\.fpn_(lateral|output)(\d)\.(\w+)", name):
        kind, level, rest = match.groups()
        return f"fpn.{kind}.{int(level) - _FPN_FIRST_LEVEL}.{rest}"
    if match := re.fullmatch(r"head\.mask_head\.\d+\.(weight|bias)", name):
        return f"mask_branch.project.{match.group(1)}"
    for released, ours in _RULES:
        renamed = _substitute(name, released, ours)
        if renamed is not None:
            return renamed
    raise KeyError(f"{name!r} is not a name of the released model")


def to_released_name(name: str, *, mask_branch_layers: int = 4) -> str:
    """The released name of one of our parameters or buffers.

    Args:
        name: a key of `DiffusionInst.state_dict()`.
        mask_branch_layers: layers of the mask branch's tower; the projection's released name counts them.
    Raises:
        KeyError: the released model has no such part.
    """
    if match := re.fullmatch(r"fpn\.(lateral|output)\.(\d)\.(\w+)", name):
        kind, index, rest = match.groups()
        return f"backbone.fpn_{kind}{int(index) + _FPN_FIRST_LEVEL}.{rest}"
    if match := re.fullmatch(r"mask_branch\.project\.(weight|bias)", name):
        return f"head.mask_head.{mask_branch_layers}.{match.group(1)}"
    for released, ours in _RULES:
        renamed = _substitute(name, ours, released)
        if renamed is not None:
            return renamed
    raise KeyError(f"{name!r} has no name in the released model")


def rename_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released state dict under our names, without the schedule's buffers."""
    renamed = {from_released_name(name): value for name, value in state.items()}
    return {name: value for name, value in renamed.items() if name is not None}
