"""Scores of a split by two evaluators: what is written, and what a disagreement does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from coco_files import block, write_set
from lvis_files import federated_scene, record

from bench.errors import EvaluatorError
from bench.measure import accuracy
from bench.measure.accuracy import EVALUATORS, Accuracy, compare_evaluators, measure_accuracy
from bench.record import RunRecord, unpack_resamples
from bench.stats.match_files import read_matches
from diffinst.config import DataConfig
from diffinst.evaluation import coco_ap
from diffinst.evaluation.scoring import score_split

FILES = {"train_annotations": "a", "train_images": "a", "val_annotations": "a", "val_images": "a"}
LVIS = DataConfig(dataset="custom", annotation_format="lvis", **FILES)
COCO = DataConfig(dataset="custom", **FILES)


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand take a second a call."""
    monkeypatch.setattr(accuracy, "NUM_RESAMPLES", 20)


def scene(folder: Path, *, seed: int = 0) -> tuple[Path, list[dict[str, Any]]]:
    """A federated scene on disk that reads as COCO too."""
    content, records = federated_scene(seed)
    for image in content["images"]:
        image["file_name"] = "x.jpg"
    path = folder / "truth.json"
    path.write_text(json.dumps(content))
    return path, records


def measure(data: DataConfig, folder: Path, **changes: Any) -> Accuracy:
    path, records = scene(folder)
    return measure_accuracy(data, path, records, folder, **{"iou_types": ("bbox", "segm")} | changes)


@pytest.mark.parametrize(("data", "numbers"), [(COCO, 12), (LVIS, 9)], ids=["coco", "lvis"])
def test_scores_carry_errors_and_were_computed_twice(data: DataConfig, numbers: int, tmp_path: Path) -> None:
    found = measure(data, tmp_path)
    scores = score_split(data, *scene(tmp_path))
    for name, value in scores.metrics.items():
        entry = found.metrics[name]
        assert entry.value == value
        assert (entry.error_of, entry.standard_error is None) == (
            ("images", False) if value is not None else (None, True)
        )
    assert found.per_class["segm/AP"] == scores.per_class["segm"]
    # A class has an error exactly where it has a value: these scenes leave no class in one image alone.
    for name, classes in found.per_class.items():
        errors = found.per_class_errors[name]
        assert errors.keys() == classes.keys()
        assert {label for label, value in classes.items() if value is None} == {
            label for label, error in errors.items() if error is None
        }
    assert any(error for error in found.per_class_errors["segm/AP"].values())
    check = found.checks["evaluators"]
    assert check["evaluators"] == list(EVALUATORS)
    assert EVALUATORS[0].startswith("hotcoco 1.")
    assert len(check["compared"]) == 2 * (numbers + 1)
    assert 0 <= check["max_difference"] < 1e-12
    paired = {"AP", "AP50", "AP75"} | ({"APr", "APc", "APf"} if data is LVIS else set())
    assert {name.partition("/")[2] for name in found.resamples} == paired
    drawn = unpack_resamples(found.resamples["segm/AP"].values)
    assert (len(drawn), found.resamples["segm/AP"].num_images) == (20, 10)
    assert found.files == [tmp_path / "matches-bbox.npz", tmp_path / "matches-segm.npz"]
    assert set(read_matches(found.files[1])) == {"all", "small", "medium", "large"}
    json.dumps(found.outputs(), allow_nan=False)


def test_relabelled_images_are_not_the_same_images(tmp_path: Path) -> None:
    path, records = scene(tmp_path)
    content = json.loads(path.read_text())
    found = []
    for change in ({}, {"category_id": next(entry["id"] for entry in content["categories"][::-1])}):
        content["annotations"][0] |= change
        path.write_text(json.dumps(content))
        scored = measure_accuracy(COCO, path, records, tmp_path, iou_types=("bbox", "segm"))
        found.append({entry.images for entry in scored.resamples.values()})
    assert [len(images) for images in found] == [1, 1]
    (one,), (other,) = found
    assert one != other
    assert one.partition(":")[0] == other.partition(":")[0]


def test_what_is_not_scored_is_not_compared(tmp_path: Path) -> None:
    found = measure(COCO, tmp_path, iou_types=("bbox",))
    assert found.metrics["segm/AP"].reason == "the model predicts boxes only"
    assert all(name.startswith("bbox/") for name in found.checks["evaluators"]["compared"])
    path, records = scene(tmp_path)
    boxes = [entry | {"segmentation": None} for entry in records]
    found = measure_accuracy(COCO, path, boxes, tmp_path, iou_types=("bbox", "segm"))
    assert found.metrics["segm/AP"].reason == "the predictions have no masks"
    assert [file.name for file in found.files] == ["matches-bbox.npz"]


def test_crowds_and_one_class_and_what_is_malformed(tmp_path: Path) -> None:
    box = (10, 10, 50, 50)
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 120, "width": 160} for i in (1, 2)],
        "categories": [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}],
        "annotations": [
            block(1, 1, 3, box),
            block(2, 2, 7, box),
            block(3, 2, 3, (60, 20, 150, 110), iscrowd=1),
            block(4, 2, 99, box),
        ],
    }
    path, _ = write_set(tmp_path, content, images=False)
    records = [record(1, (7, 0.9, box)), record(2, (7, 0.8, box), (3, 0.95, (70, 30, 120, 90)))]
    for agnostic, ap in ((False, 0.25), (True, 1.0)):
        data = COCO.model_copy(update={"skip_invalid": True, "class_agnostic": agnostic})
        found = measure_accuracy(data, path, records, tmp_path, iou_types=("bbox", "segm"))
        assert found.metrics["segm/AP"].value == pytest.approx(ap)
        assert found.checks["evaluators"]["max_difference"] < 1e-12


@pytest.mark.parametrize("name", ["AP75", "APs", "AR10"])
def test_a_disagreement_is_an_error_that_names_both_numbers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean = coco_ap.mean_defined
    honest = measure(COCO, tmp_path).metrics[f"bbox/{name}"].value
    assert honest is not None

    def wrong(values: Any) -> float | None:
        found = mean(values)
        return found + 2e-6 if found == honest else found

    monkeypatch.setattr(coco_ap, "mean_defined", wrong)
    with pytest.raises(
        EvaluatorError, match=rf"^two evaluators disagree on bbox/{name}: {honest + 2e-6:.9f} \(hotcoco"
    ):
        measure(COCO, tmp_path)


def test_a_class_that_disagrees_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = coco_ap.unique_names
    monkeypatch.setattr(coco_ap, "unique_names", lambda categories: names(categories)[::-1])
    with pytest.raises(EvaluatorError, match="two evaluators disagree on bbox/AP of 'class"):
        measure(COCO, tmp_path)


def test_what_only_one_can_compute_is_a_disagreement_and_rounding_is_none() -> None:
    assert compare_evaluators({"segm/AP": 0.5}, {"segm/AP": 0.5 + 1e-9}) == pytest.approx(1e-9, rel=1e-3)
    with pytest.raises(EvaluatorError, match="segm/AP: undefined .* and 0.500000000"):
        compare_evaluators({"segm/AP": 0.5}, {"segm/AP": None})


def test_the_outputs_fit_a_record(tmp_path: Path) -> None:
    outputs = measure(COCO, tmp_path).outputs()
    found = RunRecord.model_validate(
        {"suite": "s", "run_id": "r", "label": "", "status": "ok", "axes": {}, "config": {}, "nodes": {}}
        | {"command": "", "started_at": None, "finished_at": None, "duration_s": None}
        | outputs
    )
    assert found.resamples["bbox/AP"].of == "images"
