"""Plans: what is shared, what an id depends on, what a plan says of itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from small_plans import SMALL, nodes_of, plan_of

from bench import plan as plan_module
from bench.code_identity import Code
from bench.errors import SuiteError
from bench.outlook import changed_parts, describe_plan
from bench.plan import Node, PastNode, Plan, make_id
from diffinst.config import SECTIONS, Config, DataConfig

ROOT = Path(__file__).resolve().parents[2]


def counts(plan: Plan) -> dict[str, int]:
    return dict(Counter(node.kind for node in plan.nodes.values()))


def ids(plan: Plan) -> dict[str, list[str]]:
    return {cell.label: [cell.run_id, *cell.nodes.values()] for cell in plan.cells}


# -- ids --------------------------------------------------------------------------------------------------------------


def test_an_id_is_the_hash_of_canonical_json() -> None:
    # sha256 of the text below, by hand: keys sorted, no spaces
    text = '["train",{"a":1,"b":[2.5,null]},["dataset-1"]]'
    expected = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert make_id("train", {"b": [2.5, None], "a": 1}, ["dataset-1"]) == f"train-{expected}"
    assert make_id("train", {"a": 1, "b": [2.5, None]}, ("dataset-1",)) == f"train-{expected}"


def test_an_id_stays_what_it_was() -> None:
    # A change here throws away everybody's stored results: only on purpose.
    assert make_id("dataset", {"dataset": "coco", "splits": ["val"]}, []) == "dataset-24dc3dcc75316fbc"


def test_ids_do_not_depend_on_process_or_hash_seed(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, SMALL)
    code = (
        "import json, sys; from pathlib import Path; from bench.plan import build_plan; "
        "from bench.suite import load_suite; plan = build_plan(load_suite(Path(sys.argv[1]))); "
        "print(json.dumps({c.label: [c.run_id, *c.nodes.values()] for c in plan.cells}))"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "s.yaml")],
            env={"PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout) == ids(plan)


def test_ids_do_not_depend_on_the_order_of_keys_or_the_way_numbers_are_written(tmp_path: Path) -> None:
    one = plan_of(
        tmp_path,
        """
        train: {learning_rate: 1.0e-4, weight_decay: 0, schedule_steps: [10, 20]}
        sampler: {eta: 1, sampling_steps: 4}
        """,
    )
    other = plan_of(
        tmp_path,
        """
        sampler:
          sampling_steps: 4
          eta: 1.0
        train:
          schedule_steps:
            - 10
            - 20
          weight_decay: 0.0
          learning_rate: 0.0001
        """,
    )
    assert ids(one) == ids(other)


def test_ids_do_not_depend_on_paths_host_device_or_workers(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    one = plan_of(tmp_path, SMALL)
    other = plan_of(elsewhere, SMALL, "num_workers=3", data_root=elsewhere, num_workers=7)
    assert ids(one) == ids(other)
    assert nodes_of(other, "train")[0].options["config"]["train"]["num_workers"] == 7
    assert nodes_of(other, "train")[0].options["data_root"] == str(elsewhere)
    for node in other.nodes.values():
        assert str(tmp_path) not in json.dumps([node.id, node.inputs, node.spec])


def test_the_name_of_the_suite_and_its_reports_change_no_id(tmp_path: Path) -> None:
    assert ids(plan_of(tmp_path, SMALL)) == ids(
        plan_of(tmp_path, SMALL.replace("small", "other") + "tables: [{kind: long}]")
    )


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("eval_batch_size=7", set()),
        ("num_workers=2", set()),
        ("log_every=7", set()),
        ("checkpoint_every=7", set()),
        ("eval_seed=1", {"predict", "score", "latency"}),
        ("max_detections=7", {"predict", "score", "latency"}),
        ("shortest_edge_test=96", {"predict", "score", "latency"}),
        ("measure.latency_images=11", {"latency"}),
        ("iterations=101", {"train", "predict", "score", "latency"}),
        ("seeds=[1]", {"train", "predict", "score", "latency"}),
        ("flip_probability=0", {"train", "predict", "score", "latency"}),
        ("class_agnostic=true", {"train", "predict", "score", "latency"}),
        ("hidden_dim=128", {"train", "predict", "score", "latency"}),
        ("shapes_seed=1", {"dataset", "train", "predict", "score", "latency"}),
        ("dataset=coco", {"dataset", "train", "predict", "score", "latency"}),
    ],
)
def test_a_setting_changes_the_nodes_that_it_determines(tmp_path: Path, override: str, changed: set[str]) -> None:
    text = "model: {backbone: tiny}\n"
    before, after = plan_of(tmp_path, text).cells[0], plan_of(tmp_path, text, override).cells[0]
    assert {kind for kind in before.nodes if before.nodes[kind] != after.nodes[kind]} == changed
    assert (before.run_id != after.run_id) == bool(changed)


OTHER_VALUES: dict[str, Any] = {
    "backbone": "tiny",
    "backbone_weights": "imagenet",
    "num_classes": 3,
    "mask": "none",
    "mask_norm": "group",
    "mask_head_channels": [4],
    "box_pooling": "bags",
    "mask_head_kernel": "triton",
    "tta_merge": "nms",
    "tta_shortest_edges": list(range(100, 1400, 100)),
    "tta_min_box_sizes": [],
    "tta_max_box_sizes": [],
    "class_loss": "bce",
    "repeat_threshold": 0.001,
    "ema_decay": 0.999,
    "renewal_order": "front",
    "init": "released",
    "hidden_dim": 128,
    "num_attention_heads": 4,
    "ensemble": "none",
    "predict_noise_from": "unclamped",
    "zero_size_proposals": "keep",
    "mask_clip": "truncated",
    "schedule": "cosine",
    "schedule_steps": [1, 2],
    "precision": "fp32",
    "inference_precision": "bf16",
    "compile": "head",
    "proposal_padding": "repeat",
    "matcher": "released",
    "empty_batch_loss": "released",
    "dataset": "coco",
    "shortest_edge_train": [100],
    "crop_shortest_edge": [100],
    "crop_size_range": [100, 200],
    "crop_boxes": "released",
}
FREE = {"eval_batch_size", "num_workers", "log_every", "checkpoint_every"}
NEEDS_FILES = {
    "weights",
    "train_annotations",
    "train_images",
    "val_annotations",
    "val_images",
    "train_image_ids",
    "val_image_ids",
}
NOT_FOR_SHAPES = {"skip_invalid", "annotation_format"}
# What a field cannot be without.
NEEDS = {"use_ema": "train: {ema_decay: 0.999}\n"}


@pytest.mark.parametrize(
    "name",
    [n for section in SECTIONS.values() for n in section.model_fields if n not in FREE | NEEDS_FILES | NOT_FOR_SHAPES],
)
def test_no_field_is_forgotten(tmp_path: Path, name: str) -> None:
    """Every field that can change a result changes the id of a run: a new field that is left out fails here."""
    default = next(getattr(section, name) for _, section in Config() if name in type(section).model_fields)
    if name in OTHER_VALUES:
        other = OTHER_VALUES[name]
    elif isinstance(default, bool):
        other = not default
    else:
        assert isinstance(default, int | float), name
        other = default + 1 if isinstance(default, int) else 0.75
    text = "description: x\n" + NEEDS.get(name, "")
    before = plan_of(tmp_path, text)
    after = plan_of(tmp_path, text, f"{name}={json.dumps(other)}")
    assert before.cells[0].run_id != after.cells[0].run_id


def test_how_malformed_annotations_are_taken_belongs_to_the_data_set(tmp_path: Path) -> None:
    strict = plan_of(tmp_path, "data: {dataset: coco}\n")
    lenient = plan_of(tmp_path, "data: {dataset: coco, skip_invalid: true}\n")
    assert strict.cells[0].nodes["dataset"] != lenient.cells[0].nodes["dataset"]
    assert strict.cells[0].nodes["train"] != lenient.cells[0].nodes["train"]


# -- sharing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "axes",
    [
        "sampling_steps: [1, 2, 4], num_proposals: [20, 50, 100]",
        "eval_seed: [0, 1, 2]",
        "sampler: [fixed, released, {renewal: false}]",
        "ensemble: [all, none], eta: [0, 0.5, 1]",
        "shortest_edge_test: [96, 128]",
    ],
)
def test_axes_that_touch_only_sampling_never_retrain(tmp_path: Path, axes: str) -> None:
    plan = plan_of(tmp_path, f"axes: {{product: {{{axes}}}}}\n")
    cells = len(plan.cells)
    assert counts(plan) == {"dataset": 1, "train": 1, "predict": cells, "score": cells, "latency": cells}


@pytest.mark.parametrize(
    ("axes", "seeds", "trainings"),
    [
        ("backbone: [tiny, resnet50], sampling_steps: [1, 4]", "[0]", 2),
        ("sampling_steps: [1, 4]", "[0, 1, 2]", 3),
        ("preset: [fixed, released], sampling_steps: [1, 4]", "[0]", 2),
        ("snr_scale: [1, 2], learning_rate: [1.0e-3, 1.0e-4]", "[0]", 4),
    ],
)
def test_a_training_for_each_that_differs(tmp_path: Path, axes: str, seeds: str, trainings: int) -> None:
    plan = plan_of(tmp_path, f"axes: {{product: {{{axes}}}}}\nseeds: {seeds}\n")
    assert counts(plan)["train"] == trainings
    assert counts(plan)["dataset"] == 1


def test_a_wider_suite_keeps_the_ids_of_the_narrower_one(tmp_path: Path) -> None:
    narrow = ids(plan_of(tmp_path, SMALL))
    wide = ids(plan_of(tmp_path, SMALL.replace("[1, 4]", "[1, 2, 4]")))
    assert narrow.items() <= wide.items()


def test_splits_of_photographs_are_nodes_of_their_own(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "data: {dataset: nuclei}\n")
    train, val = nodes_of(plan, "dataset")
    assert (train.spec["splits"], val.spec["splits"]) == (["train"], ["val"])
    cell = plan.cells[0]
    assert cell.nodes["dataset"] == val.id
    assert plan.nodes[cell.nodes["train"]].inputs == (train.id,)
    assert plan.nodes[cell.nodes["predict"]].inputs == (cell.nodes["train"], val.id)
    assert plan.nodes[cell.nodes["score"]].inputs == (cell.nodes["predict"], val.id)
    assert plan.nodes[cell.nodes["latency"]].inputs == (cell.nodes["train"], val.id)


def test_a_list_of_validation_images_does_not_retrain_and_only_its_ids_count(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("3\n1\n")
    (tmp_path / "b.txt").write_text("# the same\n1\n\n3  # three\n")
    (tmp_path / "c.txt").write_text("1\n")
    text = "data: {dataset: coco}\naxes: {product: {val_image_ids: [a.txt, c.txt]}}\n"
    plan = plan_of(tmp_path, text)
    assert counts(plan) == {"dataset": 3, "train": 1, "predict": 2, "score": 2, "latency": 2}
    first = plan.nodes[plan.cells[0].nodes["predict"]]
    assert first.options["config"]["data"]["val_image_ids"] == str(tmp_path / "a.txt")
    renamed = plan_of(tmp_path, text.replace("a.txt", "b.txt"))
    assert list(renamed.cells[0].nodes.values()) == list(plan.cells[0].nodes.values())
    with pytest.raises(SuiteError, match="would be the same run"):
        plan_of(tmp_path, text.replace("c.txt", "b.txt"))


def test_custom_annotations_and_weights_count_by_content(tmp_path: Path) -> None:
    for name in ("a.json", "b.json", "w.safetensors"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "images").mkdir()
    text = """
        data:
          dataset: custom
          train_annotations: a.json
          train_images: images
          val_annotations: b.json
          val_images: images
        model: {backbone_weights: w.safetensors}
        """
    before = plan_of(tmp_path, text)
    config = before.nodes[before.cells[0].nodes["train"]].options["config"]
    assert config["data"]["train_annotations"] == str(tmp_path / "a.json")
    assert config["model"]["backbone_weights"] == str(tmp_path / "w.safetensors")
    assert before.cells[0].config["model"]["backbone_weights"] == "w.safetensors"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = plan_of(elsewhere, text, data_root=tmp_path)
    assert ids(moved) == ids(before)
    (tmp_path / "b.json").write_text("[]")
    changed = plan_of(tmp_path, text)
    assert changed.cells[0].nodes["train"] == before.cells[0].nodes["train"]
    assert changed.cells[0].nodes["predict"] != before.cells[0].nodes["predict"]
    (tmp_path / "w.safetensors").write_text("other")
    assert plan_of(tmp_path, text).cells[0].nodes["train"] != before.cells[0].nodes["train"]


def test_a_missing_file_is_named_with_the_places_that_were_tried(tmp_path: Path) -> None:
    with pytest.raises(SuiteError) as caught:
        plan_of(tmp_path, "data: {dataset: coco, val_image_ids: gone.txt}\n")
    assert str(caught.value).startswith(f"{tmp_path / 's.yaml'}: data.val_image_ids: 'gone.txt' does not exist. Tried ")
    assert str(tmp_path / "gone.txt") in str(caught.value)


def test_every_node_follows_its_inputs(tmp_path: Path) -> None:
    text = "data: {dataset: nuclei}\naxes: {product: {eta: [0, 1], hidden_dim: [64, 128]}}\nseeds: [0, 1]\n"
    plan = plan_of(tmp_path, text)
    seen: set[str] = set()
    for node in plan.nodes.values():
        assert set(node.inputs) <= seen
        seen.add(node.id)
    assert {node_id for cell in plan.cells for node_id in cell.nodes.values()} <= seen


def test_only_what_is_measured_is_planned(tmp_path: Path) -> None:
    off = "measure.latency=false", "measure.memory=false", "measure.flops=false"
    assert counts(plan_of(tmp_path, SMALL, *off)) == {"dataset": 1, "train": 1, "predict": 4, "score": 4}
    assert counts(plan_of(tmp_path, SMALL, *off[:2])) == {
        "dataset": 1,
        "train": 1,
        "predict": 4,
        "score": 4,
        "latency": 4,
    }
    assert counts(plan_of(tmp_path, SMALL, "measure.score=false")) == {"dataset": 1, "train": 1, "latency": 4}


STEP = SMALL + "measure: {training_step: true}\n"


def test_a_training_step_is_planned_once_for_all_samplers(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, STEP)
    assert counts(plan)["training_step"] == 1
    (node,) = nodes_of(plan, "training_step")
    assert node.inputs == nodes_of(plan, "latency")[0].inputs
    assert node.spec["measure"] == {"training_step_count": 5}
    assert {"batch_size", "num_train_proposals", "matcher"} <= node.spec["step"].keys()
    assert "log_every" not in node.spec["step"]
    assert "training_step" not in "".join(nodes_of(plan, "latency")[0].spec["measure"])


def test_what_measures_no_training_steps_is_named_as_before_there_were_any(tmp_path: Path) -> None:
    plan, with_steps = plan_of(tmp_path, SMALL), plan_of(tmp_path, STEP)
    for cell, other in zip(plan.cells, with_steps.cells):
        assert not any(name.startswith("training_step") for name in cell.measure)
        assert other.measure["training_step"] is True
        assert {kind: other.nodes[kind] for kind in cell.nodes} == cell.nodes
        assert cell.run_id != other.run_id


@pytest.mark.parametrize(
    ("override", "is_another"),
    [
        ("batch_size=3", True),
        ("num_train_proposals=7", True),
        ("shortest_edge_test=96", True),
        ("training_step_count=9", True),
        ("learning_rate=0.5", False),
        ("max_detections=7", False),
        ("measure.latency_images=3", False),
    ],
)
def test_what_tells_training_steps_of_the_original_apart(tmp_path: Path, override: str, is_another: bool) -> None:
    for name in ("python", "w.pth"):
        (tmp_path / name).touch()
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "r.yaml").touch()
    text = """
        name: one
        engine: {name: original, python: python, checkout: clone, recipe: r.yaml, engine_weights: w.pth}
        measure: {score: false, training_step: true}
    """
    one, other = (plan_of(tmp_path, text, *overrides).cells[0] for overrides in ((), (override,)))
    assert (one.nodes["training_step"] != other.nodes["training_step"]) == is_another
    if is_another:
        assert one.run_id != other.run_id


def test_boxes_only_scores_boxes(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "model: {mask: none}\n")
    assert nodes_of(plan, "score")[0].spec["iou_types"] == ["bbox"]


def test_latency_is_measured_anew_on_another_device_but_the_run_keeps_its_name(tmp_path: Path) -> None:
    auto, cuda = plan_of(tmp_path, SMALL), plan_of(tmp_path, SMALL, device="cuda")
    for one, other in zip(auto.cells, cuda.cells):
        assert {kind for kind in one.nodes if one.nodes[kind] != other.nodes[kind]} == {"latency"}
        assert one.run_id == other.run_id


def test_specs_and_options_are_json_and_give_the_configuration_back(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, SMALL)
    for node in plan.nodes.values():
        assert json.loads(json.dumps([node.spec, node.options])) == [node.spec, node.options]
        Config.model_validate(node.options["config"])
    cell = plan.cells[3]
    assert plan.nodes[cell.nodes["predict"]].options["config"] == cell.config
    assert Config.model_validate(cell.config).sampler.num_proposals == 50
    # A shared training says nothing of the cells that use it.
    assert nodes_of(plan, "train")[0].options["config"]["sampler"]["num_proposals"] == 500


def test_an_axis_without_effect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SuiteError) as caught:
        plan_of(tmp_path, "data: {dataset: coco}\naxes: {product: {shapes_seed: [0, 1]}}\n")
    assert str(caught.value).startswith(f"{tmp_path / 's.yaml'}:2:1: axes: the cells 'shapes_seed=0 seed=0' and ")


def test_lvis_is_scored_by_its_own_protocol_and_coco_keeps_its_ids(tmp_path: Path) -> None:
    lvis = plan_of(tmp_path, "data: {dataset: lvis}\n")
    (score,) = nodes_of(lvis, "score")
    assert score.spec == {"iou_types": ["bbox", "segm"], "class_agnostic": False, "protocol": "lvis"}
    coco = plan_of(tmp_path, "data: {dataset: coco}\n")
    (score,) = nodes_of(coco, "score")
    # As it was recorded before there was another protocol.
    assert score.spec == {"iou_types": ["bbox", "segm"], "class_agnostic": False}
    assert make_id("score", score.spec, [coco.nodes[source].spec_id for source in score.inputs]) == score.spec_id


def test_the_format_of_custom_annotations_belongs_to_the_data_set(tmp_path: Path) -> None:
    for name in ("a.json", "images"):
        (tmp_path / name).touch()
    paths = ", ".join(
        f"{split}_{what}: {name}"
        for split in ("train", "val")
        for what, name in (("annotations", "a.json"), ("images", "images"))
    )
    coco = plan_of(tmp_path, f"data: {{dataset: custom, {paths}}}\n")
    lvis = plan_of(tmp_path, f"data: {{dataset: custom, {paths}, annotation_format: lvis}}\n")
    assert not set(coco.nodes) & set(lvis.nodes)
    assert [node.spec.get("annotation_format") for node in nodes_of(lvis, "dataset")] == ["lvis", "lvis"]
    assert nodes_of(lvis, "score")[0].spec["protocol"] == "lvis"
    # The data set's node says it once.
    assert "annotation_format" not in nodes_of(lvis, "train")[0].spec["data"]


# -- selecting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("only", "labels"),
    [
        ("sampling_steps=1", ["1 20", "1 50"]),
        ("sampling_steps=1 num_proposals=5*", ["1 50"]),
        ("num_proposals=20", ["1 20", "4 20"]),
        ("*=4", ["4 20", "4 50"]),
        ("*", ["1 20", "1 50", "4 20", "4 50"]),
    ],
)
def test_only_keeps_cells_and_what_they_need(tmp_path: Path, only: str, labels: list[str]) -> None:
    plan = plan_of(tmp_path, SMALL, only=only)
    assert [f"{c.axes['sampling_steps']} {c.axes['num_proposals']}" for c in plan.cells] == labels
    assert counts(plan) == {"dataset": 1, "train": 1} | dict.fromkeys(("predict", "score", "latency"), len(labels))


def test_only_by_run_id_and_a_pattern_for_none(tmp_path: Path) -> None:
    run_id = plan_of(tmp_path, SMALL).cells[2].run_id
    assert [cell.run_id for cell in plan_of(tmp_path, SMALL, only=run_id).cells] == [run_id]
    with pytest.raises(SuiteError) as caught:
        plan_of(tmp_path, SMALL, only="sampling_steps=2")
    assert str(caught.value) == (
        "--only sampling_steps=2: matches no cell. Cells: 'sampling_steps=1 num_proposals=20 seed=0', "
        "'sampling_steps=1 num_proposals=50 seed=0', 'sampling_steps=4 num_proposals=20 seed=0' and 1 more"
    )


# -- nodes ------------------------------------------------------------------------------------------------------------


def test_nodes_compare_by_what_determines_them(tmp_path: Path) -> None:
    node = nodes_of(plan_of(tmp_path, SMALL), "train")[0]
    assert node == dataclasses.replace(node, options={})


def test_ten_thousand_cells_are_planned(tmp_path: Path) -> None:
    text = json.dumps(
        {"axes": {"product": {"sampling_steps": list(range(1, 101)), "num_proposals": list(range(1, 101))}}}
    )
    plan = plan_of(tmp_path, text)
    lines = describe_plan(plan, lambda _: False)
    assert len(plan.cells) == 10_000
    assert len(lines) == 30_002


# -- code and content -------------------------------------------------------------------------------------------------


class FakeContents:
    """Digests as they are told."""

    def __init__(self, **splits: str) -> None:
        self.splits, self.file = splits, "w1"

    def of_file(self, path: Path) -> str:
        assert path.is_file()
        return self.file

    def of_split(self, data: DataConfig, split: str, root: Path | None) -> str | None:
        assert (data.dataset, root) == ("coco", None)
        return self.splits.get(split)


COCO = "name: s\ndata: {dataset: coco}\nmodel: {backbone: efficientnet_lite0, backbone_weights: imagenet}\n"


def kinds_that_differ(one: Plan, other: Plan) -> set[str]:
    return {node.kind for node in one.nodes.values() if node.id not in other.nodes}


def test_changed_images_change_what_is_made_of_them_and_no_run_id(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, COCO, contents=FakeContents(train="a", val="b"))
    assert {node.content for node in nodes_of(plan, "dataset")} == {"a", "b"}
    val = plan_of(tmp_path, COCO, contents=FakeContents(train="a", val="c"))
    assert kinds_that_differ(plan, val) == {"dataset", "predict", "score", "latency"}
    train = plan_of(tmp_path, COCO, contents=FakeContents(train="d", val="b"))
    assert kinds_that_differ(plan, train) == {"dataset", "train", "predict", "score", "latency"}
    without = plan_of(tmp_path, COCO)
    assert {other.cells[0].run_id for other in (plan, val, train, without)} == {plan.cells[0].run_id}


def test_weights_of_a_package_count_by_content(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, COCO, contents=FakeContents())
    (train,) = nodes_of(plan, "train")
    assert train.content == "w1"
    other = FakeContents()
    other.file = "w2"
    assert kinds_that_differ(plan, plan_of(tmp_path, COCO, contents=other)) == {"train", "predict", "score", "latency"}


def test_changed_code_changes_ids_and_no_run_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path, SMALL)
    real = plan_module.node_code

    def other_code(kind: str, *arguments: Any, **options: Any) -> Code:
        code = real(kind, *arguments, **options)
        return code if kind != "train" else Code("other", {**code.parts, "diffinst.losses:giou": "other"})

    monkeypatch.setattr(plan_module, "node_code", other_code)
    changed = plan_of(tmp_path, SMALL)
    assert kinds_that_differ(plan, changed) == {"train", "predict", "score", "latency"}
    assert [cell.run_id for cell in plan.cells] == [cell.run_id for cell in changed.cells]
    past = [past_of(node, plan) for node in plan.nodes.values()]
    lines = {line.node.kind: line.why for line in describe_plan(changed, lambda node_id: node_id in plan.nodes, past)}
    assert lines["dataset"] == "stored under this id"
    assert lines["train"] == "stale: code changed: diffinst.losses.giou"
    assert lines["predict"] == "stale: its train changed"


def past_of(node: Node, plan: Plan) -> PastNode:
    return PastNode(
        node.kind,
        node.spec,
        1.0,
        node.inputs,
        spec_id=node.spec_id,
        code=node.code,
        content=node.content,
        parts=plan.codes[node.code],
    )


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ({"a:x": "1"}, {"a:x": "1"}, []),
        ({"a:x": "1"}, {"a:x": "2"}, ["a.x"]),
        ({"a:": "1", "b:y": "1"}, {"a:": "2", "c:z": "1"}, ["a", "b.y", "c.z"]),
    ],
)
def test_changed_parts_are_named(old: dict[str, str], new: dict[str, str], names: list[str]) -> None:
    assert changed_parts(old, new) == names
