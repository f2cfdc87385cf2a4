from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import block, tiny_content, write_set
from lvis_files import tiny_lvis, write_lvis

from diffinst.config import DataConfig
from diffinst.data.annotations import parse_annotations
from diffinst.data.coco import CocoDataset, open_dataset
from diffinst.data.lvis import file_name_of, parse_lvis, read_lvis
from diffinst.data.lvis_dataset import LvisDataset
from diffinst.errors import DataError

DATA = DataConfig(dataset="custom", annotation_format="lvis", crop_probability=0, shortest_edge_test=20)


def open_tiny(folder: Path, *, flat: bool = False, **data: Any) -> LvisDataset:
    annotations, root = write_lvis(folder, tiny_lvis(), flat=flat)
    return LvisDataset(annotations, root, data=DATA.model_copy(update=data), split="train")


def test_what_a_file_says() -> None:
    read = parse_lvis(tiny_lvis(), "x.json")
    assert {number: info.file_name for number, info in read.images.items()} == {
        5: "train2017/5.png",
        8: "val2017/8.png",
        11: "train2017/11.png",
    }
    assert read.negative == {5: frozenset(), 8: frozenset({7}), 11: frozenset()}
    assert read.not_exhaustive == {5: frozenset({3}), 8: frozenset(), 11: frozenset()}
    assert read.frequency == {7: "f", 3: "r"}
    assert read.image_counts == {7: 400, 3: 3}
    assert read.categories == {3: "dog", 7: "cat"}


def test_the_content_is_left_as_it_was() -> None:
    content = tiny_lvis()
    before = copy.deepcopy(content)
    parse_lvis(content, "x.json")
    assert content == before


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ({"coco_url": "http://images.cocodataset.org/train2017/000000391895.jpg"}, "train2017/000000391895.jpg"),
        # v0.5
        (
            {
                "coco_url": "http://images.cocodataset.org/val2017/000000266409.jpg",
                "file_name": "COCO_val2014_000000266409.jpg",
                "coco_file": "000000266409.jpg",
            },
            "val2017/000000266409.jpg",
        ),
        ({"coco_file": "a.jpg", "file_name": "b.jpg"}, "a.jpg"),
        ({"file_name": "b.jpg"}, "b.jpg"),
        ({"coco_url": "http://x/../b.jpg", "file_name": "b.jpg"}, "b.jpg"),
        ({"coco_url": "http://x/train2017/"}, None),
        ({"coco_url": "..", "file_name": 7}, None),
        ({}, None),
    ],
)
def test_file_names(image: dict[str, Any], expected: str | None) -> None:
    assert file_name_of(image) == expected


def test_images_in_the_folders_of_coco_and_in_one(tmp_path: Path) -> None:
    by_folder, flat = open_tiny(tmp_path / "a"), open_tiny(tmp_path / "b", flat=True)
    assert by_folder.image_ids == flat.image_ids == [5, 8, 11]
    assert [name.rpartition("/")[2] for name in by_folder.file_names()] == flat.file_names()
    for split in (by_folder, flat):
        assert all((split.images_dir / name).is_file() for name in split.file_names())
    for index in range(3):
        assert np.array_equal(by_folder.load_image(index), flat.load_image(index))


def test_it_is_a_coco_data_set_otherwise(tmp_path: Path) -> None:
    """The same images, targets and samples as from the same content as a COCO file."""
    content = tiny_content()
    content["annotations"] = [entry for entry in content["annotations"] if not entry["iscrowd"]]
    annotations, images = write_set(tmp_path / "coco", content)
    coco = CocoDataset(annotations, images, data=DATA, split="train")
    lvis = open_tiny(tmp_path / "lvis")
    assert (lvis.class_names, lvis.category_ids) == (coco.class_names, coco.category_ids) == (("dog", "cat"), (3, 7))
    assert lvis.num_instances == coco.num_instances == 3
    for index in range(3):
        found, expected = lvis.target(index), coco.target(index)
        assert torch.equal(found.boxes_xyxy, expected.boxes_xyxy)
        assert torch.equal(found.labels, expected.labels)
        assert torch.equal(found.masks, expected.masks)
        assert torch.equal(lvis.test_sample(index).image, coco.test_sample(index).image)
    assert lvis.image_labels() == coco.image_labels() == [{0}, set(), {0, 1}]


def test_image_counts_of_the_file_or_of_the_split(tmp_path: Path) -> None:
    assert open_tiny(tmp_path / "a").class_image_counts == [3, 400]  # dog, cat
    content = tiny_lvis()
    del content["categories"][0]["image_count"]
    annotations, root = write_lvis(tmp_path / "b", content)
    assert LvisDataset(annotations, root, data=DATA, split="train").class_image_counts == [2, 1]
    part = LvisDataset(annotations, root, data=DATA, split="train", image_ids=[5, 8])
    assert part.class_image_counts == [1, 0]


def test_opened_by_its_name(tmp_path: Path) -> None:
    annotations, root = write_lvis(tmp_path / "given", tiny_lvis())
    (tmp_path / "lvis").mkdir()
    annotations.rename(tmp_path / "lvis" / "lvis_v1_val.json")
    root.rename(tmp_path / "coco")
    found = open_dataset(DataConfig(dataset="lvis"), "val", tmp_path)
    assert isinstance(found, LvisDataset)
    assert found.image_ids == [5, 8, 11]
    paths = {"val_annotations": "lvis/lvis_v1_val.json", "val_images": "coco"}
    custom = open_dataset(DataConfig(dataset="custom", annotation_format="lvis", **paths), "val", tmp_path)
    assert isinstance(custom, LvisDataset)


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets 'images.2.height'; ... deletes it."""

    def change(content: Any) -> None:
        *keys, last = (int(key) if key.isdigit() else key for key in path.split("."))
        for key in keys:
            content = content[key]
        if value is ...:
            del content[last]
        else:
            content[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _set("images.0.coco_url", ...),
            "image 11: has no coco_url that ends in folder and file, and neither coco_file",
        ),
        (
            _set("images.0.neg_category_ids", ...),
            "image 11: neg_category_ids is None; it must be a list .* annotation_f",
        ),
        (
            _set("images.1.not_exhaustive_category_ids", 3),
            "image 5: not_exhaustive_category_ids is 3; it must be a list",
        ),
        (_set("images.2.neg_category_ids", [7, 9]), "image 8: neg_category_ids holds 9, which is not listed in 'categ"),
        (_set("images.2.neg_category_ids", [True]), "image 8: neg_category_ids holds True, which is not listed"),
        (_set("images.2.neg_category_ids", [[7]]), "image 8: neg_category_ids holds .7., which is not listed"),
        (_set("categories.0.frequency", ...), r"category 7 \(cat\): frequency is None; allowed: r, c, f"),
        (_set("categories.1.frequency", "x"), r"category 3 \(dog\): frequency is 'x'; allowed: r, c, f"),
        (_set("categories.1.frequency", ["r"]), r"category 3 \(dog\): frequency is \['r'\]; allowed: r, c, f"),
        (_set("categories.1.image_count", -1), r"category 3 \(dog\): image_count is -1; it must be a whole number"),
        (_set("categories.1.image_count", "3"), r"category 3 \(dog\): image_count is '3'; it must be a whole number"),
        (_set("annotations.0.iscrowd", 1), "annotation 1: iscrowd is 1, but LVIS has no crowds"),
        # And what the COCO reader finds.
        (_set("annotations.0.bbox", [0, 0, 0, 5]), r"annotation 1 \(image 11\): bbox .* has zero width"),
        (_set("annotations.0.category_id", 4), r"annotation 1 \(image 11\): category_id 4 is not listed"),
        (_set("images.0", 7), "entry 0 of 'images' has no whole number 'id'"),
        (_set("images", {}), "has no list 'images'"),
        (_set("images", []), "lists no image"),
    ],
)
def test_malformed_files(change: Callable[[dict[str, Any]], None], message: str) -> None:
    content = tiny_lvis()
    change(content)
    with pytest.raises(DataError, match=f"^x.json: .*{message}"):
        parse_lvis(content, "x.json")


@pytest.mark.parametrize("content", [[], None, "text", {"images": 3}])
def test_no_annotation_file_at_all(content: Any) -> None:
    with pytest.raises(DataError, match="has no list"):
        parse_lvis(content, "x.json")


def test_malformed_annotations_may_be_left_out() -> None:
    content = tiny_lvis()
    content["annotations"].append(block(20, 11, 99, (0, 0, 5, 5)))
    assert len(parse_lvis(content, "x.json", skip_invalid=True).skipped) == 1


def test_a_coco_file_is_refused_and_an_lvis_file_is_no_coco_file(tmp_path: Path) -> None:
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(tiny_content()))
    with pytest.raises(DataError, match="coco.json: annotation 4: iscrowd is 1|neg_category_ids is None"):
        read_lvis(path)
    with pytest.raises(DataError, match="image 5: file_name is None"):
        parse_annotations(tiny_lvis(), "x.json")


def test_missing_images_are_named(tmp_path: Path) -> None:
    annotations, root = write_lvis(tmp_path, tiny_lvis())
    (root / "train2017" / "5.png").unlink()
    with pytest.raises(DataError, match=r"lvis.json: image 5: no file .*coco/train2017/5.png\."):
        LvisDataset(annotations, root, data=DATA, split="train")
    # Only those of the split are looked for.
    assert len(LvisDataset(annotations, root, data=DATA, split="val", image_ids=[8])) == 1
