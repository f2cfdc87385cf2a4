"""Prediction of a split: every image once, and the same records however often it was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffinst.build import seeded_model
from diffinst.config import ModelConfig, SamplerConfig
from diffinst.engine.evaluate import predict_split
from diffinst.engine.inference import detect
from diffinst.errors import DataError
from diffinst.evaluation.predictions import iter_predictions, to_record
from diffinst.model import DiffusionInst
from diffinst.structures import Sample

CONFIG = ModelConfig(
    backbone="tiny",
    num_classes=3,
    hidden_dim=16,
    num_stages=1,
    num_attention_heads=2,
    dim_feedforward=16,
    dim_dynamic=4,
    mask_branch_channels=8,
    mask_branch_layers=1,
)
SETTINGS = SamplerConfig(num_proposals=6, sampling_steps=2, max_detections=5)
CATEGORY_IDS = (2, 5, 9)


class FakeSplit:
    """Seven images, of which two pad to another size than the rest."""

    def __init__(self, *, broken: int | None = None) -> None:
        self.image_ids = [31, 4, 15, 9, 26, 5, 35]
        self.category_ids = CATEGORY_IDS
        self.broken = broken

    def __len__(self) -> int:
        return len(self.image_ids)

    def test_sizes(self) -> list[tuple[int, int]]:
        return [(64, 64) if index in (2, 3) else (32, 30 + index % 3) for index in range(len(self))]

    def test_sample(self, index: int) -> Sample:
        if index == self.broken:
            raise DataError("photo.jpg: cannot be decoded")
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(256, (3, *self.test_sizes()[index]), generator=generator, dtype=torch.uint8)
        return Sample(image=image, image_id=self.image_ids[index], original_size=(40, 40))


@pytest.fixture(scope="module")
def model() -> DiffusionInst:
    return seeded_model(CONFIG, seed=0)


def records(folder: Path) -> dict[int, dict[str, Any]]:
    return {record["image_id"]: record for record in iter_predictions(folder)}


def test_every_image_has_the_record_of_its_detections(model: DiffusionInst, tmp_path: Path) -> None:
    split, seen = FakeSplit(), []
    done = predict_split(model, split, SETTINGS, tmp_path, progress=lambda *state: seen.append(state))
    assert done == 7
    assert [state[0] for state in seen] == [1, 2, 3, 4, 5, 6, 7]
    assert {state[1] for state in seen} == {7}
    found = records(tmp_path)
    assert set(found) == set(split.image_ids)
    batch = model.make_batch([split.test_sample(2)])
    assert found[15] == to_record(15, detect(model, batch, SETTINGS)[0], CATEGORY_IDS)
    assert found[15]["category_id"]
    assert set(found[15]["category_id"]) <= set(CATEGORY_IDS)


def test_a_stopped_prediction_goes_on_to_the_same_records(model: DiffusionInst, tmp_path: Path) -> None:
    split = FakeSplit()
    predict_split(model, split, SETTINGS, tmp_path / "whole", batch_size=2)
    stops = 0
    while predict_split(model, split, SETTINGS, tmp_path / "parts", batch_size=2, stop=lambda: True) < 7:
        stops += 1
    # Batches of two: three of the five small images, one of the two large ones.
    assert stops == 3
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    assert predict_split(model, split, SETTINGS, tmp_path / "parts", batch_size=2) == 7


def test_shards_end_with_batches(model: DiffusionInst, tmp_path: Path) -> None:
    predict_split(model, FakeSplit(), SETTINGS, tmp_path, batch_size=2, shard_size=3)
    # Batches of 2, 2, 1 and 2 images; a shard is closed once it has 3: 2 + 2, then 1 + 2.
    sizes = [path.read_text().count('"image_id"') for path in sorted(tmp_path.glob("*.jsonl"))]
    assert sizes == [4, 3]


def test_an_image_that_cannot_be_read_costs_no_finished_one(model: DiffusionInst, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"photo\.jpg"):
        predict_split(model, FakeSplit(broken=5), SETTINGS, tmp_path)
    assert set(records(tmp_path)) == {31, 4, 26}
    assert predict_split(model, FakeSplit(), SETTINGS, tmp_path) == 7


def test_an_empty_split(model: DiffusionInst, tmp_path: Path) -> None:
    split = FakeSplit()
    split.image_ids = []
    assert predict_split(model, split, SETTINGS, tmp_path) == 0
    assert records(tmp_path) == {}
