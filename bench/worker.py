"""The node kinds: what a data set, training, prediction, score and latency node computes. The bridge to the model.

Run by `bench.execute` through `bench.start`; see `bench.server` for how nodes become processes.
Everything is imported at the top on purpose: once, before the first fork, and nothing of it may start CUDA or a thread.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench.measure.environment import process_environment
from bench.measure.flops import count_flops, count_parameters
from bench.measure.latency import Timer, measure_latency, summarise_latency
from bench.measure.memory import peak_memory_bytes, reset_peak
from bench.record import metric
from bench.server import Input, Job, serve
from diffinst.build import build_model, seeded_model
from diffinst.checkpoint import load_checkpoint, load_model_weights
from diffinst.config import Config
from diffinst.data import catalog
from diffinst.data.coco import CocoDataset, open_dataset
from diffinst.engine.evaluate import predict_split
from diffinst.engine.inference import detect
from diffinst.engine.train import FINAL_NAME, LOSSES_NAME, TrainProgress, train
from diffinst.errors import ConfigError, DataError
from diffinst.evaluation.coco_ap import METRIC_NAMES, score_coco
from diffinst.evaluation.predictions import iter_predictions
from diffinst.model import DiffusionInst

PREDICTIONS_FOLDER = "predictions"
_MAX_LOADED_IMAGES = 64  # decoded before timing begins; more would cost memory and add nothing


def run_dataset(job: Job) -> dict[str, Any]:
    """Generate the embedded set, or read and check all annotations and look up every image file."""
    config, splits = _config(job), {}
    for split in job.node.spec["splits"]:
        dataset = open_dataset(config.data, split, _data_root(job, job.folder))
        splits[split] = {
            "num_images": len(dataset),
            "num_instances": dataset.num_instances,
            "num_skipped_annotations": dataset.num_skipped,
            "class_names": list(dataset.class_names),
            "annotations_sha256": _sha256(dataset.annotations_path),
        }
        if dataset.annotations_path.is_relative_to(job.folder):
            job.files.append(dataset.annotations_path)
        if job.stop():
            break
    return {"splits": splits}


def run_train(job: Job) -> dict[str, Any]:
    """Train to the end, going on from a checkpoint if there is one; leaves `model.safetensors`."""
    config, device = _config(job), _device(job)
    job.describe_process(process_environment(device))
    dataset = open_dataset(config.data, "train", _data_root(job, job.inputs["dataset"].folder))
    asked = config.model.num_classes
    if asked not in (None, dataset.num_classes):
        raise ConfigError(
            f"model.num_classes is {asked}, but {dataset.annotations_path} lists {dataset.num_classes} categories. "
            "Leave it out, and it is taken from the data set"
        )
    model_config = config.model.model_copy(update={"num_classes": dataset.num_classes})
    model = seeded_model(model_config, config.train.seed)

    def show(state: TrainProgress) -> None:
        job.progress(state.iteration, state.iterations, f"loss {state.total:.3f}")

    path = train(model, dataset, config, job.folder, device=device, progress=show, stop=job.stop)
    if job.stop():
        return {}
    job.files.append(path)
    # Not from the progress: there is none when an earlier attempt was killed right after its last iteration.
    last = (job.folder / LOSSES_NAME).read_text(encoding="utf-8").splitlines()[-1]
    return {"last_losses": json.loads(last)["losses"], "num_parameters": count_parameters(model)}


def run_predict(job: Job) -> dict[str, Any]:
    """Predict the validation split, going on after the shards that are there."""
    config, device = _config(job), _device(job)
    job.describe_process(process_environment(device))
    dataset, model = _dataset_and_model(job, device)
    done = predict_split(
        model,
        dataset,
        config.sampler,
        job.folder / PREDICTIONS_FOLDER,
        batch_size=config.data.eval_batch_size,
        num_workers=config.train.num_workers,
        device=device,
        progress=lambda done, total: job.progress(done, total, "images"),
        stop=job.stop,
    )
    job.files += sorted((job.folder / PREDICTIONS_FOLDER).glob("*.jsonl"))
    return {"num_images": done}


def run_score(job: Job) -> dict[str, Any]:
    """Compare stored predictions with the ground truth; needs no model."""
    config = _config(job)
    paths = catalog.resolve(config.data, "val", _data_root(job, job.inputs["dataset"].folder))
    asked = tuple(job.node.spec["iou_types"])
    scores = score_coco(
        paths.annotations,
        iter_predictions(job.inputs["predict"].folder / PREDICTIONS_FOLDER),
        iou_types=asked,
        class_agnostic=job.node.spec["class_agnostic"],
        image_ids=paths.image_ids,
        skip_invalid=config.data.skip_invalid,
    )
    no_masks = "the model predicts boxes only"
    metrics = {
        name: metric(name, scores.metrics.get(name), scores.reasons.get(name, no_masks)) for name in METRIC_NAMES
    }
    metrics |= {
        "num_images": metric("num_images", scores.num_images),
        "num_instances": metric("num_instances", scores.num_instances),
    }
    return {
        "metrics": {name: value.model_dump() for name, value in metrics.items()},
        "per_class": {f"{name}/AP": values for name, values in scores.per_class.items()},
    }


def run_latency(job: Job) -> dict[str, Any]:
    """Time single images, decoded beforehand, and take this process's peak memory; count operations and parameters."""
    config, device, asked = _config(job), _device(job), job.node.spec["measure"]
    job.describe_process(process_environment(device))
    dataset, model = _dataset_and_model(job, device)
    samples = [dataset.test_sample(index) for index in range(min(len(dataset), _MAX_LOADED_IMAGES))]

    def run_one(index: int, timer: Timer) -> None:
        with timer("preprocess"):
            batch = model.make_batch([samples[index]])
        detect(model, batch, config.sampler, timer=timer)

    reset_peak(device)
    timed = measure_latency(
        run_one,
        len(samples),
        device=device,
        min_images=asked["latency_images"] if asked["latency"] else 1,
        min_seconds=asked["latency_seconds"] if asked["latency"] else 0.0,
        stop=job.stop,
    )
    # Before the counter runs, which keeps more alive than a detection does.
    peaks = peak_memory_bytes(device)
    found: dict[str, float | None] = {}
    outputs: dict[str, Any] = {}
    if asked["latency"] and not job.stop():
        found |= summarise_latency(timed)
        outputs["samples"] = {"latency_s": timed}
    if asked["memory"]:
        found |= {f"peak_memory_bytes/{name}": value for name, value in peaks.items()}
    if asked["flops"]:
        batch = model.make_batch(samples[:1])
        found["flops"] = count_flops(lambda: detect(model, batch, config.sampler))
        found["num_parameters"] = count_parameters(model)
    reason = f"measured on {torch.device(device).type}, not on a CUDA device"
    outputs["metrics"] = {name: metric(name, value, reason).model_dump() for name, value in found.items()}
    return outputs


def _config(job: Job) -> Config:
    return Config.model_validate_json(json.dumps(job.node.options["config"]))


def _device(job: Job) -> str:
    """The device asked for, or the GPU where there is one.

    Raises:
        ConfigError: the device does not exist here.
    """
    asked = job.node.options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=asked)
    except (RuntimeError, AssertionError) as error:
        # The first sentence: torch goes on about drivers and asynchronous errors.
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise ConfigError(f"--device {asked}: cannot be used here ({reason}). Use 'cpu', or leave it out") from error
    return str(asked)


def _data_root(job: Job, generated: Path) -> Path | None:
    """Where the data set is looked for; the embedded one lives in the folder of its node."""
    if _config(job).data.dataset == "shapes":
        return generated
    root = job.node.options.get("data_root")
    return None if root is None else Path(root)


def _dataset_and_model(job: Job, device: str) -> tuple[CocoDataset, DiffusionInst]:
    dataset = open_dataset(_config(job).data, "val", _data_root(job, job.inputs["dataset"].folder))
    model, class_names = _trained_model(job.inputs["train"])
    if class_names != dataset.class_names:
        raise DataError(
            f"{dataset.annotations_path}: lists {len(dataset.class_names)} categories that are not the "
            f"{len(class_names)} the model was trained on. Both splits need the same ones"
        )
    return dataset, model.to(device).eval()


def _trained_model(source: Input) -> tuple[DiffusionInst, tuple[str, ...]]:
    checkpoint = load_checkpoint(source.folder / FINAL_NAME)
    # The checkpoint holds all weights: those that training began with need not be found again.
    model = build_model(checkpoint.config.model.model_copy(update={"backbone_weights": "none"}))
    load_model_weights(model, checkpoint)
    return model, checkpoint.class_names


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


KINDS = {
    "dataset": run_dataset,
    "train": run_train,
    "predict": run_predict,
    "score": run_score,
    "latency": run_latency,
}


def main(arguments: list[str]) -> int:
    """`--serve PARENT`: run the jobs that process PARENT writes to standard input."""
    if len(arguments) != 2 or arguments[0] != "--serve" or not arguments[1].isdigit():
        sys.stderr.write("usage: python -m bench.start --serve PARENT_PROCESS_ID (started by run-suite)\n")
        return 2
    serve(KINDS, int(arguments[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
