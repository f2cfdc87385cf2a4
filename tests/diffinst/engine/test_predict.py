from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffinst.build import seeded_model
from diffinst.config import DataConfig, ModelConfig, SamplerConfig
from diffinst.engine.predict import Photograph, coco_results, detect_image, find_photographs, predict
from diffinst.errors import DataError
from diffinst.model import DiffusionInst
from diffinst.ops.rle import decode_rle
from diffinst.structures import Detections

DATA = DataConfig(shortest_edge_test=64, longest_edge_test=96)
SAMPLER = SamplerConfig(num_proposals=8, sampling_steps=2, max_detections=5)


@pytest.fixture(scope="module")
def model() -> DiffusionInst:
    config = ModelConfig(
        backbone="tiny",
        num_classes=3,
        num_stages=1,
        hidden_dim=32,
        dim_feedforward=32,
        dim_dynamic=8,
        num_attention_heads=2,
    )
    return seeded_model(config, 0)


def _write(path: Path, *, seed: int = 0, size: tuple[int, int] = (60, 90)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_photographs_are_found_in_files_and_folders(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/inner/a.JPG", "b/1.jpeg"):
        _write(tmp_path / name)
    (tmp_path / "b/notes.txt").touch()
    single = _write(tmp_path / "single.bmp")
    found = find_photographs([tmp_path / "b", single, tmp_path / "b/1.jpeg"])
    assert [str(item.output) for item in found] == ["1.jpeg", "2.png", "inner/a.JPG", "single.png"]
    assert [item.image_id for item in found][:2] == [1, 2]


def test_the_id_of_a_photograph_is_its_own(tmp_path: Path) -> None:
    coco, other = _write(tmp_path / "000000000139.jpg"), _write(tmp_path / "cat.jpg")
    first, second = find_photographs([tmp_path])
    assert first.image_id == 139
    assert second == find_photographs([other])[0]
    assert 0 <= second.image_id < 2**52
    assert find_photographs([_write(tmp_path / "dog.jpg")])[0].image_id != second.image_id
    assert find_photographs([coco])[0].image_id != second.image_id


@pytest.mark.parametrize("kind", ["missing", "empty", "clash"])
def test_what_cannot_be_drawn_is_said_before_any_work(tmp_path: Path, kind: str) -> None:
    inputs, message = [tmp_path / "nothing"], "nothing: no such file or folder"
    if kind == "empty":
        inputs, message = [tmp_path], "no image in this folder. Looked for .jpg"
    if kind == "clash":
        inputs = [_write(tmp_path / "a/x.png"), _write(tmp_path / "b/x.bmp")]
        message = "would both be drawn as x.png"
    with pytest.raises(DataError, match=message):
        find_photographs(inputs)


def test_results_by_hand() -> None:
    masks = torch.zeros(1, 4, 5, dtype=torch.bool)
    masks[0, 1:3, 1:4] = True
    found = Detections(torch.tensor([[1.0, 1.0, 4.0, 3.0]]), torch.tensor([0.75]), torch.tensor([1]), masks)
    (result,) = coco_results(found, Photograph(Path("in/7.jpg"), Path("7.jpg"), 7), ["disc", "ring"])
    encoding = result.pop("segmentation")
    assert result == {
        "image_id": 7,
        "file_name": "7.jpg",
        "category_id": 2,
        "category": "ring",
        "score": 0.75,
        "bbox": [1.0, 1.0, 3.0, 2.0],
    }
    assert (decode_rle(encoding) == masks[0].numpy()).all()


def test_predict_writes_pictures_and_results(model: DiffusionInst, tmp_path: Path) -> None:
    _write(tmp_path / "in/a.jpg")
    _write(tmp_path / "in/deep/b.png", seed=1, size=(70, 50))
    seen = []
    path = predict(
        model,
        find_photographs([tmp_path / "in"]),
        tmp_path / "out",
        data=DATA,
        settings=SAMPLER,
        class_names=["disc", "ring", "star"],
        draw_threshold=0.0,
        on_image=lambda photograph, detections: seen.append((photograph.path.name, len(detections))),
    )
    assert sorted(str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.*")) == [
        "a.jpg",
        "deep/b.png",
        "predictions.json",
    ]
    with Image.open(tmp_path / "out/deep/b.png") as drawn, Image.open(tmp_path / "in/deep/b.png") as original:
        enlarged = original.resize((8 * original.width, 8 * original.height), Image.Resampling.NEAREST)
        assert drawn.size == enlarged.size  # 8 x 50 is the least multiple from 360 on
        assert drawn.tobytes() != enlarged.tobytes()
    results = json.loads(path.read_text())
    assert [name for name, _ in seen] == ["a.jpg", "b.png"]
    assert len(results) == sum(count for _, count in seen) > 0
    for result in results:
        x, y, width, height = result["bbox"]
        size = [60, 90] if result["file_name"] == "a.jpg" else [70, 50]
        assert result["segmentation"]["size"] == size
        assert x >= 0
        assert y >= 0
        assert x + width <= size[1] + 0.02
        assert y + height <= size[0] + 0.02


def test_a_photograph_gives_the_same_whatever_lies_beside_it(model: DiffusionInst, tmp_path: Path) -> None:
    _write(tmp_path / "in/a.png")
    alone = predict(
        model, find_photographs([tmp_path / "in"]), tmp_path / "one", data=DATA, settings=SAMPLER
    ).read_text()
    _write(tmp_path / "in/0.png", seed=1)
    both = predict(
        model, find_photographs([tmp_path / "in"]), tmp_path / "two", data=DATA, settings=SAMPLER
    ).read_text()
    assert [item for item in json.loads(both) if item["file_name"] == "a.png"] == json.loads(alone)


def test_a_photograph_may_be_of_any_size(model: DiffusionInst) -> None:
    model.eval()
    for size in ((1, 1), (3, 200)):
        found = detect_image(model, np.zeros((*size, 3), dtype=np.uint8), 0, data=DATA, settings=SAMPLER)
        assert found.masks is not None
        assert tuple(found.masks.shape[1:]) == size


def test_a_damaged_photograph_is_named(model: DiffusionInst, tmp_path: Path) -> None:
    path = _write(tmp_path / "in/a.jpg")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="a.jpg: cannot be decoded"):
        predict(model, find_photographs([path]), tmp_path / "out", data=DATA, settings=SAMPLER)
