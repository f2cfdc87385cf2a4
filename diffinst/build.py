"""ModelConfig -> DiffusionInst: the only model file that reads a configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffinst.backbones.base import Backbone
from diffinst.backbones.fpn import FPN
from diffinst.backbones.registry import BACKBONES, IMAGENET_WEIGHTS
from diffinst.checkpoint import Checkpoint, load_model_weights
from diffinst.config import ModelConfig
from diffinst.errors import CheckpointError, ConfigError
from diffinst.heads.box_head import BoxHead
from diffinst.heads.mask_branch import MaskBranch
from diffinst.heads.mask_head import num_mask_params
from diffinst.heads.released_init import released_init_
from diffinst.model import DiffusionInst
from diffinst.ops.mask_head_triton import require_triton
from diffinst.ops.roi import require_pooling

_PREFIX = "backbone."
_CHECKPOINT = "model/"  # before the names of weights in a checkpoint
_SHOWN = 3  # mismatches named in an error


def _difference(backbone: Backbone, state: dict[str, Tensor]) -> list[str]:
    own = backbone.state_dict()
    lines = [f"{key} is missing" for key in own if key not in state]
    lines += [f"{key} is not part of this backbone" for key in state if key not in own]
    lines += [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    return lines


def load_backbone_weights(backbone: Backbone, path: Path) -> None:
    """Copies weights from a safetensors file into a backbone.

    The file holds a backbone's state dict, or a whole model's or a checkpoint, of which the part under "backbone." is
    taken.

    Raises:
        CheckpointError: no such file, not a safetensors file, or the weights of another backbone.
    """
    if not path.is_file():
        raise CheckpointError(
            f"backbone_weights: {path}: no such file. Allowed: 'none', 'imagenet' or a safetensors file."
        )
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"backbone_weights: {path}: not a safetensors file, or truncated ({error}). Export the state dict with "
            "safetensors.torch.save_file."
        ) from error
    if any(key.startswith(_CHECKPOINT) for key in state):
        state = {key.removeprefix(_CHECKPOINT): value for key, value in state.items() if key.startswith(_CHECKPOINT)}
    if any(key.startswith(_PREFIX) for key in state):
        state = {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}
    difference = _difference(backbone, state)
    if difference:
        more = f", and {len(difference) - _SHOWN} more" if len(difference) > _SHOWN else ""
        raise CheckpointError(
            f"backbone_weights: {path}: weights of another backbone: {'; '.join(difference[:_SHOWN])}{more}. Choose "
            "the backbone they were saved from."
        )
    backbone.load_state_dict(state)


def build_backbone(config: ModelConfig) -> Backbone:
    """The backbone with its weights.

    Raises:
        ConfigError: ImageNet weights are asked for and not to be had.
        CheckpointError: a weights file does not fit.
    """
    backbone = BACKBONES[config.backbone](config.freeze_at)
    if config.backbone_weights == "imagenet":
        if config.backbone not in IMAGENET_WEIGHTS:
            raise ConfigError(
                f"backbone_weights 'imagenet': no installable package carries them for {config.backbone}, only for "
                f"{', '.join(IMAGENET_WEIGHTS)}. Set backbone_weights to 'none' or a safetensors file."
            )
        backbone.load_state_dict(IMAGENET_WEIGHTS[config.backbone]())
    elif config.backbone_weights != "none":
        load_backbone_weights(backbone, Path(config.backbone_weights))
    return backbone


def build_model(config: ModelConfig) -> DiffusionInst:
    """The model with initial weights, drawn from torch's global generator, on the CPU, in training mode.

    Raises:
        ConfigError: `num_classes` is not set, or the backbone's weights cannot be had.
        CheckpointError: the backbone's weights file does not fit.
        ImportError: torchvision's operators do not load.
    """
    if config.num_classes is None:
        raise ConfigError("num_classes is not set. Take it from the data set, or give it in the model section.")
    require_pooling(config.box_pooling)  # or it would not be known before a training has ended
    backbone = build_backbone(config)
    fpn = FPN(backbone.out_shapes, out_channels=config.hidden_dim)
    has_masks = config.mask == "dynamic"
    box_head = BoxHead(
        num_stages=config.num_stages,
        num_classes=config.num_classes,
        num_mask_params=(
            num_mask_params(config.mask_feature_channels, config.mask_head_channels) if has_masks else None
        ),
        dim=config.hidden_dim,
        dim_feedforward=config.dim_feedforward,
        dim_dynamic=config.dim_dynamic,
        num_attention_heads=config.num_attention_heads,
        num_class_layers=config.num_class_layers,
        num_box_layers=config.num_box_layers,
        strides=[shape.stride for shape in fpn.out_shapes.values()],
        pooler_resolution=config.pooler_resolution,
        pooler_sampling_ratio=config.pooler_sampling_ratio,
        box_pooling=config.box_pooling,
        dropout=config.dropout,
    )
    mask_branch = None
    if has_masks:
        mask_branch = MaskBranch(
            in_channels=config.hidden_dim,
            channels=config.mask_branch_channels,
            num_layers=config.mask_branch_layers,
            out_channels=config.mask_feature_channels,
            norm=config.mask_norm,
        )
    if config.init == "released":
        released_init_([box_head] if mask_branch is None else [box_head, mask_branch], config.num_classes)
    return DiffusionInst(
        backbone=backbone,
        fpn=fpn,
        box_head=box_head,
        mask_branch=mask_branch,
        mask_head_channels=config.mask_head_channels,
        mask_head_kernel=config.mask_head_kernel,
        num_classes=config.num_classes,
        num_train_timesteps=config.num_train_timesteps,
        snr_scale=config.snr_scale,
    )


def require_device(config: ModelConfig, device: torch.device | str) -> None:
    """Refuse a device on which the model cannot detect, before any work is done.

    Raises:
        ConfigError: the fused mask head is asked for where it cannot run.
    """
    if config.mask == "dynamic" and config.mask_head_kernel == "triton":
        require_triton(device, config.mask_feature_channels, config.mask_head_channels)


def restored_model(
    checkpoint: Checkpoint, config: ModelConfig | None = None, *, use_ema: bool = False
) -> DiffusionInst:
    """The model with a checkpoint's weights, on the CPU, in training mode; in a fraction of `build_model`'s time.

    Args:
        checkpoint: with tensors; the model takes them over.
        config: of the model; None takes the checkpoint's. Weights of a backbone that it names are not looked for.
        use_ema: the moving average of the weights instead.
    Raises:
        CheckpointError: the weights are those of another model, or no average was kept.
        ConfigError: `num_classes` is not set.
    """
    chosen = checkpoint.config.model if config is None else config
    require_pooling(chosen.box_pooling)  # nothing else is to be imported within the mode
    with torch.random.fork_rng(devices=[]), _Undrawn():
        model = build_model(chosen.model_copy(update={"backbone_weights": "none"}))
    load_model_weights(model, checkpoint, use_ema=use_ema, take_over=True)
    return model


class _Undrawn(TorchFunctionMode):
    """Leaves out the drawing of initial weights: memory that is never written to is not even mapped."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        # Some functions of torch.nn.init are seen as such, of others the method that they call. Those that draw until
        # all values are in bounds work on copies, which are no parameters: these have to be drawn, or it never ends.
        is_draw = func in (Tensor.normal_, Tensor.uniform_) and isinstance(args[0], torch.nn.Parameter)
        if is_draw or getattr(func, "__module__", "") == "torch.nn.init":
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


def seeded_model(config: ModelConfig, seed: int) -> DiffusionInst:
    """`build_model` with weights that depend on the seed alone; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(config)
