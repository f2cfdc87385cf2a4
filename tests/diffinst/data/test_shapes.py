from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffinst.data import shapes
from diffinst.data.shapes import CLASS_NAMES, draw_image, generate
from diffinst.errors import DataError
from diffinst.ops.rle import decode_rle


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _small(folder: Path, **changes: int) -> Path:
    return generate(folder, **{"num_train": 3, "num_val": 2, "image_size": 48, "seed": 5} | changes)


def test_the_bytes_are_the_same_on_every_machine(tmp_path: Path) -> None:
    """Renew the digest together with FORMAT_VERSION, and only on purpose: it invalidates all results on this set."""
    digest = hashlib.sha256()
    for name, content in _files(_small(tmp_path / "set")).items():
        digest.update(name.encode() + b"\0" + content)
    for index in range(40):
        digest.update(draw_image(seed=0, split="train", index=index, size=96)[0].tobytes())
    assert shapes.FORMAT_VERSION == 1
    assert digest.hexdigest() == "7f80c15a68e2a969d50a5047edc78d88320a459be017d637b12eecc38a3b32c3"


def test_two_runs_write_the_same_files(tmp_path: Path) -> None:
    first, second = _files(_small(tmp_path / "a")), _files(_small(tmp_path / "b"))
    assert first == second
    assert len(first) == 2 + 1 + 3 + 2  # annotations, shapes.json, images


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    few, many = _files(_small(tmp_path / "few")), _files(_small(tmp_path / "many", num_train=6, num_val=4))
    pictures = [name for name in few if name.endswith(".png")]
    assert len(pictures) == 5
    assert {name: few[name] for name in pictures} == {name: many[name] for name in pictures}


def test_seed_split_and_index_all_matter() -> None:
    images = [
        draw_image(seed=seed, split=split, index=index, size=48)[0].tobytes()
        for seed in (0, 1)
        for split in ("train", "val")
        for index in (0, 1)
    ]
    assert len(set(images)) == 8


@pytest.mark.parametrize("size", [32, 50, 96])
def test_objects_are_visible_disjoint_and_of_the_promised_size(size: int) -> None:
    labels, counts = set(), set()
    for index in range(40):
        image, objects = draw_image(seed=0, split="train", index=index, size=size)
        assert image.shape == (size, size, 3)
        assert image.dtype == np.uint8
        counts.add(len(objects))
        covered = np.zeros((size, size), dtype=int)
        for item in objects:
            assert item.mask.shape == (size, size)
            covered += item.mask
            labels.add(item.label)
            rows, columns = np.flatnonzero(item.mask.any(1)), np.flatnonzero(item.mask.any(0))
            extent = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
            assert size / 10 <= extent <= size * 0.6
        assert covered.max() == 1
    assert labels == set(range(len(CLASS_NAMES)))
    assert counts == {1, 2, 3, 4, 5}


def _lone(label: int, radius_px: int) -> shapes._Rendering:
    item = shapes._Placed(label, (200 * 8, 200 * 8), radius_px * 8, (1, 0, 1), (255, 255, 255), 3, 24)
    return shapes._Rendering(item, 400)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (0, np.pi * 80**2),
        (1, (2 * 80 * 196 / 256) ** 2),  # half a side is 196 / 256 of the radius
        (2, 3 * np.sqrt(3) * (80 * 144 / 256) ** 2),  # an equilateral triangle of inner radius q has area 3 sqrt(3) q^2
        (3, np.pi * 80**2 * (1 - (116 / 256) ** 2)),
    ],
    ids=CLASS_NAMES,
)
def test_outlines_have_the_area_of_their_shape(label: int, expected: float) -> None:
    assert _lone(label, 80).mask.sum() == pytest.approx(expected, rel=0.02)


def test_a_turn_is_a_rotation() -> None:
    draws = shapes._Draws(3)
    for _ in range(50):
        c, s, n = shapes._turn(draws)
        assert c * c + s * s == n * n


def test_the_front_object_hides_the_one_behind() -> None:
    for index in range(200):
        _, objects = draw_image(seed=0, split="train", index=index, size=64)
        discs = [item for item in objects if item.label == 0]
        for item in discs:
            rows = np.flatnonzero(item.mask.any(1))
            height = rows[-1] - rows[0] + 1
            if item.mask.sum() < 0.7 * np.pi / 4 * height * height:
                return  # part of a disc is covered by another object
    pytest.fail("no disc of 200 images is partly hidden")


def test_annotations_say_what_the_masks_are(tmp_path: Path) -> None:
    folder = _small(tmp_path / "set")
    for split, count in (("train", 3), ("val", 2)):
        content = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
        assert [category["name"] for category in content["categories"]] == list(CLASS_NAMES)
        assert len(content["images"]) == count
        assert [annotation["id"] for annotation in content["annotations"]] == [
            *range(1, len(content["annotations"]) + 1)
        ]
        drawn = [draw_image(seed=5, split=split, index=index, size=48) for index in range(count)]
        for entry, (image, objects) in zip(content["images"], drawn):
            with Image.open(folder / split / entry["file_name"]) as file:
                assert np.array_equal(np.asarray(file), image)
            own = [item for item in content["annotations"] if item["image_id"] == entry["id"]]
            assert len(own) == len(objects)
            for annotation, item in zip(own, objects):
                mask = decode_rle(annotation["segmentation"])
                assert np.array_equal(mask, item.mask)
                assert annotation["area"] == mask.sum()
                assert annotation["category_id"] == item.label + 1
                x, y, width, height = annotation["bbox"]
                assert mask[y : y + height, x : x + width].sum() == mask.sum()
                assert mask[y].any()
                assert mask[y + height - 1].any()
                assert mask[:, x].any()
                assert mask[:, x + width - 1].any()


def test_the_png_writer_splits_long_data_into_blocks() -> None:
    image = np.random.default_rng(0).integers(0, 256, (200, 151, 3), dtype=np.uint8)  # 90 800 bytes: two blocks
    with Image.open(io.BytesIO(shapes._encode_png(image))) as file:
        assert np.array_equal(np.asarray(file), image)


def test_an_existing_set_is_kept(tmp_path: Path) -> None:
    folder = _small(tmp_path / "set")
    marker = folder / "train" / "marker"
    marker.touch()
    assert _small(folder) == folder
    assert marker.exists()


def test_another_set_in_the_folder_is_refused(tmp_path: Path) -> None:
    folder = _small(tmp_path / "set")
    with pytest.raises(DataError, match=r"set: holds something else .*Remove the folder"):
        _small(folder, seed=6)
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="holds something else"):
        _small(tmp_path / "other")


def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    partial = tmp_path / ".set.partial"
    (partial / "train").mkdir(parents=True)
    (partial / "train" / "junk.png").touch()
    folder = _small(tmp_path / "set")
    assert not partial.exists()
    assert not (folder / "train" / "junk.png").exists()


def test_processes_that_want_the_same_set_wait_for_each_other(tmp_path: Path) -> None:
    code = (
        "import sys; from diffinst.data.shapes import generate; "
        "generate(sys.argv[1], num_train=3, num_val=2, image_size=48, seed=5)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "set")]
    workers = [subprocess.Popen(command, cwd=Path(__file__).parents[3]) for _ in range(2)]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    assert _files(tmp_path / "set") == _files(_small(tmp_path / "alone"))


@pytest.mark.parametrize(
    "changes", [{"num_train": 0}, {"num_val": 0}, {"image_size": 31}, {"image_size": 4097}, {"seed": -1}]
)
def test_impossible_parameters_are_refused(tmp_path: Path, changes: dict[str, int]) -> None:
    with pytest.raises(DataError, match="impossible parameters"):
        _small(tmp_path / "set", **changes)
    assert not (tmp_path / "set").exists()


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/set: cannot write the shapes set: .*--data-root"):
        _small(tmp_path / "file" / "set")
