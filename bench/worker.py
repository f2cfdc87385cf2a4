"""The node kinds: what a data set, training, prediction, score and latency node computes. The bridge to the model.

Run by `bench.execute` through `bench.start`; see `bench.server` for how nodes become processes.
Everything is imported before the first fork, once, so that one version of the source serves all nodes: at the top, or
by name in `main` what only some suites need (`LATE_MODULES` of bench.execute). Nothing may start CUDA or a thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import external
from bench.detectors import Detector, our_detector, torchvision_detector
from bench.engines import EXTERNAL
from bench.measure.accuracy import measure_accuracy
from bench.measure.determinism import OperatorRecorder, unseen
from bench.measure.disturbances import Watch
from bench.measure.environment import process_environment
from bench.measure.flops import count_flops, count_parameters
from bench.measure.latency import TOTAL, ScopeTimer, Timer, measure_latency, summarise_latency
from bench.measure.memory import peak_memory_bytes, reset_peak
from bench.measure.moments import Moment, conditions_between, throttle_of
from bench.measure.training import NAME as STEP_NAME
from bench.measure.training import check_batch, measure_training_steps, step_samples, summarise_steps
from bench.record import metric
from bench.server import Input, Job, serve
from diffinst.build import require_device, restored_model, seeded_model
from diffinst.checkpoint import load_checkpoint, load_model_weights
from diffinst.config import Config
from diffinst.data import catalog
from diffinst.data.coco import CocoDataset, open_dataset
from diffinst.engine.evaluate import write_predictions
from diffinst.engine.train import FINAL_NAME, LOSSES_NAME, TrainProgress, diffusion_losses, train
from diffinst.errors import ConfigError, DataError
from diffinst.evaluation.predictions import PREDICTIONS_FOLDER, iter_predictions
from diffinst.model import DiffusionInst
from diffinst.ops.library import operators
from diffinst.ops.paths import forget_paths, paths_taken
from diffinst.structures import Detections, Sample

_NOT_WATCHED = "computed by an engine in an interpreter of its own"
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
    start = _begin(job, device)
    dataset = open_dataset(config.data, "train", _data_root(job, job.inputs["dataset"].folder))
    asked = config.model.num_classes
    if asked not in (None, dataset.num_classes):
        raise ConfigError(
            f"model.num_classes is {asked}, but {dataset.annotations_path} lists {dataset.num_classes} categories. "
            "Leave it out, and it is taken from the data set"
        )
    engine = job.node.options.get("engine")
    if engine is not None and engine["name"] in EXTERNAL:
        return _train_external(job, dataset, device, start)
    model: torch.nn.Module
    if engine is not None:
        from bench import torchvision_engine  # late: importing torchvision takes a second and 160 MB

        network = torchvision_engine.build_network(engine["recipe"], dataset.num_classes, config.train.seed)
        model, losses = network, torchvision_engine.network_losses(network)
    else:
        model_config = config.model.model_copy(update={"num_classes": dataset.num_classes})
        ours = seeded_model(model_config, config.train.seed)
        model, losses = ours, diffusion_losses(ours, dataset, config)

    def show(state: TrainProgress) -> None:
        job.progress(state.iteration, state.iterations, f"loss {state.total:.3f}")

    recorder, first = OperatorRecorder(), contextlib.ExitStack()

    def first_watched(samples: list[Sample], iteration: int) -> dict[str, torch.Tensor]:
        # Not before: processes that load images are forked when the first batch is asked for.
        if not recorder.count:
            first.enter_context(recorder)
        return losses(samples, iteration)

    def stop() -> bool:  # asked after each iteration but the last
        first.close()
        return job.stop()

    with first:
        path = train(model, dataset, config, job.folder, losses=first_watched, device=device, progress=show, stop=stop)
    _end(job, device, start, recorder.facts("the first iteration") if recorder.count else unseen("resumed at its end"))
    if job.stop():
        return {}
    job.files.append(path)
    job.logs.append(job.folder / LOSSES_NAME)
    # Not from the progress: there is none when an earlier attempt was killed right after its last iteration.
    last = (job.folder / LOSSES_NAME).read_text(encoding="utf-8").splitlines()[-1]
    return {"last_losses": json.loads(last)["losses"], "num_parameters": count_parameters(model)}


def run_weights(job: Job) -> dict[str, Any]:
    """Check the weights file against the model that is to have them, in place of a training."""
    device = _device(job)
    job.describe_process(process_environment(device))
    dataset = _val_dataset(job)
    engine = job.node.options.get("engine")
    if engine is not None and engine["name"] in EXTERNAL:
        # Its format is the engine's own business: the first prediction tells.
        return {"num_bytes": Path(engine["engine_weights"]).stat().st_size}
    return {"num_parameters": count_parameters(_detector(job, dataset, "cpu").module)}


def run_predict(job: Job) -> dict[str, Any]:
    """Predict the validation split, going on after the shards that are there."""
    config, device = _config(job), _device(job)
    start = _begin(job, device)
    dataset = _val_dataset(job)
    if _is_external(job):
        return _predict_external(job, dataset, device, start)
    detector, recorder = _detector(job, dataset, device), OperatorRecorder()
    is_compiled = _is_compiled(job)

    def detect(samples: Sequence[Sample]) -> list[Detections]:
        with contextlib.nullcontext() if recorder.count or is_compiled else recorder:
            return detector.detect(samples, _untimed)

    done = write_predictions(
        detect,
        dataset,
        job.folder / PREDICTIONS_FOLDER,
        batch_size=config.data.eval_batch_size if detector.resized else 1,
        size_divisor=detector.size_divisor,
        resized=detector.resized,
        num_workers=config.train.num_workers,
        progress=lambda done, total: job.progress(done, total, "images"),
        stop=job.stop,
    )
    why = "a compiled head does not tell its operators" if is_compiled else "all images were predicted before"
    seen = recorder.facts("the first batch") if recorder.count else unseen(why)
    _end(job, device, start, seen)
    job.files += sorted((job.folder / PREDICTIONS_FOLDER).glob("*.jsonl"))
    return {"num_images": done}


def run_score(job: Job) -> dict[str, Any]:
    """Compare stored predictions with the ground truth, by two evaluators; needs no model."""
    config = _config(job)
    paths = catalog.resolve(config.data, "val", _data_root(job, job.inputs["dataset"].folder))
    found = measure_accuracy(
        config.data,
        paths.annotations,
        iter_predictions(job.inputs["predict"].folder / PREDICTIONS_FOLDER),
        job.folder,
        iou_types=tuple(job.node.spec["iou_types"]),
        image_ids=paths.image_ids,
    )
    job.files += found.files
    return found.outputs()


def run_latency(job: Job) -> dict[str, Any]:
    """Time single images, decoded beforehand, and take this process's peak memory; count operations and parameters."""
    device, asked = _device(job), job.node.spec["measure"]
    start = _begin(job, device)
    dataset = _val_dataset(job)
    if _is_external(job):
        result = _run_external(job, "latency", dataset, device, measure=asked)
        _end(job, device, start)
        return external.latency_outputs(job.node.options["engine"]["name"], result, asked) if result else {}
    detector = _detector(job, dataset, device)
    load = dataset.test_sample if detector.resized else dataset.original_sample
    samples = [load(index) for index in range(min(len(dataset), _MAX_LOADED_IMAGES))]

    def run_one(index: int, timer: Timer) -> None:
        detector.detect([samples[index]], timer)

    start = Moment.now(device)  # loading is over
    watch = Watch(device, throttle=throttle_of(device))
    reset_peak(device)
    timed = measure_latency(
        run_one,
        len(samples),
        device=device,
        min_images=asked["latency_images"] if asked["latency"] else 1,
        min_seconds=asked["latency_seconds"] if asked["latency"] else 0.0,
        stop=job.stop,
        watch=watch,
    )
    # Before the counter runs, which keeps more alive than a detection does.
    peaks = peak_memory_bytes(device)
    _end(job, device, start)
    found: dict[str, float | None] = {}
    outputs: dict[str, Any] = {}
    timed = {scope: values for scope, values in timed.items() if scope in (*detector.scopes, TOTAL)}
    untimed = external.untimed_metrics(timed, "the engine does not time it apart") if asked["latency"] else {}
    if asked["latency"] and not job.stop():
        found |= summarise_latency(timed)
        outputs["samples"] = {"latency_s": timed}
        outputs["sample_marks"] = {"latency_s": watch.marks()}
    if asked["memory"]:
        found |= {f"peak_memory_bytes/{name}": value for name, value in peaks.items()}
    if asked["flops"]:
        if _is_compiled(job):  # the same operations, but none that can be counted
            assert isinstance(detector.module, DiffusionInst)
            detector = our_detector(detector.module, _config(job).sampler.model_copy(update={"compile": "none"}))
        found["flops"] = count_flops(lambda: run_one(0, ScopeTimer(device)))
        found["num_parameters"] = count_parameters(detector.module)
    reason = f"measured on {torch.device(device).type}, not on a CUDA device"
    metrics = {name: metric(name, value, reason) for name, value in found.items()} | untimed
    outputs["metrics"] = {name: value.model_dump() for name, value in metrics.items()}
    return outputs


def run_training_step(job: Job) -> dict[str, Any]:
    """Time steps of training on one batch of validation images, and take this process's peak memory."""
    config, device, asked = _config(job), _device(job), job.node.spec["measure"]
    start = _begin(job, device)
    dataset = _val_dataset(job)
    check_batch(config.train.batch_size, len(dataset), str(dataset.annotations_path))
    if _is_external(job):
        result = _run_external(job, "training_step", dataset, device, measure=asked)
        _end(job, device, start)
        return external.training_step_outputs(job.node.options["engine"]["name"], result) if result else {}
    model = _detector(job, dataset, device).module
    root = _data_root(job, job.inputs["dataset"].folder)
    samples = step_samples(config.data, config.train.batch_size, root)
    start = Moment.now(device)  # loading is over
    watch = Watch(device, throttle=throttle_of(device))
    reset_peak(device)
    seconds = measure_training_steps(
        model,
        diffusion_losses(model, dataset, config),
        samples,
        config.train,
        count=asked["training_step_count"],
        device=device,
        stop=job.stop,
        watch=watch,
    )
    peaks = peak_memory_bytes(device)
    _end(job, device, start)
    if job.stop():
        return {}
    reason = f"measured on {torch.device(device).type}, not on a CUDA device"
    found: dict[str, float | None] = {**summarise_steps(seconds)}
    found |= {f"peak_memory_bytes/training_{name}": value for name, value in peaks.items()}
    return {
        "samples": {STEP_NAME: {TOTAL: seconds}},
        "sample_marks": {STEP_NAME: watch.marks()},
        "metrics": {name: metric(name, value, reason).model_dump() for name, value in found.items()},
    }


def _begin(job: Job, device: str) -> Moment:
    """Note what is known of this process before it works; the machine's state is noted with the end, see `_end`.

    Raises:
        ConfigError: the device cannot run what the suite asks for; it would not be known before a training has ended.
    """
    if "engine" not in job.node.options:
        require_device(_config(job).model, device)
    job.describe_process(process_environment(device))
    forget_paths()
    return Moment.now(device)


def _end(job: Job, device: str, start: Moment, determinism: dict[str, Any] | None = None) -> None:
    """Note the machine's state at the start and now, what happened between, and whether the bits would be the same.

    And which of several equivalent computations ran, where this process ran them.
    """
    seen: dict[str, Any] = {} if determinism is None else {"determinism": determinism}
    if taken := paths_taken():
        seen["paths"] = taken
    job.environment["conditions"] = conditions_between(start, Moment.now(device)) | seen


def _untimed(scope: str) -> contextlib.AbstractContextManager[None]:  # noqa: ARG001 - a timer is told the scope
    return contextlib.nullcontext()


def _is_compiled(job: Job) -> bool:
    return "engine" not in job.node.options and _config(job).sampler.compile != "none"


def _is_external(job: Job) -> bool:
    return job.node.options.get("engine", {}).get("name") in EXTERNAL


def _run_external(
    job: Job, kind: str, dataset: CocoDataset, device: str, *, measure: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Run a job in the engine's own interpreter; empty if it was stopped."""
    content = external.make_job(
        kind,
        job.node.options,
        dataset,
        job.folder,
        device=device,
        threads=torch.get_num_threads(),
        measure=measure,
        weights=job.inputs["train"].folder / external.WEIGHTS_NAME if "train" in job.inputs else None,
    )
    result = external.run_peer(content, progress=job.progress, stop=job.stop)
    if "environment" in result:
        job.describe_process({"device": device, "engine": content["engine"]["name"], **result["environment"]})
    return result


def _train_external(job: Job, dataset: CocoDataset, device: str, start: Moment) -> dict[str, Any]:
    result = _run_external(job, "train", dataset, device)
    if not result:
        return {}
    _end(job, device, start, unseen(_NOT_WATCHED))
    job.files += [job.folder / external.WEIGHTS_NAME, job.folder / external.LOSSES_NAME]
    return {name: result[name] for name in ("last_losses", "num_parameters")}


def _predict_external(job: Job, dataset: CocoDataset, device: str, start: Moment) -> dict[str, Any]:
    folder = job.folder / PREDICTIONS_FOLDER
    if not _run_external(job, "predict", dataset, device):
        return {}
    _end(job, device, start, unseen(_NOT_WATCHED))
    results = job.folder / external.RESULTS_NAME
    name = job.node.options["engine"]["name"]
    done = external.write_shards(name, results, dataset, dataset.file_sizes(), folder)
    results.unlink()
    job.files += sorted(folder.glob("*.jsonl"))
    return {"num_images": done}


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


def _val_dataset(job: Job) -> CocoDataset:
    return open_dataset(_config(job).data, "val", _data_root(job, job.inputs["dataset"].folder))


def _detector(job: Job, dataset: CocoDataset, device: str) -> Detector:
    """What was trained, or what a file of weights makes of the model, for the classes of a data set."""
    config, engine = _config(job), job.node.options.get("engine")
    if engine is not None:
        from bench import torchvision_engine  # late, as above

        network = torchvision_engine.build_network(engine["recipe"], dataset.num_classes, config.train.seed)
        if "train" in job.inputs:
            checkpoint = load_checkpoint(job.inputs["train"].folder / FINAL_NAME)
            _check_classes(dataset, checkpoint.class_names)
            load_model_weights(network, checkpoint)
        else:
            torchvision_engine.load_weights(network, Path(engine["engine_weights"]), dataset.category_ids)
        return torchvision_detector(network.to(device), config.sampler)
    use_ema = config.sampler.use_ema
    if "train" in job.inputs:
        model, class_names = _trained_model(job.inputs["train"], use_ema=use_ema)
    else:
        model, class_names = _given_model(config, dataset, use_ema=use_ema)
    _check_classes(dataset, class_names)
    return our_detector(model.to(device), config.sampler)


def _check_classes(dataset: CocoDataset, class_names: tuple[str, ...]) -> None:
    if class_names != dataset.class_names:
        raise DataError(
            f"{dataset.annotations_path}: lists {len(dataset.class_names)} categories that are not the "
            f"{len(class_names)} the model was trained on. Both splits need the same ones"
        )


def _given_model(config: Config, dataset: CocoDataset, *, use_ema: bool) -> tuple[DiffusionInst, tuple[str, ...]]:
    """The suite's model with the weights of a file, and the classes that the file names, or those of the data set.

    Raises:
        CheckpointError: the file cannot be read, or holds the weights of another model.
        ConfigError: what no tensor's shape tells differs between the file's configuration and the suite's.
    """
    checkpoint = load_checkpoint(Path(config.model.weights))
    for name in ("snr_scale", "num_train_timesteps"):
        theirs, ours = getattr(checkpoint.config.model, name), getattr(config.model, name)
        if theirs != ours:
            raise ConfigError(f"{checkpoint.path}: was trained with model.{name} {theirs}, but the suite has {ours}")
    model_config = config.model.model_copy(update={"num_classes": dataset.num_classes})
    model = restored_model(checkpoint, model_config, use_ema=use_ema)
    return model, checkpoint.class_names or dataset.class_names


def _trained_model(source: Input, *, use_ema: bool) -> tuple[DiffusionInst, tuple[str, ...]]:
    checkpoint = load_checkpoint(source.folder / FINAL_NAME)
    return restored_model(checkpoint, use_ema=use_ema), checkpoint.class_names


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


KINDS = {
    "dataset": run_dataset,
    "train": run_train,
    "weights": run_weights,
    "predict": run_predict,
    "score": run_score,
    "latency": run_latency,
    "training_step": run_training_step,
}


def main(arguments: list[str]) -> int:
    """`--serve PARENT [MODULE ...]`: import these, then run the jobs that process PARENT writes to standard input."""
    if len(arguments) < 2 or arguments[0] != "--serve" or not arguments[1].isdigit():
        usage = "python -m bench.start --serve PARENT_PROCESS_ID [MODULE ...]"
        sys.stderr.write(f"usage: {usage} (started by run-suite)\n")
        return 2
    operators()  # before the first fork too, and what does not load is known before any node runs
    for name in arguments[2:]:
        importlib.import_module(name)
    serve(KINDS, int(arguments[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
