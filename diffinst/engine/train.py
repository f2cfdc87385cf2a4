"""Training that can be killed at any moment: the same command goes on to the same losses, bit by bit on a CPU.

Nothing is carried from one iteration to the next but the weights, their moving average and the optimiser's state: the
batch, its augmentation, the timesteps and the noise are functions of (seed, iteration).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TextIO

import torch
from torch import Tensor, nn

from diffinst.checkpoint import Checkpoint, load_checkpoint, load_model_weights, replacing, save_checkpoint
from diffinst.config import Config, TrainConfig
from diffinst.data.loader import TrainingSource, training_batches
from diffinst.data.samplers import repeat_factors
from diffinst.diffusion.noise import generator_for, noise_for
from diffinst.diffusion.schedule import NoiseSchedule
from diffinst.diffusion.signal import boxes_to_signal, pad_ground_truth, signal_to_boxes, to_normalised, to_pixels
from diffinst.engine.ema import WeightAverage
from diffinst.engine.optim import (
    build_optimizer,
    clip_gradients,
    load_optimizer_tensors,
    lr_at,
    optimizer_tensors,
    set_learning_rate,
)
from diffinst.errors import CheckpointError, TrainingError
from diffinst.federated import FederatedDraws, draw_federated, sampling_weights
from diffinst.losses import compute_losses, prepare_targets
from diffinst.model import DiffusionInst
from diffinst.structures import Sample, Target

FINAL_NAME = "model.safetensors"
RESUME_NAME = "checkpoint.safetensors"
LOSSES_NAME = "losses.jsonl"
# Settings that may change between a training and its continuation: no weight depends on them.
_FREE_FIELDS = {
    "train": {"checkpoint_every", "log_every", "num_workers"},
    "data": {
        "val_annotations",
        "val_images",
        "val_image_ids",
        "shortest_edge_test",
        "longest_edge_test",
        "eval_batch_size",
        "shapes_val_images",
    },
}


class TrainingData(TrainingSource, Protocol):
    """What training needs of a data set; see `diffinst.data`."""

    @property
    def class_names(self) -> Sequence[str]:
        """K names, stored in the checkpoints."""
        ...

    @property
    def category_ids(self) -> Sequence[int]:
        """The data set's id of each class, stored in the checkpoints."""
        ...

    @property
    def class_image_counts(self) -> Sequence[int]:
        """On how many images each class is; for the federated loss only."""
        ...

    def image_labels(self) -> Sequence[Collection[int]]:
        """The classes of each image; for repeat factors only."""
        ...


@dataclass(frozen=True)
class TrainProgress:
    """Where a training is, passed to its progress callback every `log_every` iterations and at the end.

    iteration: finished ones. losses: weighted terms of that iteration's batch. seconds_left: None until it can be told.
    """

    iteration: int
    iterations: int
    losses: dict[str, float]
    learning_rate: float
    seconds_left: float | None

    @property
    def total(self) -> float:
        """Sum of the losses."""
        return math.fsum(self.losses.values())


# (samples, iteration) -> named scalar losses of the batch. What it draws from torch's global generators is seeded with
# the iteration; anything else it draws has to be a function of the iteration, too.
LossFunction = Callable[[list[Sample], int], dict[str, Tensor]]


def train(
    model: nn.Module,
    dataset: TrainingData,
    config: Config,
    out_dir: Path,
    *,
    losses: LossFunction | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[TrainProgress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Path:
    """Train a model, or go on with a training that was stopped or killed.

    `out_dir` gets "checkpoint.safetensors" every `checkpoint_every` iterations and on a stop, "losses.jsonl" with a
    line every `log_every` iterations, and at the end "model.safetensors", which takes the checkpoint's place.

    Args:
        model: with its initial weights; moved to the device and trained in place, or left alone if the final file is
            already there.
        dataset: training images.
        config: of the whole run; the sections train, model and data are used.
        out_dir: made if missing; holds nothing, or what an earlier call with the same configuration left.
        losses: what the model is trained for; by default the losses of a DiffusionInst, with the settings of `config`.
        progress: called every `log_every` iterations and after the last one.
        stop: asked after every iteration; True saves a checkpoint and returns.
    Returns:
        Path of the final file, or of the checkpoint when `stop` ended the training before its end.
    Raises:
        CheckpointError: `out_dir` holds the checkpoint of another configuration, or one that cannot be read or written.
        TrainingError: a loss or the gradient is not finite.
    """
    settings = config.train
    model_config = config.model.model_copy(update={"num_classes": len(dataset.class_names)})
    config = config.model_copy(update={"model": model_config})
    final_path, resume_path = out_dir / FINAL_NAME, out_dir / RESUME_NAME
    if final_path.is_file():
        complete = load_checkpoint(final_path)
        _check_same_training(complete, config)
        _read_losses(out_dir, complete)
        resume_path.unlink(missing_ok=True)  # left by a kill between writing the one and removing the other
        return final_path

    device = torch.device(device)
    model.to(device).train()
    optimizer = build_optimizer(model, settings)
    average = None if settings.ema_decay is None else WeightAverage(model, settings.ema_decay)
    start, checkpoint = 0, None
    if resume_path.is_file():
        checkpoint = load_checkpoint(resume_path)
        _check_same_training(checkpoint, config)
        if settings.ema_decay is not None:
            load_model_weights(model, checkpoint, use_ema=True)
            average = WeightAverage(model, settings.ema_decay)
        load_model_weights(model, checkpoint)
        load_optimizer_tensors(optimizer, model, checkpoint.optimizer)
        start = checkpoint.iteration
    losses_file = _open_losses(out_dir, checkpoint)
    threshold = settings.repeat_threshold
    factors = None if threshold is None else repeat_factors(dataset.image_labels(), threshold)
    loss_function = losses or diffusion_losses(model, dataset, config)

    def save(path: Path, iteration: int, *, with_optimizer: bool) -> None:
        # A checkpoint on the disk has its losses there too, even after a power cut.
        os.fsync(losses_file.fileno())
        logged = (out_dir / LOSSES_NAME).read_bytes()
        save_checkpoint(
            path,
            model=model.state_dict(),
            config=config,
            iteration=iteration,
            class_names=tuple(dataset.class_names),
            category_ids=tuple(dataset.category_ids),
            optimizer=optimizer_tensors(optimizer, model) if with_optimizer else None,
            ema=None if average is None else average.tensors,
            losses=(len(logged), hashlib.sha256(logged).hexdigest()),
        )

    clock = _Clock(start, settings.iterations)
    last_saved = start
    devices = [device] if device.type == "cuda" else []
    batches = training_batches(
        dataset,
        batch_size=settings.batch_size,
        seed=settings.seed,
        start_iteration=start,
        end_iteration=settings.iterations,
        num_workers=settings.num_workers,
        factors=factors,
    )
    with torch.random.fork_rng(devices), losses_file:
        for iteration, samples in enumerate(batches, start):
            terms, norm = backward_pass(model, loss_function, samples, settings, iteration)
            values = dict(zip([*terms, "gradient norm"], torch.stack([*terms.values(), norm]).tolist()))
            if not all(math.isfinite(value) for value in values.values()):
                raise _not_finite(values, iteration, samples, resume_path if last_saved else None, last_saved)
            del values["gradient norm"]
            rate = lr_at(iteration, settings)
            set_learning_rate(optimizer, rate)
            optimizer.step()
            if average is not None:
                average.update(model)

            finished = iteration + 1
            is_last = finished == settings.iterations
            if finished % settings.log_every == 0 or is_last:
                losses_file.write(json.dumps({"iteration": finished, "learning_rate": rate, "losses": values}) + "\n")
                losses_file.flush()
                if progress is not None:
                    left = clock.seconds_left(finished)
                    progress(TrainProgress(finished, settings.iterations, values, rate, left))
            if is_last:
                break
            is_stopped = stop is not None and stop()
            if is_stopped or finished % settings.checkpoint_every == 0:
                save(resume_path, finished, with_optimizer=True)
                last_saved = finished
            if is_stopped:
                return resume_path
        save(final_path, settings.iterations, with_optimizer=False)
    resume_path.unlink(missing_ok=True)
    return final_path


def draw_noisy_boxes(
    targets: Iterable[Target],
    whwh: Tensor,
    settings: TrainConfig,
    schedule: NoiseSchedule,
    snr_scale: float,
    iteration: int,
) -> tuple[Tensor, Tensor]:
    """Ground truth, padded and diffused to a random timestep per image: what the head sees in training.

    Args:
        targets: of B images, on the CPU.
        whwh: (B, 4) width, height, width, height of the unpadded images, on the CPU.
        settings: `seed`, `num_train_proposals` and `proposal_padding` are used.
        schedule: on the CPU.
        iteration: all draws are a function of it and the seed.
    Returns:
        Boxes (B, N, 4) float32 xyxy pixels, and timesteps (B,) int64, both on the CPU.
    """
    padded = torch.stack(
        [
            pad_ground_truth(
                to_normalised(target.boxes_xyxy[None], size[None])[0],
                settings.num_train_proposals,
                method=settings.proposal_padding,
                generator=generator_for(settings.seed, iteration, "training padding", place),
            )
            for place, (target, size) in enumerate(zip(targets, whwh))
        ]
    )
    t_generator = generator_for(settings.seed, iteration, "training timesteps")
    t = torch.randint(schedule.num_timesteps, (len(padded),), generator=t_generator)
    noise = noise_for(settings.seed, iteration, 0, "training noise", padded.shape)
    x_t = schedule.add_noise(boxes_to_signal(padded, snr_scale), noise, t)
    return to_pixels(signal_to_boxes(x_t, snr_scale), whwh).float(), t


def training_losses(
    model: DiffusionInst,
    images: Tensor,
    targets: list[Target],
    whwh: Tensor,
    boxes_xyxy: Tensor,
    t: Tensor,
    settings: TrainConfig,
    federated: FederatedDraws | None = None,
) -> dict[str, Tensor]:
    """Forward pass and losses of one batch.

    Args:
        images: (B, 3, H, W) normalised, padded, on the model's device.
        targets: of the B images, on the CPU.
        whwh: (B, 4), boxes_xyxy: (B, N, 4) noisy boxes, t: (B,) timesteps, federated: on any device.
    Returns:
        Weighted float32 losses, see `diffinst.losses.compute_losses`.
    """
    device = images.device
    whwh = whwh.to(device, non_blocking=True)
    is_bf16 = settings.precision == "bf16" or (settings.precision == "auto" and _has_bf16(device))
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16):
        features, pyramid = model.encode_boxes(images)
        output = model.denoise(features, boxes_xyxy.to(device, non_blocking=True), t.to(device, non_blocking=True))
        # Last: its activations are then the first to go in the backward, before the gradients of the head pile up.
        mask_features = model.encode_masks(pyramid)
    mask_size, mask_stride = None, 4
    if mask_features is not None:
        height, width = mask_features.shape[-2:]
        mask_size, mask_stride = (height, width), images.shape[-1] // width
    return compute_losses(
        output,
        mask_features,
        prepare_targets(targets, mask_size, mask_stride=mask_stride).to(device),
        whwh,
        model.mask_logits,
        matcher=settings.matcher,
        empty_batch_loss=settings.empty_batch_loss,
        class_loss=settings.class_loss,
        federated=None if federated is None else federated.to(device),
        ota_k=settings.ota_k,
        class_weight=settings.class_weight,
        l1_weight=settings.l1_weight,
        giou_weight=settings.giou_weight,
        mask_weight=settings.mask_weight,
        focal_alpha=settings.focal_alpha,
        focal_gamma=settings.focal_gamma,
    )


def _has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself; older GPUs only imitate it, slower than float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def diffusion_losses(model: nn.Module, dataset: TrainingData, config: Config) -> LossFunction:
    """The losses of a DiffusionInst on noisy boxes, as a function of a batch and its iteration.

    Raises:
        TypeError: the model is another one.
    """
    if not isinstance(model, DiffusionInst):
        raise TypeError(f"a {type(model).__name__} is trained with losses of its own: give them")
    settings, detector = config.train, model
    schedule = NoiseSchedule(config.model.num_train_timesteps)
    # (K,) of the classes when they are sampled; None for a loss over all.
    class_weights = None
    if settings.federated_loss:
        class_weights = sampling_weights(dataset.class_image_counts, settings.federated_power)

    def losses(samples: list[Sample], iteration: int) -> dict[str, Tensor]:
        batch = detector.make_batch(samples)
        targets = [target_of(sample) for sample in samples]
        whwh = torch.tensor([(w, h, w, h) for h, w in batch.image_sizes], dtype=torch.float32)
        boxes_xyxy, t = draw_noisy_boxes(targets, whwh, settings, schedule, config.model.snr_scale, iteration)
        federated = None
        if class_weights is not None:
            federated = draw_federated(
                class_weights,
                settings.federated_classes,
                seed=settings.seed,
                iteration=iteration,
                num_stages=len(detector.box_head.stages),
            )
        return training_losses(detector, batch.images, targets, whwh, boxes_xyxy, t, settings, federated)

    return losses


def backward_pass(
    model: nn.Module, loss_function: LossFunction, samples: list[Sample], settings: TrainConfig, iteration: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Leave the clipped gradients of a batch in the model; its losses, detached, and the norm before clipping."""
    # Of ours, only dropout and stochastic depth draw from the global generators.
    torch.manual_seed(generator_for(settings.seed, iteration, "training dropout").initial_seed())
    # Before the forward, whose activations are most of what a step needs at once.
    model.zero_grad(set_to_none=True)
    losses = loss_function(samples, iteration)
    torch.stack(list(losses.values())).sum().backward()
    norm = clip_gradients(model.parameters(), settings.clip_gradient_norm)
    return {name: loss.detach() for name, loss in losses.items()}, norm


def target_of(sample: Sample) -> Target:
    """The ground truth of a training sample."""
    if sample.target is None:
        raise ValueError(f"image {sample.image_id}: a training sample needs a target")
    return sample.target


def _check_same_training(checkpoint: Checkpoint, config: Config) -> None:
    """Refuse to go on with the training of another configuration."""
    differing = []
    for section in ("model", "train", "data"):
        theirs, ours = getattr(checkpoint.config, section), getattr(config, section)
        differing += [
            f"{section}.{field} {getattr(theirs, field)!r} instead of {getattr(ours, field)!r}"
            for field in type(ours).model_fields
            if getattr(theirs, field) != getattr(ours, field) and field not in _FREE_FIELDS.get(section, ())
        ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(
            f"{checkpoint.path}: belongs to another training: {', '.join(differing[:3])}{more}. Use another output "
            "folder, the same configuration, or delete the file to start anew."
        )


def _read_losses(out_dir: Path, checkpoint: Checkpoint) -> bytes:
    """The log of losses as it was when the checkpoint was written, without what came after.

    Raises:
        CheckpointError: part of it is gone or has changed.
    """
    path = out_dir / LOSSES_NAME
    try:
        content = path.read_bytes() if path.is_file() else b""
        if checkpoint.losses is None:  # of an earlier version: a line cut by a kill is the last one, and comes after
            lines = content.splitlines(keepends=True)
            whole = (line for line in lines if line.endswith(b"\n"))
            return b"".join(line for line in whole if json.loads(line)["iteration"] <= checkpoint.iteration)
        size, digest = checkpoint.losses
        if len(content) >= size and hashlib.sha256(content[:size]).hexdigest() == digest:
            return content[:size]
        problem = "is gone or cut off" if len(content) < size else "has changed"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        problem = "is damaged"
    raise CheckpointError(
        f"{path}: what was logged up to iteration {checkpoint.iteration} {problem}. Restore it, or delete "
        f"{checkpoint.path.name} beside it to train from the start."
    )


def _open_losses(out_dir: Path, checkpoint: Checkpoint | None) -> TextIO:
    """Open the log of losses for appending, without what came after the checkpoint that training goes on from."""
    path = out_dir / LOSSES_NAME
    kept = b"" if checkpoint is None else _read_losses(out_dir, checkpoint)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size != len(kept):
            with replacing(path) as temporary:
                temporary.write_bytes(kept)
        return path.open("a")
    except OSError as error:
        raise CheckpointError(
            f"{out_dir}: cannot be written ({error.strerror}). Choose another folder, or change its permissions."
        ) from error


def _not_finite(
    values: dict[str, float], iteration: int, samples: list[Sample], saved: Path | None, saved_iteration: int
) -> TrainingError:
    name, value = next((name, value) for name, value in values.items() if not math.isfinite(value))
    good = (
        f"the last good checkpoint is {saved} (iteration {saved_iteration})" if saved else "there is no checkpoint yet"
    )
    image_ids = ", ".join([str(sample.image_id) for sample in samples[:8]] + ["..."] * (len(samples) > 8))
    return TrainingError(
        f"iteration {iteration + 1}: {name} is {value} (images {image_ids}); {good}. "
        "Lower train.learning_rate, lengthen train.warmup_iterations, or use train.precision: fp32."
    )


class _Clock:
    """Estimates the time left from the iterations of this process, the slow first one left out."""

    def __init__(self, start: int, iterations: int) -> None:
        self._first = start + 1
        self._iterations = iterations
        self._started: float | None = None

    def seconds_left(self, finished: int) -> float | None:
        now = time.monotonic()
        if self._started is None:
            self._started, self._first = now, finished
            return None
        return (now - self._started) / (finished - self._first) * (self._iterations - finished)
