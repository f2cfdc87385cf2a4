"""Matching detections with instances, by hand and against the COCO tools."""

from __future__ import annotations

import itertools
from typing import Any

import hotcoco
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from bench.stats.bootstrap import RECALLS, Resampler
from diffinst.evaluation.matches import IOU_THRESHOLDS, MatchTable, build_matches, match_greedily

HALF = np.array([0.5])


def scene(seed: int, *, num_images: int = 6, num_categories: int = 3) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Boxes on a coarse grid, so that overlaps tie; equal scores, crowd regions, images and categories without any."""
    generator = np.random.default_rng(seed)

    def box() -> list[float]:
        x, y, width, height = generator.integers([0, 0, 1, 1], [12, 12, 9, 9]) * 4
        return [float(x), float(y), float(width), float(height)]

    annotations, results = [], []
    for image_id, category_id in itertools.product(range(1, num_images + 1), range(1, num_categories + 1)):
        for _ in range(int(generator.integers(0, 5))):
            x, y, width, height = bbox = box()
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": bbox,
                    "area": width * height,
                    "iscrowd": int(generator.random() < 0.2),
                    "segmentation": [[x, y, x + width, y, x + width, y + height, x, y + height]],
                }
            )
            if generator.random() < 0.7:
                bbox = [value + 4 * float(generator.integers(0, 2)) for value in bbox]
                score = float(generator.integers(1, 8)) / 8
                results.append({"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score})
        for _ in range(int(generator.integers(0, 4))):
            score = float(generator.integers(1, 8)) / 8
            results.append({"image_id": image_id, "category_id": category_id, "bbox": box(), "score": score})
    content = {
        "images": [{"id": i, "height": 96, "width": 96} for i in range(1, num_images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": str(i)} for i in range(1, num_categories + 1)],
    }
    return content, results


def match_slowly(overlaps: np.ndarray, is_crowd: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The obvious way: threshold by threshold, detection by detection, region by region."""
    shape = (len(thresholds), len(overlaps))
    matched, ignored = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for t, threshold in enumerate(thresholds):
        taken: set[int] = set()
        for d, overlap in enumerate(overlaps):
            for wants_crowd in (False, True):
                fitting = [
                    (value, g)
                    for g, value in enumerate(overlap)
                    if is_crowd[g] == wants_crowd and g not in taken and value >= min(threshold, 1 - 1e-10)
                ]
                if fitting:
                    matched[t, d], ignored[t, d] = True, wants_crowd
                    if not wants_crowd:
                        taken.add(max(fitting)[1])
                    break
    return matched, ignored


def test_by_hand() -> None:
    # The first takes the better of two, the second is left with the other, the third finds both taken.
    overlaps = np.array([[0.6, 0.9], [0.7, 0.8], [0.9, 0.9]])
    matched, ignored = match_greedily(overlaps, np.zeros(2, dtype=bool), np.array([0.5, 0.75]))
    assert matched.tolist() == [[True, True, False], [True, False, True]]
    assert not ignored.any()


def test_crowd_regions_excuse_any_number_of_detections_after_the_instances() -> None:
    overlaps = np.array([[0.6, 0.9], [0.6, 0.9], [0.2, 0.9]])
    matched, ignored = match_greedily(overlaps, np.array([False, True]), HALF)
    assert matched.tolist() == [[True, True, True]]
    assert ignored.tolist() == [[False, True, True]]


def test_nothing_to_match() -> None:
    for shape in ((0, 3), (3, 0), (0, 0)):
        matched, ignored = match_greedily(np.zeros(shape), np.zeros(shape[1], dtype=bool), IOU_THRESHOLDS)
        assert matched.shape == ignored.shape == (10, shape[0])
        assert not matched.any()


def test_a_perfect_overlap_matches_at_a_threshold_of_one() -> None:
    assert match_greedily(np.array([[1.0]]), np.array([False]), np.array([1.0]))[0].all()


@given(st.integers(0, 2**32 - 1), st.integers(0, 7), st.integers(0, 6))
def test_equals_the_slow_twin(seed: int, num_detections: int, num_regions: int) -> None:
    generator = np.random.default_rng(seed)
    overlaps = generator.integers(0, 21, (num_detections, num_regions)) / 20  # many ties
    is_crowd = generator.random(num_regions) < 0.3
    for fast, slow in zip(
        match_greedily(overlaps, is_crowd, IOU_THRESHOLDS), match_slowly(overlaps, is_crowd, IOU_THRESHOLDS)
    ):
        assert_array_equal(fast, slow)


def precision_of_hotcoco(content: dict[str, Any], results: list[dict[str, Any]], iou_type: str) -> np.ndarray:
    """(K, T) average precision; NaN where a category has no instance."""
    truth = hotcoco.COCO(content)
    evaluator = hotcoco.COCOeval(truth, truth.load_res(results), iou_type)
    evaluator.params.img_ids = [image["id"] for image in content["images"]]
    evaluator.params.cat_ids = [category["id"] for category in content["categories"]]
    evaluator.evaluate()
    evaluator.accumulate()
    assert evaluator.eval is not None
    table = np.asarray(evaluator.eval["precision"])[:, :, :, 0, -1]  # (T, R, K)
    return np.where((table > -1).all(axis=1), table.mean(axis=1), np.nan).T


def table_of(content: dict[str, Any], results: list[dict[str, Any]], iou_type: str) -> MatchTable:
    return build_matches(content, results, [image["id"] for image in content["images"]], iou_type)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(8))
def test_average_precision_of_all_images_is_that_of_the_coco_tools(seed: int, iou_type: str) -> None:
    content, results = scene(seed)
    if iou_type == "segm":
        for result in results:
            x, y, width, height = result.pop("bbox")
            result["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        results = _with_rle(content, results)
    ours = Resampler(table_of(content, results, iou_type)).average_precision(np.ones((6, 1), dtype=np.int32))[..., 0]
    np.testing.assert_allclose(ours, precision_of_hotcoco(content, results, iou_type), rtol=0, atol=1e-12)


def _with_rle(content: dict[str, Any], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from pycocotools import mask as coco_mask

    size = (content["images"][0]["height"], content["images"][0]["width"])
    rles = [coco_mask.merge(coco_mask.frPyObjects(result["segmentation"], *size)) for result in results]
    return [
        {**result, "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}
        for result, rle in zip(results, rles)
    ]


def test_only_the_best_hundred_of_an_image_and_category_count() -> None:
    content, _ = scene(0, num_images=1, num_categories=1)
    results = [
        {"image_id": 1, "category_id": 1, "bbox": [0.0, 0.0, 4.0, 4.0], "score": rank / 200} for rank in range(150)
    ]
    table = table_of(content, results, "bbox")
    assert table.score.tolist() == sorted((result["score"] for result in results), reverse=True)[:100]


def test_without_detections() -> None:
    content, _ = scene(1)
    table = table_of(content, [], "bbox")
    assert table.matched.shape == (10, 0)
    found = Resampler(table).average_precision(np.ones((6, 1), dtype=np.int32))
    assert set(np.unique(found[~np.isnan(found)])) == {0.0}
    assert len(RECALLS) == 101
