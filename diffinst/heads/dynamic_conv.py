"""Dynamic instance interaction of Sparse R-CNN (arXiv:2011.12450 section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffinst.ops.linear import Linear, linear, prepare_linear
from diffinst.ops.recompute import computed_again, map_in_parts

# Generated filters alive at once in inference on a CPU, in elements (16 MiB in float32): they should stay in the cache,
# and memory of this size is used again where larger blocks are mapped anew each time, page by page.
_FILTER_ELEMENTS_CPU = 2**22
# And in training (64 MiB): of more than this, parts are computed again in the backward instead of being kept.
_FILTER_ELEMENTS_TRAINING_CPU = 2**24

Map = Callable[[Tensor], Tensor]


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
        self.generate = Linear(dim, 2 * dim * dim_dynamic)
        self.norm1 = nn.LayerNorm(dim_dynamic)
        self.norm2 = nn.LayerNorm(dim)
        self.out = Linear(resolution**2 * dim, dim)
        self.out_norm = nn.LayerNorm(dim)

    def forward(
        self, proposal_features: Tensor, roi_features: Tensor, pool: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """(R, D) proposal features and (R, D, r, r) RoI features of the same R proposals -> (R, D).

        Args:
            pool: makes the RoI features again; a training on a CPU does not keep them then.
        """
        num_proposals = len(proposal_features)
        is_training = torch.is_grad_enabled()
        part_size = max(num_proposals, 1)
        if proposal_features.device.type == "cpu" and not torch.compiler.is_compiling():
            elements = _FILTER_ELEMENTS_TRAINING_CPU if is_training else _FILTER_ELEMENTS_CPU
            num_parts = -(-num_proposals * self.generate.out_features // elements)
            part_size = max(-(-num_proposals // max(num_parts, 1)), 1)
        x = _pixels(roi_features)
        if is_training and part_size < num_proposals:
            with nullcontext() if pool is None else computed_again(x, lambda: _pixels(pool())):
                mapped = map_in_parts(self._part, (proposal_features, x), self._weights(), part_size)
        else:
            generate, out = (prepare_linear(layer, num_proposals) for layer in (self.generate, self.out))
            parts = []
            for features, pixels in zip(proposal_features.split(part_size), x.split(part_size)):
                filters1, filters2 = generate(features).chunk(2, dim=-1)
                parts.append(out(self._interact(filters1, filters2, pixels, self.norm1, self.norm2)))
            mapped = parts[0] if len(parts) == 1 else torch.cat(parts)
        return functional.relu(self.out_norm(mapped))

    def _weights(self) -> list[Tensor]:
        """What `_part` needs; of the two filters apart, so that no gradient of filters has to be put together."""
        half = self.dim * self.dim_dynamic
        filters = zip(self.generate.weight.split(half), self.generate.bias.split(half))
        layers = ((layer.weight, layer.bias) for layer in (self.norm1, self.norm2, self.out))
        return [tensor for pair in (*filters, *layers) for tensor in pair]

    def _part(self, proposal_features: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
        """(R, D) proposal features and (R, r*r, D) pixels of some proposals -> (R, D) before the last norm."""
        first, second, *norms, out = zip(weights[::2], weights[1::2])
        norm1, norm2 = (partial(_normalise, weight=weight, bias=bias) for weight, bias in norms)
        filters = linear(proposal_features, *first), linear(proposal_features, *second)
        return linear(self._interact(*filters, x, norm1, norm2), *out)

    def _interact(self, filters1: Tensor, filters2: Tensor, x: Tensor, norm1: Map, norm2: Map) -> Tensor:
        """(R, D * dim_dynamic) filters, twice, and (R, r*r, D) pixels -> (R, r*r * D)."""
        x = torch.bmm(x, filters1.unflatten(-1, (self.dim, self.dim_dynamic)))
        x = functional.relu(norm1(x))
        x = torch.bmm(x, filters2.unflatten(-1, (self.dim_dynamic, self.dim)))
        return functional.relu(norm2(x)).flatten(1)


def _pixels(roi_features: Tensor) -> Tensor:
    """(R, D, r, r) -> (R, r*r, D)."""
    return roi_features.flatten(2).transpose(1, 2)


def _normalise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(x, weight.shape, weight, bias)
