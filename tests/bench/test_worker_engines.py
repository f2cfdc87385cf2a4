"""Peers, and models with weights from a file, through the real worker: one suite in which some cells cannot be run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.execute import RunOutcome, run_plan
from bench.plan import Cell, Plan, build_plan
from bench.record import RunRecord
from bench.report.build import select
from bench.report.conditions import conditions
from bench.report.tables import long_table, to_markdown
from bench.server import Input, Job
from bench.store import Store
from bench.suite import load_suite, metrics_of
from bench.worker import run_weights
from diffinst.build import seeded_model
from diffinst.checkpoint import save_checkpoint
from diffinst.config import Config
from diffinst.errors import CheckpointError, ConfigError, DataError
from diffinst.evaluation.predictions import iter_predictions

FAKE = Path(__file__).resolve().parents[1] / "fake_peer.py"
SUITE = """
name: minute
data:
  {dataset: shapes, shapes_train_images: 4, shapes_val_images: 3, shapes_image_size: 64, shortest_edge_train: [64],
   longest_edge_train: 64, shortest_edge_test: 64, longest_edge_test: 64, crop_probability: 0.0, eval_batch_size: 2}
model:
  {backbone: tiny, freeze_at: 0, hidden_dim: 16, num_stages: 1, num_attention_heads: 2, dim_feedforward: 16,
   dim_dynamic: 4, mask_branch_channels: 8, mask_branch_layers: 1}
train: {iterations: 3, batch_size: 2, warmup_iterations: 1, schedule_steps: []}
sampler: {num_proposals: 5}
engine: {python: fake-python}
axes:
  include:
    - {engine: {name: torchvision, recipe: maskrcnn_tiny_fpn}}
    - {engine: detectron2}
    - {engine: {name: detectron2, options: {mode: mistake}}}
    - {weights: given.safetensors}
    - {weights: gone.safetensors}
measure: {latency_images: 2, latency_seconds: 0.0}
"""
TORCHVISION, PEER, FAILING, GIVEN, GONE = range(5)


def make_plan(folder: Path) -> Plan:
    """Writes the suite, an 'interpreter' that runs the fake peer whatever it is asked to run, and the weights."""
    interpreter = folder / "fake-python"
    interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$2"\n')
    interpreter.chmod(0o755)
    path = folder / "minute.yaml"
    path.write_text(SUITE)
    suite = load_suite(path)
    save_weights(folder / "given.safetensors", suite.base)
    return build_plan(suite, device="cpu")


def save_weights(path: Path, config: Config, class_names: tuple[str, ...] = (), **model: Any) -> None:
    model_config = config.model.model_copy(update={"num_classes": 4, **model})
    state = seeded_model(model_config, 0).state_dict()
    config = config.model_copy(update={"model": model_config})
    save_checkpoint(path, model=state, config=config, iteration=1, class_names=class_names)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, RunOutcome]:
    folder = tmp_path_factory.mktemp("minute")
    plan = make_plan(folder)
    with (folder / "screen.txt").open("w") as file:
        outcome = run_plan(plan, Store(folder / "results"), console=Console(file=file, width=200))
    return folder, plan, outcome


@pytest.fixture(scope="module")
def records(done: tuple[Path, Plan, RunOutcome]) -> dict[str, RunRecord]:
    found = Store(done[0] / "results").records("minute", done[2].machine)
    return {record.run_id: record for record in found}


def cell_of(done: tuple[Path, Plan, RunOutcome], number: int) -> Cell:
    return done[1].cells[number]


def test_what_can_be_run_is_run_and_the_rest_is_told(done: tuple[Path, Plan, RunOutcome]) -> None:
    folder, plan, outcome = done
    assert outcome.ok == [plan.cells[number].run_id for number in (TORCHVISION, PEER, GIVEN)], outcome.failures
    assert outcome.failed == [plan.cells[FAILING].run_id]
    assert outcome.missing == [plan.cells[GONE].run_id]
    assert outcome.exit_code == 2  # of the mistake; what is missing alone gives 1
    screen = (folder / "screen.txt").read_text()
    assert (
        "missing engine=diffinst weights=gone.safetensors seed=0: model.weights: 'gone.safetensors' does not" in screen
    )
    assert "engine detectron2: detectron2 is not installed. Install it" in screen
    assert RunOutcome("m", missing=["x"]).exit_code == 1


def test_torchvision_is_measured_like_ours(done: tuple[Path, Plan, RunOutcome], records: dict[str, RunRecord]) -> None:
    record = records[cell_of(done, TORCHVISION).run_id]
    assert record.config["engine"]["recipe"] == "maskrcnn_tiny_fpn"
    assert set(metrics_of(record.config["data"])) <= set(record.metrics)
    assert set(record.samples["latency_s"]) == {"preprocess", "total"}
    assert record.metrics["latency_s/backbone"].reason == "the engine does not time it apart"
    for name in ("segm/AP", "bbox/AP", "latency_s/total", "flops", "num_parameters", "peak_memory_bytes/rss"):
        assert record.metrics[name].value is not None, name
    assert record.metrics["num_images"].value == 3
    folder = Store(done[0] / "results").folder(record.nodes["train"])
    assert (folder / "model.safetensors").is_file()
    assert not (folder / "checkpoint.safetensors").exists()


def test_an_engine_of_another_interpreter_is_scored_by_the_same_code(
    done: tuple[Path, Plan, RunOutcome], records: dict[str, RunRecord]
) -> None:
    record = records[cell_of(done, PEER).run_id]
    assert record.metrics["num_images"].value == 3
    assert record.metrics["segm/AP"].value is not None
    assert record.metrics["latency_s/total"].value == 0.25
    assert record.metrics["flops"].reason == "engine detectron2 does not count it"
    assert record.environment["process"]["engine"] == "detectron2"
    assert record.environment["process"]["packages"] == {"torch": "2.1"}
    store = Store(done[0] / "results")
    assert len(list(iter_predictions(store.folder(record.nodes["predict"]) / "predictions"))) == 3
    assert not (store.folder(record.nodes["predict"]) / "results.jsonl").exists()
    trained = store.result(record.nodes["train"])
    assert trained is not None
    assert trained.outputs == {"num_parameters": 7, "last_losses": {"loss": 1.0}}
    assert set(trained.files) == {"weights.pth", "losses.jsonl"}


def test_a_peer_that_fails_says_why_in_its_record(
    done: tuple[Path, Plan, RunOutcome], records: dict[str, RunRecord]
) -> None:
    record = records[cell_of(done, FAILING).run_id]
    assert record.status == "failed"
    assert record.reason == "train: engine detectron2: detectron2 is not installed. Install it"
    assert record.label == "engine=detectron2:mode=mistake weights=none seed=0"
    assert "loading" in str(record.log)


def test_a_model_with_weights_is_measured_without_training(
    done: tuple[Path, Plan, RunOutcome], records: dict[str, RunRecord]
) -> None:
    record = records[cell_of(done, GIVEN).run_id]
    assert "train" not in record.nodes
    assert record.node_runs["weights"].attempts == 1
    assert record.metrics["segm/AP"].value is not None
    assert set(record.samples["latency_s"]) == {"preprocess", "backbone", "head", "masks", "total"}


def test_reports_show_the_engines_and_what_is_missing(
    done: tuple[Path, Plan, RunOutcome], records: dict[str, RunRecord]
) -> None:
    rows = select([record.model_dump(mode="json") for record in records.values()], done[1].cells).records
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "ok", "skipped"]
    text = to_markdown(long_table(rows))
    assert "detectron2:mode=mistake" in text
    assert "'gone.safetensors' does not exist" in text
    phrases = conditions(rows[:2], [])
    assert "torchvision maskrcnn_tiny_fpn / detectron2 mask_rcnn_R_50_FPN_3x" in phrases
    assert conditions([rows[GIVEN]], [])[3] == "weights from a file"
    (software,) = (phrase for phrase in conditions(rows[:2], []) if phrase.startswith("torch "))
    assert software.endswith(" / torch 2.1")


def test_a_record_from_where_the_weights_are_is_shown_where_they_are_not(
    done: tuple[Path, Plan, RunOutcome], records: dict[str, RunRecord]
) -> None:
    given = cell_of(done, GIVEN)
    record = records[given.run_id].model_dump(mode="json")
    gone = Cell("0" * 16, given.label, given.axes, given.config, {}, given.measure, missing="no such file")
    assert select([record], [gone]).records == (record,)
    other = Cell("0" * 16, given.label, {**given.axes, "seed": 1}, given.config, {}, given.measure, missing="no file")
    assert select([record], [other]).records[0]["status"] == "skipped"


# -- weights that do not fit ------------------------------------------------------------------------------------------


def check(done: tuple[Path, Plan, RunOutcome], path: Path, **model: Any) -> dict[str, Any]:
    """What the weights node says of another file, or with other settings of the model."""
    folder, plan, _ = done
    cell = plan.cells[GIVEN]
    node = plan.nodes[cell.nodes["weights"]]
    config = dict(node.options["config"])
    config["model"] = {**config["model"], "weights": str(path), **model}
    source = plan.nodes[cell.nodes["dataset"]]
    dataset = Input(source.id, "dataset", Store(folder / "results").folder(source.id), source.spec, outputs={})
    changed = type(node)(node.id, "weights", node.inputs, node.spec, {**node.options, "config": config})
    job = Job(changed, path.parent, {"dataset": dataset}, environment={}, report=lambda event: None)
    return run_weights(job)


def test_weights_are_checked_against_the_model(done: tuple[Path, Plan, RunOutcome], tmp_path: Path) -> None:
    base = Config.model_validate(done[1].cells[GIVEN].config)
    path = tmp_path / "w.safetensors"
    save_weights(path, base)
    assert check(done, path)["num_parameters"] > 1000
    with pytest.raises(CheckpointError, match="checkpoint of another model"):
        check(done, path, hidden_dim=32)
    with pytest.raises(ConfigError, match=r"was trained with model.snr_scale 2.0, but the suite has 1.0"):
        check(done, path, snr_scale=1.0)
    save_weights(path, base, ("a", "b", "c", "d"))
    with pytest.raises(DataError, match="categories that are not the 4 the model was trained on"):
        check(done, path)
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        check(done, path)
