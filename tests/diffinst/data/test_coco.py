from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import block, block_mask, rle_of, tiny_content, write_set
from PIL import Image
from pycocotools import mask as coco_mask

from diffinst.config import DataConfig
from diffinst.data import coco
from diffinst.data.annotations import parse_annotations, read_image
from diffinst.data.coco import CocoDataset, open_dataset
from diffinst.data.transforms import boxes_of_masks
from diffinst.errors import DataError

PLAIN = DataConfig(
    shortest_edge_train=(20,), shortest_edge_test=20, flip_probability=0.0, crop_probability=0.0, longest_edge_train=99
)


def _dataset(
    folder: Path, content: dict[str, Any] | None = None, data: DataConfig = PLAIN, **changes: Any
) -> CocoDataset:
    annotations, images = write_set(folder, content or tiny_content())
    return CocoDataset(annotations, images, data=data, split="train", **changes)


# What is read


def test_images_come_by_id_and_categories_without_gaps(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path)
    assert dataset.image_ids == [5, 8, 11]
    assert len(dataset) == 3
    assert dataset.num_classes == 2
    assert dataset.class_names == ("dog", "cat")
    assert dataset.category_ids == (3, 7)
    assert dataset.num_instances == 3


def test_all_kinds_of_masks(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path)
    polygon_and_rle = dataset.target(2)
    assert polygon_and_rle.labels.tolist() == [1, 0]
    assert polygon_and_rle.boxes_xyxy.tolist() == [[2, 4, 12, 14], [10, 2, 30, 8]]
    assert polygon_and_rle.masks is not None
    assert polygon_and_rle.masks.dtype == torch.bool
    expected = [block_mask((20, 30), (2, 4, 12, 14)), block_mask((20, 30), (10, 2, 30, 8))]
    assert np.array_equal(polygon_and_rle.masks.numpy(), np.stack(expected))
    uncompressed = dataset.target(0)
    assert uncompressed.masks is not None
    assert np.array_equal(uncompressed.masks.numpy()[0], block_mask((20, 30), (2, 0, 3, 20)))


def test_crowds_are_left_out_and_empty_images_kept(tmp_path: Path) -> None:
    target = _dataset(tmp_path).target(1)
    assert len(target) == 0
    assert target.boxes_xyxy.shape == (0, 4)
    assert target.masks is not None
    assert target.masks.shape == (0, 20, 30)
    sample = _dataset(tmp_path).training_sample(1, torch.Generator())
    assert sample.target is not None
    assert len(sample.target) == 0


def test_several_polygons_are_one_mask(tmp_path: Path) -> None:
    content = tiny_content()
    parts = [[0, 0, 4, 0, 4, 4, 0, 4], [10, 10, 14, 10, 14, 14, 10, 14]]
    content["annotations"] = [block(1, 5, 3, (0, 0, 14, 14), segmentation=parts)]
    masks = _dataset(tmp_path, content).target(0).masks
    assert masks is not None
    expected = block_mask((20, 30), (0, 0, 4, 4)) + block_mask((20, 30), (10, 10, 14, 14))
    assert np.array_equal(masks[0].numpy(), expected)


def test_samples(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path)
    sample = dataset.training_sample(2, torch.Generator())
    assert sample.image_id == 11
    assert sample.original_size == (20, 30)
    assert sample.image.shape == (3, 20, 30)
    assert sample.image.dtype == torch.uint8
    with Image.open(tmp_path / "images" / "11.png") as file:
        assert np.array_equal(sample.image.permute(1, 2, 0).numpy(), np.asarray(file))
    assert sample.target is not None
    assert sample.target.boxes_xyxy.tolist() == [[2, 4, 12, 14], [10, 2, 30, 8]]
    assert dataset.test_sample(2).target is None


def test_resizing(tmp_path: Path) -> None:
    data = PLAIN.model_copy(update={"shortest_edge_train": (40,), "shortest_edge_test": 10})
    dataset = _dataset(tmp_path, data=data)
    sample = dataset.training_sample(2, torch.Generator())
    assert sample.image.shape == (3, 40, 60)
    assert sample.target is not None
    assert sample.target.boxes_xyxy.tolist() == [[4, 8, 24, 28], [20, 4, 60, 16]]
    assert sample.target.masks is not None
    assert sample.target.masks.sum(dim=(1, 2)).tolist() == [4 * 100, 4 * 120]
    assert dataset.test_sample(2).image.shape == (3, 10, 15)
    assert dataset.test_sizes() == [(10, 15)] * 3
    original = dataset.original_sample(2)
    assert original.original_size == (20, 30)
    assert np.array_equal(original.image.permute(1, 2, 0).numpy(), dataset.load_image(2))


def test_augmentation_is_a_function_of_the_generator(tmp_path: Path) -> None:
    data = DataConfig(shortest_edge_train=(20, 24), crop_shortest_edge=(20,), crop_size_range=(10, 15))
    dataset = _dataset(tmp_path, data=data)
    samples = [dataset.training_sample(2, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2, 3, 4)]
    assert torch.equal(samples[0].image, samples[1].image)
    assert len({tuple(sample.image.flatten().tolist()) for sample in samples}) > 1


@pytest.mark.parametrize("crop_boxes", ["released", "fixed"])
def test_the_setting_decides_what_a_crop_makes_of_boxes(tmp_path: Path, crop_boxes: str) -> None:
    """A mask thinner than its box: only boxes drawn anew around the cropped masks fit them."""
    triangle = block(1, 5, 7, (2, 2, 28, 18), segmentation=[[2, 2, 28, 18, 2, 18]])
    content = tiny_content() | {"annotations": [triangle]}
    data = PLAIN.model_copy(
        update={"crop_probability": 1.0, "crop_shortest_edge": (20,), "crop_size_range": (8, 12)}
        | {"crop_boxes": crop_boxes}
    )
    dataset = _dataset(tmp_path, content, data)
    fits = []
    for seed in range(20):
        target = dataset.training_sample(0, torch.Generator().manual_seed(seed)).target
        if len(target):
            fits.append(bool((target.boxes_xyxy == boxes_of_masks(target.masks)).all()))
    assert len(fits) > 5
    assert all(fits) == (crop_boxes == "fixed")


def test_class_agnostic(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, data=PLAIN.model_copy(update={"class_agnostic": True}))
    assert dataset.class_names == ("object",)
    assert dataset.num_classes == 1
    assert dataset.category_ids == (1,)
    assert dataset.target(2).labels.tolist() == [0, 0]


def test_an_id_list_restricts_the_split(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path, image_ids=[11, 5])
    assert dataset.image_ids == [5, 11]
    (tmp_path / "images" / "8.png").unlink()  # not of this split: nobody misses it
    assert len(_dataset_of(tmp_path, image_ids=[5])) == 1
    with pytest.raises(DataError, match=r"image 6 of the id list is not in this file \(2 of 3 are not\).*train split"):
        _dataset_of(tmp_path, image_ids=[5, 6, 7])


def _dataset_of(folder: Path, **changes: Any) -> CocoDataset:
    return CocoDataset(folder / "instances.json", folder / "images", data=PLAIN, split="train", **changes)


def test_boxes_are_clipped_to_the_image(tmp_path: Path) -> None:
    content = tiny_content()
    content["annotations"] = [block(1, 5, 3, (0, 0, 1, 1), bbox=[-2.5, 1, 100, 30.5])]
    assert _dataset(tmp_path, content).target(0).boxes_xyxy.tolist() == [[0, 1, 30, 20]]


def test_boxes_without_any_masks(tmp_path: Path) -> None:
    content = tiny_content()
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    dataset = _dataset(tmp_path, content)
    assert dataset.target(2).masks is None
    assert dataset.target(1).masks is None
    sample = dataset.training_sample(2, torch.Generator())
    assert sample.target is not None
    assert sample.target.masks is None


def test_no_annotations_at_all(tmp_path: Path) -> None:
    content = tiny_content() | {"annotations": []}
    dataset = _dataset(tmp_path, content)
    assert dataset.num_instances == 0
    assert dataset.target(0).masks is not None


def test_what_is_kept_in_memory_is_not_changed(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path)
    first = dataset.training_sample(2, torch.Generator())
    expected = first.image.clone()
    first.image.zero_()
    assert first.target is not None
    assert first.target.masks is not None
    first.target.masks.zero_()
    again = dataset.training_sample(2, torch.Generator())
    assert torch.equal(again.image, expected)
    assert again.target is not None
    assert again.target.masks is not None
    assert again.target.masks.any()


def test_large_sets_are_not_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = _dataset(tmp_path)
    assert small.load_image(0) is small.load_image(0)
    monkeypatch.setattr(coco, "CACHE_BYTES", 3 * 3 * 20 * 30 - 1)
    large = _dataset_of(tmp_path)
    assert large.load_image(0) is not large.load_image(0)


# Images


def test_skipping_is_counted_by_the_data_set(tmp_path: Path) -> None:
    content = tiny_content()
    content["annotations"].append(block(77, 5, 3, (1, 1, 5, 5), bbox=[1, 1, 0, 1]))
    assert _dataset(tmp_path, content, PLAIN.model_copy(update={"skip_invalid": True})).num_skipped == 1


def test_a_missing_image_is_found_up_front(tmp_path: Path) -> None:
    _dataset(tmp_path)
    (tmp_path / "images" / "8.png").unlink()
    with pytest.raises(DataError, match=r"instances.json: image 8: no file .*images/8.png\. .*train_image_ids\)\.$"):
        _dataset_of(tmp_path)
    (tmp_path / "images" / "5.png").unlink()
    with pytest.raises(DataError, match=r"image 5: .* 2 of 3 files are missing\.$"):
        _dataset_of(tmp_path)


def test_images_in_folders_of_the_image_folder(tmp_path: Path) -> None:
    content = tiny_content()
    content["images"][0]["file_name"] = "sub/11.png"
    (tmp_path / "images" / "sub").mkdir(parents=True)
    assert _dataset(tmp_path, content).load_image(2).shape == (20, 30, 3)


def test_the_image_folder_is_missing(tmp_path: Path) -> None:
    annotations, images = write_set(tmp_path, tiny_content(), images=False)
    images.rmdir()
    with pytest.raises(DataError, match="cannot list the image folder of .*instances.json"):
        CocoDataset(annotations, images, data=PLAIN, split="val")


def test_an_image_of_another_size(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path)
    Image.new("RGB", (20, 30)).save(tmp_path / "images" / "8.png")
    with pytest.raises(DataError, match=r"image 8: .*8.png is 30 x 20 .* but the json says 20 x 30"):
        dataset.test_sample(1)


def _jpeg(path: Path, **options: Any) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(
        path, "JPEG", **options
    )


@pytest.mark.parametrize("keep", [0, 10, 300, 600])
def test_a_damaged_jpeg_is_named_when_it_is_read(tmp_path: Path, keep: int) -> None:
    dataset = _dataset(tmp_path)
    path = tmp_path / "images" / "8.png"
    _jpeg(path)
    assert path.stat().st_size > 700
    assert dataset.test_sample(1).image.shape == (3, 20, 30)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"instances.json: image 8: .*8.png: cannot be decoded: .*replace it") as caught:
        _dataset_of(tmp_path).test_sample(1)
    assert "\n" not in str(caught.value)


def test_a_damaged_png(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path)
    path = tmp_path / "images" / "8.png"
    content = bytearray(path.read_bytes())
    content[60:80] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be decoded"):
        dataset.test_sample(1)


def test_an_image_that_disappears(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path)
    (tmp_path / "images" / "8.png").unlink()
    with pytest.raises(DataError, match="image 8: .*no such image file"):
        dataset.test_sample(1)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_pixel_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (3, 2), (255, 255, 255)).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (2, 3, 3)
    assert image.dtype == np.uint8
    assert (image == 255).all()


def test_sixteen_bits_are_refused_rather_than_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.full((2, 3), 40_000, dtype=np.uint16)).save(path)
    with pytest.raises(DataError, match="mode I;16 are not supported; save it with 8 bits"):
        read_image(path)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    path = tmp_path / "a.jpg"
    _jpeg(path, exif=exif)
    assert read_image(path).shape == (30, 20, 3)


# Finding and comparing sets


def test_open_dataset(tmp_path: Path) -> None:
    data = DataConfig(
        dataset="shapes",
        shapes_train_images=3,
        shapes_val_images=2,
        shapes_image_size=32,
        shortest_edge_train=(32,),
        shortest_edge_test=32,
        crop_probability=0.0,
    )
    train, val = open_dataset(data, "train", tmp_path), open_dataset(data, "val", tmp_path)
    assert (len(train), len(val)) == (3, 2)
    assert set(train.image_ids).isdisjoint(val.image_ids)
    assert train.class_names == val.class_names
    for index in range(3):
        sample = train.training_sample(index, torch.Generator().manual_seed(index))
        assert sample.target is not None
        assert 1 <= len(sample.target) <= 5


def test_masks_equal_those_of_pycocotools(tmp_path: Path) -> None:
    """A jagged polygon, by our reader and by pycocotools alone."""
    draws = np.random.default_rng(3)
    content = tiny_content()
    polygons = [(draws.uniform(0, 1, (9, 2)) * (30, 20)).flatten().tolist() for _ in range(8)]
    content["annotations"] = [block(i + 1, 5, 3, (0, 0, 30, 20), segmentation=[p]) for i, p in enumerate(polygons)]
    masks = _dataset(tmp_path, content).target(0).masks
    assert masks is not None
    for mask, polygon in zip(masks.numpy(), polygons):
        assert rle_of(mask)["counts"] == coco_mask.frPyObjects([polygon], 20, 30)[0]["counts"].decode()


def test_json_survives_the_reader(tmp_path: Path) -> None:
    content = tiny_content()
    before = json.dumps(content)
    parse_annotations(content, "file")
    assert json.dumps(content) == before
