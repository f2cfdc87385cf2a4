"""Where oneDNN's own operators apply: those that `torch.compile` puts in on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def applies_to(weight: Tensor, *operators: str) -> bool:
    """Whether these operators of `torch.ops.mkldnn` exist and take the weight: float32 on a CPU, without autocast."""
    return (
        not torch.compiler.is_compiling()  # it takes its own
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)  # the user's switch
        and all(hasattr(torch.ops.mkldnn, name) for name in operators)
    )
