from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from coco_files import block_mask, rle_of
from report_store import SIZE, predictions

from bench.agreement import Agreement, compare_detections, judge
from bench.errors import BenchError

BOX = (2, 4, 12, 14)


def _of(*items: tuple[int, float, tuple[int, int, int, int]], image_id: int = 5) -> dict[str, Any]:
    (record,) = predictions({image_id: list(items)})
    return record


def test_the_same_detections_in_another_order() -> None:
    items = [(3, 0.9, BOX), (7, 0.8, BOX), (3, 0.7, (0, 0, 9, 9))]
    found = compare_detections([_of(*items), _of(image_id=6)], [_of(image_id=6), _of(*reversed(items))])
    assert found == Agreement(images=2, base=3, head=3, matched=3, masks=3, identical_masks=3)
    assert judge(found, max_box_px=0, min_mask_iou=1) == []


def test_differences_by_hand() -> None:
    base, head = _of((3, 0.9, BOX)), _of((3, 0.8, BOX))
    head["bbox"][0] = [2.25, 4, 9.5, 10]  # x from 2.25 to 11.75
    mask = block_mask(SIZE, BOX)
    mask[4, 2] = False
    head["segmentation"][0] = rle_of(mask)  # 99 of 100 pixels
    found = compare_detections([base], [head])
    assert (found.matched, found.largest_box_px, found.unmatched) == (1, 0.25, [])
    assert found.largest_score_difference == pytest.approx(0.1)
    assert (found.masks, found.identical_masks) == (1, 0)
    assert found.smallest_mask_iou == pytest.approx(0.99)
    assert found.most_pixels == 1
    assert judge(found, max_box_px=0.25, min_mask_iou=0.99) == []
    assert judge(found, max_box_px=0.2, min_mask_iou=0.999) == [
        "a box is 0.25 px off, more than 0.2",
        "a mask has IoU 0.99000 with its twin, less than 0.999",
    ]


def test_a_twin_is_of_the_same_class_and_place_and_nobody_elses() -> None:
    base = _of((3, 0.9, BOX), (7, 0.8, BOX), (3, 0.7, BOX))
    head = _of((3, 0.9, BOX), (4, 0.8, BOX), (7, 0.6, (2, 4, 12, 16)))
    found = compare_detections([base], [head])
    assert (found.base, found.head, found.matched) == (3, 3, 1)
    assert found.unmatched == [("base", 5, 7, 0.8), ("base", 5, 3, 0.7), ("head", 5, 4, 0.8), ("head", 5, 7, 0.6)]
    assert judge(found, max_box_px=1, min_mask_iou=0) == ["2 of base and 2 of head have no twin"]


def test_the_nearest_is_the_twin() -> None:
    base, head = _of((3, 0.9, BOX), (3, 0.8, BOX)), _of((3, 0.9, BOX), (3, 0.8, BOX))
    base["bbox"] = [[2, 4, 10, 10], [2.5, 4, 10, 10]]
    head["bbox"] = [[2.5, 4, 10, 10], [2, 4, 10, 10]]
    assert compare_detections([base], [head]).largest_box_px == 0


def test_no_more_than_ten_are_listed() -> None:
    found = compare_detections([_of(*[(3, 0.5, BOX)] * 8)], [_of(*[(4, 0.5, BOX)] * 8)])
    assert [side for side, *_ in found.unmatched] == ["base"] * 8 + ["head"] * 2


def test_nothing_found_and_no_masks() -> None:
    (without,) = predictions({5: [(3, 0.9, BOX)]}, masks=False)
    assert compare_detections([without], [_of((3, 0.9, BOX))]).masks == 0
    assert judge(compare_detections([_of()], [_of()]), max_box_px=0, min_mask_iou=1) == []
    empty = _of((3, 0.9, BOX))
    empty["segmentation"][0] = rle_of(np.zeros(SIZE, dtype=bool))
    assert compare_detections([empty], [empty]).smallest_mask_iou == 1
    assert compare_detections([empty], [_of((3, 0.9, BOX))]).smallest_mask_iou == 0


def test_other_images_are_refused() -> None:
    with pytest.raises(BenchError, match="different images: 2 are of one alone, as 5"):
        compare_detections([_of()], [_of(image_id=6)])
