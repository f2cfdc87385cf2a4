"""What a suite is warned of, and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.suite import LVIS_DETECTIONS, load_suite
from bench.suite_warnings import warnings_of
from diffinst.evaluation import lvis_ap

ROOT = Path(__file__).resolve().parents[2]
SUITES = sorted([*(ROOT / "suites").glob("*.yaml"), *(ROOT / "suites" / "paper").glob("*.yaml")])

FROZEN = (
    "model.freeze_at: the first 2 stages of resnet50 are frozen at random values, as backbone_weights is none. Give"
)


def said(folder: Path, text: str, *overrides: str) -> list[str]:
    path = folder / "s.yaml"
    path.write_text(text)
    suite = load_suite(path, overrides)
    return [str(warning).replace(f"{folder}/", "") for warning in warnings_of(suite, suite.cells)]


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_the_suites_of_this_project_are_warned_of_nothing(path: Path) -> None:
    suite = load_suite(path)
    assert warnings_of(suite, suite.cells) == []


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("name: s\n", "s.yaml: "),
        ("model:\n  backbone: resnet50\n", "s.yaml:2:13: "),
        ("model:\n  backbone: resnet50\n  backbone_weights: none\n", "s.yaml:3:21: "),
        ("model: {backbone: tiny}\naxes: {product: {backbone: [tiny, resnet50]}}\n", "s.yaml:2:35: "),
        ("axes: {product: {engine: [torchvision, diffinst]}}\n", "s.yaml: "),
    ],
)
def test_a_training_with_stages_frozen_at_random_values(tmp_path: Path, text: str, place: str) -> None:
    (warning,) = said(tmp_path, text)
    assert warning.startswith(place + FROZEN)
    assert warning.count("\n") == 0
    assert said(tmp_path, text, "freeze_at=0") == []


def test_what_is_not_trained_or_not_frozen_gives_no_warning(tmp_path: Path) -> None:
    assert said(tmp_path, "model: {weights: w.safetensors}\n") == []
    assert said(tmp_path, "model: {backbone_weights: w.safetensors}\n") == []
    assert said(tmp_path, "model: {backbone: swin_b}\n") == []
    assert said(tmp_path, "engine: torchvision\n") == []


LVIS = "sampler.max_detections: 100 detections an image are kept, where LVIS scores 300. Give max_detections: 300"
TINY = "model: {backbone: tiny}\n"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("data: {dataset: lvis}\n", "s.yaml:2:17: "),
        ("data:\n  dataset: lvis_tiny\nsampler: {eta: 0.0}\n", "s.yaml:3:12: "),
        ("data: {dataset: lvis}\nsampler: {max_detections: 100}\n", "s.yaml:3:27: "),
        ("axes: {product: {dataset: [coco, lvis]}}\n", "s.yaml:2:34: "),
        ("data: {dataset: lvis}\naxes: {product: {max_detections: [300, 100, null]}}\n", "s.yaml:3:40: "),
        ("preset: released\ndata: {dataset: lvis}\nsampler: {max_detections: 100}\n", "s.yaml:4:27: "),
    ],
)
def test_fewer_detections_than_lvis_scores(tmp_path: Path, text: str, place: str) -> None:
    assert said(tmp_path, TINY + text) == [place + LVIS]


def test_as_many_detections_as_lvis_scores_give_no_warning(tmp_path: Path) -> None:
    assert said(tmp_path, TINY + "data: {dataset: lvis}\nsampler: {max_detections: 300}\n") == []
    assert said(tmp_path, TINY + "preset: released\ndata: {dataset: lvis}\n") == []
    assert said(tmp_path, TINY + "data: {dataset: coco}\n") == []
    assert said(tmp_path, TINY + "data: {dataset: lvis}\nmeasure: {score: false}\n") == []


def test_a_data_set_in_lvis_format_counts_too(tmp_path: Path) -> None:
    paths = "".join(f", {name}: x" for name in ("train_annotations", "train_images", "val_annotations", "val_images"))
    text = f"data: {{dataset: custom, annotation_format: lvis{paths}}}\n"
    assert said(tmp_path, TINY + text) == [f"s.yaml:2:17: {LVIS}"]


def test_the_number_of_detections_is_that_of_the_scores() -> None:
    assert lvis_ap.MAX_DETECTIONS == LVIS_DETECTIONS
