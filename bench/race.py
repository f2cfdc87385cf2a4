"""Two detectors timed by turns, image by image, each in a process of its own: what two separate runs cannot tell.

A machine drifts, and its neighbours come and go: times of two runs differ by that too. Here both sides see the same
image in the order base, head, head, base (head, base, base, head for the next one), and never at the same time, so that
what changes slowly is in both alike. What a process has by its luck, such as where its memory lies, is not: so both are
started anew for each of several rounds, and the rounds' spread says how sure the result is.

A side is a stored record: its configuration, and the weights that its results folder still has. It may run in another
interpreter and with the code of another checkout. The result is a record a side and round, with the axis `round`, which
`bench.compare` judges like any others; `measure.race` ties them together.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from bench.engines import EngineConfig
from bench.errors import BenchError
from bench.measure.disturbances import Disturbance, mark_samples
from bench.measure.environment import SOURCE_ROOT, WORKER_VARIABLES, machine_environment
from bench.record import RunRecord, dump_json, dump_record, load_record, metric, scrub
from bench.server import die_with
from bench.stats.latency import quantile
from bench.store import Store, find_record, now_text

SIDES = ("base", "head")
VERSION = 1
WARMUP_IMAGES = 3  # as in bench.measure.latency, which loads torch
MAX_IMAGES = 64  # decoded before timing begins
SIDE_COMMAND = ("-P", str(Path(__file__).resolve().with_name("race_side.py")))
# Fields that name files, where the validation images and the weights are.
_FILES = {"data": ("val_annotations", "val_images", "val_image_ids"), "model": ("weights",)}
_NO_FILE = (None, "none")


@dataclass(frozen=True)
class Side:
    """One of the two. record: of the run that is timed; store: its results folder. data_root: of its data set.

    python: an interpreter that has the packages. source: the checkout whose code it runs.
    """

    name: str
    record: RunRecord
    store: Store
    python: str = sys.executable
    source: Path = SOURCE_ROOT
    data_root: Path | None = None
    device: str | None = None


class Unlike(BenchError):
    """The sides do not see the same images."""


class SideFailed(BenchError):
    """The process of a side ended."""

    def __init__(self, side: str, reason: str, log: str) -> None:
        super().__init__(f"{side}: {reason}")
        self.side, self.reason, self.log = side, reason, log


def find_side(name: str, text: str, results: Path, **settings: Any) -> Side:
    """The side that a record file, or a run id (or its beginning) in a results folder, stands for.

    Raises:
        RecordError: no such record, or several. BenchError: it cannot be timed, and why.
    """
    path = find_record(name, text, results)
    record = load_record(path)
    store = Store(path.parents[2])
    if record.status != "ok":
        raise BenchError(f"{path}: {record.status}, so it has nothing to time. Run it again")
    engine = record.config.get("engine", {"name": "diffinst"})
    if EngineConfig.model_validate(engine).is_external:
        raise BenchError(f"{path}: engine {engine['name']} cannot be raced: it runs in an interpreter without races")
    side = Side(name, record, store, **settings)
    _job(side)  # what is missing is told before anything starts
    return side


def race(
    base: Side,
    head: Side,
    *,
    rounds: int,
    images: int,
    command: Sequence[str] = ("diffbench", "race"),
    progress: Callable[[int], None] | None = None,
    side_command: Sequence[str] = SIDE_COMMAND,
) -> dict[str, list[dict[str, Any]]]:
    """Time both sides by turns.

    Args:
        rounds: times that both are started anew. images: timed in each round, twice a side, going round the data set.
        progress: told the images done, of `rounds` x `images`.
        side_command: arguments after each side's interpreter.
    Returns:
        'base' and 'head': their records, one a round. Where a side fails, its last one says so, and there are no more.
    Raises:
        Unlike: the sides see different images. BenchError: what the user can put right.
    """
    sides = {"base": base, "head": head}
    writer = _Records(sides, rounds, images, command)
    for number in range(rounds):
        started_at = now_text()
        tell = None if progress is None else partial(_tell, progress, number * images)
        try:
            facts, taken = _round(sides, number, images, side_command, tell)
        except SideFailed as failed:
            writer.failed(number, failed, started_at)
            break
        writer.finished(number, facts, taken, started_at)
    return writer.records


def dump_race(records: dict[str, list[dict[str, Any]]]) -> str:
    """The text of a race file: 'base' and 'head', each a list of records."""
    return dump_json({"version": VERSION, "kind": "race", **records})


def _tell(progress: Callable[[int], None], before: int, done: int) -> None:
    progress(before + done)


def _round(
    sides: dict[str, Side], number: int, images: int, command: Sequence[str], progress: Callable[[int], None] | None
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """What both sides say of themselves, and what each timed, in the order in which it did."""
    # Each side is the first to be started, and the first to be timed, as often as the other.
    order = SIDES if number % 2 == 0 else SIDES[::-1]
    with contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(_Process(sides[name], command)) for name in order}
        facts = {name: running[name].ready() for name in order}
        _check_images(facts["base"], facts["head"])
        num_images = len(facts["base"]["images"])
        for index in range(WARMUP_IMAGES):
            for name in order:
                running[name].time(index % num_images)
        taken: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
        for index in range(images):
            first, second = order if index % 2 == 0 else order[::-1]
            for name in (first, second, second, first):
                taken[name].append(running[name].time(index % num_images))
            if progress is not None:
                progress(index + 1)
    return facts, taken


def _check_images(base: dict[str, Any], head: dict[str, Any]) -> None:
    for what in ("images", "sizes"):
        if base[what] != head[what]:
            place = next(
                (number for number, (old, new) in enumerate(zip(base[what], head[what])) if old != new),
                min(len(base[what]), len(head[what])),
            )
            texts = [str(side[what][place]) if place < len(side[what]) else "none" for side in (base, head)]
            name = "id" if what == "images" else "size"
            raise Unlike(f"base and head see different images: {name} of image {place} is {texts[0]} and {texts[1]}")


def _job(side: Side) -> dict[str, Any]:
    """What the side's process needs to make its detector.

    Raises:
        BenchError: something of it is not in the results folder, or not here.
    """
    record = side.record
    inputs = []
    for kind in ("train", "weights", "dataset"):
        if (node_id := record.nodes.get(kind)) is None:
            continue
        done = side.store.result(node_id)
        folder = side.store.folder(node_id).resolve()
        if done is None:
            raise BenchError(
                f"{side.name}: {node_id} is not in {side.store.nodes_folder}, or not whole. Its weights are needed: "
                "run its suite again, into this results folder"
            )
        inputs.append({"id": node_id, "kind": kind, "folder": str(folder), "spec": done.spec, "outputs": done.outputs})
    config = {name: dict(section) for name, section in record.config.items() if name != "engine"}
    for section, names in _FILES.items():
        for name in names:
            if (text := config.get(section, {}).get(name)) not in _NO_FILE:
                config[section][name] = str(_file(side, f"{section}.{name}", text))
    options: dict[str, Any] = {
        "config": config,
        "data_root": None if side.data_root is None else str(side.data_root.absolute()),
        "device": side.device,
    }
    if "engine" in record.config:
        engine = EngineConfig.model_validate(record.config["engine"]).resolved()
        if engine["engine_weights"] not in _NO_FILE:
            engine["engine_weights"] = str(_file(side, "engine.engine_weights", engine["engine_weights"]))
        options["engine"] = engine
    node = {
        "id": record.nodes.get("latency", f"latency-{record.run_id}"),
        "kind": "latency",
        "inputs": [item["id"] for item in inputs],
        "spec": {},
        "options": options,
    }
    return {"node": node, "inputs": inputs, "max_images": MAX_IMAGES}


def _file(side: Side, key: str, text: str) -> Path:
    """A file that the record names, as its suite did; records hold no machine paths."""
    relative = text.removeprefix("<data-root>/")
    roots = [root for root in (side.data_root, side.source, Path()) if root is not None]
    found = next((path for root in roots if (path := (root / relative).absolute()).exists()), None)
    if found is None:
        raise BenchError(
            f"{side.name}: {key}: '{text}' does not exist. Give the folder that it lies in with --data-root"
        )
    return found


class _Process:
    """The process of one side, which times an image when it is told to and else waits."""

    def __init__(self, side: Side, command: Sequence[str]) -> None:
        self._side, self._command = side, command
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit

    def __enter__(self) -> _Process:
        environment = {**WORKER_VARIABLES, **os.environ, "PYTHONPATH": str(self._side.source.absolute())}
        try:
            self._process = subprocess.Popen(
                [self._side.python, *self._command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
                preexec_fn=partial(die_with, os.getpid()),
            )
        except OSError as error:
            self._log.close()
            python = self._side.python
            raise BenchError(f"{self._side.name}: python '{python}' cannot be started ({error.strerror})") from error
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def ready(self) -> dict[str, Any]:
        """Facts about the side, once it has loaded."""
        facts: dict[str, Any] = self._ask(_job(self._side))["ready"]
        return facts

    def time(self, index: int) -> dict[str, Any]:
        """Time image `index`."""
        return self._ask({"image": index})

    def _ask(self, content: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(content).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended: its last words are there to be read
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else {}
        if "error" in answer and answer["is_mistake"]:
            raise BenchError(f"{self._side.name}: {answer['error']}")
        if not answer or "error" in answer:
            raise SideFailed(self._side.name, *self._last_words(answer.get("error")))
        return answer

    def _last_words(self, error: str | None) -> tuple[str, str]:
        code = self._process.wait()
        self._log.seek(0)
        log = self._log.read().decode(errors="replace")
        if error is None:
            lines = log.strip().splitlines()
            how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            error = f"its process was {how}" if code < 0 else f"its process {how}"
            error += f" ({lines[-1].strip()[:300]})" if lines else ""
        return error, log[-6000:]


class _Records:
    """Makes the records of a race."""

    def __init__(self, sides: dict[str, Side], rounds: int, images: int, command: Sequence[str]) -> None:
        self.records: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
        self._sides = sides
        self._environment = machine_environment()
        self._race = {"id": uuid.uuid4().hex[:16], "rounds": rounds, "images": images, "order": "ABBA BAAB"}
        self._command = " ".join(command)
        labels = list(dict.fromkeys(side.record.label for side in sides.values()))
        self._label = " against ".join(labels[::-1]) or "the only cell"

    def finished(
        self,
        number: int,
        facts: dict[str, dict[str, Any]],
        taken: dict[str, list[dict[str, Any]]],
        started_at: str,
    ) -> None:
        """Add both records of a round."""
        shared = [scope for scope in facts["base"]["scopes"] if scope in facts["head"]["scopes"]]
        for name in SIDES:
            samples = {scope: [one["elapsed_s"][scope] for one in taken[name]] for scope in shared}
            found = [Disturbance(one["contended"], one["throttled"]) for one in taken[name]]
            # The machine is one; what else the side says of itself is of its own interpreter and checkout.
            environment = facts[name]["environment"] | {"machine": self._environment["machine"]}
            self._add(
                name,
                number,
                started_at,
                status="ok",
                metrics={
                    f"latency_s/{scope}": metric(f"latency_s/{scope}", quantile(values).value)
                    for scope, values in samples.items()
                },
                samples={"latency_s": samples},
                sample_marks={"latency_s": mark_samples(found, on_cpu=facts[name]["on_cpu"])},
                environment=environment,
            )

    def failed(self, number: int, failure: SideFailed, started_at: str) -> None:
        """Add the record of a side that failed, and that of the other, which could not go on."""
        for name in SIDES:
            if name == failure.side:
                self._add(name, number, started_at, status="failed", reason=failure.reason, log=failure.log)
            else:
                self._add(name, number, started_at, status="skipped", reason="the other side failed")

    def _add(self, name: str, number: int, started_at: str, **content: Any) -> None:
        record = self._sides[name].record
        private = {str(Path.home()): "~", str(self._sides[name].source.absolute()): "<source>"}
        host = socket.gethostname()
        if len(host) >= 4 and host != "localhost":
            private[host] = "<host>"
        made = RunRecord.model_validate(
            {
                "suite": "race",
                "run_id": f"{self._race['id']}-{name}-{number}",
                "label": f"{record.label} round={number}",
                "axes": {"race": self._label, "round": number},
                "config": record.config,
                "measure": {"latency": True, "race": self._race},
                "nodes": record.nodes,
                "command": self._command,
                "started_at": started_at,
                "finished_at": now_text(),
                "duration_s": None,
                "environment": self._environment,
                **content,
            }
        )
        self.records[name].append(json.loads(dump_record(RunRecord.model_validate(scrub(made.model_dump(), private)))))
