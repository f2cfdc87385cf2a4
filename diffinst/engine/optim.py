"""The optimiser of the release and its learning rate as a pure function of the iteration."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from diffinst.config import TrainConfig


def build_optimizer(model: nn.Module, settings: TrainConfig) -> torch.optim.AdamW:
    """AdamW over all trainable parameters; norms and biases decay too, as in the release."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Fused: one pass over the tensors; on a CPU it saves most of the step's time for a small model.
    return torch.optim.AdamW(parameters, lr=lr_at(0, settings), weight_decay=settings.weight_decay, fused=True)


def lr_at(iteration: int, settings: TrainConfig) -> float:
    """Learning rate of an iteration, counted from 0: linear warm-up times the schedule.

    Warm-up rises from `warmup_factor` to 1 over `warmup_iterations`. "step" multiplies by `schedule_gamma` from each of
    `schedule_steps` on; "cosine" falls from 1 to 0 over all iterations (arXiv:1608.03983, eq. 5, without restarts).
    """
    rate = settings.learning_rate
    if iteration < settings.warmup_iterations:
        share = iteration / settings.warmup_iterations
        rate *= settings.warmup_factor * (1 - share) + share
    if settings.schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * min(iteration / settings.iterations, 1.0)))
    return rate * settings.schedule_gamma ** sum(iteration >= step for step in settings.schedule_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for all parameters from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients, in place, so that their joint L2 norm is at most `max_norm`; None only measures.

    Returns:
        Scalar norm before clipping; 0 without any gradient.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm, norm)
    return norm


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """State of an optimiser over the model's trainable parameters, as "PARAMETER/ENTRY" -> tensor."""
    return {
        f"{name}/{entry}": value
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` gave, for the same model.

    Raises:
        ValueError: a tensor belongs to no trainable parameter.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    position = {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        if name not in position:
            raise ValueError(f"optimiser state of {name!r}, which is no trainable parameter of this model")
        state.setdefault(position[name], {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
