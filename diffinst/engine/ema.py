"""Moving average of a model's weights, as the release keeps it (off there, too, by default)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightAverage:
    """average = decay * average + (1 - decay) * weights, from the weights at the beginning on.

    Everything in the state dict is averaged, frozen weights and the statistics of batch norms too; counters are copied.

    Args:
        model: its present state is the first average.
        decay: in [0, 1]; 0.999 in the release.

    Attributes:
        tensors: the average, under the names of the state dict, on the model's device.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors: dict[str, Tensor] = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """To be called after each step of the optimiser.

        Args:
            model: the one that the average began with, on the same device.
        """
        averages, values = [], []
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                averages.append(self.tensors[name])
                values.append(value)
            else:
                self.tensors[name].copy_(value)
        # Linear interpolation leaves what does not change as it is, to the last bit.
        torch._foreach_lerp_(averages, values, 1 - self.decay)
