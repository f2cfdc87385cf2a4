"""Parameters and floating point operations, counted rather than timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


def _linear_flops(x: Sequence[int], *_: object, out_shape: Sequence[int], **__: object) -> int:
    """Of a linear layer by oneDNN, whose weights tell no shape: (R, in) -> (R, out)."""
    return 2 * math.prod(out_shape) * x[-1]


def _convolution_flops(
    total: Sequence[int], x: Sequence[int], weight: Sequence[int], *_: object, out_shape: Sequence[int], **__: object
) -> int:
    """Of a convolution (out, in / groups, k, k) that is added to a map: (B, in, H, W) -> (B, out, H, W)."""
    del total, x
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


# Operators of `diffinst.ops`, by what torch calls them.
_UNKNOWN_TO_TORCH: dict[Any, Any] = {
    getattr(torch.ops.mkldnn, name): count
    for name, count in (("_linear_pointwise", _linear_flops), ("_convolution_pointwise_", _convolution_flops))
    if hasattr(torch.ops.mkldnn, name)
}


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters, frozen ones included, shared ones once; buffers are not parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(run: Callable[[], object]) -> int:
    """Floating point operations of matrix products and convolutions in `run()`; a multiply-add counts as two.

    Elementwise operations, normalisations, pooling and NMS are not counted, as is usual in tables.
    """
    from torch.utils.flop_counter import FlopCounterMode  # late: it imports Triton, 80 MB that nothing else needs

    with FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH) as counter:
        run()
    return counter.get_total_flops()
