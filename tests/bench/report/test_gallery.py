from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from coco_files import block_mask, rle_of
from PIL import Image
from report_store import make_results

from bench.report.evidence import EvidenceReader, NotThere
from bench.report.gallery import LONG_SIDE, choose, draw_regions, score_images, show
from bench.store import Store

NAN = float("nan")


def test_the_best_the_worst_and_the_farthest_apart() -> None:
    f1 = np.array([[0.9, 0.2, NAN, 0.5, 0.9, 0.2], [0.9, 0.8, NAN, 0.1, 0.7, 0.2]])
    choice = choose(f1, np.array([1, 1, 0, 1, 5, 3]), of=0, count=2)
    assert choice.best == (4, 0)  # equal ones: more instances first
    assert choice.worst == (5, 1)
    # Image 1: 0.6 apart, and there the second cell is the better one. Equal results are no disagreement.
    assert choice.apart == ((1, 1, 0), (3, 0, 1))


def test_no_image_is_both_best_and_worst_and_one_cell_cannot_disagree() -> None:
    choice = choose(np.array([[0.9, 0.1, 0.5]]), np.array([1, 1, 1]), of=0, count=4)
    assert (choice.best, choice.worst, choice.apart) == ((0, 2), (1,), ())
    nothing = choose(np.array([[NAN], [NAN]]), np.array([0]), of=0, count=4)
    assert (nothing.best, nothing.worst, nothing.apart) == ((), (), ())


def test_what_is_shown_of_an_image(tmp_path: Path) -> None:
    results, records = make_results(tmp_path)
    reader = EvidenceReader(Store(results))
    poor, good = (reader.cell(record) for record in records)
    scores = {"good": score_images(good), "poor": score_images(poor)}
    # The good cell finds two instances at 0.9 and 0.8 before its wrong detection; nothing in image 5, and 8 has none.
    assert scores["good"].threshold == 0.8
    assert scores["good"].f1[2] == pytest.approx(1.0)
    assert scores["good"].f1[0] == 0.0
    assert np.isnan(scores["good"].f1[1])
    shown = show(11, "text", [("good", good, scores["good"]), ("poor", poor, scores["poor"])])
    assert [(panel.title, panel.text) for panel in shown.panels] == [
        ("Ground truth", "2 instances, 2 of them found by good"),
        ("good", "2 of 2 detections right; F1 1.00"),
        ("poor", "1 of 1 detection right; F1 0.67"),
    ]
    for panel in shown.panels:
        head, _, data = panel.uri.partition(",")
        assert head == "data:image/webp;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (panel.width, panel.height) == (120, 80)
    again = show(11, "text", [("good", good, scores["good"]), ("poor", poor, scores["poor"])])
    assert again == shown
    good.truth.pictures[11].write_bytes(b"no image")  # type: ignore[attr-defined]
    with pytest.raises(NotThere):
        show(11, "text", [("good", good, scores["good"])])


def test_regions_are_drawn_where_they_are_in_the_colour_of_their_state() -> None:
    picture = np.full((40, 80, 3), 128, dtype=np.uint8)
    items = [{"segmentation": rle_of(block_mask((40, 80), box))} for box in ((0, 0, 20, 20), (40, 20, 60, 40))]
    drawn = np.asarray(draw_regions(picture, items, [True, False], "segm")).astype(int)
    assert drawn.shape == (160, LONG_SIDE, 3)
    found, missed, outside = drawn[40, 40], drawn[120, 200], drawn[40, 300]
    assert found[2] > found[0] + 20  # blue
    assert missed[0] > missed[2] + 20  # orange
    assert outside.tolist() == [128, 128, 128]
    assert (drawn[1, 10:70] == [40, 150, 255]).all()  # a full line
    row = (drawn[81, 170:230] == [255, 120, 0]).all(axis=1)
    assert row.any()
    assert not row.all()  # a broken line


def test_boxes_have_no_filling_and_large_pictures_shrink() -> None:
    picture = np.full((640, 320, 3), 200, dtype=np.uint8)
    drawn = np.asarray(draw_regions(picture, [{"bbox": [40, 40, 200, 200]}], [True], "bbox"))
    assert drawn.shape == (LONG_SIDE, 160, 3)
    assert drawn[70, 70].tolist() == [200, 200, 200]
    assert drawn[20, 70].tolist() == [40, 150, 255]
    crowd = np.asarray(draw_regions(picture, [{"bbox": [40, 40, 200, 200]}], [None], "bbox"))
    assert [150, 150, 150] in crowd[20].tolist()
    nothing = np.asarray(draw_regions(picture, [], [], "segm"))
    assert (nothing == 200).all()
