"""What a suite is warned of, and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.suite import load_suite
from bench.suite_warnings import warnings_of

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
