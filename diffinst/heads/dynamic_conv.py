"""Dynamic instance interaction of Sparse R-CNN (arXiv:2011.12450 section 3.2)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from diffinst.ops.linear import prepare_linear

# Generated filters alive at once in inference on a CPU, in elements (16 MiB in float32): they should stay in the cache,
# and memory of this size is used again where larger blocks are mapped anew each time, page by page.
_FILTER_ELEMENTS_CPU = 2**22
# And in training (64 MiB): of more than this, parts are computed again in the backward instead of being kept.
_FILTER_ELEMENTS_TRAINING_CPU = 2**24


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
        num_proposals = len(proposal_features)
        is_training = torch.is_grad_enabled()
        num_parts = 1
        if proposal_features.device.type == "cpu":
            elements = _FILTER_ELEMENTS_TRAINING_CPU if is_training else _FILTER_ELEMENTS_CPU
            num_parts = max(1, min(-(-num_proposals * self.generate.out_features // elements), num_proposals))
        x = roi_features.flatten(2).transpose(1, 2)  # (R, r*r, D)
        pairs = zip(proposal_features.tensor_split(num_parts), x.tensor_split(num_parts))
        if is_training and num_parts > 1:
            parts = [
                checkpoint(self._part, *pair, self.generate, self.out, use_reentrant=False, preserve_rng_state=False)
                for pair in pairs
            ]
        else:
            generate, out = (prepare_linear(layer, num_proposals) for layer in (self.generate, self.out))
            parts = [self._part(*pair, generate, out) for pair in pairs]
        return functional.relu(self.out_norm(parts[0] if num_parts == 1 else torch.cat(parts)))

    def _part(
        self,
        proposal_features: Tensor,
        x: Tensor,
        generate: Callable[[Tensor], Tensor],
        out: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """(R, D) proposal features and (R, r*r, D) pixels of some proposals -> (R, D) before the last norm."""
        return out(self._interact(generate(proposal_features), x).flatten(1))

    def _interact(self, filters: Tensor, x: Tensor) -> Tensor:
        """(R, 2 * D * dim_dynamic) filters and (R, r*r, D) pixels -> (R, r*r, D)."""
        weight1, weight2 = filters.split(self.dim * self.dim_dynamic, dim=-1)
        x = torch.bmm(x, weight1.unflatten(-1, (self.dim, self.dim_dynamic)))
        x = functional.relu(self.norm1(x))
        x = torch.bmm(x, weight2.unflatten(-1, (self.dim_dynamic, self.dim)))
        return functional.relu(self.norm2(x))
