from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffinst.build import seeded_model
from diffinst.checkpoint import Checkpoint
from diffinst.config import Config, DataConfig, ModelConfig, SamplerConfig
from diffinst.data.annotations import read_image
from diffinst.engine.predict import category_ids_of, coco_results, detect_image, find_media, predict
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
    found = find_media([tmp_path / "b", single, tmp_path / "b/1.jpeg"])
    assert [str(item.output) for item in found] == ["1.jpeg", "2.png", "inner/a.JPG", "single.png"]
    assert [item.image_id for item in found][:2] == [1, 2]


def test_the_id_of_a_photograph_is_its_own(tmp_path: Path) -> None:
    coco, other = _write(tmp_path / "000000000139.jpg"), _write(tmp_path / "cat.jpg")
    first, second = find_media([tmp_path])
    assert first.image_id == 139
    assert second == find_media([other])[0]
    assert 0 <= second.image_id < 2**52
    assert find_media([_write(tmp_path / "dog.jpg")])[0].image_id != second.image_id
    assert find_media([coco])[0].image_id != second.image_id


@pytest.mark.parametrize("kind", ["missing", "empty", "clash"])
def test_what_cannot_be_drawn_is_said_before_any_work(tmp_path: Path, kind: str) -> None:
    inputs, message = [tmp_path / "nothing"], "nothing: no such file or folder"
    if kind == "empty":
        inputs, message = [tmp_path], "no image in this folder, and no video. Looked for .jpg"
    if kind == "clash":
        inputs = [_write(tmp_path / "a/x.png"), _write(tmp_path / "b/x.bmp")]
        message = "would both be drawn as x.png"
    with pytest.raises(DataError, match=message):
        find_media(inputs)


def test_results_by_hand() -> None:
    masks = torch.zeros(1, 4, 5, dtype=torch.bool)
    masks[0, 1:3, 1:4] = True
    found = Detections(torch.tensor([[1.0, 1.0, 4.0, 3.0]]), torch.tensor([0.75]), torch.tensor([1]), masks)
    (result,) = coco_results(found, 7, "7.jpg", ["disc", "ring"])
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


def test_category_ids_are_those_of_the_data_set() -> None:
    found = Detections(torch.zeros(3, 4), torch.ones(3), torch.tensor([1, 0, 2]), None)
    for ids, expected in ((), [2, 1, 3]), ((4, 13, 90), [13, 4, 90]):
        assert [result["category_id"] for result in coco_results(found, 7, "7.jpg", (), ids)] == expected


def _checkpoint(dataset: str, num_classes: int, names: tuple[str, ...] = (), ids: tuple[int, ...] = ()) -> Checkpoint:
    config = Config(model=ModelConfig(num_classes=num_classes), data=DataConfig(dataset=dataset))
    return Checkpoint(Path("x"), config, 0, names, {}, {}, category_ids=ids)


def test_models_of_coco_without_stored_ids_have_those_of_coco() -> None:
    coco = category_ids_of(_checkpoint("coco", 80))
    assert (len(coco), coco[0], coco[11], coco[79]) == (80, 1, 13, 90)  # person, stop sign, toothbrush
    names = ["x"] * 80
    names[0], names[11], names[79] = "person", "stop sign", "toothbrush"
    assert category_ids_of(_checkpoint("coco_mini", 80, tuple(names))) == coco
    assert category_ids_of(_checkpoint("coco", 80, tuple(reversed(names)))) == ()
    assert category_ids_of(_checkpoint("coco", 3)) == category_ids_of(_checkpoint("shapes", 80)) == ()
    assert category_ids_of(_checkpoint("coco", 80, ids=tuple(range(80)))) == tuple(range(80))


def test_predict_writes_pictures_and_results(model: DiffusionInst, tmp_path: Path) -> None:
    _write(tmp_path / "in/a.jpg")
    _write(tmp_path / "in/deep/b.png", seed=1, size=(70, 50))
    seen = []
    done = predict(
        model,
        find_media([tmp_path / "in"]),
        tmp_path / "out",
        data=DATA,
        settings=SAMPLER,
        class_names=["disc", "ring", "star"],
        draw_threshold=0.0,
        report=lambda medium, number, total: seen.append((medium.path.name, number, total)),
    )
    assert done == 2
    assert seen == [("a.jpg", 1, 1), ("b.png", 1, 1)]
    out = tmp_path / "out"
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*.*")) == [
        "a.jpg",
        "a.jpg.json",
        "deep/b.png",
        "deep/b.png.json",
        "predictions.json",
    ]
    with Image.open(out / "deep/b.png") as drawn, Image.open(tmp_path / "in/deep/b.png") as original:
        enlarged = original.resize((8 * original.width, 8 * original.height), Image.Resampling.NEAREST)
        assert drawn.width == enlarged.width  # 8 x 50 is the least multiple from 360 on
        assert enlarged.height < drawn.height  # the legend
        assert drawn.crop((0, 0, *enlarged.size)).tobytes() != enlarged.tobytes()
    results = json.loads((out / "predictions.json").read_text())
    assert len(results) == 10
    parts = [json.loads((out / name).read_text()) for name in ("a.jpg.json", "deep/b.png.json")]
    assert results == parts[0] + parts[1]
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
    predict(model, find_media([tmp_path / "in"]), tmp_path / "one", data=DATA, settings=SAMPLER)
    _write(tmp_path / "in/0.png", seed=1)
    predict(model, find_media([tmp_path / "in"]), tmp_path / "two", data=DATA, settings=SAMPLER)
    assert (tmp_path / "one/a.png.json").read_bytes() == (tmp_path / "two/a.png.json").read_bytes()


def test_nothing_is_overwritten_in_silence(model: DiffusionInst, tmp_path: Path) -> None:
    media = find_media([_write(tmp_path / "a.png")])
    predict(model, media, tmp_path / "out", data=DATA, settings=SAMPLER)
    before = (tmp_path / "out/a.png.json").read_bytes()
    with pytest.raises(DataError, match=r"out/a\.png: is there already, and 2 more\. Choose .* with --force"):
        predict(model, media, tmp_path / "out", data=DATA, settings=SAMPLER.model_copy(update={"eval_seed": 1}))
    assert (tmp_path / "out/a.png.json").read_bytes() == before
    predict(model, media, tmp_path / "out", data=DATA, settings=SAMPLER, force=True)
    assert (tmp_path / "out/a.png.json").read_bytes() == before
    with pytest.raises(DataError, match=r"a\.png: would be drawn over itself"):
        predict(model, media, tmp_path, data=DATA, settings=SAMPLER, force=True)


def test_stopping_keeps_what_is_done(model: DiffusionInst, tmp_path: Path) -> None:
    for number in range(3):
        _write(tmp_path / f"in/{number}.png", seed=number)
    seen: list[int] = []
    done = predict(
        model,
        find_media([tmp_path / "in"]),
        tmp_path / "out",
        data=DATA,
        settings=SAMPLER,
        report=lambda *_: seen.append(1),
        stop=lambda: len(seen) == 2,
    )
    assert done == 2
    assert not (tmp_path / "out/2.png").exists()
    assert {result["image_id"] for result in json.loads((tmp_path / "out/predictions.json").read_text())} == {0, 1}


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16", "EXIF", "1x1"])
def test_every_kind_of_picture(model: DiffusionInst, tmp_path: Path, mode: str) -> None:
    grey = np.tile(np.linspace(0, 255, 40, dtype=np.uint8), (30, 1))
    image = Image.fromarray(np.stack([grey] * 3, axis=2))
    expected = (30, 40)
    path = tmp_path / ("in.tif" if mode == "CMYK" else "in.png")
    if mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
        assert (read_image(path, reduce_depth=True) == np.asarray(image)).all()
    elif mode == "EXIF":
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise
        image.save(path, exif=exif)
        expected = (40, 30)
        assert (read_image(path) == np.rot90(np.asarray(image), -1)).all()
    elif mode == "1x1":
        image.crop((0, 0, 1, 1)).save(path)
        expected = (1, 1)
    else:
        image.convert(mode).save(path)
    predict(model, find_media([path]), tmp_path / "out", data=DATA, settings=SAMPLER, draw_threshold=0.0)
    results = json.loads((tmp_path / "out/in.png.json").read_text())
    assert {tuple(result["segmentation"]["size"]) for result in results} == {expected}
    with Image.open(tmp_path / "out/in.png") as drawn:
        assert min(drawn.size) >= 360


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
        predict(model, find_media([path]), tmp_path / "out", data=DATA, settings=SAMPLER)
    assert not list((tmp_path / "out").iterdir())


def test_augmentation_reaches_photographs(model: DiffusionInst) -> None:
    model.eval()
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    tta = SAMPLER.model_copy(
        update={"tta": True, "tta_shortest_edges": (48,), "tta_min_box_sizes": (), "tta_max_box_sizes": ()}
    )
    plain, augmented = (detect_image(model, image, 0, data=DATA, settings=settings) for settings in (SAMPLER, tta))
    assert augmented.masks is not None
    assert tuple(augmented.masks.shape[1:]) == (60, 90)
    assert plain.boxes_xyxy.shape != augmented.boxes_xyxy.shape or (plain.boxes_xyxy != augmented.boxes_xyxy).any()
