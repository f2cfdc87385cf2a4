"""The reverse process: which timesteps are visited, and one step between two of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def timestep_pairs(num_timesteps: int, sampling_steps: int) -> list[tuple[int, int]]:
    """Pairs (t, t_next) from noise to clean boxes; the last t_next is -1, "there is no next step".

    Evenly spaced in float32 and cut to integers like the release, so that uneven spacings round as there.

    Args:
        num_timesteps: T, the timesteps of training.
        sampling_steps: S in [1, T].
    Returns:
        S pairs; the first t is T - 1.
    Raises:
        ValueError: S is not in [1, T].
    """
    if not 1 <= sampling_steps <= num_timesteps:
        raise ValueError(f"sampling_steps must be in [1, {num_timesteps}], got {sampling_steps}")
    times = torch.linspace(-1, num_timesteps - 1, sampling_steps + 1, dtype=torch.float32).int().tolist()[::-1]
    return list(zip(times[:-1], times[1:]))


def ddim_step(x_0: Tensor, noise_pred: Tensor, *, alpha: float, alpha_next: float, eta: float, noise: Tensor) -> Tensor:
    """Move noisy boxes from timestep t to t_next (DDIM, arXiv:2010.02502, eq. 12 and 16).

    The noisy boxes themselves are not needed: x_0 and noise_pred determine them.

    Args:
        x_0, noise_pred: (..., 4) predicted signal and noise; x_0 within [-snr_scale, snr_scale].
        alpha, alpha_next: cumulative products at t and t_next, 0 < alpha < alpha_next <= 1.
        eta: 0 is deterministic DDIM, 1 is ancestral sampling.
        noise: (..., 4) standard normal; has no effect when eta is 0.
    Returns:
        (..., 4) boxes at t_next; the inputs are left unchanged.
    Raises:
        ValueError: the alphas are not in rising order (timesteps given the wrong way round).
    """
    if not 0 < alpha < alpha_next <= 1:
        raise ValueError(f"expected 0 < alpha < alpha_next <= 1, got alpha={alpha}, alpha_next={alpha_next}")
    # 1. sigma_t of eq. 16: how much of the step is fresh noise.
    sigma = eta * math.sqrt((1 - alpha / alpha_next) * (1 - alpha_next) / (1 - alpha))
    # 2. Weight of "direction pointing to x_t" in eq. 12; rounding may take it just below zero.
    direction = math.sqrt(max(1 - alpha_next - sigma**2, 0.0))
    # 3. Eq. 12.
    return math.sqrt(alpha_next) * x_0 + direction * noise_pred + sigma * noise
