"""What one step of training costs: the steps of `diffinst.engine.train` on one batch, timed one by one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bench.measure.disturbances import Watch
from bench.measure.latency import TOTAL, ScopeTimer, percentile
from diffinst.config import DataConfig, TrainConfig
from diffinst.data.coco import open_dataset
from diffinst.engine.optim import build_optimizer, lr_at, set_learning_rate
from diffinst.engine.train import LossFunction, backward_pass
from diffinst.errors import DataError
from diffinst.structures import Sample

NAME = "training_step_s"
# Steps before the first timed one: the optimiser's state is made on it, and caches and kernels settle.
WARMUP_STEPS = 1


def step_samples(data: DataConfig, batch_size: int, root: Path | None) -> list[Sample]:
    """The first images of the validation split at the test size, with their instances, neither flipped nor cropped.

    Raises:
        DataError: the split has fewer.
    """
    as_tested = {
        "flip_probability": 0.0,
        "crop_probability": 0.0,
        "shortest_edge_train": (data.shortest_edge_test,),
        "longest_edge_train": data.longest_edge_test,
    }
    dataset = open_dataset(data.model_copy(update=as_tested), "val", root)
    check_batch(batch_size, len(dataset), str(dataset.annotations_path))
    return [dataset.training_sample(index, torch.Generator()) for index in range(batch_size)]


def check_batch(batch_size: int, num_images: int, where: str) -> None:
    """Refuse a batch that a split cannot fill.

    Raises:
        DataError: see above.
    """
    if batch_size > num_images:
        raise DataError(
            f"{where}: a training step is measured on train.batch_size images, {batch_size}, but the validation split "
            f"has {num_images}. Set a smaller batch_size"
        )


def measure_training_steps(
    model: nn.Module,
    losses: LossFunction,
    samples: list[Sample],
    settings: TrainConfig,
    *,
    count: int,
    device: torch.device | str,
    clock: Callable[[], float] = time.perf_counter,
    stop: Callable[[], bool] = lambda: False,
    watch: Watch | None = None,
) -> list[float]:
    """Train on one batch, over and over: images in, normalised and padded, to updated weights.

    Args:
        model: on the device; its weights change. losses: what it is trained for. samples: of the batch, decoded and
            resized.
        count: how many steps are timed, the first one left out. stop: asked after each; True ends the measurement.
        watch: marks the timed steps that were disturbed.
    Returns:
        Seconds of each timed step, in order.
    """
    model.train()
    optimizer = build_optimizer(model, settings)
    seconds: list[float] = []
    for iteration in range(WARMUP_STEPS + count):
        timer, is_timed = ScopeTimer(device, clock), iteration >= WARMUP_STEPS
        if watch is not None and is_timed:
            watch.before()
        with timer(TOTAL):
            terms, norm = backward_pass(model, losses, samples, settings, iteration)
            torch.stack([*terms.values(), norm]).tolist()  # a training looks at them before it changes a weight
            set_learning_rate(optimizer, lr_at(iteration, settings))
            optimizer.step()
        if is_timed:
            if watch is not None:
                watch.after(timer.elapsed_s[TOTAL])
            seconds.append(timer.elapsed_s[TOTAL])
        if stop():
            break
    return seconds


def summarise_steps(seconds: list[float]) -> dict[str, float]:
    """Metric name -> seconds: 'training_step_s/total' is the median, with '/p5' and '/p95' beside it."""
    ends = {"": 50, "/p5": 5, "/p95": 95}
    return {f"{NAME}/{TOTAL}{end}": percentile(seconds, q) for end, q in ends.items()}
