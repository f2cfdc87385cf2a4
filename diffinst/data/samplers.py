"""Which image comes when: pure functions of the seed, so that a restarted training goes on where it was."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

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


def repeat_factors(labels: Sequence[Collection[int]], threshold: float) -> Tensor:
    """How often an epoch has each image, on average, so that rare classes are seen more often (arXiv:1908.03195).

    A class on a share f of the images asks for max(1, sqrt(threshold / f)) times; an image is repeated as often as the
    one of its classes asks that asks for most, and one without any is there once.

    Args:
        labels: the classes of each image.
        threshold: share of the images below which a class counts as rare.
    Returns:
        (number of images,) float64, 1 or more.
    """
    num_with = Counter(chain.from_iterable(set(found) for found in labels))
    wanted = {label: max(1.0, (threshold * len(labels) / count) ** 0.5) for label, count in num_with.items()}
    return torch.tensor([max((wanted[label] for label in found), default=1.0) for found in labels], dtype=torch.float64)


def repeated_order(factors: Tensor, seed: int, epoch: int) -> Tensor:
    """Indices of the images of an epoch, each as often as its factor says: its whole part, once more by its fraction.

    Where all factors are 1 it is `epoch_order`.

    Args:
        factors: (number of images,) float64, 0 or more.
    """
    draws = torch.rand(len(factors), generator=_generator("repeats", seed, epoch), dtype=torch.float64)
    counts = factors.floor() + (draws < factors - factors.floor())
    indices = torch.arange(len(factors)).repeat_interleave(counts.long())
    return indices[torch.randperm(len(indices), generator=_generator("order", seed, epoch))]


class RepeatedEpochs:
    """Epochs of `repeated_order`, which differ in length, put end to end."""

    def __init__(self, factors: Tensor, seed: int) -> None:
        if len(factors) and float(factors.min()) < 1:
            raise ValueError(f"repeat factors must be at least 1, not {float(factors.min())}")
        self._factors = factors
        self._seed = seed
        self._starts = [0]  # position at which each epoch begins, as far as they have been counted
        self._last: tuple[int, Tensor] | None = None

    def index_at(self, position: int) -> int:
        """The image at a position of the stream; a position far ahead costs a draw for each epoch before it."""
        while self._starts[-1] <= position:
            self._starts.append(self._starts[-1] + len(self._order(len(self._starts) - 1)))
        epoch = bisect_right(self._starts, position) - 1
        return int(self._order(epoch)[position - self._starts[epoch]])

    def _order(self, epoch: int) -> Tensor:
        if self._last is None or self._last[0] != epoch:
            self._last = (epoch, repeated_order(self._factors, self._seed, epoch))
        return self._last[1]


def draws_of_iteration(
    iteration: int, *, num_images: int, batch_size: int, seed: int, repeated: RepeatedEpochs | None = None
) -> list[Draw]:
    """The batch of an iteration (counted from 0): the next `batch_size` images of epochs put end to end.

    Args:
        repeated: epochs of these images and this seed; None has every image once in an epoch.
    Raises:
        ValueError: there is no image, or no room for one in a batch.
    """
    if num_images < 1 or batch_size < 1:
        raise ValueError(f"num_images ({num_images}) and batch_size ({batch_size}) must be at least 1")
    positions = range(iteration * batch_size, (iteration + 1) * batch_size)
    if repeated is not None:
        return [Draw(repeated.index_at(position), position) for position in positions]
    return [
        Draw(int(epoch_order(num_images, seed, position // num_images)[position % num_images]), position)
        for position in positions
    ]


def augmentation_generator(seed: int, position: int) -> torch.Generator:
    """The randomness of one training image; the same whichever worker process loads it."""
    return _generator("augment", seed, position)


class TrainingBatches:
    """Batches of draws, from `start_iteration` up to `end_iteration` or for ever; a batch sampler of a DataLoader.

    factors: (num_images,) of `repeat_factors`; None has every image once in an epoch.
    """

    def __init__(
        self,
        *,
        num_images: int,
        batch_size: int,
        seed: int,
        start_iteration: int = 0,
        end_iteration: int | None = None,
        factors: Tensor | None = None,
    ) -> None:
        self._num_images = num_images
        self._batch_size = batch_size
        self._seed = seed
        self._start = start_iteration
        self._end = end_iteration
        self._repeated = None if factors is None else RepeatedEpochs(factors, seed)

    def __iter__(self) -> Iterator[list[Draw]]:
        iteration = self._start
        while self._end is None or iteration < self._end:
            yield draws_of_iteration(
                iteration,
                num_images=self._num_images,
                batch_size=self._batch_size,
                seed=self._seed,
                repeated=self._repeated,
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
