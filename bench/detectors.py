"""The engines of this interpreter behind one face: images in, detections out, with the scopes that each times apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from bench.measure.latency import SCOPES, Timer
from diffinst.config import SamplerConfig
from diffinst.engine.inference import detect
from diffinst.engine.tta import detect_augmented
from diffinst.model import DiffusionInst
from diffinst.structures import Detections, Sample

if TYPE_CHECKING:
    from torchvision.models.detection import MaskRCNN


@dataclass(frozen=True)
class Detector:
    """A trained network, in evaluation mode.

    detect: samples that pad to the same size -> a list of detections in pixels of the files; enters `scopes` of the
    timer. resized: whether it takes images at the test size; otherwise as they are in their files, one at a time.
    """

    module: nn.Module
    detect: Callable[[Sequence[Sample], Timer], list[Detections]]
    scopes: tuple[str, ...]
    size_divisor: int
    resized: bool = True


def our_detector(model: DiffusionInst, settings: SamplerConfig) -> Detector:
    """DiffusionInst with its sampler, and with test-time augmentation if the settings ask for it."""

    def plain(samples: Sequence[Sample], timer: Timer) -> list[Detections]:
        with timer("preprocess"):
            batch = model.make_batch(samples)
        return detect(model, batch, settings, timer=timer, mask_form="rle")

    def augmented(samples: Sequence[Sample], timer: Timer) -> list[Detections]:
        # Resizing to views is part of augmentation, and timed; resizing to the test size is part of loading.
        return [detect_augmented(model, sample, settings, timer=timer) for sample in samples]

    run = augmented if settings.tta else plain
    return Detector(model.eval(), run, SCOPES, model.backbone.size_divisor, resized=not settings.tta)


def torchvision_detector(network: MaskRCNN, settings: SamplerConfig) -> Detector:
    """torchvision's Mask R-CNN."""
    from bench import torchvision_engine  # late: importing torchvision takes a second and 160 MB

    def run(samples: Sequence[Sample], timer: Timer) -> list[Detections]:
        return torchvision_engine.detect(network, samples, settings, timer=timer)

    return Detector(network.eval(), run, torchvision_engine.SCOPES, torchvision_engine.SIZE_DIVISOR)
