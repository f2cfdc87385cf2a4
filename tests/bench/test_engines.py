"""Engines in suites and plans: what may be written, what it is called, and what tells runs apart."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bench.engines import (
    DEFAULT_RECIPES,
    ENGINES,
    USED,
    EngineConfig,
    code_digest,
    engine_identity,
    engine_labels,
    used_fields,
)
from bench.errors import SuiteError, SuiteErrors
from bench.outlook import describe_plan
from bench.plan import Node, Plan, build_plan, past_of_record
from bench.suite import Suite, load_suite
from diffinst.config import SECTIONS

ORIGINAL = "{name: original, python: P, checkout: clone, recipe: configs/a.yaml, engine_weights: w.pth}"


def load(folder: Path, text: str, *overrides: str) -> Suite:
    path = folder / "s.yaml"
    path.write_text(textwrap.dedent(text))
    return load_suite(path, overrides)


def plan_of(folder: Path, text: str, *overrides: str, **options: Any) -> Plan:
    return build_plan(load(folder, text, *overrides), **options)


def mistakes(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(SuiteErrors) as caught:
        load(folder, text, *overrides)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def engines_of(suite: Suite) -> dict[str, dict[str, Any]]:
    """Label -> what was set."""
    return {cell.axes["engine"]: cell.engine.model_dump(exclude_defaults=True) for cell in suite.cells}


def node(plan: Plan, cell: int, kind: str) -> Node:
    return plan.nodes[plan.cells[cell].nodes[kind]]  # type: ignore[index]


# -- suites -----------------------------------------------------------------------------------------------------------


def test_a_bare_name_is_an_engine(tmp_path: Path) -> None:
    suite = load(tmp_path, "engine: torchvision\n")
    assert suite.cells[0].engine == EngineConfig(name="torchvision")
    assert suite.cells[0].axes == {"seed": 0}
    assert load(tmp_path, "description: x\n").cells[0].engine.is_default


def test_engines_are_an_axis_with_short_names(tmp_path: Path) -> None:
    suite = load(
        tmp_path,
        """
        engine: {python: P}
        axes:
          product: {engine: [diffinst, torchvision, {name: detectron2, options: {A.B: [1, 2.5]}}]}
        """,
    )
    assert engines_of(suite) == {
        "diffinst": {},
        "torchvision": {"name": "torchvision"},
        "detectron2": {"name": "detectron2", "python": "P", "options": {"A.B": [1, 2.5]}},
    }


def test_engines_of_one_name_are_called_by_what_differs() -> None:
    def peer(**values: Any) -> EngineConfig:
        return EngineConfig(name="detectron2", python="P", **values)

    assert engine_labels([EngineConfig(), peer(), peer(recipe="x/y.yaml")]) == [
        "diffinst",
        "detectron2:mask_rcnn_R_50_FPN_3x",
        "detectron2:y",
    ]
    assert engine_labels([peer(options={"A.B": 1}), peer(options={"A.B": 2}), peer()]) == [
        "detectron2:B=1",
        "detectron2:B=2",
        "detectron2",
    ]
    assert engine_labels([peer(engine_weights="a/w.pth"), peer()]) == ["detectron2:w", "detectron2:none"]


def test_an_excluded_engine_is_named_by_its_name(tmp_path: Path) -> None:
    suite = load(
        tmp_path,
        """
        axes:
          product:
            engine: [diffinst, {name: torchvision, recipe: maskrcnn_tiny_fpn}]
            sampling_steps: [1, 4]
          exclude: [{engine: torchvision, sampling_steps: 4}]
        """,
    )
    assert [(cell.axes["engine"], cell.axes["sampling_steps"]) for cell in suite.cells] == [
        ("diffinst", 1),
        ("diffinst", 4),
        ("torchvision", 1),
    ]


def test_the_interpreter_may_be_given_for_all_on_the_command_line(tmp_path: Path) -> None:
    text = "axes: {product: {engine: [torchvision, detectron2, {name: detectron2, python: Q, recipe: r.yaml}]}}\n"
    found = engines_of(load(tmp_path, text, "engine.python=/p"))
    assert [engine.get("python") for engine in found.values()] == [None, "/p", "/p"]
    assert mistakes(tmp_path, "engine: torchvision\n", "engine.python=/p") == [
        "--set engine.python=/p: no engine of this suite takes it. Allowed for: detectron2, original"
    ]


def test_overrides(tmp_path: Path) -> None:
    assert load(tmp_path, "description: x\n", "engine=torchvision").cells[0].engine.name == "torchvision"
    suite = load(tmp_path, "engine: torchvision\n", "engine.recipe=maskrcnn_tiny_fpn")
    assert suite.cells[0].engine.recipe == "maskrcnn_tiny_fpn"
    axes = "axes: {product: {engine: [diffinst, torchvision]}}\n"
    assert list(engines_of(load(tmp_path, axes, "engine=torchvision"))) == ["torchvision"]
    assert list(engines_of(load(tmp_path, axes, "engine=[torchvision, diffinst]"))) == ["torchvision", "diffinst"]
    assert mistakes(tmp_path, axes, "engine.recipe=x") == [
        "--set engine.recipe=x: engine is varied at s.yaml:1. Choose cells with --only, or change the suite"
    ]
    assert mistakes(tmp_path, axes, "engine.recipes=x") == [
        "--set engine.recipes=x: unknown key. Allowed: name, python, checkout, recipe, engine_weights, options. "
        "Did you mean 'recipe'?"
    ]


NAMES = ", ".join(ENGINES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "engine: torchvison\n",
            f"s.yaml:1:9: engine: 'torchvison' is not allowed. Allowed: {NAMES}. Did you mean 'torchvision'?",
        ),
        (
            "engine: 3\n",
            f"s.yaml:1:9: engine: 3 is not allowed. Allowed: {NAMES}, or a mapping of name, python, checkout, recipe, "
            "engine_weights, options",
        ),
        (
            "engine: {nme: torchvision}\n",
            "s.yaml:1:10: engine.nme: unknown key. Allowed: name, python, checkout, recipe, engine_weights, options. "
            "Did you mean 'name'?",
        ),
        (
            "engine: {name: torchvision, recipe: maskrcnn_tiny}\n",
            "s.yaml:1:37: engine.recipe: 'maskrcnn_tiny' is not allowed. Allowed: maskrcnn_resnet50_fpn_v2, "
            "maskrcnn_resnet50_fpn, maskrcnn_tiny_fpn. Did you mean 'maskrcnn_tiny_fpn'?",
        ),
        (
            "engine: {name: torchvision, python: P}\n",
            "s.yaml:1:37: engine.python: not for engine torchvision. Allowed for: detectron2, original",
        ),
        (
            "engine: {engine_weights: w.pth}\n",
            "s.yaml:1:26: engine.engine_weights: not for engine diffinst (model.weights is the file of its weights). "
            "Allowed for: torchvision, detectron2, original",
        ),
        (
            "engine: detectron2\n",
            "s.yaml:1:9: engine: engine detectron2 needs python: the path of an interpreter that has detectron2 "
            "(`tox -e detectron2` makes .tox/detectron2/bin/python), or --set engine.python=PATH",
        ),
        (
            "engine: {name: original, python: P}\n",
            "s.yaml:1:16: engine: engine original needs checkout: the folder of a local clone of DiffusionInst or "
            "DiffusionDet",
        ),
        (
            "engine: {name: detectron2, python: P, options: {A: {b: 1}}}\n",
            "s.yaml:1:48: engine.options: {A: {b: 1}} is not allowed. Allowed: a mapping from names to plain values or "
            "lists of them",
        ),
        (
            "engine: {name: detectron2, python: P, options: {A: .inf}}\n",
            "s.yaml:1:48: engine.options: {A: inf} is not allowed. Allowed: a mapping from names to plain values or "
            "lists of them",
        ),
        (
            "axes: {product: {engine: [torchvision, torchvision]}}\n",
            "s.yaml:1:40: axes.product.engine: 'torchvision' is there twice. Keep one of the two",
        ),
        (
            "axes: {product: {engine.recipe: [a, b]}}\n",
            "s.yaml:1:18: axes.product.engine.recipe: unknown field. Allowed: a field of model, sampler, train or "
            "data, one of these sections, preset, or engine. An axis takes whole engines: "
            "'engine: [{name: ..., recipe: ...}]'",
        ),
        (
            "model: {weights: w.safetensors}\naxes: {product: {engine: [diffinst, torchvision]}}\n",
            "s.yaml:2:37: axes.engine: model.weights is for engine diffinst, not torchvision. Use engine_weights "
            "(in the cells with engine=torchvision)",
        ),
    ],
)
def test_mistakes_are_told_with_their_place(tmp_path: Path, text: str, expected: str) -> None:
    assert mistakes(tmp_path, text) == [expected]


def test_a_section_that_is_built_elsewhere_is_checked_too() -> None:
    with pytest.raises(ValidationError, match="python: not for engine torchvision"):
        EngineConfig(name="torchvision", python="P")
    with pytest.raises(ValidationError, match="needs engine_weights: a file of its weights"):
        EngineConfig(name="original", python="P", checkout="c", recipe="r")


def test_tables_may_have_engines(tmp_path: Path) -> None:
    suite = load(
        tmp_path,
        """
        axes: {product: {engine: [diffinst, torchvision]}}
        seeds: [0, 1]
        tables: [{rows: engine, columns: seed, metric: segm/AP}]
        plots: [{x: latency_s/total, y: segm/AP, lines: engine}]
        """,
    )
    assert suite.tables[0].rows == "engine"


# -- plans ------------------------------------------------------------------------------------------------------------

TWO = "axes: {product: {engine: [diffinst, torchvision]}}\n"


def test_our_own_model_keeps_its_ids(tmp_path: Path) -> None:
    plain = plan_of(tmp_path, "description: x\n").cells[0]
    for text in ("engine: diffinst\n", "engine: {name: diffinst}\n", TWO):
        cell = plan_of(tmp_path, text).cells[0]
        assert (cell.run_id, cell.nodes, cell.config) == (plain.run_id, plain.nodes, plain.config)
    assert "engine" not in plain.config


def test_a_peer_shares_the_data_set_and_nothing_else(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, TWO)
    ours, theirs = plan.cells
    assert ours.nodes["dataset"] == theirs.nodes["dataset"]
    assert not {*ours.nodes.values()} & {*theirs.nodes.values()} - {ours.nodes["dataset"]}
    assert theirs.config["engine"]["name"] == "torchvision"
    spec = node(plan, 1, "train").spec
    assert spec["engine"] == {"name": "torchvision", "recipe": "maskrcnn_resnet50_fpn_v2"}
    assert "model" not in spec
    assert "ota_k" not in spec["train"]
    assert node(plan, 1, "train").options["engine"]["recipe"] == "maskrcnn_resnet50_fpn_v2"
    assert "engine" not in node(plan, 0, "train").options


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("iterations=101", {"train", "predict", "score", "latency"}),
        ("batch_size=3", {"train", "predict", "score", "latency"}),
        ("schedule=cosine", {"train", "predict", "score", "latency"}),
        ("seeds=[1]", {"train", "predict", "score", "latency"}),
        ("flip_probability=0", {"train", "predict", "score", "latency"}),
        ("engine.recipe=maskrcnn_tiny_fpn", {"train", "predict", "score", "latency"}),
        ("max_detections=7", {"predict", "score", "latency"}),
        ("mask_threshold=0.4", {"predict", "score", "latency"}),
        ("shortest_edge_test=96", {"predict", "score", "latency"}),
        ("sampling_steps=4", set()),
        ("num_proposals=7", set()),
        ("backbone=tiny", set()),
        ("ota_k=3", set()),
        ("checkpoint_every=3", set()),
    ],
)
def test_what_a_peer_does_not_look_at_changes_no_id(tmp_path: Path, override: str, changed: set[str]) -> None:
    before = plan_of(tmp_path, "engine: torchvision\n").cells[0]
    after = plan_of(tmp_path, "engine: torchvision\n", override).cells[0]
    assert {kind for kind in before.nodes if before.nodes[kind] != after.nodes[kind]} == changed
    assert (before.run_id != after.run_id) == bool(changed)


def test_peers_that_train_here_clip_gradients_alike(tmp_path: Path) -> None:
    for engine in ("torchvision", "{name: detectron2, python: P}"):
        before, after = (
            plan_of(tmp_path, f"engine: {engine}\n", f"clip_gradient_norm={norm}").cells[0] for norm in (1, 2)
        )
        assert before.nodes["train"] != after.nodes["train"]
        other = plan_of(tmp_path, f"engine: {engine}\n", "clip_gradient_norm=1", "nms_iou_threshold=0.3").cells[0]
        assert other.nodes == before.nodes  # suppression is the recipe's


def test_cells_that_a_peer_cannot_tell_apart_are_named(tmp_path: Path) -> None:
    text = "axes: {product: {engine: [diffinst, torchvision], sampling_steps: [1, 4]}}\n"
    with pytest.raises(SuiteError, match=r"'engine=torchvision sampling_steps=1 seed=0' and .* would be the same run"):
        plan_of(tmp_path, text)


def test_where_an_engine_is_installed_changes_no_id(tmp_path: Path) -> None:
    interpreter = tmp_path / "bin" / "python"
    interpreter.parent.mkdir()
    interpreter.touch()
    cells = [plan_of(tmp_path, f"engine: {{name: detectron2, python: {python}}}\n") for python in ("P", "bin/python")]
    assert cells[0].cells[0].nodes == cells[1].cells[0].nodes
    assert cells[0].cells[0].run_id == cells[1].cells[0].run_id
    assert node(cells[0], 0, "train").options["engine"]["python"] == "P"
    assert node(cells[1], 0, "train").options["engine"]["python"] == str(interpreter)


def test_recipes_weights_and_options_of_another_interpreter_count(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: 1\n")
    (tmp_path / "w.pth").write_text("w")

    def run_id(*fields: str) -> str:
        return (
            plan_of(tmp_path, f"engine: {{{', '.join(['name: detectron2', 'python: P', *fields])}}}\n").cells[0].run_id
        )

    ids = [run_id(), run_id("recipe: r.yaml"), run_id("options: {A: 1}"), run_id("engine_weights: w.pth")]
    (tmp_path / "r.yaml").write_text("a: 2\n")
    (tmp_path / "w.pth").write_text("v")
    ids += [run_id("recipe: r.yaml"), run_id("engine_weights: w.pth")]
    assert len(set(ids)) == 6


def make_checkout(folder: Path) -> Path:
    clone = folder / "clone"
    (clone / "configs").mkdir(parents=True)
    (clone / "configs" / "a.yaml").write_text("x: 1\n")
    (clone / "model.py").write_text("pass\n")
    (folder / "w.pth").write_text("w")
    return clone


def test_the_code_of_a_checkout_counts_and_what_it_writes_does_not(tmp_path: Path) -> None:
    clone = make_checkout(tmp_path)
    before = plan_of(tmp_path, f"engine: {ORIGINAL}\n").cells[0]
    assert set(before.nodes) == {"dataset", "weights", "predict", "score", "latency"}
    (clone / "output").mkdir()
    (clone / "output" / "config.yaml").write_text("y")
    (clone / ".git").mkdir()
    (clone / ".git" / "x.py").write_text("y")
    (clone / "notes.txt").write_text("y")
    assert plan_of(tmp_path, f"engine: {ORIGINAL}\n").cells[0].run_id == before.run_id
    (clone / "model.py").write_text("1\n")
    assert plan_of(tmp_path, f"engine: {ORIGINAL}\n").cells[0].run_id != before.run_id
    (clone / "model.py").rename(clone / "other.py")
    digest = code_digest(clone)
    (clone / "other.py").rename(clone / "model.py")
    assert code_digest(clone) != digest
    with pytest.raises(SuiteError, match=r"engine.recipe: 'configs/b.yaml' is no file in .*clone"):
        plan_of(tmp_path, f"engine: {ORIGINAL.replace('a.yaml', 'b.yaml')}\n")


def test_what_an_original_names_is_found_below_the_data_root_the_suite_or_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, root = tmp_path / "here", tmp_path / "root"
    for folder in (here, root):
        folder.mkdir()
    monkeypatch.chdir(here)
    found = []
    for place in (here, tmp_path, root):  # the later ones are looked at first
        make_checkout(place)
        engine = node(plan_of(tmp_path, f"engine: {ORIGINAL}\n", data_root=root), 0, "predict").options["engine"]
        assert engine["checkout"] == str(place / "clone")
        assert engine["engine_weights"] == str(place / "w.pth")
        found.append(engine["recipe"])
    assert found == ["configs/a.yaml"] * 3


def test_the_recipe_of_a_checkout_is_the_one_inside_it(tmp_path: Path) -> None:
    make_checkout(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a.yaml").write_text("x: 2\n")  # beside the suite, under the same name
    engine = node(plan_of(tmp_path, f"engine: {ORIGINAL}\n"), 0, "predict").options["engine"]
    assert engine["recipe"] == "configs/a.yaml"
    (tmp_path / "configs" / "b.yaml").write_text("x: 2\n")
    with pytest.raises(SuiteError, match=r"'configs/b.yaml' is no file in .*clone"):
        plan_of(tmp_path, f"engine: {ORIGINAL.replace('a.yaml', 'b.yaml')}\n")


def test_a_recipe_of_detectron2_is_a_file_where_there_is_one_else_a_name(tmp_path: Path) -> None:
    text = "engine: {name: detectron2, python: P, recipe: r.yaml}\n"
    assert node(plan_of(tmp_path, text), 0, "train").options["engine"]["recipe"] == "r.yaml"
    (tmp_path / "r.yaml").write_text("x: 1\n")
    assert node(plan_of(tmp_path, text), 0, "train").options["engine"]["recipe"] == str(tmp_path / "r.yaml")


# -- weights from files -----------------------------------------------------------------------------------------------


def test_a_model_with_weights_is_not_trained_and_its_content_counts(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_text("one")
    text = "model: {weights: w.safetensors}\n"
    plan = plan_of(tmp_path, text)
    cell = plan.cells[0]
    assert list(cell.nodes) == ["dataset", "weights", "predict", "score", "latency"]
    assert node(plan, 0, "predict").inputs == (cell.nodes["weights"], cell.nodes["dataset"])
    assert node(plan, 0, "weights").inputs == (cell.nodes["dataset"],)
    config = node(plan, 0, "predict").options["config"]
    assert config["model"]["weights"] == str(tmp_path / "w.safetensors")
    assert str(tmp_path) not in json.dumps([found.spec for found in plan.nodes.values()])
    for override in ("iterations=7", "ota_k=3", "learning_rate=1.0"):
        assert plan_of(tmp_path, text, override).cells[0].run_id == cell.run_id
    assert plan_of(tmp_path, text, "class_agnostic=true").cells[0].nodes["weights"] != cell.nodes["weights"]
    (tmp_path / "v.safetensors").write_text("one")
    assert plan_of(tmp_path, text.replace("w.s", "v.s")).cells[0].run_id == cell.run_id
    (tmp_path / "w.safetensors").write_text("two")
    assert plan_of(tmp_path, text).cells[0].run_id != cell.run_id
    with pytest.raises(SuiteError, match="would be the same run"):
        plan_of(tmp_path, text, "seeds=[0, 1]")


def test_a_cell_whose_weights_are_not_there_is_missing_and_the_others_are_planned(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_text("one")
    text = "axes: {product: {weights: [w.safetensors, gone.safetensors, none]}}\n"
    here, gone, trained = plan_of(tmp_path, text).cells
    assert (here.missing, trained.missing) == (None, None)
    assert gone.nodes == {}
    assert gone.missing == (
        "model.weights: 'gone.safetensors' does not exist below the suite's folder or the current one"
    )
    assert "the data root" in str(plan_of(tmp_path, text, data_root=tmp_path).cells[1].missing)
    assert len({here.run_id, gone.run_id, trained.run_id}) == 3
    (other,) = plan_of(tmp_path, text, only="gone*").cells
    assert other.run_id == gone.run_id
    lines = describe_plan(plan_of(tmp_path, text), lambda _: False)
    assert {line.node.id for line in lines} == {*here.nodes.values(), *trained.nodes.values()}


def test_a_peer_without_its_checkout_or_weights_is_missing(tmp_path: Path) -> None:
    assert str(plan_of(tmp_path, f"engine: {ORIGINAL}\n").cells[0].missing).startswith("engine.engine_weights: 'w.pth'")
    (tmp_path / "w.pth").write_text("w")
    assert str(plan_of(tmp_path, f"engine: {ORIGINAL}\n").cells[0].missing).startswith("engine.checkout: 'clone'")


# -- what a plan says -------------------------------------------------------------------------------------------------


def test_a_plan_says_what_is_trained_and_for_how_long(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_text("w")
    plan = plan_of(tmp_path, "engine: torchvision\ntrain: {iterations: 50}\n")
    cell = plan.cells[0]
    seconds = {"dataset": 1.0, "train": 30.0, "predict": 4.0, "score": 2.0, "latency": 5.0}
    past = past_of_record(cell.config, cell.measure, dict(cell.nodes), seconds)
    longer = plan_of(tmp_path, "engine: torchvision\ntrain: {iterations: 100}\n")
    lines = {line.node.kind: line for line in describe_plan(longer, lambda _: False, past)}
    assert lines["train"].what.startswith("torchvision maskrcnn_resnet50_fpn_v2 on shapes, 100 iterations")
    assert {kind: line.estimate_s for kind, line in lines.items()} == seconds | {"train": 60.0}
    ours = {line.node.kind: line for line in describe_plan(plan_of(tmp_path, "seeds: [0]\n"), lambda _: False, past)}
    assert ours["train"].estimate_s is None
    given = plan_of(tmp_path, "engine: {name: torchvision, engine_weights: w.pth}\n")
    lines = {line.node.kind: line for line in describe_plan(given, lambda _: False)}
    assert lines["weights"].what == "torchvision maskrcnn_resnet50_fpn_v2 with weights w.pth, for shapes"


def test_what_is_used_are_fields() -> None:
    for name, sections in USED.items():
        assert name in ENGINES
        for section, fields in sections.items():
            assert set(fields) <= set(SECTIONS[section].model_fields)
    values = SECTIONS["sampler"]().model_dump(mode="json")
    assert used_fields("diffinst", "sampler", values) == values
    assert set(used_fields("torchvision", "sampler", values)) == {"max_detections", "mask_threshold"}


def test_identity_leaves_out_where_things_are() -> None:
    engine = EngineConfig(name="detectron2", python="/a/b", engine_weights="/c/d.pth").model_dump(mode="json")
    assert engine_identity(engine, {"engine_weights": "12ab"}) == {
        "name": "detectron2",
        "recipe": DEFAULT_RECIPES["detectron2"],
        "engine_weights": "12ab",
    }
