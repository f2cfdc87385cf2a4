"""A residual sum within the convolution that it ends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from diffinst.ops.onednn import applies_to
from diffinst.ops.paths import note_path


def convolve_into(
    total: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *, padding: Sequence[int] = (0, 0), groups: int = 1
) -> Tensor:
    """relu(total + convolution of x) with stride 1, by either path the same but for rounding.

    In inference on a CPU with channels innermost, oneDNN adds and rectifies while it writes, and no new map is made.

    Args:
        total: (B, out, H, W); may hold the result afterwards.
        x: (B, in, H, W). weight: (out, in / groups, k, k). bias: (out,).
    """
    is_dense = all(map.is_contiguous(memory_format=torch.channels_last) for map in (total, x))
    if torch.is_grad_enabled() or not is_dense or not applies_to(weight, "_convolution_pointwise_"):
        note_path("residual", "torch")
        mapped = functional.conv2d(x, weight, bias, padding=tuple(padding), groups=groups)
        return functional.relu(mapped.add_(total), inplace=True)
    note_path("residual", "onednn_fused")
    fused: Tensor = torch.ops.mkldnn._convolution_pointwise_(
        total, x, weight, bias, list(padding), [1, 1], [1, 1], groups, "add", 1.0, "relu", [], ""
    )
    return fused
