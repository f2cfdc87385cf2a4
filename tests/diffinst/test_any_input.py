"""End to end on what is small, odd or extreme: a training step, then detections, for every kind of model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffinst.backbones.registry import BACKBONES
from diffinst.build import seeded_model
from diffinst.config import RELEASED, Config, ModelConfig, SamplerConfig, TrainConfig
from diffinst.diffusion.schedule import NoiseSchedule
from diffinst.engine.inference import detect
from diffinst.engine.optim import build_optimizer, clip_gradients
from diffinst.engine.train import draw_noisy_boxes, training_losses
from diffinst.model import DiffusionInst
from diffinst.structures import Sample, Target

NUM_PROPOSALS = 8
SMALL: dict[str, Any] = {
    "backbone": "tiny",
    "num_classes": 2,
    "hidden_dim": 16,
    "num_stages": 2,
    "num_attention_heads": 2,
    "dim_feedforward": 16,
    "dim_dynamic": 4,
    "mask_branch_channels": 8,
    "mask_branch_layers": 1,
}
# Batches as lists of (height, width); the images of one pad to the same size.
SIZES = [[(1, 1)], [(1, 45)], [(45, 1)], [(33, 17)], [(31, 32), (20, 5), (2, 3)], [(65, 95)]]
PRESETS = {"fixed": Config(), "released": Config.model_validate(RELEASED)}


def _model(**changes: Any) -> DiffusionInst:
    return seeded_model(ModelConfig(**SMALL | changes), seed=0)


def _samples(sizes: list[tuple[int, int]], num_instances: int, num_classes: int = 2) -> list[Sample]:
    samples = []
    for image_id, (height, width) in enumerate(sizes):
        generator = torch.Generator().manual_seed(image_id)
        sides = torch.tensor([width, height])
        corner = torch.rand(num_instances, 2, generator=generator) * sides * 0.6
        boxes = torch.cat([corner, corner + 0.1 + torch.rand(num_instances, 2, generator=generator) * sides * 0.3], 1)
        x, y = torch.arange(width), torch.arange(height)
        in_columns = (x >= boxes[:, :1].floor()) & (x < boxes[:, 2:3])
        in_rows = (y >= boxes[:, 1:2].floor()) & (y < boxes[:, 3:])
        target = Target(
            boxes,
            torch.randint(num_classes, (num_instances,), generator=generator),
            in_rows[:, :, None] & in_columns[:, None],
        )
        image = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)
        samples.append(Sample(image, image_id, (height + 3, 2 * width), target))
    return samples


def _train_step(model: DiffusionInst, samples: list[Sample], **settings: Any) -> dict[str, torch.Tensor]:
    """One iteration; everything in it must stay finite and nothing trainable may be left out."""
    train = TrainConfig(num_train_proposals=NUM_PROPOSALS, **settings)
    model.train()
    batch, targets = model.make_batch(samples), [sample.target for sample in samples]
    boxes_xyxy, t = draw_noisy_boxes(targets, batch.whwh, train, NoiseSchedule(1000), model.snr_scale, 0)
    losses = training_losses(model, batch.images, targets, batch.whwh, boxes_xyxy, t, train)
    torch.stack(list(losses.values())).sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if train.empty_batch_loss == "fixed":
        assert not [name for name, parameter in trained.items() if parameter.grad is None]
    optimizer = build_optimizer(model, train)
    assert clip_gradients(trained.values(), train.clip_gradient_norm).isfinite()
    optimizer.step()
    assert all(parameter.isfinite().all() and parameter.dtype == torch.float32 for parameter in trained.values())
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    return losses


def _check_detections(model: DiffusionInst, samples: list[Sample], settings: SamplerConfig) -> None:
    model.eval()
    found = detect(model, model.make_batch(samples), settings)
    assert len(found) == len(samples)
    for detections, sample in zip(found, samples):
        height, width = sample.original_size
        x1, y1, x2, y2 = detections.boxes_xyxy.unbind(-1)
        assert ((x1 >= 0) & (x1 < x2) & (x2 <= width) & (y1 >= 0) & (y1 < y2) & (y2 <= height)).all()
        assert ((detections.scores >= 0) & (detections.scores <= 1)).all()
        assert ((detections.labels >= 0) & (detections.labels < model.num_classes)).all()
        if model.mask_branch is None:
            assert detections.masks is None
        else:
            assert detections.masks.shape == (len(detections), height, width)


def _sampler(preset: str, **changes: Any) -> SamplerConfig:
    return PRESETS[preset].sampler.model_copy(update={"num_proposals": NUM_PROPOSALS, "sampling_steps": 3} | changes)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mask", ["dynamic", "none"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.filterwarnings("ignore::diffinst.matching.MatcherWarning")  # more instances than proposals
def test_any_image_size_and_number_of_instances(sizes: list[tuple[int, int]], mask: str, preset: str) -> None:
    switches = RELEASED if preset == "released" else {"model": {}, "train": {}}
    model = _model(mask=mask, **switches["model"])
    for num_instances in (0, 1, NUM_PROPOSALS, 3 * NUM_PROPOSALS):
        losses = _train_step(model, _samples(sizes, num_instances), **switches["train"])
        assert any("masks" in name for name in losses) == (mask == "dynamic")
        model.zero_grad()
    _check_detections(model, _samples(sizes, 0), _sampler(preset))


def test_images_with_none_and_with_too_many_instances_share_a_batch() -> None:
    few, many = _samples([(40, 50)], 0), _samples([(40, 50)], 5 * NUM_PROPOSALS)
    _train_step(_model(), few + many + _samples([(40, 50)], 1))


@pytest.mark.parametrize("init", ["released", "fixed"])
@pytest.mark.parametrize("num_classes", [1, 2, 3, 4, 90])
def test_any_class_count(num_classes: int, init: str) -> None:
    model = _model(num_classes=num_classes, init=init)
    samples = _samples([(40, 50)], 3, num_classes)
    _train_step(model, samples)
    _check_detections(model, samples, _sampler("fixed"))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone(backbone: str) -> None:
    model = _model(backbone=backbone)
    samples = _samples([(50, 33)], 2)
    _train_step(model, samples)
    _check_detections(model, samples, _sampler("fixed"))


@pytest.mark.parametrize("mask", ["dynamic", "none"])
@pytest.mark.parametrize("num_instances", [0, 2])
def test_bf16(mask: str, num_instances: int) -> None:
    """Weights, gradients and losses stay in float32; only the forward pass inside is in bf16."""
    _train_step(_model(mask=mask), _samples([(40, 50), (64, 60)], num_instances), precision="bf16")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_proposals": 1},
        {"sampling_steps": 1},
        {"nms_iou_threshold": None},
        {"renewal": False, "eta": 0.0},
        {"ensemble": "none"},
        {"max_detections": 1},
        {"score_threshold": 1.0},
        {"renewal_threshold": 1.0},
    ],
    ids=str,
)
def test_any_sampler(changes: dict[str, Any]) -> None:
    _check_detections(_model(), _samples([(33, 17), (40, 20)], 0), _sampler("fixed", **changes))
