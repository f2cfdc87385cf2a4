"""Federated classes: which of them take part in a class loss where labels are partial (arXiv:2103.07461).

In a data set like LVIS an image is annotated for some of the classes only, so a detection of another one may be right.
Each stage's loss is taken over the classes that its matched proposals have, and over others that are sampled, more
often the more images have them. Sampling without replacement is a race: class c arrives at an exponential time of rate
weight(c), and the first ones are taken. The times are drawn beforehand, on the CPU, as a function of (seed, iteration,
stage); who takes part is then decided on the device, without waiting for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffinst.diffusion.noise import generator_for


class FederatedDraws(NamedTuple):
    """Who comes first when classes are sampled.

    arrival: (S, K) float32, the lower the earlier; inf never takes part. num_classes: how many take part in a stage;
    the background counts as one of them where a proposal is matched to nothing.
    """

    arrival: Tensor
    num_classes: int

    def to(self, device: torch.device | str) -> FederatedDraws:
        """The same on another device, without waiting for it."""
        return FederatedDraws(self.arrival.to(device, non_blocking=True), self.num_classes)


def sampling_weights(image_counts: Sequence[int], power: float) -> Tensor:
    """(K,) float64: the image count of each class to a power; a class without images is sampled only at power 0."""
    return torch.tensor(image_counts, dtype=torch.float64) ** power


def draw_federated(weights: Tensor, num_classes: int, *, seed: int, iteration: int, num_stages: int) -> FederatedDraws:
    """Arrival times of all classes in every stage of one iteration.

    Args:
        weights: (K,), 0 or more, on the CPU; classes of weight 0 are never sampled.
        num_classes: see `FederatedDraws`.
    """
    times = []
    for stage in range(num_stages):
        draws = torch.rand(
            len(weights), generator=generator_for(seed, iteration, "training classes", stage), dtype=torch.float64
        )
        # 0 / 0 where a draw of 0 meets a weight of 0.
        times.append(torch.where(weights > 0, -(-draws).log1p() / weights, torch.inf))
    return FederatedDraws(torch.stack(times).float(), num_classes)


def choose_classes(draws: FederatedDraws, labels: Tensor) -> Tensor:
    """The classes that take part: those present, and the earliest of the others up to `num_classes`, if there are any.

    All of the classes present take part, even if they are more. The background index K counts among those present, as
    in the release: of 50 classes, 49 are real ones.

    Args:
        draws: of S stages and K classes, on the labels' device.
        labels: (S, P) int64, class of each proposal, K where it is matched to nothing.
    Returns:
        (S, K) bool.
    """
    num_stages, num_all = draws.arrival.shape
    present = torch.zeros((num_stages, num_all + 1), dtype=torch.bool, device=labels.device)
    present = present.scatter(1, labels, torch.ones_like(labels, dtype=torch.bool))
    wanted = draws.num_classes - present.sum(1, keepdim=True)
    present = present[:, :-1]
    arrival = draws.arrival.masked_fill(present, torch.inf)
    place = arrival.argsort(dim=1, stable=True).argsort(dim=1)
    return present | ((place < wanted) & arrival.isfinite())
