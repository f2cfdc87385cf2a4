"""Buffers that the released models store and that follow from their sizes: the noise schedule's and Swin's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from diffinst.diffusion.schedule import cosine_betas

_TABLE, _INDEX = "relative_position_bias_table", "relative_position_index"
_CRITERION = ("criterion.fed_loss_cls_weights", "criterion.empty_weight")


def schedule_constants(num_timesteps: int) -> dict[str, Tensor]:
    """The noise schedule as the released models keep it (DDPM, arXiv:2006.11239, eq. 4 to 7); each (T,) float64."""
    betas = cosine_betas(num_timesteps)
    alphas = 1 - betas
    product = torch.cumprod(alphas, dim=0)
    before = functional.pad(product[:-1], (1, 0), value=1.0)
    variance = betas * (1 - before) / (1 - product)
    return {
        "betas": betas,
        "alphas_cumprod": product,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": product.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - product).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - product).log(),
        "sqrt_recip_alphas_cumprod": (1 / product).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / product - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - product),
        "posterior_mean_coef2": (1 - before) * alphas.sqrt() / (1 - product),
    }


def window_index(window_size: int) -> Tensor:
    """Row of Swin's bias table for each pair of positions in a window, (M*M, M*M) int64, M = window_size."""
    axis = torch.arange(window_size)
    row, column = (grid.flatten() for grid in torch.meshgrid(axis, axis, indexing="ij"))
    shift, width = window_size - 1, 2 * window_size - 1
    return (row[:, None] - row + shift) * width + column[:, None] - column + shift


def window_constants(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The indices that belong to the bias tables of a released state dict, by name; empty without Swin."""
    found = {}
    for name, table in state.items():
        if name.endswith(_TABLE):
            window_size = (round(len(table) ** 0.5) + 1) // 2
            found[name.removesuffix(_TABLE) + _INDEX] = window_index(window_size)
    return found


def is_criterion(name: str) -> bool:
    """Whether a name is a constant of the released loss: class frequencies of LVIS, the weight of 'no object'."""
    return name in _CRITERION


def differing_constants(state: Mapping[str, Tensor]) -> list[str]:
    """Constants of a released state dict that have other values than this project computes.

    Averages of weights contain averages of the constants: equal but for rounding in float32.
    """
    num_timesteps = len(state["betas"]) if "betas" in state and state["betas"].dim() == 1 else 0
    expected = schedule_constants(num_timesteps) if num_timesteps else {}
    expected |= window_constants(state)
    return [
        name
        for name, value in expected.items()
        if name in state
        and not (
            state[name].shape == value.shape
            and torch.allclose(state[name].double(), value.double(), rtol=1e-4, atol=1e-6)
        )
    ]
