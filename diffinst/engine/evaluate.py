"""Predictions of a whole split, written so that a killed run goes on where its last shard ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from diffinst.config import SamplerConfig
from diffinst.data.loader import EvaluationSource, evaluation_batches
from diffinst.engine.inference import detect
from diffinst.engine.tta import detect_augmented
from diffinst.evaluation.predictions import PredictionWriter, to_record
from diffinst.model import DiffusionInst
from diffinst.structures import Detections, Sample


class EvaluationData(EvaluationSource, Protocol):
    """What prediction needs of a data set; see `diffinst.data`. category_ids: the id of each label."""

    @property
    def category_ids(self) -> Sequence[int]: ...


def predict_split(
    model: DiffusionInst,
    dataset: EvaluationData,
    settings: SamplerConfig,
    folder: Path,
    *,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    shard_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> int:
    """Detect in every image of a split and write the detections to `folder`, one record an image.

    Images that have a record there are left out, so the same call goes on after a kill; the folder must belong to this
    model, data set and these settings. The records do not depend on interruptions at all, and on the batch size only in
    the last bits of their numbers.

    Args:
        model: moved to the device and into evaluation mode.
        dataset: the split.
        settings: sampling, post-processing and test-time augmentation, for which images are not resized beforehand.
        folder: made if missing; see `diffinst.evaluation.predictions`.
        batch_size: images a batch; only images that pad to the same size share one. With test-time augmentation, 1.
        num_workers: processes that load images; 0 loads them in this one.
        shard_size: images a shard, rounded up to whole batches; about the most that a kill can cost.
        progress: called after each batch with the number of images that are done, and of all images.
        stop: asked after every batch; True writes what there is and returns.
    Returns:
        The number of images that have a record now; all of them, unless stopped.
    Raises:
        DataError: an image cannot be read, or the folder cannot be written or holds a damaged shard.
    """
    model.to(device).eval()
    return write_predictions(
        lambda samples: _detect(model, samples, settings),
        dataset,
        folder,
        batch_size=1 if settings.tta else batch_size,
        size_divisor=model.backbone.size_divisor,
        resized=not settings.tta,
        num_workers=num_workers,
        shard_size=shard_size,
        progress=progress,
        stop=stop,
    )


def write_predictions(
    detect_samples: Callable[[Sequence[Sample]], list[Detections]],
    dataset: EvaluationData,
    folder: Path,
    *,
    batch_size: int = 1,
    size_divisor: int = 32,
    resized: bool = True,
    num_workers: int = 0,
    shard_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> int:
    """`predict_split` for any detector.

    Args:
        detect_samples: images -> their detections, in pixels of the files.
        size_divisor, resized: see `diffinst.data.loader.evaluation_batches`. The others: see `predict_split`.
    """
    known = set(dataset.image_ids)
    # Shards end where batches end, so the batches after a kill are those that would have come without it: the last bits
    # of a network's output depend on the batch that an image is in.
    with PredictionWriter(folder, shard_size=len(known) + 1) as writer:
        pending = 0
        done = len(writer.done_ids & known)
        batches = evaluation_batches(
            dataset,
            batch_size=batch_size,
            size_divisor=size_divisor,
            num_workers=num_workers,
            skip_ids=frozenset(writer.done_ids),
            resized=resized,
        )
        for samples in batches:
            found = zip(samples, detect_samples(samples))
            for record in [to_record(sample.image_id, item, dataset.category_ids) for sample, item in found]:
                writer.add(record)
            done += len(samples)
            pending += len(samples)
            if pending >= shard_size:
                writer.flush()
                pending = 0
            if progress is not None:
                progress(done, len(known))
            if stop is not None and stop():
                break
    return done


def _detect(model: DiffusionInst, samples: Sequence[Sample], settings: SamplerConfig) -> list[Detections]:
    if settings.tta:
        return [detect_augmented(model, sample, settings) for sample in samples]
    return detect(model, model.make_batch(samples), settings, mask_form="rle")
