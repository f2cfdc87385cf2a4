"""Parameters and floating point operations, counted rather than timed."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters, frozen ones included, shared ones once; buffers are not parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(run: Callable[[], object]) -> int:
    """Floating point operations of matrix products and convolutions in `run()`; a multiply-add counts as two.

    Elementwise operations, normalisations, pooling and NMS are not counted, as is usual in tables.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
