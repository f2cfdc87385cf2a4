"""The forward process: how much of a signal is left at timestep t, and noise put in or read back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def cosine_betas(num_timesteps: int, *, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """Share of noise added at each timestep of the cosine schedule (arXiv:2102.09672, eq. 17).

    Args:
        num_timesteps: T, at least 1.
        offset: s of the paper; keeps the first betas away from 0.
        max_beta: upper bound of every beta; avoids a singularity at the last timestep.
    Returns:
        (T,) float64, within (0, max_beta].
    """
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
    # On the CPU even where a model is built without memory, on torch's device "meta".
    time = torch.linspace(0, num_timesteps, num_timesteps + 1, dtype=torch.float64, device="cpu") / num_timesteps
    alphas_cumprod = torch.cos((time + offset) / (1 + offset) * torch.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(0, max_beta)


def cosine_alphas_cumprod(num_timesteps: int, *, offset: float = 0.008, max_beta: float = 0.999) -> Tensor:
    """Share of the signal's variance left at each timestep, cumulative products of `1 - cosine_betas`.

    Returns:
        (T,) float64, falling, within (0, 1).
    """
    return torch.cumprod(1 - cosine_betas(num_timesteps, offset=offset, max_beta=max_beta), dim=0)


class NoiseSchedule(nn.Module):
    """Cosine schedule over `num_timesteps`, as buffers that move with the model and are not part of its state.

    Both square roots are float64, and so is every signal that noise is put into or read from, as in the release: in
    float32 the noise part of the first timesteps would lose three digits, and the steps of sampling enlarge rounding.
    """

    sqrt_alphas_cumprod: Tensor  # (T,) share of the signal
    sqrt_one_minus_alphas_cumprod: Tensor  # (T,) share of the noise

    def __init__(self, num_timesteps: int = 1000) -> None:
        super().__init__()
        alphas_cumprod = cosine_alphas_cumprod(num_timesteps)
        self.num_timesteps = num_timesteps
        # Plain numbers too, so that a sampling step reads no device memory.
        self._alphas_cumprod: list[float] = alphas_cumprod.tolist()
        self.register_buffer("sqrt_alphas_cumprod", alphas_cumprod.sqrt(), persistent=False)
        self.register_buffer("sqrt_one_minus_alphas_cumprod", (1 - alphas_cumprod).sqrt(), persistent=False)

    def alpha(self, t: int) -> float:
        """Cumulative product at timestep t, in (0, 1), as a float64 number.

        Raises:
            ValueError: t is not in [0, num_timesteps).
        """
        if not 0 <= t < self.num_timesteps:
            raise ValueError(f"t must be in [0, {self.num_timesteps}), got {t}")
        return self._alphas_cumprod[t]

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) noise (DDPM, arXiv:2006.11239, eq. 4).

        Args:
            x_0, noise: (B, ...) signal and standard normal draws.
            t: (B,) int64 timesteps in [0, T).
        Returns:
            (B, ...) float64 noisy signal, not clamped.
        """
        return self._signal_share(t, x_0) * x_0 + self._noise_share(t, x_0) * noise

    def predict_noise(self, x_t: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        """The noise that `add_noise` would have needed to make x_t out of x_0.

        Args:
            x_t, x_0: (B, ...) noisy and clean signal.
            t: (B,) int64 timesteps in [0, T).
        Returns:
            (B, ...) float64 noise.
        """
        return (x_t - self._signal_share(t, x_0) * x_0) / self._noise_share(t, x_0)

    def _signal_share(self, t: Tensor, like: Tensor) -> Tensor:
        return self.sqrt_alphas_cumprod[t].reshape(-1, *[1] * (like.ndim - 1))

    def _noise_share(self, t: Tensor, like: Tensor) -> Tensor:
        return self.sqrt_one_minus_alphas_cumprod[t].reshape(-1, *[1] * (like.ndim - 1))
