"""Dynamic instance interaction of Sparse R-CNN (arXiv:2011.12450 section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class DynamicConv(nn.Module):
    """Each proposal generates two 1x1 convolutions, which are applied to its own RoI features.

    Args:
        dim: width D of proposal and RoI features.
        dim_dynamic: width between the two convolutions.
        resolution: side r of the RoI features.
    """

    def __init__(self, *, dim: int, dim_dynamic: int, resolution: int) -> None:
        super().__init__()
        self.dim = dim
        self.dim_dynamic = dim_dynamic
        self.generate = nn.Linear(dim, 2 * dim * dim_dynamic)
        self.norm1 = nn.LayerNorm(dim_dynamic)
        self.norm2 = nn.LayerNorm(dim)
        self.out = nn.Linear(resolution**2 * dim, dim)
        self.out_norm = nn.LayerNorm(dim)

    def forward(self, proposal_features: Tensor, roi_features: Tensor) -> Tensor:
        """(R, D) proposal features and (R, D, r, r) RoI features of the same R proposals -> (R, D)."""
        weight1, weight2 = self.generate(proposal_features).split(self.dim * self.dim_dynamic, dim=-1)
        x = roi_features.flatten(2).transpose(1, 2)  # (R, r*r, D)
        x = torch.bmm(x, weight1.unflatten(-1, (self.dim, self.dim_dynamic)))
        x = functional.relu(self.norm1(x))
        x = torch.bmm(x, weight2.unflatten(-1, (self.dim_dynamic, self.dim)))
        x = functional.relu(self.norm2(x))
        return functional.relu(self.out_norm(self.out(x.flatten(1))))
