"""Linear layers over many rows on a CPU, by oneDNN's kernel instead of the BLAS library's.

On processors that are not the BLAS library's own it is twice as fast, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from diffinst.ops.onednn import applies_to
from diffinst.ops.paths import note_path

# With fewer rows, the calls cost more than the faster kernel saves.
_MAP_FROM_ROWS = 64
# With fewer rows, reordering the weights costs more than the faster kernel saves.
_PACK_FROM_ROWS = 32
# And smaller layers gain less than the calls cost.
_PACK_FROM_WEIGHTS = 2**20


def prepare_linear(layer: nn.Linear, num_rows: int) -> Callable[[Tensor], Tensor]:
    """A form of `layer` for about `num_rows` rows, to be called on parts of them: equal to it to 1e-6, and faster.

    The weights are reordered for the kernel once, here, and the copy lives as long as what is returned: never longer
    than the weights it was made from are sure to be the layer's. The operators are those that `torch.compile` puts in
    for linear layers; where they are missing, do not apply (gradients, other devices and types) or do not pay, the
    layer itself is returned.

    Args:
        layer: float32 on a CPU, or anything else.
        num_rows: over all calls.
    Returns:
        (R, in) -> (R, out), of any R.
    """
    if (
        torch.is_grad_enabled()
        or not _has_kernel(layer.weight)
        or num_rows < _PACK_FROM_ROWS
        or layer.weight.numel() < _PACK_FROM_WEIGHTS
    ):
        note_path("linear", "torch")
        return layer
    note_path("linear", "onednn_packed")
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight, num_rows)

    def apply(x: Tensor) -> Tensor:
        if len(x) == 0:
            return x.new_zeros(0, layer.out_features)
        return _map(x.contiguous(), packed, layer.bias)

    return apply


class Linear(nn.Linear):
    """`torch.nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, of many float32 rows on a CPU by oneDNN: equal to 1e-6, and faster.

    Gradients cannot be differentiated again there.

    Args:
        x: (..., in). weight: (out, in). bias: (out,).
    """
    # First what a compiled function asks for: it would be compiled again for other numbers of rows.
    if not _has_kernel(weight) or x.dtype != torch.float32 or x.shape[:-1].numel() < _MAP_FROM_ROWS:
        note_path("linear", "torch")
        return functional.linear(x, weight, bias)
    note_path("linear", "onednn")
    rows = x.flatten(0, -2)
    mapped: Tensor = _OneDnnLinear.apply(rows, weight, bias) if torch.is_grad_enabled() else _map(rows, weight, bias)
    return mapped.unflatten(0, x.shape[:-1])


class _OneDnnLinear(torch.autograd.Function):
    """(R, in) rows, (out, in) weight, (out,) bias or None -> (R, out)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _map(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        of_weight = None
        if needs_weight and len(weight) > weight.shape[1]:  # the first of the two is copied: it should be the smaller
            of_weight = _map(x.t(), gradient.t()).t()
        elif needs_weight:
            of_weight = _map(gradient.t(), x.t())
        return (
            _map(gradient, weight.t()) if needs_x else None,
            of_weight,
            gradient.sum(0) if needs_bias else None,
        )


def _map(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dense = None if bias is None else bias.contiguous()  # the operator would read what lies beside it
    mapped: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, dense, "none", [], "")
    return mapped


def _has_kernel(weight: Tensor) -> bool:
    return applies_to(weight, "_reorder_linear_weight", "_linear_pointwise")
