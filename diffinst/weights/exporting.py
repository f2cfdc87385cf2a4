"""A checkpoint -> a file that the released code and detectron2 read: released names, and the constants they store."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from diffinst.checkpoint import Checkpoint, load_checkpoint
from diffinst.errors import CheckpointError
from diffinst.released_names import rename_to_released
from diffinst.weights.constants import schedule_constants, window_constants
from diffinst.weights.files import EMA, MODEL, write_pkl, write_pth

SUFFIXES = (".pth", ".pkl")


def released_state(checkpoint: Checkpoint, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """One of a checkpoint's sets of weights under the released names, with the constants of the released model.

    Raises:
        CheckpointError: the released code has no such model.
    """
    settings = checkpoint.config.model
    if not settings.backbone.startswith(("resnet", "swin")):
        raise CheckpointError(
            f"{checkpoint.path}: the released code has no backbone {settings.backbone}. Allowed are ResNet and Swin."
        )
    if settings.mask == "dynamic" and settings.mask_norm != "batch":
        raise CheckpointError(
            f"{checkpoint.path}: the released code has no mask branch with mask_norm {settings.mask_norm}, only batch."
        )
    state = rename_to_released(weights, mask_branch_layers=settings.mask_branch_layers)
    return schedule_constants(settings.num_train_timesteps) | state | window_constants(state)


def export_weights(path: Path, out: Path) -> int:
    """Write a checkpoint's weights, and their moving average if it has one, for the released code.

    Args:
        path: a checkpoint of `diffinst train` or `diffinst import-weights`.
        out: a .pth file (torch, tensors only) or a .pkl file (detectron2, numpy arrays); replaced if it is there.
    Returns:
        The number of names in the model's state.
    Raises:
        CheckpointError: no checkpoint, a model that the released code does not have, or `out` cannot be written.
    """
    checkpoint = load_checkpoint(path)
    states = {MODEL: released_state(checkpoint, checkpoint.model)}
    if checkpoint.ema:
        states[EMA] = released_state(checkpoint, checkpoint.ema)
    try:
        (write_pkl if out.suffix == ".pkl" else write_pth)(out, states)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
        raise CheckpointError(f"{out}: cannot be written ({error}). Check free space and permissions.") from error
    return len(states[MODEL])
