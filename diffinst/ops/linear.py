"""Linear layers over many rows, in inference on a CPU, by oneDNN's kernel instead of the BLAS library's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffinst.ops.paths import note_path

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
    if not _can_pack(layer) or num_rows < _PACK_FROM_ROWS or layer.weight.numel() < _PACK_FROM_WEIGHTS:
        note_path("linear", "torch")
        return layer
    note_path("linear", "onednn_packed")
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight, num_rows)

    def apply(x: Tensor) -> Tensor:
        if len(x) == 0:
            return x.new_zeros(0, layer.out_features)
        mapped: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, layer.bias, "none", [], "")
        return mapped

    return apply


def _can_pack(layer: nn.Linear) -> bool:
    weight = layer.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)  # the user's switch
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
