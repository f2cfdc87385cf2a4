"""Batches of samples, loaded ahead by worker processes if wanted; how many there are never changes what comes out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffinst.data.samplers import Draw, TrainingBatches, augmentation_generator, batches_of_equal_size
from diffinst.errors import DataError
from diffinst.structures import Sample


class TrainingSource(Protocol):
    """What training needs of a data set."""

    def __len__(self) -> int: ...

    def training_sample(self, index: int, generator: torch.Generator) -> Sample:
        """One augmented image with its ground truth, a function of the arguments alone."""
        ...


class EvaluationSource(Protocol):
    """What prediction needs of a data set."""

    image_ids: list[int]

    def __len__(self) -> int: ...

    def test_sample(self, index: int) -> Sample:
        """One resized image."""
        ...

    def original_sample(self, index: int) -> Sample:
        """One image as it is in its file."""
        ...

    def test_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every test sample."""
        ...


@dataclass(frozen=True)
class _Refused:
    """A DataError on its way out of a worker process; DataLoader would bury its one line in a traceback."""

    text: str


def _or_refused(load: Callable[[], Sample]) -> Sample | _Refused:
    try:
        return load()
    except DataError as error:
        return _Refused(str(error))


class _TrainingItems(Dataset["Sample | _Refused"]):
    def __init__(self, source: TrainingSource, seed: int) -> None:
        self._source = source
        self._seed = seed

    def __getitem__(self, draw: Draw) -> Sample | _Refused:
        generator = augmentation_generator(self._seed, draw.position)
        return _or_refused(lambda: self._source.training_sample(draw.index, generator))


class _EvaluationItems(Dataset["Sample | _Refused"]):
    def __init__(self, source: EvaluationSource, *, resized: bool) -> None:
        self._source = source
        self._resized = resized

    def __getitem__(self, index: int) -> Sample | _Refused:
        load = self._source.test_sample if self._resized else self._source.original_sample
        return _or_refused(lambda: load(index))


def _as_list(samples: list[Sample | _Refused]) -> list[Sample | _Refused]:
    return samples


def _one_thread(worker: int) -> None:  # noqa: ARG001 (the signature that DataLoader calls)
    torch.set_num_threads(1)


def _iterate(
    items: Dataset[Sample | _Refused], batches: Iterable[list[Any]], num_workers: int
) -> Iterator[list[Sample]]:
    # The loader seeds its workers from a generator; its own one keeps the global random state untouched.
    loader: DataLoader[Sample | _Refused] = DataLoader(
        items,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_list,
        worker_init_fn=_one_thread if num_workers else None,
        generator=torch.Generator(),
    )
    for batch in loader:
        samples = []
        for item in batch:
            if isinstance(item, _Refused):
                raise DataError(item.text)
            samples.append(item)
        yield samples


def training_batches(
    source: TrainingSource,
    *,
    batch_size: int,
    seed: int,
    start_iteration: int = 0,
    end_iteration: int | None = None,
    num_workers: int = 0,
    factors: Tensor | None = None,
) -> Iterator[list[Sample]]:
    """The batches of iterations `start_iteration`, ... (counted from 0), for ever or until before `end_iteration`.

    Batch i is a function of (source, batch_size, seed, factors, i): a training that starts again at i sees what it
    would have seen.

    Args:
        factors: how often an epoch has each image, see `samplers.repeat_factors`; None: once.
    """
    batches = TrainingBatches(
        num_images=len(source),
        batch_size=batch_size,
        seed=seed,
        start_iteration=start_iteration,
        end_iteration=end_iteration,
        factors=factors,
    )
    return _iterate(_TrainingItems(source, seed), batches, num_workers)


def evaluation_batches(
    source: EvaluationSource,
    *,
    batch_size: int,
    size_divisor: int = 32,
    num_workers: int = 0,
    skip_ids: Collection[int] = (),
    resized: bool = True,
) -> Iterator[list[Sample]]:
    """Every image once, in batches whose members all pad to the same size, so that none is padded beyond its own.

    Args:
        size_divisor: the network's; heights and widths are padded to multiples of it.
        skip_ids: images that need no prediction any more.
        resized: to the test size; False gives images as they are in their files, which need batches of one.
    """
    indices = [index for index, image_id in enumerate(source.image_ids) if image_id not in skip_ids]
    sizes = source.test_sizes()
    grouped = batches_of_equal_size(
        [sizes[index] for index in indices], batch_size=batch_size, size_divisor=size_divisor
    )
    items = _EvaluationItems(source, resized=resized)
    return _iterate(items, [[indices[member] for member in batch] for batch in grouped], num_workers)
