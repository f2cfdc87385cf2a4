from __future__ import annotations

from pathlib import Path

import pytest

from diffinst.config import DataConfig
from diffinst.data import catalog
from diffinst.data.catalog import SplitPaths, annotation_format, check_name, read_image_ids, resolve
from diffinst.errors import DataError


def _touch(root: Path, annotations: str, images: str) -> SplitPaths:
    found = SplitPaths(root / annotations, root / images)
    found.annotations.parent.mkdir(parents=True, exist_ok=True)
    found.annotations.touch()
    found.images.mkdir(parents=True, exist_ok=True)
    return found


@pytest.mark.parametrize(
    ("dataset", "split", "annotations", "images"),
    [
        ("coco", "train", "coco/annotations/instances_train2017.json", "coco/train2017"),
        ("coco", "val", "coco/annotations/instances_val2017.json", "coco/val2017"),
        ("coco", "val", "annotations/instances_val2017.json", "val2017"),
        ("coco_mini", "val", "coco_mini/annotations/instances_val.json", "coco_mini/val"),
        ("coco_mini", "train", "annotations/instances_train.json", "train"),
        ("nuclei", "train", "nuclei/annotations/instances_train.json", "nuclei/images"),
        ("nuclei", "val", "annotations/instances_val.json", "images"),
        ("lvis", "train", "lvis/lvis_v1_train.json", "coco"),
        ("lvis", "val", "lvis/lvis_v1_val.json", "coco"),
        ("lvis_v05", "val", "lvis/lvis_v0.5_val.json", "coco"),
        ("lvis_tiny", "train", "lvis_tiny/lvis_v0.5_val_tiny.json", "lvis_tiny/images"),
        ("lvis_tiny", "val", "lvis_v0.5_val_tiny.json", "images"),
    ],
)
def test_layouts(tmp_path: Path, dataset: str, split: catalog.Split, annotations: str, images: str) -> None:
    expected = _touch(tmp_path, annotations, images)
    assert resolve(DataConfig(dataset=dataset), split, tmp_path) == expected


@pytest.mark.parametrize(("split", "count"), [("train", 343), ("val", 126)])
def test_coco_mini_out_of_the_full_coco(tmp_path: Path, split: catalog.Split, count: int) -> None:
    expected = _touch(tmp_path, f"coco/annotations/instances_{split}2017.json", f"coco/{split}2017")
    found = resolve(DataConfig(dataset="coco_mini"), split, tmp_path)
    assert (found.annotations, found.images) == (expected.annotations, expected.images)
    assert found.image_ids is not None
    assert len(found.image_ids) == count


def test_the_root_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _touch(tmp_path, "coco/annotations/instances_val2017.json", "coco/val2017")
    monkeypatch.setenv("DIFFINST_DATASETS", str(tmp_path))
    assert resolve(DataConfig(dataset="coco"), "val") == expected
    with pytest.raises(DataError, match="not found"):
        resolve(DataConfig(dataset="coco"), "val", tmp_path / "given")  # an explicit root wins


def test_no_root_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFINST_DATASETS", raising=False)
    with pytest.raises(DataError, match=r"'coco': no root folder is given.*--data-root DIR or DIFFINST_DATASETS=DIR"):
        resolve(DataConfig(dataset="coco"), "val")


def test_nothing_found_says_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        resolve(DataConfig(dataset="coco_mini"), "val", tmp_path)
    message = str(caught.value)
    for tried in ("coco_mini/annotations/instances_val.json", "coco/annotations/instances_val2017.json"):
        assert str(tmp_path / tried) in message
    assert "--data-root" in message


def test_the_image_folder_is_missing(tmp_path: Path) -> None:
    found = _touch(tmp_path, "coco/annotations/instances_val2017.json", "coco/val2017")
    found.images.rmdir()
    with pytest.raises(DataError, match=r"coco/val2017: no such folder"):
        resolve(DataConfig(dataset="coco"), "val", tmp_path)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'nucleus' is not known\. Allowed: shapes, .*Did you mean 'nuclei'\?"):
        check_name(DataConfig(dataset="nucleus"))
    with pytest.raises(
        DataError, match=r"Allowed: shapes, coco, coco_mini, nuclei, lvis, lvis_v05, lvis_tiny, custom\.$"
    ):
        check_name(DataConfig(dataset="xyz"))


def test_custom_paths(tmp_path: Path) -> None:
    expected = _touch(tmp_path, "a.json", "pictures")
    data = DataConfig(dataset="custom", train_annotations="a.json", train_images="pictures")
    assert resolve(data, "train", tmp_path) == expected
    absolute = DataConfig(
        dataset="custom", train_annotations=str(expected.annotations), train_images=str(expected.images)
    )
    assert resolve(absolute, "train") == expected
    with pytest.raises(DataError, match="val split needs both val_annotations and val_images"):
        resolve(data, "val", tmp_path)
    with pytest.raises(DataError, match=r"b.json: no such file \(train_annotations\)"):
        resolve(data.model_copy(update={"train_annotations": "b.json"}), "train", tmp_path)


def test_custom_paths_only_with_custom() -> None:
    with pytest.raises(DataError, match="'custom' needs its paths"):
        check_name(DataConfig(dataset="custom"))
    with pytest.raises(DataError, match="val_images: only for dataset 'custom', but dataset is 'coco'"):
        check_name(DataConfig(dataset="coco", val_images="x"))


def test_the_format_of_annotations() -> None:
    files = {"train_annotations": "a.json", "train_images": "a"}
    assert {name: annotation_format(DataConfig(dataset=name)) for name in catalog.NAMES} == {
        name: "lvis" if name.startswith("lvis") else "coco" for name in catalog.NAMES
    }
    assert annotation_format(DataConfig(dataset="custom", annotation_format="lvis", **files)) == "lvis"
    with pytest.raises(DataError, match="annotation_format: only for dataset 'custom', but dataset is 'coco'"):
        check_name(DataConfig(dataset="coco", annotation_format="lvis"))
    with pytest.raises(DataError, match="class_agnostic: not for LVIS"):
        check_name(DataConfig(dataset="lvis", class_agnostic=True))
    with pytest.raises(DataError, match="class_agnostic: not for LVIS"):
        check_name(DataConfig(dataset="custom", annotation_format="lvis", class_agnostic=True, **files))


def test_shapes_are_made_where_they_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig(dataset="shapes", shapes_train_images=2, shapes_val_images=1, shapes_image_size=32)
    found = resolve(data, "train", tmp_path)
    assert found.annotations.is_file()
    assert len([*found.images.iterdir()]) == 2
    assert resolve(data, "val", tmp_path).annotations.parent == found.annotations.parent
    monkeypatch.setenv("DIFFINST_CACHE", str(tmp_path / "cache"))
    assert resolve(data, "train").annotations.is_relative_to(tmp_path / "cache")
    monkeypatch.delenv("DIFFINST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert resolve(data, "train").annotations.is_relative_to(tmp_path / "xdg" / "diffinst")
    other = resolve(data.model_copy(update={"shapes_seed": 1}), "train", tmp_path)
    assert other.annotations != found.annotations


def test_a_given_id_list_wins(tmp_path: Path) -> None:
    _touch(tmp_path, "coco/annotations/instances_val2017.json", "coco/val2017")
    ids = tmp_path / "ids.txt"
    ids.write_text("7\n5\n")
    data = DataConfig(dataset="coco_mini", val_image_ids=str(ids))
    assert resolve(data, "val", tmp_path).image_ids == (7, 5)


def test_id_lists(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("# a comment\n12\n\n 5 # another\n")
    assert read_image_ids(path) == (12, 5)
    for content, message in [
        ("1\nx7\n", r"ids.txt: line 2: 'x7' is no image id"),
        ("1\n-3\n", r"line 2: '-3' is no image id"),
        ("4\n5\n4\n", r"line 3: image 4 is already listed in line 1"),
        ("# nothing\n", r"lists no image id"),
    ]:
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_image_ids(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot read the list"):
        read_image_ids(path)
    with pytest.raises(DataError, match="cannot read the list"):
        read_image_ids(tmp_path / "missing.txt")
