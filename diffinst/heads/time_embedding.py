"""Embedding of the diffusion timestep (arXiv:1706.03762 section 3.5, as in DDPM)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of t at geometrically falling frequencies from 1 to 1/10000.

    Args:
        t: (B,) timesteps.
        dim: length of the embedding, even.
    Returns:
        (B, dim) float32.
    """
    half = dim // 2
    # The step is rounded before it is multiplied, as released: at t = 999 the other order moves angles by 1e-4.
    step = math.log(10_000) / max(half - 1, 1)
    angles = t.float()[:, None] * torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * -step)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimeEmbedding(nn.Module):
    """(B,) timesteps -> (B, 4 * dim): sinusoidal embedding of width dim, then Linear, GELU, Linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.out_dim = 4 * dim
        self.mlp = nn.Sequential(nn.Linear(dim, self.out_dim), nn.GELU(), nn.Linear(self.out_dim, self.out_dim))

    def forward(self, t: Tensor) -> Tensor:
        embedding: Tensor = self.mlp(sinusoidal_embedding(t, self.dim))
        return embedding
