"""Engines in an interpreter of their own: one child process a node, a job in, progress and a result out.

The child is `PYTHON bench/peers/run_peer.py JOB.json`; `bench.peers.protocol` describes the job and the lines that it
writes. It dies with the process that started it, is asked to stop like any node, and what it leaves in the node's
folder is gone on from. Its detections are checked here and become the same shards as ours, so that all are scored by
the same code. It is told of the suite only what `bench.engines.USED` lists, so nothing else can matter to it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

from bench.engines import step_fields, used_fields
from bench.errors import PeerCrash, PeerError
from bench.measure.disturbances import MARKS
from bench.measure.latency import SCOPES, TOTAL, WARMUP_IMAGES, summarise_latency
from bench.measure.training import NAME as STEP_NAME
from bench.measure.training import WARMUP_STEPS, summarise_steps
from bench.record import Metric, dump_json, metric
from bench.server import die_with
from bench.store import write_atomic
from diffinst.data.annotations import decode_rle_counts
from diffinst.evaluation.predictions import PredictionWriter, Record

PROTOCOL = 1
RUNNER = Path(__file__).resolve().parent / "peers" / "run_peer.py"
JOB_NAME, RESULTS_NAME, WEIGHTS_NAME, LOSSES_NAME = "job.json", "results.jsonl", "weights.pth", "losses.jsonl"
EXIT_MISTAKE = 2

_POLL_S = 0.2
_SHARD_SIZE = 64
_KEPT_BYTES = 4000  # of standard error, for the reason of a crash
# What would lead another interpreter to this one's packages.
_FOREIGN_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")

ProgressFunction = Callable[[int, int, str], None]


class Split(Protocol):
    """What a peer is told of a data set; see `diffinst.data.coco.CocoDataset`."""

    annotations_path: Path
    images_dir: Path
    image_ids: list[int]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]

    def file_names(self) -> list[str]: ...


def make_job(
    kind: str,
    options: Mapping[str, Any],
    split: Split,
    folder: Path,
    *,
    device: str,
    threads: int,
    measure: Mapping[str, Any] | None = None,
    weights: Path | None = None,
) -> dict[str, Any]:
    """The content of a job file.

    Args:
        kind: train, predict, latency or training_step. options: of the node, with `engine` and `config`.
        weights: what a training of this engine left; None where the section names a file, or there are none.
    """
    engine, config = options["engine"], options["config"]
    is_step = kind == "training_step"
    train = (
        step_fields(engine["name"], config["train"])
        if is_step
        else used_fields(engine["name"], "train", config["train"])
    )
    # Beside what tells results apart, what never changes one.
    free = {name: config["train"][name] for name in ("log_every", "checkpoint_every", "num_workers")}
    return {
        "protocol": PROTOCOL,
        "kind": kind,
        "engine": engine,
        "folder": str(folder),
        "annotations": str(split.annotations_path),
        "images": str(split.images_dir),
        "image_ids": list(split.image_ids),
        "file_names": split.file_names(),
        "class_names": list(split.class_names),
        "category_ids": list(split.category_ids),
        "train": train | free,
        "data": used_fields(engine["name"], "data", config["data"]),
        "sampler": used_fields(engine["name"], "sampler", config["sampler"]),
        "weights": None if weights is None else str(weights),
        "device": device,
        "threads": threads,
        "measure": {"warmup": WARMUP_STEPS if is_step else WARMUP_IMAGES, **(measure or {})},
    }


def run_peer(
    job: Mapping[str, Any], *, progress: ProgressFunction, stop: Callable[[], bool], runner: Path = RUNNER
) -> dict[str, Any]:
    """Run one job to its end in the interpreter that its engine names.

    Returns:
        The result; empty when `stop` ended it.
    Raises:
        PeerError: the interpreter cannot be started, or the peer names a mistake of the user's.
        PeerCrash: it ended without a result.
    """
    engine, folder = job["engine"], Path(job["folder"])
    path = folder / JOB_NAME
    write_atomic(path, dump_json(dict(job)))
    name, python = engine["name"], engine["python"]
    environment = {key: value for key, value in os.environ.items() if key not in _FOREIGN_VARIABLES}
    try:
        process = subprocess.Popen(
            [python, str(runner), str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=environment,
            bufsize=0,
            preexec_fn=partial(die_with, os.getpid()),
        )
    except OSError as error:
        raise PeerError(
            f"engine {name}: python '{python}' cannot be started ({error.strerror}). Give an interpreter that has it "
            "with engine.python, or with --set engine.python=PATH"
        ) from error
    with process:
        try:
            talk = _Talk(process, progress, stop)
            talk.listen()
            code = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
    if stop():
        return {}
    if code == 0 and talk.result is not None:
        return talk.result
    _fail(name, code, talk)


class _Talk:
    """What a peer says until it ends; its standard error goes on to ours, the log."""

    def __init__(self, process: subprocess.Popen[bytes], progress: ProgressFunction, stop: Callable[[], bool]) -> None:
        self._process, self._progress, self._stop = process, progress, stop
        self._line = b""
        self._asked = False
        self._tail = b""
        self.result: dict[str, Any] | None = None
        self.error: str | None = None

    @property
    def last_words(self) -> str:
        """The last line of its standard error."""
        lines = self._tail.decode(errors="replace").strip().splitlines()
        return " ".join(lines[-1].split())[:500] if lines else ""

    def listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for pipe, take in ((self._process.stdout, self._take_lines), (self._process.stderr, self._take_log)):
                assert pipe is not None
                selector.register(pipe, selectors.EVENT_READ, take)
            while selector.get_map():
                ready = selector.select(_POLL_S)
                if not ready and self._process.poll() is not None:
                    break  # a helper that it left behind holds the pipes
                for key, _ in ready:
                    chunk = os.read(key.fd, 65536)
                    if chunk:
                        key.data(chunk)
                    else:
                        selector.unregister(key.fileobj)
                if self._stop() and not self._asked:
                    self._asked = True
                    with contextlib.suppress(ProcessLookupError):
                        self._process.send_signal(signal.SIGTERM)

    def _take_log(self, chunk: bytes) -> None:
        self._tail = (self._tail + chunk)[-_KEPT_BYTES:]
        _log(chunk)

    def _take_lines(self, chunk: bytes) -> None:
        *lines, self._line = (self._line + chunk).split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            match message:
                case {"progress": [int(done), int(total), str(text)]}:
                    self._progress(done, total, text)
                case {"result": dict(result)}:
                    self.result = result
                case {"error": str(error)}:
                    self.error = error
                case _:  # a print of some library: no last words, for the two pipes keep no order between them
                    _log(line + b"\n")


def _log(chunk: bytes) -> None:
    sys.stderr.flush()
    os.write(2, chunk)


def _fail(name: str, code: int, talk: _Talk) -> NoReturn:
    if talk.error is not None and code == EXIT_MISTAKE:
        raise PeerError(f"engine {name}: {talk.error}")
    if talk.error is not None:
        raise PeerCrash(f"engine {name}: {talk.error}")
    if code == -signal.SIGKILL:
        raise PeerCrash(f"engine {name}: its process was killed; most often this is the kernel short of memory")
    how = f"crashed with {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code} and no result"
    words = f" ({talk.last_words})" if talk.last_words else ""
    raise PeerCrash(f"engine {name}: its process {how}{words}")


def write_shards(name: str, results: Path, split: Split, sizes: Sequence[tuple[int, int]], folder: Path) -> int:
    """Check a peer's detections and write them as shards, see `diffinst.evaluation.predictions`.

    Args:
        name: of the engine, for messages. results: its file, a line an image. sizes: (height, width) of the images'
            files, in the order of the split's ids. folder: of the shards; those that are there stay.
    Returns:
        The number of images.
    Raises:
        PeerCrash: a line is not what the protocol says, or an image has none.
    """
    known = dict(zip(split.image_ids, sizes))
    seen: set[int] = set()
    with PredictionWriter(folder, shard_size=_SHARD_SIZE) as writer, results.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                problem = _problem(record, known, split.category_ids)
            except ValueError:
                problem = "is no JSON"
            if problem is None and record["image_id"] in seen:
                problem = f"image {record['image_id']} comes twice"
            if problem is not None:
                raise PeerCrash(f"engine {name}: line {number} of its {results.name}: {problem}")
            seen.add(record["image_id"])
            if record["image_id"] not in writer.done_ids:
                writer.add(record)
    missing = [image_id for image_id in split.image_ids if image_id not in seen]
    if missing:
        raise PeerCrash(f"engine {name}: gave no detections for {len(missing)} images, the first is {missing[0]}")
    return len(seen)


def _problem(record: Record, sizes: Mapping[int, tuple[int, int]], category_ids: Sequence[int]) -> str | None:
    """What is wrong with one image's detections, in words."""
    keys = {"image_id", "category_id", "score", "bbox", "segmentation"}
    if not isinstance(record, dict) or record.keys() != keys:
        return f"needs the keys {', '.join(sorted(keys))} and no others"
    if record["image_id"] not in sizes:
        return f"image {record['image_id']!r} was not asked for"
    labels, scores, boxes, masks = (record[key] for key in ("category_id", "score", "bbox", "segmentation"))
    if not all(isinstance(part, list) for part in (labels, scores, boxes)):
        return "category_id, score and bbox have to be lists"
    lengths = {len(part) for part in (labels, scores, boxes, masks) if part is not None}
    if len(lengths) > 1:
        return f"its lists differ in length: {sorted(lengths)}"
    if unknown := [label for label in labels if label not in category_ids]:
        return f"category {unknown[0]!r} is none of the data set"
    if not all(_is_number(score) for score in scores):
        return "a score is no finite number"
    if not all(isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) for box in boxes):
        return "a bbox is not four finite numbers"
    return next((text for mask in masks or () if (text := _mask_problem(mask, sizes[record["image_id"]]))), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _mask_problem(mask: Any, size: tuple[int, int]) -> str | None:
    if not isinstance(mask, dict) or mask.keys() != {"size", "counts"} or not isinstance(mask["counts"], str):
        return "a mask is no compressed RLE"
    if mask["size"] != list(size):
        return f"a mask has size {mask['size']}, the image {list(size)}"
    try:
        runs = decode_rle_counts(mask["counts"])
    except ValueError as error:
        return f"the RLE of a mask {error}"
    if (len(runs) and runs.min() < 0) or int(runs.sum()) != size[0] * size[1]:
        return f"the RLE of a mask does not cover its {size[0]} x {size[1]} pixels"
    return None


def latency_outputs(name: str, result: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """A latency node's outputs from a peer's result: what was asked for, and why something is not there.

    Raises:
        PeerCrash: the result is not what the protocol says.
    """
    metrics: dict[str, Metric] = {}
    outputs: dict[str, Any] = {}
    try:
        if asked["latency"]:
            timed = {scope: [float(value) for value in values] for scope, values in _scopes(result).items()}
            outputs["samples"] = {"latency_s": timed}
            untold = {"samples": None, "reason": f"engine {name} does not tell"}
            outputs["sample_marks"] = {"latency_s": dict.fromkeys(MARKS, untold)}
            metrics |= {key: metric(key, value) for key, value in summarise_latency(timed).items()}
            metrics |= untimed_metrics(timed, f"engine {name} does not time it apart")
        if asked["memory"]:
            peaks = result["peak_memory_bytes"]
            for key in ("rss", "cuda_allocated", "cuda_reserved"):
                entry = f"peak_memory_bytes/{key}"
                metrics[entry] = metric(entry, peaks.get(key), "not measured on a CUDA device")
        if asked["flops"]:
            for key in ("num_parameters", "flops"):
                metrics[key] = metric(key, result.get(key), f"engine {name} does not count it")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PeerCrash(f"engine {name}: its measurements are not what the protocol says ({error!r})") from error
    return outputs | {"metrics": {key: value.model_dump() for key, value in metrics.items()}}


def training_step_outputs(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of a node of training steps from a peer's result.

    Raises:
        PeerCrash: the result is not what the protocol says.
    """
    try:
        seconds = [float(value) for value in result["samples"][STEP_NAME][TOTAL]]
        found = {key: metric(key, value) for key, value in summarise_steps(seconds).items()}
        for key in ("rss", "cuda_allocated", "cuda_reserved"):
            entry = f"peak_memory_bytes/training_{key}"
            found[entry] = metric(entry, result["peak_memory_bytes"].get(key), "not measured on a CUDA device")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PeerCrash(f"engine {name}: its measurements are not what the protocol says ({error!r})") from error
    untold = {"samples": None, "reason": f"engine {name} does not tell"}
    return {
        "samples": {STEP_NAME: {TOTAL: seconds}},
        "sample_marks": {STEP_NAME: dict.fromkeys(MARKS, untold)},
        "metrics": {key: value.model_dump() for key, value in found.items()},
    }


def _scopes(result: Mapping[str, Any]) -> dict[str, list[float]]:
    found = {scope: values for scope, values in result["samples"]["latency_s"].items() if values is not None}
    if not found.get(TOTAL):
        raise ValueError("no total latency")
    return found


def untimed_metrics(timed: Mapping[str, Sequence[float]], reason: str) -> dict[str, Metric]:
    """Latency metrics of the scopes that are not among `timed`, without a value."""
    names = [f"latency_s/{scope}{end}" for scope in SCOPES if scope not in timed for end in ("", "/p5", "/p95")]
    return {name: metric(name, None, reason) for name in names}
