"""The strict reader of annotation files: every fault by file, annotation and image."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import block, block_mask, rle_of, tiny_content
from hypothesis import given
from hypothesis import strategies as st

from diffinst.data.annotations import decode_rle_counts, parse_annotations, read_annotations
from diffinst.errors import DataError

# RLE strings


def test_rle_counts_by_hand() -> None:
    # Below 16 a run is one character: 48 + run. 40 = 8 + 1 * 32 is two: 48 + 8 + 32 (more follows), then 48 + 1.
    assert decode_rle_counts("345").tolist() == [3, 4, 5]
    assert decode_rle_counts(chr(48 + 8 + 32) + "1").tolist() == [40]
    assert decode_rle_counts("3451").tolist() == [3, 4, 5, 4 + 1]  # from the fourth on: the difference to two before
    assert decode_rle_counts("345O").tolist() == [3, 4, 5, 4 - 1]  # 'O' - 48 = 31, all five bits set: -1
    assert decode_rle_counts("").tolist() == []


@given(st.lists(st.integers(0, 1), min_size=1, max_size=400), st.integers(1, 20))
def test_rle_counts_are_those_of_pycocotools(bits: list[int], height: int) -> None:
    width = max(len(bits) // height, 1)
    mask = np.resize(np.array(bits, dtype=np.uint8), (height, width))
    runs = decode_rle_counts(rle_of(mask)["counts"])
    back = np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T
    assert np.array_equal(back, mask)


def test_long_runs() -> None:
    mask = np.zeros((2000, 3000), dtype=np.uint8)
    mask[1999, 2999] = mask[0, 0] = 1
    assert decode_rle_counts(rle_of(mask)["counts"]).tolist() == [0, 1, 2000 * 3000 - 2, 1]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ("3 4", "characters"),
        ("3é", "characters"),
        ("34p", "characters"),
        ("34P", "cut off"),
        ("P" * 13 + "0", "too long"),
    ],
)
def test_malformed_rle_strings(counts: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_rle_counts(counts)


# Malformed json


Change = Callable[[dict[str, Any]], Any]


def _annotation(**changes: Any) -> Change:
    """Put one changed annotation (id 77 of image 5) into the content; a value of ... removes the key."""
    return lambda content: content["annotations"].append(block(77, 5, 3, (1, 1, 5, 5), **changes))


MALFORMED: dict[str, tuple[Change, str]] = {
    "zero width": (
        _annotation(bbox=[10, 20, 0, 15]),
        r"file: annotation 77 \(image 5\): bbox \[10, 20, 0, 15\] has zero width; width and height must be above 0\. "
        r"Correct or remove it, or set skip_invalid: true",
    ),
    "zero height": (_annotation(bbox=[1, 2, 3, 0]), "zero height"),
    "negative width": (_annotation(bbox=[1, 2, -3, 4]), "negative width"),
    "box of three": (_annotation(bbox=[1, 2, 3]), r"bbox is \[1, 2, 3\]; it must be \[x, y, width, height\]"),
    "box of text": (_annotation(bbox=[1, 2, 3, "4"]), "bbox is"),
    "no box": (_annotation(bbox=...), "bbox is None"),
    "box of nan": (_annotation(bbox=[1, 2, 3, float("nan")]), "not finite"),
    "box of huge integers": (_annotation(bbox=[1, 2, 3, 10**400]), "too large"),
    "box outside": (_annotation(bbox=[30, 2, 3, 4]), "outside the image, which is 30 wide and 20 high"),
    "mask of another size": (
        _annotation(segmentation=rle_of(np.ones((30, 20)))),
        r"annotation 77 \(image 5\): mask has size \[30, 20\], but the image is \[20, 30\]",
    ),
    "uncompressed mask too short": (
        _annotation(segmentation={"size": [20, 30], "counts": [40, 20]}),
        "covers 60 pixels, but the image has 20 x 30 = 600",
    ),
    "mask with a negative run": (_annotation(segmentation={"size": [20, 30], "counts": [-1, 601]}), "negative run"),
    "mask with a huge run": (_annotation(segmentation={"size": [20, 30], "counts": [10**30]}), "too long"),
    "mask without a pixel": (_annotation(segmentation={"size": [20, 30], "counts": [600]}), "has no pixel"),
    "mask string cut off": (
        _annotation(
            segmentation={"size": [20, 30], "counts": rle_of(block_mask((20, 30), (2, 2, 9, 9)))["counts"][:-2]}
        ),
        "covers|cut off",
    ),
    "mask counts of another type": (_annotation(segmentation={"size": [20, 30], "counts": 5}), "counts are a int"),
    "mask of text": (_annotation(segmentation="rle"), "segmentation is a str"),
    "no polygon": (_annotation(segmentation=[]), "list of polygons is empty"),
    "polygon of two points": (_annotation(segmentation=[[1, 1, 5, 5]]), "a polygon is 4 numbers"),
    "polygon of odd length": (_annotation(segmentation=[[1, 1, 5, 5, 1, 5, 3]]), "a polygon is 7 numbers"),
    "polygon of text": (_annotation(segmentation=[["1", 1, 5, 5, 1, 5]]), "something else than numbers"),
    "flat polygon": (_annotation(segmentation=[1, 1, 5, 5, 1, 5]), "a polygon is a int"),
    "polygon far away": (_annotation(segmentation=[[1, 1, 5e9, 5, 1, 5]]), "leaves the image"),
    "polygon of infinity": (_annotation(segmentation=[[1, 1, float("inf"), 5, 1, 5]]), "leaves the image"),
    "no mask": (_annotation(segmentation=...), r"annotation 77 \(image 5\): has no segmentation, but others"),
    "unlisted category": (_annotation(category_id=4), r"category_id 4 is not listed in 'categories'; allowed: 3, 7"),
    "unknown image": (_annotation(image_id=6), r"annotation 77 \(image 6\): image_id 6 is not listed in 'images'"),
    "no image": (_annotation(image_id=...), "image_id None is not listed"),
    "crowd of two": (_annotation(iscrowd=2), "iscrowd is 2; allowed: 0, 1"),
    "negative area": (_annotation(area=-1), "area is -1"),
    "duplicate annotation id": (_annotation(id=9), r"annotation 9 \(image 5\): its id is used twice"),
}


@pytest.mark.parametrize(("change", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_annotations(change: Change, message: str, caplog: pytest.LogCaptureFixture) -> None:
    content = tiny_content()
    change(content)
    with pytest.raises(DataError, match=message) as caught:
        parse_annotations(content, "file")
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        read = parse_annotations(content, "file", skip_invalid=True)
    assert len(read.skipped) == 1
    assert "left out 1 malformed annotations" in caplog.text
    assert [item.id for item in read.instances[5]] == [9]  # the others are all there
    assert [item.id for item in read.instances[11]] == [1, 2]


def test_the_number_of_faults_is_told() -> None:
    content = tiny_content()
    content["annotations"] += [block(70 + i, 5, 3, (1, 1, 5, 5), bbox=[1, 1, 0, 1]) for i in range(3)]
    with pytest.raises(DataError, match=r"annotation 70 .* 3 annotations of the file are malformed\.$"):
        parse_annotations(content, "file")


def _entry(key: str, position: int, **changes: Any) -> Change:
    return lambda content: content[key][position].update(changes)


@pytest.mark.parametrize("skip_invalid", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("images"), "file: has no list 'images'"),
        (lambda content: content.update(annotations={}), "has no list 'annotations'"),
        (lambda content: content.update(images=[]), "lists no image"),
        (lambda content: content.update(categories=[]), "lists no category"),
        (_entry("images", 0, id=5), "image id 5 is listed twice"),
        (_entry("images", 0, id="11"), "entry 0 of 'images' has no whole number 'id'"),
        (_entry("images", 0, height=0), r"image 11 \(11.png\): height 0 and width 30 must be whole numbers above 0"),
        (_entry("images", 0, width=30.0), "must be whole numbers"),
        (_entry("images", 0, file_name=None), "image 11: file_name is None"),
        (_entry("images", 0, file_name="../11.png"), "image 11: file_name is '../11.png'.* set the image folder"),
        (_entry("images", 0, file_name="a/../11.png"), "image 11: file_name is 'a/../11.png'"),
        (_entry("images", 0, file_name="/data/11.png"), "image 11: file_name is '/data/11.png'"),
        (_entry("categories", 0, id=3), "category id 3 is listed twice"),
        (_entry("categories", 0, name=""), "category 7: name is ''"),
        (_entry("annotations", 1, id=None), "entry 1 of 'annotations' has no whole number 'id'"),
        (lambda content: content["annotations"].append(5), "entry 4 of 'annotations'"),
    ],
)
def test_faults_that_are_never_skipped(change: Change, message: str, skip_invalid: bool) -> None:
    content = tiny_content()
    change(content)
    with pytest.raises(DataError, match=message):
        parse_annotations(content, "file", skip_invalid=skip_invalid)


def test_not_an_object() -> None:
    with pytest.raises(DataError, match="has no list 'categories'"):
        parse_annotations([], "file")


def test_unreadable_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(DataError, match=r"a\.json: cannot be read: No such file"):
        read_annotations(path)
    path.write_text('{"images": [')
    with pytest.raises(DataError, match=r"a\.json: is not valid json: .*line 1 column 13"):
        read_annotations(path)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match="is not valid json"):
        read_annotations(path)
