"""The real node kinds on a minute data set: one suite from its file to its records, and what can be wrong with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import needs_compiler
from lvis_files import tiny_lvis, write_lvis
from rich.console import Console

from bench.execute import RunOutcome, run_plan
from bench.plan import Plan, build_plan
from bench.record import RunRecord, unpack_resamples
from bench.server import Input, Job
from bench.store import Store
from bench.suite import METRICS, load_suite, metrics_of
from bench.worker import KINDS, _trained_model, main, run_dataset, run_train
from diffinst.checkpoint import load_checkpoint
from diffinst.config import SamplerConfig
from diffinst.data.coco import open_dataset
from diffinst.engine.evaluate import predict_split
from diffinst.errors import CheckpointError, ConfigError, DataError
from diffinst.evaluation.predictions import iter_predictions

SUITE = """
name: minute
data:
  {dataset: shapes, shapes_train_images: 4, shapes_val_images: 3, shapes_image_size: 64, shortest_edge_train: [64],
   longest_edge_train: 64, shortest_edge_test: 64, longest_edge_test: 64, crop_probability: 0.0, eval_batch_size: 2}
model:
  {backbone: tiny, freeze_at: 0, hidden_dim: 16, num_stages: 1, num_attention_heads: 2, dim_feedforward: 16,
   dim_dynamic: 4, mask_branch_channels: 8, mask_branch_layers: 1}
train:
  {iterations: 3, batch_size: 2, num_train_proposals: 10, warmup_iterations: 1, schedule_steps: [], precision: fp32}
axes: {product: {num_proposals: [5, 8]}, include: [{mask: none, num_proposals: 5}]}
measure: {latency_images: 2, latency_seconds: 0.0}
"""


def make_plan(folder: Path, *overrides: str, **options: Any) -> Plan:
    path = folder / "minute.yaml"
    path.write_text(SUITE)
    return build_plan(load_suite(path, list(overrides)), device="cpu", **options)


def run(plan: Plan, root: Path) -> RunOutcome:
    with (root.parent / "screen.txt").open("a") as file:
        return run_plan(plan, Store(root), console=Console(file=file, width=200))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, RunOutcome]:
    folder = tmp_path_factory.mktemp("minute")
    plan = make_plan(folder)
    return folder / "results", plan, run(plan, folder / "results")


@pytest.fixture(scope="module")
def found(done: tuple[Path, Plan, RunOutcome]) -> list[RunRecord]:
    root, _, outcome = done
    assert outcome.exit_code == 0, outcome.failures
    return Store(root).records("minute", outcome.machine)


def test_the_suite_trains_once_and_measures_each_cell(
    done: tuple[Path, Plan, RunOutcome], found: list[RunRecord]
) -> None:
    kinds = [node_id.split("-")[0] for node_id in done[2].executed]
    # Three cells of two models.
    assert sorted(kinds) == ["dataset", *["latency"] * 3, *["predict"] * 3, *["score"] * 3, *["train"] * 2]
    assert len(found) == 3


@needs_compiler
def test_a_compiled_head_is_predicted_timed_and_counted(
    tmp_path: Path, done: tuple[Path, Plan, RunOutcome], found: list[RunRecord]
) -> None:
    plan = make_plan(tmp_path, "sampler.compile=head", only="num_proposals=5 mask=dynamic")
    outcome = run(plan, tmp_path / "results")
    assert outcome.exit_code == 0, outcome.failures
    (record,) = Store(tmp_path / "results").records("minute", outcome.machine)
    (eager,) = (other for other in found if other.axes == record.axes)
    assert record.metrics["flops"] == eager.metrics["flops"]
    conditions = record.environment["conditions"]
    assert conditions["predict"]["determinism"]["why"] == "a compiled head does not tell its operators"
    assert conditions["latency"]["paths"]["box_head"] == ["compiled"]
    by_id = {entry["image_id"]: entry for entry in predictions_of(done[0], eager)}
    for entry in predictions_of(tmp_path / "results", record):
        assert entry["score"] == pytest.approx(by_id[entry["image_id"]]["score"], abs=1e-4)


def predictions_of(root: Path, record: RunRecord) -> list[dict[str, Any]]:
    return list(iter_predictions(Store(root).folder(record.nodes["predict"]) / "predictions"))


def test_records_hold_every_metric_or_the_reason_why_not(found: list[RunRecord]) -> None:
    for record in found:
        expected = set(metrics_of(record.config["data"]))
        assert expected <= set(record.metrics)
        assert not (set(METRICS) - expected) & set(record.metrics)
        missing = {name for name, metric in record.metrics.items() if metric.value is None}
        assert {"peak_memory_bytes/cuda_allocated", "bbox/APl"} <= missing
        assert record.metrics["peak_memory_bytes/cuda_allocated"].reason == "measured on cpu, not on a CUDA device"
        assert not {name for name in missing if name.startswith("latency_s") or name in {"flops", "bbox/AP"}}
        assert record.metrics["num_images"].value == 3
        assert "disc" in record.per_class["bbox/AP"]


def test_a_training_step_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    off = [f"measure.{name}=false" for name in ("score", "latency", "memory", "flops")]
    plan = make_plan(tmp_path, *off, "measure.training_step=true", "training_step_count=2")
    outcome = run(plan, tmp_path / "results")
    assert outcome.exit_code == 0, outcome.failures
    kinds = sorted(node_id.split("-")[0] for node_id in outcome.executed)
    assert kinds == ["dataset", *["train"] * 2, *["training_step"] * 2]  # one for each of two models
    records = Store(tmp_path / "results").records("minute", outcome.machine)
    assert len(records) == 3
    for record in records:
        (seconds,) = record.samples["training_step_s"].values()
        assert len(seconds) == 2
        assert record.metrics["training_step_s/total"].value == pytest.approx(sum(seconds) / 2)
        assert record.metrics["peak_memory_bytes/training_rss"].value > 2**20
        assert record.metrics["peak_memory_bytes/training_cuda_allocated"].reason.startswith("measured on cpu")
        assert record.metrics["latency_s/total"].reason == "not asked for"
        assert record.sample_marks["training_step_s"].keys() == {"contended", "throttled"}
        assert record.measure["training_step"] is True


def test_a_training_step_needs_as_many_images_as_a_batch_has(tmp_path: Path) -> None:
    outcome = run(make_plan(tmp_path, "measure.training_step=true", "batch_size=4"), tmp_path / "results")
    assert outcome.exit_code == 2
    reasons = [failure.reason for failure in outcome.failures.values()]
    assert any("train.batch_size images, 4, but the validation split has 3" in reason for reason in reasons)


def test_scores_are_checked_and_carry_what_images_change(
    done: tuple[Path, Plan, RunOutcome], found: list[RunRecord]
) -> None:
    root, plan, _ = done
    for record in found:
        kinds = ["bbox"] if record.axes["mask"] == "none" else ["bbox", "segm"]
        assert {name.partition("/")[0] for name in record.resamples} == set(kinds)
        assert len(unpack_resamples(record.resamples["bbox/AP"].values)) == 1000
        assert record.metrics["bbox/AP"].error_of == "images"
        assert record.checks["evaluators"]["max_difference"] < 1e-6
        score = Store(root).folder(record.nodes["score"])
        assert [path.name for path in sorted(score.glob("*.npz"))] == [f"matches-{kind}.npz" for kind in kinds]
    assert len({record.resamples["bbox/AP"].images for record in found}) == 1


def test_samples_are_raw_and_fit_together(found: list[RunRecord]) -> None:
    with_masks = next(record for record in found if record.axes["mask"] == "dynamic")
    samples = with_masks.samples["latency_s"]
    assert set(samples) == {"preprocess", "backbone", "head", "masks", "total"}
    assert {len(values) for values in samples.values()} == {2}
    for image in range(2):
        parts = [samples[scope][image] for scope in ("preprocess", "backbone", "head", "masks")]
        assert min(parts) > 0
        assert sum(parts) <= samples["total"][image]
    assert set(with_masks.sample_marks["latency_s"]) == {"contended", "throttled"}


def test_more_proposals_cost_more_operations_and_no_parameter(found: list[RunRecord]) -> None:
    with_masks = [record for record in found if record.axes["mask"] == "dynamic"]
    few, many = sorted(with_masks, key=lambda record: record.axes["num_proposals"])
    assert few.metrics["flops"].value < many.metrics["flops"].value  # type: ignore[operator]
    assert few.metrics["num_parameters"] == many.metrics["num_parameters"]


def test_conditions_are_noted_at_start_and_end_of_each_node(found: list[RunRecord]) -> None:
    for record in found:
        conditions = record.environment["conditions"]
        assert set(conditions) == {"train", "predict", "latency"}
        for noted in conditions.values():
            assert noted["start"]["load_average_1min"] is not None
            assert noted["end"]["load_average_1min"] is not None
            assert noted["between"]["seconds"] > 0
        for kind, part in (("train", "the first iteration"), ("predict", "the first batch")):
            seen = conditions[kind]["determinism"]
            assert seen["of"] == part
            assert seen["operators"] > 50
            assert seen["matmul_dtypes"] == ["float32"]
            assert seen["level"] == "bitwise", seen
        assert "determinism" not in conditions["latency"]
        with_masks = {"mask_head": ["torch"], "masks": ["whole"]} if record.axes["mask"] == "dynamic" else {}
        for kind in ("predict", "latency"):
            # Small layers are left to torch.
            assert conditions[kind]["paths"] == {
                "box_head": ["eager"],
                "box_pooling": ["bags"],
                "linear": ["torch"],
                "precision": ["fp32"],
                **with_masks,
            }
        assert record.environment_id is not None
    assert len({record.environment_id for record in found}) == 1


def test_the_environment_is_of_the_process_and_private(
    done: tuple[Path, Plan, RunOutcome], found: list[RunRecord]
) -> None:
    process = found[0].environment["process"]
    assert process["device"] == "cpu"
    assert process["variables"]["OPENBLAS_NUM_THREADS"]
    text = json.dumps([record.model_dump() for record in found])
    assert str(done[0].parent) not in text
    assert str(Path.home()) + "/" not in text


def test_predictions_are_one_record_an_image(done: tuple[Path, Plan, RunOutcome]) -> None:
    root, plan, _ = done
    for cell in plan.cells:
        folder = Store(root).folder(cell.nodes["predict"]) / "predictions"
        assert len(list(iter_predictions(folder))) == 3


def test_a_lost_checkpoint_costs_nothing_until_it_is_needed(done: tuple[Path, Plan, RunOutcome]) -> None:
    root, plan, outcome = done
    model = Store(root).folder(plan.cells[0].nodes["train"]) / "model.safetensors"
    weights = model.read_bytes()
    model.unlink()
    assert run(plan, root).executed == []
    model.write_bytes(weights)


def test_a_training_killed_at_its_very_end_gives_the_same_outputs(done: tuple[Path, Plan, RunOutcome]) -> None:
    store, cell = Store(done[0]), done[1].cells[0]
    node, source = (done[1].nodes[cell.nodes[kind]] for kind in ("train", "dataset"))
    dataset = Input(source.id, source.kind, store.folder(source.id), source.spec, outputs={})
    job = Job(node, store.folder(node.id), {"dataset": dataset}, environment={}, report=lambda event: None)
    stored = store.result(node.id)
    assert stored is not None
    assert stored.outputs["last_losses"]
    assert run_train(job) == stored.outputs


def test_a_model_without_masks_says_so(found: list[RunRecord]) -> None:
    boxes_only = [record for record in found if record.axes["mask"] == "none"]
    assert len(boxes_only) == 1
    assert boxes_only[0].metrics["segm/AP"].reason == "the model predicts boxes only"
    assert boxes_only[0].metrics["bbox/AP"].value is not None


def test_averaged_weights_are_those_predicted_with(tmp_path: Path) -> None:
    axes = "axes: {product: {use_ema: [false, true]}}"
    path = tmp_path / "minute.yaml"
    path.write_text("\n".join(axes if line.startswith("axes:") else line for line in SUITE.splitlines()))
    settings = ["ema_decay=0.5", "learning_rate=0.01", "num_proposals=5", "eval_batch_size=2"]
    plan = build_plan(load_suite(path, settings), device="cpu")
    assert len({cell.nodes["train"] for cell in plan.cells}) == 1

    inputs: dict[str, Input] = {}
    found = {}
    plain, averaged = sorted(plan.cells, key=lambda cell: cell.axes["use_ema"])
    for kind, cell in (("dataset", plain), ("train", plain), ("predict", plain), ("predict", averaged)):
        node = plan.nodes[cell.nodes[kind]]
        folder = tmp_path / node.id
        folder.mkdir()
        KINDS[kind](Job(node, folder, inputs, environment={}, report=lambda event: None))
        inputs[kind] = Input(node.id, kind, folder, node.spec, outputs={})
        if kind == "predict":
            found[cell.axes["use_ema"]] = list(iter_predictions(folder / "predictions"))

    model, _ = _trained_model(inputs["train"], use_ema=True)
    checkpoint = load_checkpoint(inputs["train"].folder / "model.safetensors")
    assert all(value.equal(checkpoint.ema[name]) for name, value in model.state_dict().items())
    images = open_dataset(checkpoint.config.data, "val", inputs["dataset"].folder)
    predict_split(model, images, SamplerConfig(num_proposals=5), tmp_path / "by_hand", batch_size=2)
    assert list(iter_predictions(tmp_path / "by_hand")) == found[True] != found[False]


def test_lvis_from_its_file_to_its_scores(tmp_path: Path) -> None:
    write_lvis(tmp_path, tiny_lvis())
    files = [f"data.{split}_{what}" for split in ("train", "val") for what in ("annotations=lvis.json", "images=coco")]
    plan = make_plan(
        tmp_path,
        *("dataset=custom", "annotation_format=lvis", *files, "num_proposals=5"),
        *("federated_loss=true", "federated_classes=2", "repeat_threshold=1.0", "class_loss=bce", "iterations=2"),
        data_root=tmp_path,
        only="mask=dynamic",
    )
    (cell,) = plan.cells
    inputs: dict[str, Input] = {}
    for node in plan.nodes.values():
        if node.kind == "latency":
            continue
        folder = tmp_path / node.id
        folder.mkdir()
        outputs = KINDS[node.kind](Job(node, folder, inputs, environment={}, report=lambda event: None))
        inputs[node.kind] = Input(node.id, node.kind, folder, node.spec, outputs=outputs)
    metrics = inputs["score"].outputs["metrics"]
    assert set(metrics) == {name for name, needs in metrics_of(cell.config["data"]).items() if needs == "score"}
    # A cat and two dogs; dogs are rare.
    assert (metrics["num_instances"]["value"], metrics["num_instances/rare"]["value"]) == (3, 2)
    assert metrics["segm/APf"]["value"] is not None
    assert (metrics["segm/APc"]["value"], metrics["segm/APc"]["reason"]) == (None, "no ground truth of common classes")
    assert set(inputs["score"].outputs["per_class"]["bbox/AP"]) == {"dog", "cat"}


def test_an_average_that_the_training_did_not_keep_is_one_line(done: tuple[Path, Plan, RunOutcome]) -> None:
    train = next(node for node in done[1].nodes.values() if node.kind == "train")
    source = Input(train.id, train.kind, Store(done[0]).folder(train.id), train.spec, outputs={})
    with pytest.raises(CheckpointError, match="no moving average of the weights. Set sampler.use_ema") as caught:
        _trained_model(source, use_ema=True)
    assert "\n" not in str(caught.value)


def test_a_data_set_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "dataset=nuclei", "num_proposals=5", data_root=tmp_path)
    node = next(iter(plan.nodes.values()))
    job = Job(node, tmp_path, inputs={}, environment={}, report=lambda event: None)
    with pytest.raises(DataError, match="dataset 'nuclei', train split: not found. Tried .*--data-root") as caught:
        run_dataset(job)
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    node = next(node for node in plan.nodes.values() if node.kind == "train")
    node.options["device"] = "cuda:99"
    job = Job(node, tmp_path, inputs={}, environment={}, report=lambda event: None)
    with pytest.raises(ConfigError, match="--device cuda:99: cannot be used here"):
        run_train(job)


def test_a_device_that_cannot_detect_is_one_line_before_anything_is_trained(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, "mask_head_kernel=triton", "num_proposals=5")
    node = next(node for node in plan.nodes.values() if node.kind == "train")
    source = Input("dataset", "dataset", tmp_path, {}, outputs={})
    with pytest.raises(ConfigError, match="mask_head_kernel 'triton'") as caught:
        run_train(Job(node, tmp_path, inputs={"dataset": source}, environment={}, report=lambda event: None))
    assert "\n" not in str(caught.value)


def test_the_worker_forks_with_one_thread_and_no_cuda() -> None:
    code = (
        "import os, sys, bench.worker, torch; "
        "print(len(os.listdir('/proc/self/task')) if sys.platform == 'linux' else 1, torch.cuda.is_initialized())"
    )
    environment = {"PATH": "", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["1", "False"]


def test_it_is_not_for_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err
