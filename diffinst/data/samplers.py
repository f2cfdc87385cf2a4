"""Which image comes when: pure functions of the seed, so that a restarted training goes on where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Draw:
    """An image's index in its data set, and its position in the endless stream of training images."""

    index: int
    position: int


def _generator(*key: int | str) -> torch.Generator:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


@lru_cache(maxsize=4)
def epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    """(num_images,) int64, a permutation that depends on the arguments alone. Cached: do not write to it."""
    return torch.randperm(num_images, generator=_generator("order", seed, epoch))


def draws_of_iteration(iteration: int, *, num_images: int, batch_size: int, seed: int) -> list[Draw]:
    """The batch of an iteration (counted from 0): the next `batch_size` images of epochs put end to end.

    Raises:
        ValueError: there is no image, or no room for one in a batch.
    """
    if num_images < 1 or batch_size < 1:
        raise ValueError(f"num_images ({num_images}) and batch_size ({batch_size}) must be at least 1")
    positions = range(iteration * batch_size, (iteration + 1) * batch_size)
    return [
        Draw(int(epoch_order(num_images, seed, position // num_images)[position % num_images]), position)
        for position in positions
    ]


def augmentation_generator(seed: int, position: int) -> torch.Generator:
    """The randomness of one training image; the same whichever worker process loads it."""
    return _generator("augment", seed, position)


class TrainingBatches:
    """Batches of draws, from `start_iteration` up to `end_iteration` or for ever; a batch sampler of a DataLoader."""

    def __init__(
        self, *, num_images: int, batch_size: int, seed: int, start_iteration: int = 0, end_iteration: int | None = None
    ) -> None:
        self._num_images = num_images
        self._batch_size = batch_size
        self._seed = seed
        self._start = start_iteration
        self._end = end_iteration

    def __iter__(self) -> Iterator[list[Draw]]:
        iteration = self._start
        while self._end is None or iteration < self._end:
            yield draws_of_iteration(
                iteration, num_images=self._num_images, batch_size=self._batch_size, seed=self._seed
            )
            iteration += 1


def batches_of_equal_size(sizes: list[tuple[int, int]], *, batch_size: int, size_divisor: int) -> list[list[int]]:
    """Group indices so that all images of a batch are padded to the same size, and none beyond its own.

    An image then enters the network exactly as it would alone: predictions do not depend on the batch.

    Args:
        sizes: (height, width) after resizing.
        size_divisor: padded heights and widths are multiples of this.

    Returns:
        Batches of at most `batch_size` indices in rising order, groups in order of their first image.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (height, width) in enumerate(sizes):
        groups.setdefault((-(-height // size_divisor), -(-width // size_divisor)), []).append(index)
    return [
        members[start : start + batch_size]
        for members in groups.values()
        for start in range(0, len(members), batch_size)
    ]
