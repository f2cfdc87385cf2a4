"""The child's side of running nodes: a small server that loads everything once and forks a process for each node.

A process of its own for each node keeps a crash or an out-of-memory to that node, and makes peak memory its own.
Loading torch takes seconds, as long as a small run, so the server loads it once, while it has a single thread and no
CUDA context, and each node starts from a fork of it within milliseconds. The server reads one job a line from its input
and writes events, one JSON object a line, to what was its standard output; a forked job writes its progress there too
(lines shorter than a pipe's atomic write, so they never mix).

No process outlives the one that started it: each asks the kernel (Linux) to be killed with its parent, and the server
also looks for its parent while it waits. The server knows no node kind: `bench.worker` does.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import json
import logging
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.digests import check_inputs, digest_files, seal
from bench.errors import StoreError
from bench.plan import Node
from bench.record import dump_json
from bench.store import ATTEMPTS_NAME, NodeResult, later_text, now_text, write_atomic, write_problem
from diffinst.errors import DiffInstError

EXIT_FAILED = 1
EXIT_STOPPED = 75  # asked to stop, partial work kept (EX_TEMPFAIL)

_LOG = logging.getLogger(__name__)

_MAX_EVENT_BYTES = 4000  # below PIPE_BUF (4096): one write is one line, whatever else is written
_PROGRESS_INTERVAL_S = 0.2
_FOLDER_LOCK_TIMEOUT_S = 60.0
_POLL_S = 0.02
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Input:
    """A finished node that a job builds on: its folder and what its done.json says."""

    id: str
    kind: str
    folder: Path
    spec: dict[str, Any]
    outputs: dict[str, Any]


@dataclass
class Job:
    """One attempt at one node, as the node's function sees it.

    inputs: node kind -> the nearest node of that kind that this one builds on. A function lists the files that
    later nodes need in `files` (paths in `folder`); they go to done.json, and so does `environment`. logs: files that
    no node needs and people read; their digests are kept.
    report: sends an event to the parent process.
    """

    node: Node
    folder: Path
    inputs: dict[str, Input]
    environment: dict[str, Any]
    report: Callable[[dict[str, Any]], None]
    files: list[Path] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _last_progress: float = 0.0

    def stop(self) -> bool:
        """Whether the node was asked to stop: keep the partial work and return."""
        return self._stop.is_set()

    def request_stop(self) -> None:
        """Ask the node's function to stop at its next opportunity."""
        self._stop.set()

    def describe_process(self, facts: dict[str, Any]) -> None:
        """Note facts about this process for done.json, and tell them now, for the record should the job fail."""
        self.environment["process"] = facts
        self.report({"event": "environment", "process": facts})

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Tell how far the node is; calls in quick succession are dropped, but never the last."""
        now = time.monotonic()
        if done >= total or now - self._last_progress >= _PROGRESS_INTERVAL_S:
            self._last_progress = now
            self.report({"event": "progress", "done": done, "total": total, "text": text[:500]})


NodeFunction = Callable[[Job], dict[str, Any]]


def serve(kinds: Mapping[str, NodeFunction], parent: int) -> None:
    """Run jobs from standard input until it ends. Never returns in a forked job.

    Args:
        kinds: node kind -> function that does the work in `job.folder` and returns JSON-able outputs.
        parent: process id of the process to end with.
    """
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = os.dup(1)
    os.dup2(2, 1)  # a stray print goes to the log, not into the protocol
    _send(channel, {"event": "ready", "threads": _thread_count()})
    for line in _lines(parent):
        job = json.loads(line)
        own = os.getpid()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os._exit(_job_process(kinds, job, channel, own))
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        _send(channel, {"event": "started", "pid": pid})
        _send(channel, {"event": "exited", "pid": pid, "code": _wait(pid, parent)})


def _lines(parent: int) -> Iterator[bytes]:
    waiting = b""
    while True:
        readable, _, _ = select.select([0], [], [], 1.0)
        if os.getppid() != parent:
            return
        if readable:
            chunk = os.read(0, 65536)
            if not chunk:
                return
            *lines, waiting = (waiting + chunk).split(b"\n")
            yield from lines


def _wait(pid: int, parent: int) -> int:
    """The exit code of `pid`, negative for a signal. Ends everything if the parent is gone meanwhile."""
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found == pid:
            return os.waitstatus_to_exitcode(status)
        if os.getppid() != parent:
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
            os._exit(EXIT_FAILED)
        time.sleep(_POLL_S)


def _job_process(kinds: Mapping[str, NodeFunction], content: dict[str, Any], channel: int, server: int) -> int:
    """Everything that happens in a forked process; returns its exit code."""
    try:
        log = os.open(content["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(log)
        os.close(null)
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        die_with(server)
        _prefer_as_oom_victim()
        faulthandler.enable()
        node = Node(**{**content["node"], "inputs": tuple(content["node"]["inputs"])})
        job = Job(
            node=node,
            folder=Path(content["folder"]),
            inputs=_inputs(content["inputs"]),
            environment=dict(content["environment"]),
            report=lambda event: _send(channel, event),
        )
        signal.signal(signal.SIGTERM, lambda *_: job.request_stop())
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
        return _run_job(kinds[node.kind], job)
    except BaseException as error:  # the process ends here; its parent has to hear why
        with contextlib.suppress(OSError):  # the log may be on a disk that is full
            traceback.print_exc()
        _send(channel, _describe(error))
        return EXIT_FAILED
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()


def _inputs(items: list[dict[str, Any]]) -> dict[str, Input]:
    found: dict[str, Input] = {}
    for item in items:  # nearest first: the data set that the node reads, not the one that its model was trained on
        found.setdefault(item["kind"], Input(**{**item, "folder": Path(item["folder"])}))
    return found


def _run_job(function: NodeFunction, job: Job) -> int:
    with _folder_lock(job.folder):
        started_at, start = now_text(), time.monotonic()
        attempts = _count_attempt(job.folder, started_at)
        _LOG.info("%s, attempt %d", job.node.id, attempts)
        check_inputs(source.folder for source in job.inputs.values() if source.id in job.node.inputs)
        outputs = function(job)
        if job.stop():
            return EXIT_STOPPED
        duration_s = round(time.monotonic() - start, 3)
        result = NodeResult(
            id=job.node.id,
            kind=job.node.kind,
            spec=job.node.spec,
            inputs=list(job.node.inputs),
            started_at=started_at,
            finished_at=later_text(started_at, duration_s),
            duration_s=duration_s,
            attempts=attempts,
            files={str(path.relative_to(job.folder)): path.stat().st_size for path in sorted(job.files)},
            outputs=outputs,
            environment=job.environment,
            spec_id=job.node.spec_id,
            code=job.node.code,
            content=job.node.content,
            digests=digest_files(job.folder, [*job.files, *job.logs]),
        )
        write_atomic(job.folder / "done.json", seal(dump_json(result.model_dump(mode="json"))))
    return 0


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Wait until no earlier attempt works in the folder: that of a killed run-suite may live some milliseconds on."""
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + _FOLDER_LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise StoreError(f"{folder}: another process works here. Stop it and run again") from error
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(handle)


def _count_attempt(folder: Path, started_at: str) -> int:
    path = folder / ATTEMPTS_NAME
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{started_at}\n")
    return len(path.read_bytes().splitlines())


def _describe(error: BaseException) -> dict[str, Any]:
    """An 'error' event. category: 'memory', 'user' (a DiffInstError, whose text is complete), or 'crash'."""
    # torch.OutOfMemoryError by its name, so that this module loads no torch; the CPU allocator raises RuntimeError.
    names = {base.__name__ for base in type(error).__mro__}
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if names & {"MemoryError", "OutOfMemoryError"} or re.search(r"\bcan(not|'t) allocate memory", text, re.IGNORECASE):
        # Of the CPU allocator's message, what tells something.
        asked = re.search(r"you tried to allocate (\d+) bytes", text)
        text = f"a single request for {int(asked[1]) / 2**30:.1f} GiB failed" if asked else text or kind
        category, text = "memory", f"out of memory: {text}"
    elif (problem := write_problem(error)) is not None:
        category, text = "user", problem
    elif isinstance(error, DiffInstError):
        category = "user"
    else:
        category, text = "crash", f"{kind}: {text}" if text else kind
    return {"event": "error", "category": category, "type": kind, "text": text[:2000]}


def _send(channel: int, event: dict[str, Any]) -> None:
    """Write one event. Nobody listening is no error: the parent is gone, and we are about to be."""
    data = json.dumps(event).encode() + b"\n"
    if len(data) > _MAX_EVENT_BYTES and "text" in event:
        data = json.dumps({**event, "text": event["text"][:500] + " ..."}).encode() + b"\n"
    with contextlib.suppress(BrokenPipeError):
        os.write(channel, data)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; leave at once if that has happened already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(EXIT_FAILED)


def _prefer_as_oom_victim() -> None:
    """When the machine runs out of memory, the kernel should end this run rather than the suite."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


def _thread_count() -> int | None:
    try:
        return sum(1 for _ in Path("/proc/self/task").iterdir())
    except OSError:
        return None
