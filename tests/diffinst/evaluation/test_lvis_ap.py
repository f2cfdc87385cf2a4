from __future__ import annotations

import copy
import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_files import block, block_mask, rle_of
from lvis_files import SIZE, federated_scene, record
from pycocotools import mask as maskutils

from diffinst.errors import DataError
from diffinst.evaluation.coco_ap import CocoScores, score_coco
from diffinst.evaluation.lvis_ap import METRIC_NAMES, score_lvis
from diffinst.evaluation.predictions import to_coco_results

NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"]
BOX = (10, 10, 50, 50)  # 40 x 40 pixels: of medium size
ELSEWHERE = (60, 60, 100, 100)


def _truth(
    *annotations: Any, negative: dict[int, list[int]] | None = None, inexhaustive: dict[int, list[int]] | None = None
) -> dict[str, Any]:
    """Images 1 and 2; categories 1 (rare), 2 (common), 3 (frequent)."""
    return {
        "images": [
            {
                "id": number,
                "coco_url": f"http://images.cocodataset.org/val2017/{number}.jpg",
                "height": SIZE[0],
                "width": SIZE[1],
                "neg_category_ids": (negative or {}).get(number, []),
                "not_exhaustive_category_ids": (inexhaustive or {}).get(number, []),
            }
            for number in (1, 2)
        ],
        "categories": [
            {"id": number, "name": name, "frequency": frequency}
            for number, name, frequency in ((1, "dodo", "r"), (2, "goat", "c"), (3, "dog", "f"))
        ],
        "annotations": list(annotations),
    }


class TestByHand:
    def test_a_perfect_detection_of_a_rare_class(self) -> None:
        scores = score_lvis(_truth(block(1, 1, 1, BOX)), [record(1, (1, 0.9, BOX)), record(2)])
        assert tuple(scores.metrics) == METRIC_NAMES
        for kind in ("bbox", "segm"):
            for name in NAMES:
                expected = None if name in {"APs", "APl", "APc", "APf"} else pytest.approx(1.0)
                assert scores.metrics[f"{kind}/{name}"] == expected, name
            assert scores.per_class[kind] == {"dodo": pytest.approx(1.0)}
        assert scores.reasons["bbox/APf"] == "no ground truth of frequent classes"
        assert scores.reasons["segm/APs"] == "no ground truth of size 'small'"
        assert scores.reasons.keys() == {name for name, value in scores.metrics.items() if value is None}
        assert (scores.num_images, scores.num_instances) == (2, 1)
        json.dumps(scores.as_dict())

    def test_means_are_over_the_classes_of_a_frequency(self) -> None:
        truth = _truth(block(1, 1, 1, BOX), block(2, 1, 3, ELSEWHERE))
        scores = score_lvis(truth, [record(1, (1, 0.9, BOX)), record(2)])
        found = [scores.metrics[f"bbox/{name}"] for name in ("AP", "APr", "APc", "APf")]
        assert found == [pytest.approx(0.5), pytest.approx(1.0), None, 0.0]

    @pytest.mark.parametrize(
        ("federation", "expected"),
        [
            # Nothing is known of class 3 in image 2: the wrong detection there is left out.
            ({}, 1.0),
            # It is known to be absent there: a false positive before the right one, precision 1/2.
            ({"negative": {2: [3]}}, 0.5),
        ],
    )
    def test_only_what_is_known_to_be_wrong_counts(self, federation: dict[str, Any], expected: float) -> None:
        truth = _truth(block(1, 1, 3, BOX), **federation)
        found = [record(1, (3, 0.8, BOX)), record(2, (3, 0.9, ELSEWHERE))]
        for kind in ("bbox", "segm"):
            assert score_lvis(truth, found).metrics[f"{kind}/AP"] == pytest.approx(expected)

    @pytest.mark.parametrize(("inexhaustive", "expected"), [({}, 0.5), ({1: [3]}, 1.0)])
    def test_a_class_that_is_not_annotated_exhaustively(self, inexhaustive: dict, expected: float) -> None:
        truth = _truth(block(1, 1, 3, BOX), inexhaustive=inexhaustive)
        found = [record(1, (3, 0.9, ELSEWHERE), (3, 0.8, BOX)), record(2)]
        assert score_lvis(truth, found).metrics["segm/AP"] == pytest.approx(expected)

    def test_three_hundred_detections_of_an_image_over_all_classes(self) -> None:
        truth = _truth(block(1, 1, 3, BOX))
        crowd = [(2, 0.5 + place / 1000, ELSEWHERE) for place in range(300)]
        assert score_lvis(truth, [record(1, (3, 0.4, BOX), *crowd[1:]), record(2)]).metrics["bbox/AP"] > 0.99
        assert score_lvis(truth, [record(1, (3, 0.4, BOX), *crowd), record(2)]).metrics["bbox/AP"] == 0
        # Of equal scores those that come first.
        equal = [(2, 0.4, ELSEWHERE)] * 300
        assert score_lvis(truth, [record(1, (3, 0.4, BOX), *equal), record(2)]).metrics["bbox/AP"] > 0.99
        assert score_lvis(truth, [record(1, *equal, (3, 0.4, BOX)), record(2)]).metrics["bbox/AP"] == 0

    def test_an_empty_mask_is_left_out(self) -> None:
        found = record(1, (3, 0.9, ELSEWHERE), (3, 0.8, BOX))
        found["segmentation"][0] = rle_of(block_mask(SIZE, (0, 0, 0, 0)))
        scores = score_lvis(_truth(block(1, 1, 3, BOX)), [found, record(2)])
        assert (scores.metrics["segm/AP"], scores.metrics["bbox/AP"]) == (pytest.approx(1.0), pytest.approx(0.5))

    def test_the_size_of_a_mask_result_is_that_of_its_mask(self) -> None:
        """A false positive with a small mask in a box of medium size leaves medium AP alone."""
        found = record(1, (3, 0.9, (60, 60, 110, 110)), (3, 0.8, BOX))
        found["segmentation"][0] = rle_of(block_mask(SIZE, (60, 60, 70, 70)))
        scores = score_lvis(_truth(block(1, 1, 3, BOX)), [found, record(2)])
        assert scores.metrics["segm/APm"] == pytest.approx(1.0)
        assert scores.metrics["bbox/APm"] == pytest.approx(0.5)
        assert scores.metrics["segm/AP"] == pytest.approx(0.5)


def test_no_detection_at_all() -> None:
    scores = score_lvis(_truth(block(1, 1, 1, BOX)), [record(1), record(2)])
    assert scores.metrics["segm/AP"] == 0.0


def test_no_ground_truth_at_all() -> None:
    scores = score_lvis(_truth(negative={1: [3]}), [record(1, (3, 0.9, BOX)), record(2)])
    assert set(scores.metrics.values()) == {None}
    assert set(scores.reasons) == set(METRIC_NAMES)


def test_boxes_alone() -> None:
    found = [record(1, (1, 0.9, BOX)) | {"segmentation": None}, record(2) | {"segmentation": None}]
    scores = score_lvis(_truth(block(1, 1, 1, BOX)), found)
    assert scores.metrics["bbox/AP"] == pytest.approx(1.0)
    assert scores.reasons["segm/AP"] == "the predictions have no masks"


def test_a_part_of_the_images() -> None:
    truth = _truth(block(1, 1, 3, BOX), block(2, 2, 3, BOX))
    scores = score_lvis(truth, [record(2, (3, 0.9, BOX))], image_ids=[2])
    assert (scores.metrics["bbox/AP"], scores.num_images, scores.num_instances) == (pytest.approx(1.0), 1, 1)


def test_mistakes() -> None:
    truth = _truth(block(1, 1, 3, BOX))
    with pytest.raises(DataError, match=r"image 2 are missing \(1 of 2"):
        score_lvis(truth, [record(1)])
    with pytest.raises(DataError, match="category id 9 is not listed in annotations"):
        score_lvis(truth, [record(1, (9, 0.5, BOX)), record(2)])
    with pytest.raises(DataError, match="annotation 1 .image 1.: has no 'area'"):
        score_lvis(_truth(block(1, 1, 3, BOX, area=...)), [record(1), record(2)])


# Against the lvis package


@pytest.fixture
def lvis_package(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """lvis 0.5.3 as it is installed: it draws with OpenCV, not needed here, and uses an alias that NumPy dropped."""
    if importlib.util.find_spec("lvis") is None:
        pytest.skip("the lvis package is not installed")
    if "cv2" not in sys.modules:
        monkeypatch.setitem(sys.modules, "cv2", types.ModuleType("cv2"))
    monkeypatch.setattr(np, "float", float, raising=False)
    lvis = importlib.import_module("lvis")
    monkeypatch.setattr("logging.Logger.warn", lambda *_: None)  # deprecated, and lvis calls it
    return lvis


def _theirs(
    lvis: types.ModuleType, content: dict[str, Any], records: list[dict[str, Any]], kind: str, folder: Path
) -> dict[str, float | None]:
    path = folder / "truth.json"
    path.write_text(json.dumps(content))
    truth = lvis.LVIS(str(path))
    dropped = "bbox" if kind == "segm" else "segmentation"
    results = [{key: value for key, value in item.items() if key != dropped} for item in to_coco_results(records)]
    evaluation = lvis.LVISEval(truth, lvis.LVISResults(truth, copy.deepcopy(results)), kind)
    evaluation.run()
    found = evaluation.get_results()
    return {f"{kind}/{name}": None if found[name] == -1 else float(found[name]) for name in NAMES}


def _check(ours: CocoScores, theirs: dict[str, float | None]) -> None:
    for name, value in theirs.items():
        assert ours.metrics[name] == (None if value is None else pytest.approx(value, abs=1e-9)), name


@pytest.mark.parametrize("seed", range(6))
def test_equal_to_lvis(seed: int, lvis_package: types.ModuleType, tmp_path: Path) -> None:
    content, records = federated_scene(seed)
    scores = score_lvis(content, records)
    for kind in ("bbox", "segm"):
        _check(scores, _theirs(lvis_package, content, records, kind, tmp_path))
    # The scene has everything: other rules would give other numbers.
    assert max(len(found["score"]) for found in records) > 300
    assert scores.metrics["bbox/AP"] != pytest.approx(scores.metrics["segm/AP"], abs=1e-5)
    plain = {**content, "images": [{**image, "file_name": "x.jpg"} for image in content["images"]]}
    assert score_coco(plain, records).metrics["bbox/AP"] != pytest.approx(scores.metrics["bbox/AP"], abs=1e-3)


def _disturbed(content: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Detections made of the annotations: moved, of other classes now and then, with scores of few values."""
    draws = np.random.default_rng(seed)
    categories = [category["id"] for category in content["categories"]]
    found: dict[int, list[tuple[int, float, Any]]] = {image["id"]: [] for image in content["images"]}
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    for entry in content["annotations"]:
        height, width = sizes[entry["image_id"]]
        parts = maskutils.frPyObjects(entry["segmentation"], height, width)
        mask = maskutils.decode(maskutils.merge(parts))
        for _ in range(int(draws.integers(0, 4))):
            moved = np.roll(mask, draws.integers(-3, 4, 2), (0, 1))
            label = entry["category_id"] if draws.random() < 0.8 else int(draws.choice(categories))
            found[entry["image_id"]].append((label, float(np.float32(draws.integers(1, 50) / 50)), moved))
    records = []
    for image_id, detections in found.items():
        rles = [maskutils.encode(np.asfortranarray(mask)) for _, _, mask in detections]
        records.append(
            {
                "image_id": image_id,
                "category_id": [label for label, _, _ in detections],
                "score": [score for _, score, _ in detections],
                "bbox": [maskutils.toBbox(rle).tolist() for rle in rles],
                "segmentation": [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in rles],
            }
        )
    return records


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_lvis_on_its_own_annotations(seed: int, lvis_package: types.ModuleType, tmp_path: Path) -> None:
    path = Path(os.environ.get("DIFFINST_DATASETS", "")) / "lvis_tiny/lvis_v0.5_val_tiny.json"
    if not path.is_file():
        pytest.skip("no lvis_tiny below $DIFFINST_DATASETS")
    content = json.loads(path.read_text())
    records = _disturbed(content, seed)
    scores = score_lvis(content, records)
    assert 0.1 < (scores.metrics["segm/AP"] or 0) < 0.9
    for kind in ("bbox", "segm"):
        _check(scores, _theirs(lvis_package, content, records, kind, tmp_path))


def test_equal_to_lvis_on_instances_without_area(lvis_package: types.ModuleType, tmp_path: Path) -> None:
    content, records = federated_scene(9)
    for annotation in content["annotations"][::4]:
        annotation["area"] = 0
    scores = score_lvis(content, records)
    for kind in ("bbox", "segm"):
        _check(scores, _theirs(lvis_package, content, records, kind, tmp_path))
    assert scores.num_instances == len(content["annotations"]) - len(content["annotations"][::4])
