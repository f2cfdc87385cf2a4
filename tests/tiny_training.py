"""A training that takes milliseconds an iteration; run as a script it waits after iteration 6 until it is killed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from diffinst.build import seeded_model
from diffinst.config import Config, ModelConfig, TrainConfig
from diffinst.engine.train import TrainProgress, train
from diffinst.model import DiffusionInst
from diffinst.structures import Sample, Target

MODEL = ModelConfig(
    backbone="tiny",
    num_classes=2,
    hidden_dim=16,
    num_stages=2,
    num_attention_heads=2,
    dim_feedforward=32,
    dim_dynamic=8,
    mask_branch_channels=8,
    mask_branch_layers=1,
    dropout=0.1,
)
TRAIN = TrainConfig(
    iterations=10,
    batch_size=2,
    learning_rate=1e-3,
    warmup_iterations=3,
    schedule_steps=(8,),
    num_train_proposals=12,
    checkpoint_every=4,
    log_every=1,
)


class Rectangles:
    """Images of noise with brighter rectangles; every fifth has none. Sizes vary with the augmentation."""

    class_names = ("wide", "high")
    category_ids = (1, 7)
    num_classes = 2
    image_ids = tuple(range(100, 107))

    def __len__(self) -> int:
        return len(self.image_ids)

    def training_sample(self, index: int, generator: torch.Generator) -> Sample:
        height, width = (32 + 8 * side for side in torch.randint(3, (2,), generator=generator).tolist())
        image = torch.randint(128, (3, height, width), dtype=torch.uint8, generator=generator)
        boxes, labels = [], []
        masks = torch.zeros(index % 5, height, width, dtype=torch.bool)
        for mask in masks:
            x, y, longer = torch.randint(4, 12, (3,), generator=generator).tolist()
            label = len(labels) % 2
            w, h = (longer + 8, 6) if label == 0 else (6, longer + 8)
            mask[y : y + h, x : x + w] = True
            image[:, mask] += 100
            boxes.append([x, y, x + w, y + h])
            labels.append(label)
        target = Target(torch.tensor(boxes).float().reshape(-1, 4), torch.tensor(labels, dtype=torch.int64), masks)
        return Sample(image, self.image_ids[index], (height, width), target)


def tiny_config(**train: Any) -> Config:
    return Config(model=MODEL, train=TRAIN.model_copy(update=train))


def killed_config() -> Config:
    """Of the script: with all the state that a training can have."""
    return tiny_config(ema_decay=0.9)


def tiny_model() -> DiffusionInst:
    return seeded_model(MODEL, 0)


def wait_to_be_killed(progress: TrainProgress) -> None:
    if progress.iteration == 6:
        time.sleep(120)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    train(tiny_model(), Rectangles(), killed_config(), Path(sys.argv[1]), progress=wait_to_be_killed)
