"""A cell becomes a configuration of the released code, and comes back the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.errors import BenchError
from bench.upstream import read_upstream
from bench.upstream_export import only_cell, to_upstream
from diffinst.config import RELEASED, Config


def released(**changes: Any) -> Config:
    """`preset: released` on COCO with some fields changed, 'section.field' as 'section__field'."""
    sections: dict[str, dict[str, Any]] = {name: dict(values) for name, values in RELEASED.items()}
    sections["data"]["dataset"] = "coco"
    for name, value in changes.items():
        section, _, field = name.partition("__")
        sections[section][field] = value
    return Config.model_validate(sections)


CASES: dict[str, dict[str, Any]] = {
    "published": {},
    "four steps": {"sampler__sampling_steps": 4, "sampler__num_proposals": 300, "train__num_train_proposals": 300},
    "boxes only": {"model__mask": "none", "model__backbone": "resnet101", "train__seed": 40244023},
    "lvis": {
        "data__dataset": "lvis",
        "train__federated_loss": True,
        "train__repeat_threshold": 0.001,
        "train__class_loss": "bce",
    },
    "lvis 0.5": {"data__dataset": "lvis_v05", "train__schedule": "cosine", "train__schedule_steps": ()},
    "swin": {"model__backbone": "swin_l_384", "model__freeze_at": 0},
    "average": {"train__ema_decay": 0.9, "sampler__use_ema": True},
    "tta": {
        "sampler__tta": True,
        "sampler__tta_shortest_edges": (400, 800),
        "sampler__tta_min_box_sizes": (),
        "sampler__tta_max_box_sizes": (),
        "sampler__nms_iou_threshold": None,
    },
    "no crops": {"data__crop_probability": 0.0, "train__clip_gradient_norm": None, "data__shortest_edge_train": (600,)},
    "sizes": {
        "model__hidden_dim": 64,
        "model__num_stages": 2,
        "model__snr_scale": 1.0,
        "model__pooler_resolution": 5,
        "train__learning_rate": 1e-7,
        "train__warmup_iterations": 3,
        "data__longest_edge_test": 900,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_comes_back(case: str, tmp_path: Path) -> None:
    config = released(**CASES[case])
    text = to_upstream(config, weights="x.pth")
    (tmp_path / "x.yaml").write_text(text)
    upstream = read_upstream(tmp_path / "x.yaml")
    assert upstream.config() == config
    assert upstream.weights == "x.pth"
    assert "&" not in text


def test_tuples_are_written_as_detectron2_reads_them() -> None:
    found = yaml.safe_load(to_upstream(released()))
    assert found["SOLVER"]["STEPS"] == "(350000, 420000)"
    assert found["DATASETS"]["TRAIN"] == "('coco_2017_train',)"
    assert found["MODEL"]["RESNETS"] == {
        "DEPTH": 50,
        "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "STRIDE_IN_1X1": False,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__backbone": "tiny"}, "model.backbone: the released code has no tiny. Allowed: resnet50, resnet101"),
        ({"data__dataset": "nuclei"}, "data.dataset: the released code has no nuclei. Allowed: coco, lvis, lvis_v05"),
        ({"sampler__eta": 0.5}, "sampler.eta is 0.5, there 1.0"),
        ({"sampler__ensemble": "all"}, "sampler.ensemble is 'all', there 'all_but_last'"),
        ({"model__mask_norm": "group"}, "model.mask_norm is 'group', there 'batch'"),
        ({"train__num_train_proposals": 30}, "train.num_train_proposals is 30, there 500"),
        ({"train__ema_decay": 0.9}, "sampler.use_ema is false, there true"),
        ({"train__class_loss": "bce"}, "MODEL.DiffusionInst.USE_FOCAL: false is not allowed"),
    ],
)
def test_what_the_release_cannot_have(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchError) as raised:
        to_upstream(released(**changes))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_only_rounding_tells_is_left_out() -> None:
    same = {"model__box_pooling": "bags", "model__mask_head_kernel": "triton"}
    assert to_upstream(released(**same)) == to_upstream(released())


def test_the_intended_behaviour_is_not_the_released_one() -> None:
    with pytest.raises(
        BenchError, match=r"model.init is 'fixed', there 'released'; .* and \d more. .*preset: released"
    ):
        to_upstream(Config.model_validate({"data": {"dataset": "coco"}}))


def test_only_cell() -> None:
    one, two = released(), released(sampler__sampling_steps=4)
    assert only_cell({"a": one}, None) is one
    assert only_cell({"a": one, "b": two}, "b") is two
    with pytest.raises(BenchError, match="2 cells. Choose one with --cell: a, b"):
        only_cell({"a": one, "b": two}, None)
    with pytest.raises(BenchError, match="--cell c: no such cell. Allowed: a, b"):
        only_cell({"a": one, "b": two}, "c")
