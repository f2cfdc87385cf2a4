"""Parameters and floating point operations, counted rather than timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def _linear_flops(x: Sequence[int], *_: object, out_shape: Sequence[int], **__: object) -> int:
    """Of a linear layer by oneDNN, whose weights tell no shape: (R, in) -> (R, out)."""
    return 2 * math.prod(out_shape) * x[-1]


# Operators of `diffinst.ops.linear`, by what torch calls them.
_UNKNOWN_TO_TORCH: dict[Any, Any] = (
    {torch.ops.mkldnn._linear_pointwise: _linear_flops} if hasattr(torch.ops.mkldnn, "_linear_pointwise") else {}
)


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters, frozen ones included, shared ones once; buffers are not parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(run: Callable[[], object]) -> int:
    """Floating point operations of matrix products and convolutions in `run()`; a multiply-add counts as two.

    Elementwise operations, normalisations, pooling and NMS are not counted, as is usual in tables.
    """
    with FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH) as counter:
        run()
    return counter.get_total_flops()
