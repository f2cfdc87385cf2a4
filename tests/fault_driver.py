"""Runs a real suite again and again, each time with another fault, in a program that has loaded everything once.

    python fault_driver.py ROOT real|fake < jobs   # a JSON object a line: {"action": ..., "at": ..., "delay_s": ...}

Every run is a forked process, with the processes that it has in earnest: the command, the server and a job each. `real`
is `bench.cli.main` with a small suite; `fake` the plan of `fake_plan`, which needs no torch. After a fault the same
command runs undisturbed. One JSON line for each job says what was found; the first is of a run without a fault.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_worker
from fake_plan import make_plan
from fault_points import Strike, install, moments

import bench.cli
import bench.execute
import bench.server
from bench.errors import BenchError
from bench.measure.environment import machine_environment
from bench.measure.packages import packages_lock
from bench.measure.source import Source
from bench.plan import build_plan
from bench.record import load_record
from bench.server import Input, Job
from bench.store import Store
from bench.suite import load_suite

# Dropout, so that the global generators count; two shards a cell; a checkpoint at every iteration.
SUITE = """
name: faults
data:
  {dataset: shapes, shapes_train_images: 4, shapes_val_images: 3, shapes_image_size: 64, shortest_edge_train: [64],
   longest_edge_train: 64, shortest_edge_test: 64, longest_edge_test: 64, crop_probability: 0.0, eval_batch_size: 2}
model:
  {backbone: tiny, freeze_at: 0, hidden_dim: 16, num_stages: 1, num_attention_heads: 2, dim_feedforward: 16,
   dim_dynamic: 4, mask_branch_channels: 8, mask_branch_layers: 1, dropout: 0.1}
train:
  {iterations: 4, batch_size: 1, warmup_iterations: 0, schedule_steps: [], num_train_proposals: 6, checkpoint_every: 1,
   log_every: 1, precision: fp32}
sampler: {num_proposals: 5, score_threshold: 0.0}
axes: {product: {sampling_steps: [1, 2]}}
measure: {latency: false, memory: false, flops: false}
tables: [{kind: long, metrics: [segm/AP, bbox/AP]}]
plots: []
"""
SHARD_SIZE = 2
_TIMES = {"started_at", "finished_at", "duration_s", "attempts", "environment", "checksum", "environment_id"}
_NOT_COMPARED = re.compile(r"(^|/)(\.lock|log\.txt|worker\.log|attempts\.txt)$|/history/")
_LEFTOVER = re.compile(r"\.(tmp|partial)$")


class ForkedWorker:
    """In place of the worker's `subprocess.Popen`: the same processes and pipes, without loading torch again."""

    def __init__(self, _command: Any, *, stderr: Any, env: dict[str, str], **_: Any) -> None:
        jobs_read, jobs_write = os.pipe()
        events_read, events_write = os.pipe()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for old, new in ((jobs_read, 0), (events_write, 1), (stderr.fileno(), 2)):
                os.dup2(old, new)
            for handle in (jobs_read, jobs_write, events_read, events_write):
                os.close(handle)
            os.environ.update(env)
            try:
                bench.server.serve(KINDS, parent)
            finally:
                os._exit(0)
        os.close(jobs_read)
        os.close(events_write)
        os.set_inheritable(jobs_write, False)
        self.stdin, self.stdout = open(jobs_write, "wb", buffering=0), open(events_read, "rb", buffering=0)  # noqa: PTH123, SIM115

    def wait(self, timeout: float | None = None) -> None:
        deadline = time.monotonic() + (timeout or 60)
        while os.waitpid(self.pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout or 60)
            time.sleep(0.002)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def run_command(folder: Path, strike: Strike | None, delay_s: float | None = None) -> tuple[int, float]:
    """The command in a process of its own: exit code (negative for a signal), and seconds."""
    began = time.monotonic()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            screen = os.open(folder / "screen.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(screen, 1)
            os.dup2(screen, 2)
            if strike is not None:
                install(Strike(strike.action, strike.at, strike.root, strike.journal, os.getpid()))
            code = COMMAND(folder)
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if delay_s is not None:
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while time.monotonic() < began + delay_s and os.waitid(os.P_PID, pid, ended) is None:
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - began


def wait_for_lock(path: Path, seconds: float = 60.0) -> None:
    """Until no worker of a killed command lives: as they are forked only, they hold its lock until the signal comes."""
    deadline = time.monotonic() + seconds
    while path.is_file() and time.monotonic() < deadline:
        with path.open("rb") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.01)


def content(root: Path) -> dict[str, str]:
    """Everything in a results folder that has to be the same however often its making was disturbed."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_file() and not _NOT_COMPARED.search(name):
            data = path.read_bytes()
            if path.name == "done.json" or (path.suffix == ".json" and not name.startswith(".store/")):
                data = json.dumps(_without(json.loads(data))).encode()
            elif path.suffix == ".safetensors":
                data = _ordered_head(data)
            found[name] = hashlib.sha256(data).hexdigest()
    return found


def _ordered_head(data: bytes) -> bytes:
    """A safetensors file with its metadata in order of name: the library writes them in any order."""
    size = int.from_bytes(data[:8], "little")
    return json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True).encode() + data[8 + size :]


def _without(value: dict[str, Any]) -> dict[str, Any]:
    """A result without times, and what measures times."""
    value = {key: entry for key, entry in value.items() if key not in {*_TIMES, "node_runs", "samples"}}
    if value.get("kind") == "latency":
        value["outputs"] = None
    if isinstance(value.get("outputs"), dict):  # of the fake training: where an attempt began
        value["outputs"] = {name: entry for name, entry in value["outputs"].items() if name != "resumed_at"}
    if "metrics" in value:
        value["metrics"] = {name: entry for name, entry in value["metrics"].items() if not name.startswith("latency_s")}
    return value


def unreadable(root: Path) -> list[str]:
    """Results and records that are there and cannot be read; the errors."""
    faults = []
    for path in root.glob(".store/*/done.json"):
        try:
            Store(root).result(path.parent.name)
        except BenchError as error:
            faults.append(str(error))
    for path in root.glob("[!.]*/*/*.json"):
        try:
            load_record(path)
        except BenchError as error:
            faults.append(str(error))
    return faults


def run_job(folder: Path, job: dict[str, Any], expected: dict[str, str] | None) -> dict[str, Any]:
    """One fault and what comes after it.

    Returns: code and screen of the struck run, `unreadable` results after it, `again`: the code of the run after it,
        `differing` and `left`: names of files that are not as in an undisturbed store, or should not be there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "faults.yaml").write_text(SUITE)
    root, journal = folder / "results", folder / "journal"
    strike = None
    if job["action"] != "delay":
        strike = Strike(job["action"], job.get("at", 0), root, journal, 0)
    code, seconds = run_command(folder, strike, job.get("delay_s"))
    found: dict[str, Any] = {"job": job, "code": code, "seconds": seconds, "moments": len(moments(journal))}
    found["moment"] = moments(journal)[job["at"] - 1 :][:1] if "at" in job else []
    found["screen"] = (folder / "screen.txt").read_text()
    found["unreadable"] = unreadable(root)
    if expected is not None:
        (folder / "screen.txt").unlink()
        wait_for_lock(root / ".lock")
        found["again"], found["seconds_again"] = run_command(folder, None)
        found["screen_again"] = (folder / "screen.txt").read_text()
        now = content(root)
        found["differing"] = sorted(name for name in now.keys() | expected if now.get(name) != expected.get(name))
        found["left"] = sorted(str(path) for path in root.rglob("*") if _LEFTOVER.search(path.name))
        found["history"] = len(list(root.rglob("history/*")))
    return found


def warm_up(folder: Path) -> None:
    """Run nodes here once: libraries load and compile at their first call, and what is forked has that behind it."""
    folder.mkdir()
    path = folder / "faults.yaml"
    path.write_text(SUITE)
    plan = build_plan(load_suite(path), device="cpu")
    inputs: dict[str, Input] = {}
    for kind in ("dataset", "train", "predict"):  # scoring starts a thread
        node_id = plan.cells[0].nodes[kind]
        node = plan.nodes[node_id]
        place = folder / kind
        place.mkdir()
        outputs = KINDS[kind](Job(node, place, inputs, {}, lambda _: None))
        inputs[kind] = Input(node_id, kind, place, node.spec, outputs)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads must not be forked"


def say(found: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def run_suite(folder: Path) -> int:
    return bench.cli.main([str(folder / "faults.yaml"), "--results", str(folder / "results"), "--device=cpu"])


def run_fake(folder: Path) -> int:
    try:
        return bench.execute.run_plan(make_plan(), Store(folder / "results")).exit_code
    except BenchError as error:
        sys.stderr.write(f"run-suite: {error}\n")
        return 2


def prepare_real(root: Path) -> None:
    """Load all that a run loads, so that a forked one loads nothing."""
    import bench.report.build
    import bench.report.plots
    import bench.report.tables
    import bench.worker

    bench.worker.write_predictions = partial(bench.worker.write_predictions, shard_size=SHARD_SIZE)
    # Drawing takes longer than all else, and is not what is struck here; the files are written all the same.
    bench.report.build.render = lambda plot: {"png": b"a picture", "svg": b"a drawing"}
    KINDS.update(bench.worker.KINDS)
    warm_up(root / "warm")


KINDS: dict[str, Any] = {}
COMMAND = run_suite


def main(root: Path, which: str) -> None:
    global COMMAND
    # What asks several programs each time; a patch, whatever the state of this checkout, so that one has to be kept.
    source, lock = Source("0" * 40, dirty=True, patch=b"a patch\n"), packages_lock()
    facts = machine_environment(source)
    bench.execute.source_state = lambda: source
    bench.execute.packages_lock = lambda: lock
    bench.execute.machine_environment = lambda _source=None: copy.deepcopy(facts)
    bench.execute.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=ForkedWorker, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired
    )
    if which == "real":
        prepare_real(root)
    else:
        COMMAND = run_fake
        KINDS.update({kind: getattr(fake_worker, kind) for kind in ("dataset", "train", "predict", "score")})
    say(run_job(root / "undisturbed", {"action": "count"}, None))
    expected = content(root / "undisturbed" / "results")
    for line in sys.stdin:
        say(run_job(root / "struck", json.loads(line), expected))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
