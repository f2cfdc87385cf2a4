"""Boxes out of noise: the sampling loop, whole batch at a time.

It knows neither network nor images: what denoises and where noise comes from are arguments. All shapes are fixed, and
nothing in the loop waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinst.config import SamplerConfig
from diffinst.diffusion.ddim import ddim_step, timestep_pairs
from diffinst.diffusion.schedule import NoiseSchedule
from diffinst.diffusion.signal import MIN_BOX_SIZE, boxes_to_signal, signal_to_boxes, to_normalised, to_pixels
from diffinst.structures import HeadOutput


@dataclass
class StepPrediction:
    """What one sampling step saw and said; of the head's stages only the last.

    t: timestep. class_logits: (B, N, K). boxes_xyxy: (B, N, 4) pixels, not clipped. mask_params: (B, N, P) or None.
    x_t: (B, N, 4) noisy signal the step began with, not clamped; float64 from the second step on.
    x_0: (B, N, 4) predicted signal, clamped. noise_pred: (B, N, 4) float64 noise that leads from x_0 to x_t.
    keep: (B, N) bool, proposals that renewal leaves alone.
    """

    t: int
    class_logits: Tensor
    boxes_xyxy: Tensor
    mask_params: Tensor | None
    x_t: Tensor
    x_0: Tensor
    noise_pred: Tensor
    keep: Tensor


def sample(
    denoise: Callable[[Tensor, Tensor], HeadOutput],
    *,
    whwh: Tensor,
    schedule: NoiseSchedule,
    settings: SamplerConfig,
    snr_scale: float,
    noise: Callable[[int, str], Tensor],
) -> list[StepPrediction]:
    """Denoise random boxes in `settings.sampling_steps` steps (DiffusionDet, arXiv:2211.09788, section 3.4).

    Args:
        denoise: (boxes_xyxy (B, N, 4) pixels, t (B,) int64) -> HeadOutput.
        whwh: (B, 4) width, height, width, height of the resized, unpadded images.
        schedule: the forward process of training.
        settings: steps, eta, renewal and the switches between the released and the intended behaviour.
        snr_scale: half the range of the signal.
        noise: (step, purpose) -> (B, N, 4) standard normal on the device of whwh; purposes "initial" (step 0),
            "step" and "renewal".
    Returns:
        One prediction per step, in the order they were made.
    """
    batch_size = len(whwh)
    min_size = MIN_BOX_SIZE if settings.zero_size_proposals == "clamp" else 0.0
    predictions: list[StepPrediction] = []
    x_t = noise(0, "initial")
    for step, (t, t_next) in enumerate(timestep_pairs(schedule.num_timesteps, settings.sampling_steps)):
        times = torch.full((batch_size,), t, dtype=torch.int64, device=whwh.device)
        # 1. What the head sees: the noisy signal, clamped, as boxes in pixels.
        seen_boxes = signal_to_boxes(x_t, snr_scale, min_size=min_size)
        output = denoise(to_pixels(seen_boxes, whwh), times)
        class_logits, boxes_xyxy = output.class_logits[-1], output.boxes_xyxy[-1]
        # 2. The head's boxes are the prediction of x_0; together with x_t they say which noise was in it.
        x_0 = boxes_to_signal(to_normalised(boxes_xyxy, whwh), snr_scale).clamp(-snr_scale, snr_scale)
        seen_x_t = boxes_to_signal(seen_boxes, snr_scale) if settings.predict_noise_from == "clamped" else x_t
        noise_pred = schedule.predict_noise(seen_x_t, x_0, times)
        keep = class_logits.amax(dim=-1).sigmoid() > settings.renewal_threshold
        predictions.append(
            StepPrediction(
                t=t,
                class_logits=class_logits,
                boxes_xyxy=boxes_xyxy,
                mask_params=None if output.mask_params is None else output.mask_params[-1],
                x_t=x_t,
                x_0=x_0,
                noise_pred=noise_pred,
                keep=keep if settings.renewal else torch.ones_like(keep),
            )
        )
        if t_next < 0:
            break
        # 3. To the next timestep; proposals that found nothing start again from noise.
        if settings.renewal and settings.renewal_order == "front":
            front = keep.int().argsort(dim=1, descending=True, stable=True)
            keep = keep.gather(1, front)
            x_0, noise_pred = (signal.gather(1, front[..., None].expand_as(signal)) for signal in (x_0, noise_pred))
        x_t = ddim_step(
            x_0,
            noise_pred,
            alpha=schedule.alpha(t),
            alpha_next=schedule.alpha(t_next),
            eta=settings.eta,
            noise=noise(step, "step"),
        )
        if settings.renewal:
            x_t = torch.where(keep[..., None], x_t, noise(step, "renewal"))
    return predictions
