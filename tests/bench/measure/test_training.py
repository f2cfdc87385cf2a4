"""Timing of training steps with a clock of our own, and what the steps are taken on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from coco_files import tiny_content, write_set
from torch import Tensor, nn

from bench.measure.disturbances import Watch
from bench.measure.training import WARMUP_STEPS, check_batch, measure_training_steps, step_samples, summarise_steps
from diffinst.config import DataConfig, TrainConfig
from diffinst.data.coco import open_dataset
from diffinst.errors import DataError
from diffinst.structures import Sample

SETTINGS = TrainConfig(learning_rate=0.5, warmup_iterations=0, weight_decay=0.0)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(count: int, stop_after: int | None = None) -> tuple[list[float], list[int], nn.Module]:
    """Step i takes i + 1 seconds."""
    clock, seen, model = Clock(), [], nn.Linear(1, 1).eval()
    samples = [Sample(torch.zeros(3, 4, 4, dtype=torch.uint8), 7, (4, 4))]

    def losses(batch: list[Sample], iteration: int) -> dict[str, Tensor]:
        assert batch == samples
        assert model.training
        seen.append(iteration)
        clock.now += iteration + 1
        return {"loss": model(torch.ones(1, 1)).square().sum()}

    def stop() -> bool:
        return stop_after is not None and len(seen) >= stop_after

    seconds = measure_training_steps(
        model, losses, samples, SETTINGS, count=count, device="cpu", clock=clock, stop=stop, watch=Watch("cpu")
    )
    return seconds, seen, model


def test_steps_are_timed_one_by_one_after_a_first_one() -> None:
    seconds, seen, _ = run(3)
    assert WARMUP_STEPS == 1
    assert seen == [0, 1, 2, 3]
    assert seconds == [2.0, 3.0, 4.0]


def test_a_step_changes_the_weights() -> None:
    torch.manual_seed(0)
    before = nn.Linear(1, 1).weight.detach()
    torch.manual_seed(0)
    model = run(1)[2]
    assert not torch.equal(model.weight, before)


def test_a_stop_ends_it_early() -> None:
    assert run(5, stop_after=3)[0] == [2.0, 3.0]
    assert run(5, stop_after=1)[0] == []


def test_the_summary_is_median_and_ends() -> None:
    found = summarise_steps([1.0, 2.0, 3.0])
    assert list(found) == ["training_step_s/total", "training_step_s/total/p5", "training_step_s/total/p95"]
    assert list(found.values()) == pytest.approx([2.0, 1.1, 2.9])


def test_samples_are_the_first_images_as_tested_with_their_instances(tmp_path: Path) -> None:
    annotations, images = write_set(tmp_path, tiny_content())
    paths = {"val_annotations": str(annotations), "val_images": str(images)}
    train = {"train_annotations": str(annotations), "train_images": str(images)}
    data = DataConfig(dataset="custom", shortest_edge_test=32, longest_edge_test=64, **paths, **train)
    dataset = open_dataset(data, "val")
    for index, sample in enumerate(step_samples(data, 2, None)):
        assert torch.equal(sample.image, dataset.test_sample(index).image)
        assert sample.image.shape == (3, 32, 48)
        assert sample.target is not None
        assert sample.target.masks is not None
        assert sample.target.masks.shape[1:] == (32, 48)
        # From 20 x 30 to 32 x 48: 1.6 times.
        torch.testing.assert_close(sample.target.boxes_xyxy, dataset.target(index).boxes_xyxy * 1.6)


def test_a_batch_that_the_split_cannot_fill_is_refused() -> None:
    check_batch(2, 2, "a.json")
    with pytest.raises(DataError, match="a.json: a training step is measured on train.batch_size images, 3, but"):
        check_batch(3, 2, "a.json")
