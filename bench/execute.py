"""A plan, node by node: each in a process of its own, each finished run turned into a record at once.

A failure ends its node and what builds on it, nothing else. A kill at any moment, of this process too, leaves a store
from which the same call goes on: complete nodes are reused, the others resumed or redone (see `bench.store`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from bench.display import Display
from bench.errors import BenchError, StoreError
from bench.measure.environment import SOURCE_ROOT, WORKER_VARIABLES, environment_id, machine_environment
from bench.measure.packages import packages_lock
from bench.measure.source import private_reason, source_state
from bench.plan import Cell, Node, Plan, needed_nodes
from bench.record import Metric, NodeRun, RunRecord, metric, scrub
from bench.store import NodeResult, Store, later_text, now_text
from bench.suite import metrics_of

WORKER_COMMAND = (sys.executable, "-m", "bench.start")
# Of this program's modules, those that bring much with them and that few nodes run.
LATE_MODULES = ("bench.torchvision_engine", "diffinst.backbones.swin")

# Whose process took the measurements of a run: the first of these that the run has.
_MEASURING = ("latency", "training_step", "predict", "score", "train", "weights", "dataset")
_SHARED = ("dataset", "train", "weights")  # many runs' nodes, each of which has a line of its own
_LOG_LINES = 40
_LOG_CHARACTERS = 6000


@dataclass(frozen=True)
class Failure:
    """Why a node has no result. category: 'user' (bad input: its text is complete), 'memory', 'crash', 'killed'.

    run: when the attempt began and how long it took. environment: of its process, as far as it had told it.
    """

    node_id: str
    reason: str
    category: str
    log: str
    run: NodeRun
    environment: dict[str, Any]


@dataclass
class RunOutcome:
    """What became of a plan's cells.

    ok, failed: run ids as they finished. missing: those of cells that cannot be run here, as the plan says. A cell in
    none of them was not finished because of an interrupt. executed: ids of the nodes run now. records: run id -> record
    file. failures: node id -> why.
    """

    machine: str
    ok: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)
    records: dict[str, Path] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """130 interrupted; 2 something failed on bad input; 1 something failed or is missing; 0 all is well."""
        if self.interrupted:
            return 130
        if any(failure.category == "user" for failure in self.failures.values()):
            return 2
        return 1 if self.failed or self.missing else 0


def run_plan(
    plan: Plan,
    store: Store,
    *,
    command: Sequence[str] = ("run-suite",),
    console: Console | None = None,
    worker_command: Sequence[str] = WORKER_COMMAND,
    private: dict[str, str] | None = None,
    grace_s: float = 30.0,
) -> RunOutcome:
    """Run what is not done yet and write the record of every finished run.

    Args:
        command: the command line as typed, for the records.
        console: where progress goes; standard error by default.
        worker_command: starts the process that runs nodes, see `bench.server`.
        private: text -> mark for what records must not tell, such as {data root: '<data-root>'}; home, temporary
            folder, this program's and the results folder, and the host's name are always replaced.
        grace_s: after an interrupt, time for the running node to write its partial work; a second interrupt ends it.
    Returns:
        The outcome; failed nodes and an interrupt (SIGINT, SIGTERM) are part of it and raise nothing.
    Raises:
        StoreError: the results folder cannot be used. BenchError: the worker process cannot be started.
    """
    with store.lock(), _Interrupts() as interrupts:
        hidden = private_texts(store, private or {})
        todo = needed_nodes(plan, store.is_done)
        environment = _environment(store, hidden) if todo else machine_environment()
        runner = _Runner(plan, store, environment, command, hidden)
        screen = console or Console(stderr=True)
        with (
            Display(screen, len(todo)) as display,
            _Worker(worker_command, late_modules(plan, todo), store, interrupts, grace_s) as worker,
        ):
            runner.tell_missing(display)
            runner.write_finished(display, unsettled={node.id for node in todo})
            waiting = {node.id for node in todo}
            for node in todo:
                if interrupts.count:
                    break
                runner.run(node, worker, display)
                waiting.discard(node.id)
                if not interrupts.count or store.is_done(node.id):
                    runner.write_finished(display, unsettled=waiting)
        runner.outcome.interrupted = interrupts.count > 0
        return runner.outcome


def late_modules(plan: Plan, nodes: Sequence[Node]) -> list[str]:
    """Those of `LATE_MODULES` that some of the nodes run."""
    parts = {part for node in nodes for part in plan.codes.get(node.code, {})}
    return [module for module in LATE_MODULES if any(part.startswith(f"{module}:") for part in parts)]


def _environment(store: Store, private: dict[str, str]) -> dict[str, Any]:
    """The machine's facts, with the patch and the lock that they name kept under the results folder."""
    source, lock = source_state(), packages_lock()
    environment = machine_environment(source)
    name = f"{environment['packages_lock']['sha256'][:16]}.lock.txt"
    environment["packages_lock"]["file"] = store.keep_provenance(name, lock.encode())
    if source.patch is not None and source.file_name is not None:
        # Folders that any machine has tell nothing.
        common = {tempfile.gettempdir(), sys.prefix, sys.base_prefix}
        reason = private_reason(source.patch, [text for text in private if text not in common])
        kept = store.keep_provenance(source.file_name, source.patch, publish=reason is None)
        environment["diff"]["file"] = kept
        if reason is not None:
            environment["diff"]["reason"] = f"not among what is committed: {reason}"
    return environment


class _Interrupts:
    """Counts SIGINT and SIGTERM instead of dying of them, while it is entered; does nothing outside the main thread."""

    def __init__(self) -> None:
        self.count = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._count)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _count(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1


class _WorkerGone(Exception):
    """The worker process ended while it was needed."""


@dataclass
class _Ended:
    """How a job ended. code: exit code, negative for a signal, None when the worker itself ended; error: its event.

    environment: what the job had told of its process.
    """

    code: int | None
    stopped: bool
    error: dict[str, Any] | None
    environment: dict[str, Any] = field(default_factory=dict)


class _Worker:
    """The process that runs nodes; started when first needed, and again after it has ended."""

    def __init__(
        self,
        command: Sequence[str],
        modules: Sequence[str],
        store: Store,
        interrupts: _Interrupts,
        grace_s: float,
    ) -> None:
        self._command, self._modules = command, modules
        self._log = store.nodes_folder / "worker.log"
        self._interrupts = interrupts
        self._grace_s = grace_s
        self._process: subprocess.Popen[bytes] | None = None
        self._running: int | None = None
        self._buffer = b""

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        if self._running is not None:  # an error of ours, not of the job: leave nothing behind
            self._signal_job(signal.SIGKILL)
        self._close()

    def run(self, job: dict[str, Any], on_progress: Callable[[int, int, str], None]) -> _Ended:
        """Run one job to its end.

        Raises:
            BenchError: the worker cannot be started.
        """
        error = None
        environment: dict[str, Any] = {}
        asked_s: float | None = None
        try:
            if not self._ready():
                return _Ended(None, stopped=True, error=None)
            self._tell(job)
            while True:
                event = self._next_event(0.1)
                if self._interrupts.count and self._running is not None:
                    if asked_s is None:
                        asked_s = time.monotonic()
                        self._signal_job(signal.SIGTERM)
                    elif self._interrupts.count > 1 or time.monotonic() - asked_s > self._grace_s:
                        self._signal_job(signal.SIGKILL)
                match event:
                    case {"event": "started", "pid": int(pid)}:
                        self._running = pid
                    case {"event": "progress", "done": int(done), "total": int(total), "text": str(text)}:
                        on_progress(done, total, text)
                    case {"event": "environment", "process": dict(process)}:
                        environment = {"process": process}
                    case {"event": "error"}:
                        error = event
                    case {"event": "exited", "code": int(code)}:
                        self._running = None
                        return _Ended(code, asked_s is not None and code != 0, error, environment)
        except _WorkerGone:
            self._running = None
            self._close()
            return _Ended(None, bool(self._interrupts.count), error, environment)

    def _ready(self) -> bool:
        """Have a worker that listens; False when interrupted meanwhile."""
        if self._process is not None:
            return True
        with self._log.open("ab") as log:
            start = log.tell()
            self._process = subprocess.Popen(
                [*self._command, "--serve", str(os.getpid()), *self._modules],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                start_new_session=True,  # Ctrl-C in the terminal is for us; we pass it on
                env={**WORKER_VARIABLES, **os.environ},
            )
        self._buffer = b""
        try:
            while not self._interrupts.count:
                if self._next_event(0.1) is not None:
                    return True
        except _WorkerGone as gone:
            self._close()
            lines = self._log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
            last = lines[-1] if lines else "no message"
            raise BenchError(f"the worker process cannot start: {last} (all of it: {self._log})") from gone
        return False

    def _tell(self, job: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        data = memoryview(json.dumps(job).encode() + b"\n")
        try:
            while data:
                data = data[self._process.stdin.write(data) :]
        except BrokenPipeError as error:
            raise _WorkerGone from error

    def _next_event(self, timeout_s: float) -> dict[str, Any] | None:
        assert self._process is not None
        assert self._process.stdout is not None
        if b"\n" not in self._buffer:
            readable, _, _ = select.select([self._process.stdout], [], [], timeout_s)
            if not readable:
                return None
            chunk = self._process.stdout.read(65536)
            if not chunk:
                raise _WorkerGone
            self._buffer += chunk
            if b"\n" not in self._buffer:
                return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event

    def _signal_job(self, number: signal.Signals) -> None:
        # The job leads a group of its own; only a kill goes to its helpers too, a request to stop is for the job.
        assert self._running is not None
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self._running, number)
            else:
                os.kill(self._running, number)

    def _close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


class _Runner:
    """Runs nodes of one plan and keeps what is known of them."""

    def __init__(
        self, plan: Plan, store: Store, environment: dict[str, Any], command: Sequence[str], private: dict[str, str]
    ) -> None:
        self.outcome = RunOutcome(machine=environment["machine"])
        self._plan = plan
        self._store = store
        self._environment = environment
        self._command = " ".join(command)
        self._private = private
        self._written: set[str] = set()
        self._labels = _node_labels(plan)

    def run(self, node: Node, worker: _Worker, display: Display) -> None:
        """Run one node unless one that it builds on has failed; note a failure."""
        broken = [self.outcome.failures[source] for source in node.inputs if source in self.outcome.failures]
        if broken:
            self.outcome.failures[node.id] = broken[0]
            display.node_dropped()
            return
        display.node_started(node.kind, self._labels[node.id])
        folder = self._store.begin(node)
        self._store.keep_code(node.code, self._plan.codes.get(node.code, {}))
        log = folder / "log.txt"
        log_start = log.stat().st_size if log.exists() else 0
        started_at, start, oom_kills = now_text(), time.monotonic(), _oom_kills()
        ended = worker.run(self._job(node, folder, log), display.node_progress)
        self.outcome.executed.append(node.id)
        if self._store.is_done(node.id):
            display.node_finished(f"{time.monotonic() - start:.1f} s", quiet=node.kind not in _SHARED)
        elif ended.stopped:
            display.node_finished("stopped, goes on from here next time")
        else:
            category, reason = _reason(ended, out_of_memory=_oom_kills() > oom_kills)
            reason = f"{node.kind}: {reason}"
            environment = self._environment | ended.environment
            run = NodeRun(
                started_at=started_at,
                duration_s=round(time.monotonic() - start, 3),
                attempts=self._store.attempts(node.id),
                **_where(environment),
            )
            failure = Failure(node.id, reason, category, _log_tail(log, log_start), run, environment)
            self.outcome.failures[node.id] = failure
            display.node_finished(f"failed: {reason.removeprefix(f'{node.kind}: ')} (log: {log})", failed=True)
            try:
                self._store.note_failure(node.id, failure.reason)
            except StoreError as error:  # the reason is known, and goes into the records if they can be written
                display.line(f"why is not noted for next time: {error}", "yellow")

    def _job(self, node: Node, folder: Path, log: Path) -> dict[str, Any]:
        inputs = []
        for source in _ancestors(self._plan, node):
            # One that is not done is one that nobody needs any more, see `needed_nodes`.
            if (done := self._store.result(source.id)) is not None:
                inputs.append(
                    {
                        "id": source.id,
                        "kind": source.kind,
                        "folder": str(self._store.folder(source.id).resolve()),
                        "spec": source.spec,
                        "outputs": done.outputs,
                    }
                )
        content = {"id": node.id, "kind": node.kind, "inputs": node.inputs, "spec": node.spec, "options": node.options}
        content |= {"spec_id": node.spec_id, "code": node.code, "content": node.content}
        return {
            "node": content,
            "folder": str(folder.resolve()),
            "log": str(log.resolve()),
            "inputs": inputs,
            "environment": self._environment,
        }

    def tell_missing(self, display: Display) -> None:
        """Say which cells cannot be run, and why; they get no record."""
        for cell in self._plan.cells:
            if cell.missing is not None:
                self.outcome.missing.append(cell.run_id)
                display.line(f"missing {cell.label}: {cell.missing}", "yellow")

    def write_finished(self, display: Display, unsettled: set[str]) -> None:
        """Write the records of all runs none of whose nodes is still to be run (in `unsettled`).

        Each run is written once; a run with a failed node is recorded as failed.
        """
        for cell in self._plan.cells:
            if cell.missing or cell.run_id in self._written or unsettled & set(cell.nodes.values()):
                continue
            self._written.add(cell.run_id)
            record, machine = self._record(cell)
            change = self._store.write_record(record, machine)
            self.outcome.records[cell.run_id] = self._store.record_path(record.suite, machine, record.run_id)
            (self.outcome.ok if record.status == "ok" else self.outcome.failed).append(cell.run_id)
            if record.status != "ok":
                display.line(f"failed  {cell.label}: {self._short_reason(cell, record)}", "bold red")
            elif change != "same":
                count = f"{len(self.outcome.records)}/{len(self._plan.cells)}"
                display.line(f"ok      {cell.label}{_headline(record)}  ({count})", "green")

    def _short_reason(self, cell: Cell, record: RunRecord) -> str:
        """The reason, or for a node that many runs share, which has said it already, the node's kind."""
        failed = next(self.outcome.failures[node] for node in cell.nodes.values() if node in self.outcome.failures)
        runs = sum(failed.node_id in other.nodes.values() for other in self._plan.cells)
        if runs == 1:
            return str(record.reason)
        return f"its {self._plan.nodes[failed.node_id].kind} node failed, see above"

    def _record(self, cell: Cell) -> tuple[RunRecord, str]:
        results = {kind: done for kind, node_id in cell.nodes.items() if (done := self._store.result(node_id))}
        failures = [self.outcome.failures[node] for node in cell.nodes.values() if node in self.outcome.failures]
        environment = next((results[kind].environment for kind in _MEASURING if kind in results), self._environment)
        conditions = {kind: found for kind, done in results.items() if (found := done.environment.get("conditions"))}
        node_runs = {kind: _node_run(done) for kind, done in results.items()}
        finished_at = [done.finished_at for done in results.values()]
        if failures:
            environment = failures[0].environment
            node_runs |= {self._plan.nodes[failure.node_id].kind: failure.run for failure in failures}
            finished_at += [later_text(failure.run.started_at, failure.run.duration_s) for failure in failures]
        if conditions:  # of every node that has some, not of the one whose process is described
            environment = environment | {"conditions": conditions}
        outputs = [done.outputs for done in results.values()]
        content = {
            "suite": self._plan.suite_name,
            "run_id": cell.run_id,
            "label": cell.label,
            "status": "failed" if failures else "ok",
            "reason": failures[0].reason if failures else None,
            "axes": cell.axes,
            "config": cell.config,
            "measure": cell.measure,
            "nodes": dict(cell.nodes),
            "code": {kind: code for kind, node_id in cell.nodes.items() if (code := self._plan.nodes[node_id].code)},
            "node_runs": node_runs,
            "metrics": _metrics(cell, outputs, failed=bool(failures)),
            "samples": {name: value for part in outputs for name, value in part.get("samples", {}).items()},
            "sample_marks": {name: value for part in outputs for name, value in part.get("sample_marks", {}).items()},
            "per_class": {name: value for part in outputs for name, value in part.get("per_class", {}).items()},
            "per_class_errors": {
                name: value for part in outputs for name, value in part.get("per_class_errors", {}).items()
            },
            "resamples": {name: value for part in outputs for name, value in part.get("resamples", {}).items()},
            "checks": {name: value for part in outputs for name, value in part.get("checks", {}).items()},
            "environment": environment,
            "environment_id": environment_id(environment),
            "command": self._command,
            "started_at": min((run.started_at for run in node_runs.values()), default=None),
            "finished_at": max(finished_at, default=None),
            "duration_s": round(sum(run.duration_s for run in node_runs.values()), 3) if node_runs else None,
            "log": failures[0].log if failures else None,
        }
        record = RunRecord.model_validate(content)
        told = record.model_dump()
        resamples = told.pop("resamples")  # numbers in base64, which can look like a path
        return RunRecord.model_validate(scrub(told, self._private) | {"resamples": resamples}), environment["machine"]


def _metrics(cell: Cell, outputs: Sequence[dict[str, Any]], *, failed: bool) -> dict[str, Metric]:
    """All that the nodes measured, and for what else there is to measure the reason why it was not."""
    found = {name: Metric(**value) for part in outputs for name, value in part.get("metrics", {}).items()}
    for name, setting in metrics_of(cell.config.get("data", {})).items():
        if name not in found:
            has_node = (setting if setting in ("score", "training_step") else "latency") in cell.nodes
            found[name] = metric(name, None, "the run failed" if failed and has_node else "not asked for")
    return found


def _node_run(done: NodeResult) -> NodeRun:
    return NodeRun(
        started_at=done.started_at, duration_s=done.duration_s, attempts=done.attempts, **_where(done.environment)
    )


def _where(environment: dict[str, Any]) -> dict[str, Any]:
    """What a node's environment says of where it ran, for `NodeRun`."""
    process = environment.get("process") or {}
    return {
        "commit": environment.get("commit"),
        "dirty": environment.get("dirty"),
        "environment_id": environment_id(environment),
        "device": process.get("device_name") or process.get("device"),
    }


def _ancestors(plan: Plan, node: Node) -> Iterator[Node]:
    """What a node builds on, nearest first."""
    seen: set[str] = set()
    waiting = list(node.inputs)
    while waiting:
        source = plan.nodes[waiting.pop(0)]
        if source.id not in seen:
            seen.add(source.id)
            waiting += source.inputs
            yield source


def _node_labels(plan: Plan) -> dict[str, str]:
    """Node id -> the axis values that all its runs share, or its id when it has none."""
    users: dict[str, list[Cell]] = {}
    for cell in plan.cells:
        for node_id in cell.nodes.values():
            users.setdefault(node_id, []).append(cell)
    labels = {}
    for node_id in plan.nodes:
        cells = users.get(node_id, [])
        if len(cells) == 1:
            labels[node_id] = cells[0].label
            continue
        first = cells[0].axes if cells else {}
        shared = [name for name, value in first.items() if all(cell.axes.get(name) == value for cell in cells)]
        text = " ".join(f"{name}={first[name]}" for name in shared)
        labels[node_id] = f"{text} (for {len(cells)} runs)".strip() if cells else node_id
    return labels


def _headline(record: RunRecord) -> str:
    """The main score and the latency, as far as they were measured."""
    values = {name: metric.value for name, metric in record.metrics.items() if metric.value is not None}
    scores = [f"  {name} {values[name]:.4f}" for name in ("segm/AP", "bbox/AP") if name in values]
    latency = values.get("latency_s/total")
    return "".join(scores[:1]) + ("" if latency is None else f"  {latency * 1000:.1f} ms an image")


def _reason(ended: _Ended, *, out_of_memory: bool) -> tuple[str, str]:
    """(category, one line) for a node that ended without a result."""
    if ended.error is not None:
        category, kind = ended.error["category"], ended.error["type"]
        # These are about what happened, not about what was typed: they fail the run, not the command.
        return ("crash" if kind in ("TrainingError", "PeerCrash", "EvaluatorError") else category), ended.error["text"]
    if ended.code is None:
        return "killed", "the worker process ended" + (": the kernel ran out of memory" if out_of_memory else "")
    if ended.code == -signal.SIGKILL:
        if out_of_memory:
            return "memory", "out of memory: killed by the kernel (SIGKILL)"
        return "killed", "killed (SIGKILL); most often this is the kernel short of memory"
    if ended.code < 0:
        return "crash", f"crashed with {signal.Signals(-ended.code).name}"
    return "crash", f"ended with exit code {ended.code} and no result"


def _oom_kills() -> int:
    """Processes that the kernel has killed for memory so far, on this machine and in our control group."""
    files = [Path("/proc/vmstat")]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            if line.startswith("0::"):
                files.append(Path("/sys/fs/cgroup") / line[3:].lstrip("/") / "memory.events")
    total = 0
    for file in files:
        with contextlib.suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            total += int(found[1]) if found else 0
    return total


def _log_tail(path: Path, start: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(start)
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-_LOG_LINES:])[-_LOG_CHARACTERS:]


def private_texts(store: Store, private: dict[str, str]) -> dict[str, str]:
    """What must not be told, such as folders and the host's name -> what stands for it; see `bench.record.scrub`."""
    found = {
        str(SOURCE_ROOT): "<source>",
        sys.prefix: "<python>",
        sys.base_prefix: "<python>",
        tempfile.gettempdir(): "<tmp>",
        str(Path.cwd()): ".",
        str(Path.home()): "~",
        **{os.environ[name]: f"${name}" for name in ("DIFFINST_DATASETS", "DIFFINST_CACHE") if os.environ.get(name)},
        str(store.root.resolve()): "<results>",
        **private,
    }
    host = socket.gethostname()
    if len(host) >= 4 and host != "localhost":
        found[host] = "<host>"
    return {text: mark for text, mark in found.items() if len(text) > 1}
