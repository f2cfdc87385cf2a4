"""Time of the method's hot paths, at sizes that take milliseconds on one core. `tox -e bench` runs them.

Compare two runs with `diffbench compare --benchmarks BASE.json HEAD.json`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from diffinst.config import SamplerConfig
from diffinst.diffusion.sampler import sample
from diffinst.diffusion.schedule import NoiseSchedule
from diffinst.heads.dynamic_conv import DynamicConv
from diffinst.heads.mask_head import apply_mask_head, num_mask_params
from diffinst.losses import compute_losses, prepare_targets
from diffinst.matching import match, pad_targets
from diffinst.ops.nms import classwise_nms
from diffinst.ops.rle import decode_rle, encode_masks
from diffinst.ops.roi import pool_boxes
from diffinst.postprocess import finish, select_candidates
from diffinst.structures import HeadOutput, Target

pytestmark = pytest.mark.bench

SIZE = 256  # pixels of the square input
NUM_PROPOSALS = 100
NUM_CLASSES = 20
STRIDES = (4, 8, 16, 32)
CHANNELS = (8, 8)
NUM_PARAMS = num_mask_params(8, CHANNELS)
WHWH = torch.full((2, 4), float(SIZE))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads would measure the neighbours on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random_boxes(generator: torch.Generator, *lead: int) -> torch.Tensor:
    """(..., 4) xyxy within the image."""
    corner = torch.rand(*lead, 2, generator=generator) * SIZE * 0.7
    return torch.cat([corner, corner + 4 + torch.rand(*lead, 2, generator=generator) * SIZE * 0.3], dim=-1)


def random_output(generator: torch.Generator, stages: int = 3) -> HeadOutput:
    lead = (stages, 2, NUM_PROPOSALS)
    return HeadOutput(
        class_logits=torch.randn(*lead, NUM_CLASSES, generator=generator) - 3,
        boxes_xyxy=random_boxes(generator, *lead),
        mask_params=0.1 * torch.randn(*lead, NUM_PARAMS, generator=generator),
    )


def random_targets(generator: torch.Generator, count: int = 8) -> list[Target]:
    targets = []
    for _ in range(2):
        boxes = random_boxes(generator, count)
        masks = torch.zeros(count, SIZE, SIZE, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist()):
            mask[top:bottom, left:right] = True
        targets.append(Target(boxes, torch.randint(NUM_CLASSES, (count,), generator=generator), masks))
    return targets


def mask_head(features: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    return apply_mask_head(features, params, channels=CHANNELS)


@pytest.mark.parametrize("method", ["roi_align", "bags"])
def test_box_pooling(benchmark: Any, generator: torch.Generator, method: Any) -> None:
    pyramid = [torch.randn(2, 32, SIZE // stride, SIZE // stride, generator=generator) for stride in STRIDES]
    boxes = random_boxes(generator, 2, NUM_PROPOSALS)
    pooled = benchmark(pool_boxes, pyramid, STRIDES, boxes, method=method)
    assert pooled.shape == (2 * NUM_PROPOSALS, 32, 7, 7)


def test_dynamic_conv(benchmark: Any, generator: torch.Generator) -> None:
    module = DynamicConv(dim=64, dim_dynamic=16, resolution=7).eval()
    proposals = torch.randn(200, 64, generator=generator)
    rois = torch.randn(200, 64, 7, 7, generator=generator)
    assert benchmark(module, proposals, rois).shape == (200, 64)


def test_mask_head(benchmark: Any, generator: torch.Generator) -> None:
    features = torch.randn(8, SIZE // 4, SIZE // 4, generator=generator)
    params = torch.randn(NUM_PROPOSALS, NUM_PARAMS, generator=generator)
    assert benchmark(mask_head, features, params).shape == (NUM_PROPOSALS, SIZE // 4, SIZE // 4)


def test_matcher(benchmark: Any, generator: torch.Generator) -> None:
    output, targets = random_output(generator), pad_targets(random_targets(generator))
    found = benchmark(match, output.class_logits, output.boxes_xyxy, targets, WHWH)
    assert found.shape == (3, 2, NUM_PROPOSALS)


def test_losses(benchmark: Any, generator: torch.Generator) -> None:
    output = random_output(generator)
    features = torch.randn(2, 8, SIZE // 4, SIZE // 4, generator=generator)
    targets = prepare_targets(random_targets(generator), (SIZE // 4, SIZE // 4))
    losses = benchmark(compute_losses, output, features, targets, WHWH, mask_head)
    assert len(losses) == 3 * 4


def steps_of(generator: torch.Generator, num_steps: int) -> Any:
    """What the sampler does around the head, which costs nothing here."""
    output = random_output(generator, stages=1)
    draws = torch.randn(2, NUM_PROPOSALS, 4, generator=generator)
    settings = SamplerConfig(sampling_steps=num_steps, num_proposals=NUM_PROPOSALS)
    schedule = NoiseSchedule(1000)

    def run() -> Any:
        return sample(
            lambda boxes, t: output,
            whwh=WHWH,
            schedule=schedule,
            settings=settings,
            snr_scale=2.0,
            noise=lambda step, purpose: draws,
        )

    return run


def test_sampler_steps(benchmark: Any, generator: torch.Generator) -> None:
    assert len(benchmark(steps_of(generator, 4))) == 4


def test_nms(benchmark: Any, generator: torch.Generator) -> None:
    boxes, scores = random_boxes(generator, 1000), torch.rand(1000, generator=generator)
    labels = torch.randint(NUM_CLASSES, (1000,), generator=generator)
    assert len(benchmark(classwise_nms, boxes, scores, labels, iou_threshold=0.5)) > 100


def test_postprocessing(benchmark: Any, generator: torch.Generator) -> None:
    steps = steps_of(generator, 2)()
    features = torch.randn(8, SIZE // 4, SIZE // 4, generator=generator)
    settings = SamplerConfig(sampling_steps=2, num_proposals=NUM_PROPOSALS, max_detections=50)

    def run() -> Any:
        candidates = select_candidates(steps, settings)
        return finish(
            candidates[0],
            features,
            image_size=(SIZE, SIZE),
            original_size=(300, 300),
            settings=settings,
            mask_head=mask_head,
        )

    assert len(benchmark(run)) == 50


def discs(count: int, size: int) -> np.ndarray:
    rows, columns = np.mgrid[:size, :size]
    radii = np.linspace(size / 8, size / 2, count)
    centres = np.linspace(size / 3, size / 1.5, count)
    return np.stack([(rows - y) ** 2 + (columns - size / 2) ** 2 < r**2 for y, r in zip(centres, radii)])


def test_rle_encoding(benchmark: Any) -> None:
    assert len(benchmark(encode_masks, discs(50, SIZE))) == 50


def test_rle_decoding(benchmark: Any) -> None:
    encoded = encode_masks(discs(50, SIZE))
    decoded = benchmark(lambda: [decode_rle(one) for one in encoded])
    assert np.array_equal(np.stack(decoded), discs(50, SIZE))
