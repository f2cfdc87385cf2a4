"""Images in, detections out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from diffinst.config import SamplerConfig
from diffinst.diffusion.noise import noise_for
from diffinst.diffusion.sampler import sample
from diffinst.model import DiffusionInst
from diffinst.ops.paths import note_path
from diffinst.postprocess import MaskForm, finish, select_candidates
from diffinst.structures import Candidates, Detections, Features, ImageBatch

# The parts of `detect`, in order; what comes before them, making the batch, is `DiffusionInst.make_batch`.
SCOPES = ("backbone", "head", "masks")

Timer = Callable[[str], AbstractContextManager[object]]


def untimed(scope: str) -> AbstractContextManager[None]:  # noqa: ARG001 - a timer is told the scope
    """The timer that measures nothing."""
    return nullcontext()


@torch.inference_mode()
def detect(
    model: DiffusionInst,
    batch: ImageBatch,
    settings: SamplerConfig,
    *,
    timer: Timer = untimed,
    mask_form: MaskForm = "bitmaps",
) -> list[Detections]:
    """Detections of a batch of images; an image's are the same in any batch.

    Args:
        model: in evaluation mode.
        batch: made by the model, on its device, of images that all pad to the same size: zeros beyond an image's own
            padding would change its features (`diffinst.data.samplers.batches_of_equal_size` groups images).
        settings: sampling and post-processing.
        timer: called with each of `SCOPES` in turn, gives the context that the scope runs in. Work on a GPU may be
            unfinished when a scope ends; a timer that measures must synchronise.
        mask_form: "bitmaps" gives `Detections.masks`; "rle" gives `encodings`, in memory that does not grow with the
            number of detections.
    Returns:
        One entry per image, in original-image pixels, on the model's device.
    Raises:
        ValueError: detections would depend on the batch: the model is in training mode, where batch statistics count,
            or an image is padded beyond its own size.
    """
    features, candidates = find_candidates(model, batch, settings, timer=timer)
    with timer("masks"):
        return [
            finish(
                candidates[image],
                None if features.mask_features is None else features.mask_features[image],
                image_size=batch.image_sizes[image],
                original_size=batch.original_sizes[image],
                settings=settings,
                mask_head=model.mask_logits,
                mask_form=mask_form,
            )
            for image in range(len(batch))
        ]


@torch.inference_mode()
def find_candidates(
    model: DiffusionInst, batch: ImageBatch, settings: SamplerConfig, *, view: int = 0, timer: Timer = untimed
) -> tuple[Features, list[Candidates]]:
    """The first two scopes of `detect`: everything but what only kept detections need.

    Args:
        view: which augmented copy of its images the batch holds; each has noise of its own, and 0 that of `detect`.
        model, batch, settings, timer: as for `detect`.
    Returns:
        Features of the batch, and one entry per image.
    Raises:
        ValueError: as for `detect`.
    """
    if model.training:
        raise ValueError("detection needs a model in evaluation mode: call model.eval() first")
    _check_padding(batch, model.backbone.size_divisor)
    is_bf16 = settings.inference_precision == "bf16"
    note_path("precision", settings.inference_precision)
    with torch.autocast(batch.images.device.type, dtype=torch.bfloat16, enabled=is_bf16):
        with timer("backbone"):
            features = model.encode(batch.images)
        with timer("head"):
            steps = sample(
                partial(model.denoise, features, compiled=settings.compile == "head"),
                whwh=batch.whwh,
                schedule=model.schedule,
                settings=settings,
                snr_scale=model.snr_scale,
                noise=batch_noise(batch.image_ids, settings, batch.images.device, view=view),
            )
            candidates = select_candidates(steps, settings)
    if features.mask_features is not None:
        features.mask_features = features.mask_features.float()
    return features, candidates


def _check_padding(batch: ImageBatch, divisor: int) -> None:
    """Refuse a batch in which an image is padded further than it would be alone."""
    padded = tuple(batch.images.shape[-2:])
    for image_id, size in zip(batch.image_ids, batch.image_sizes):
        alone = tuple(-(-side // divisor) * divisor for side in size)
        if alone != padded:
            raise ValueError(
                f"image {image_id} alone is padded to {alone[0]} x {alone[1]}, in this batch to {padded[0]} x "
                f"{padded[1]}, which would change its detections: put only images that pad to the same size together"
            )


def batch_noise(
    image_ids: list[int], settings: SamplerConfig, device: torch.device | str, *, view: int = 0
) -> Callable[[int, str], Tensor]:
    """The sampler's noise source for these images: (step, purpose) -> (B, N, 4) float32 on the device."""
    shape = (settings.num_proposals, 4)

    def noise(step: int, purpose: str) -> Tensor:
        key = f"{purpose} of view {view}" if view else purpose
        draws = [noise_for(settings.eval_seed, image_id, step, key, shape) for image_id in image_ids]
        return torch.stack(draws).to(device, non_blocking=True)

    return noise
