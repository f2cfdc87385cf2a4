"""Parameter names of the released code (detectron2) <-> ours. Shapes are the same on both sides.

Fits DiffusionInst with ResNet or Swin, and DiffusionDet, which names the parts it has alike. Two kinds of released
buffers have no counterpart here, because they are constants that the configuration decides: those of the noise schedule
("betas", ...) and those of Swin's windows ("...attn.relative_position_index", "...attn_mask").
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_CONSTANT = re.compile(
    r"betas|(log_|sqrt_)?\w*alphas_cumprod\w*|posterior_\w+"  # of the noise schedule
    r"|(.*\.)?(relative_position_index|attn_mask)"  # of Swin's windows
)
# Of classifiers: their last norm and layer, and counters of batch norms that are frozen here.
_CLASSIFIER = re.compile(r"(norm|head|stem\.fc)\.(weight|bias)|.*\.num_batches_tracked")

# (released, ours), tried in order; a name fits that begins so; {n} stands for a number that both names share.
_BACKBONE_RULES: tuple[tuple[str, str], ...] = (
    # ResNet; res2.0.conv1.norm. and so on are alike.
    ("stem.conv1.", "stem."),
    ("res{n}.", "res{n}."),
    # Swin; merging belongs to the stage before it there and after it in torchvision, and is counted alike.
    ("patch_embed.proj.", "patch_projection."),
    ("patch_embed.norm.", "patch_norm."),
    ("layers.{n}.blocks.{n}.mlp.fc1.", "stages.{n}.{n}.mlp.0."),
    ("layers.{n}.blocks.{n}.mlp.fc2.", "stages.{n}.{n}.mlp.3."),
    ("layers.{n}.blocks.{n}.", "stages.{n}.{n}."),
    ("layers.{n}.downsample.", "merges.{n}."),
    ("norm{n}.", "norms.{n}."),
)
_HEAD_RULES: tuple[tuple[str, str], ...] = (
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
_RULES = tuple((f"backbone.bottom_up.{theirs}", f"backbone.{ours}") for theirs, ours in _BACKBONE_RULES) + _HEAD_RULES
_FPN_FIRST_LEVEL = 2


def _substitute(name: str, source: str, target: str) -> str | None:
    pattern = re.escape(source).replace(r"\{n\}", r"(\d+)")
    match = re.match(pattern, name)
    if match is None:
        return None
    for number in match.groups():
        target = target.replace("{n}", number, 1)
    return target + name[match.end() :]


def from_released_name(name: str) -> str | None:
    """Our name of a released parameter or buffer, as in `DiffusionInst.state_dict()`; None for a constant.

    None stands for the buffers without counterpart that the module's text lists; all other names have one.

    Raises:
        KeyError: no such name in the released model.
    """
    if _CONSTANT.fullmatch(name):
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

    The released model has constants besides (see the module's text). Its own loading fills in those that a file lacks.

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
    """A released state dict under our names, without its constants.

    Raises:
        KeyError: see `from_released_name`.
    """
    renamed = {from_released_name(name): value for name, value in state.items()}
    return {name: value for name, value in renamed.items() if name is not None}


def rename_to_released(state: Mapping[str, Tensor], *, mask_branch_layers: int = 4) -> dict[str, Tensor]:
    """Our state dict under the released names; without the constants, which the released code computes itself.

    Raises:
        KeyError: see `to_released_name`.
    """
    return {to_released_name(name, mask_branch_layers=mask_branch_layers): value for name, value in state.items()}


def from_pretrained_name(name: str) -> str | None:
    """Our name, in `Backbone.state_dict()`, of a tensor of a published ImageNet classifier.

    Known are detectron2's R-50.pkl and R-101.pkl in its torchvision variant ("stem.conv1.weight", "res2.0.conv1.norm.
    running_mean") and the Swin authors' checkpoints ("layers.0.blocks.0.attn.qkv.weight"). None for what a backbone has
    no use for: the classifier's last norm and layer ("norm.weight", "head.weight", "stem.fc.weight") and constants.
    The LayerNorms of Swin's four maps are in no classifier: they start as they are built.

    Raises:
        KeyError: neither of the two; among others, detectron2's MSRA variant ("res2_0_branch2a_w"), which has its
            strides elsewhere and is another network.
    """
    if _CONSTANT.fullmatch(name) or _CLASSIFIER.fullmatch(name):
        return None
    for theirs, ours in _BACKBONE_RULES:
        renamed = _substitute(name, theirs, ours)
        if renamed is not None:
            return renamed
    raise KeyError(f"{name!r} is not a name of a published ResNet or Swin classifier")


def rename_pretrained(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published classifier's state dict under the names of our backbone, without what the backbone has no use for.

    Raises:
        KeyError: see `from_pretrained_name`.
    """
    renamed = {from_pretrained_name(name): value for name, value in state.items()}
    return {name: value for name, value in renamed.items() if name is not None}
