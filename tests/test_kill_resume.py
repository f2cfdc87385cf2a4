"""A real suite, killed at ten random moments and started again each time, ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import bench
from bench.errors import RecordError, StoreError
from bench.record import load_record
from bench.store import Store

# Dropout, so that the global generators count; more validation images than a shard holds.
SUITE = """
name: minute
data:
  {dataset: shapes, shapes_train_images: 40, shapes_val_images: 80, shapes_image_size: 64, shortest_edge_train: [64],
   longest_edge_train: 64, shortest_edge_test: 64, longest_edge_test: 64, crop_probability: 0.0, eval_batch_size: 8}
model:
  {backbone: tiny, freeze_at: 0, hidden_dim: 32, num_stages: 2, num_attention_heads: 2, dim_feedforward: 32,
   dim_dynamic: 8, mask_branch_channels: 8, mask_branch_layers: 1, dropout: 0.1}
train:
  {iterations: 48, batch_size: 4, learning_rate: 4.0e-3, warmup_iterations: 4, schedule: cosine, schedule_steps: [],
   num_train_proposals: 20, checkpoint_every: 4, log_every: 1, precision: fp32}
sampler: {num_proposals: 20}
axes: {product: {sampling_steps: [1, 2]}}
measure: {latency_images: 2, latency_seconds: 0.0}
tables: [{kind: long, metrics: [segm/AP, bbox/AP, flops]}]
plots: [{x: sampling_steps, y: segm/AP}]
"""
ITERATIONS = 48
NODES = ["dataset", "latency", "latency", "predict", "predict", "score", "score", "train"]
KILLS = 10
SEED = 5
# Of the kills, how many strike while programs load; the others strike while a node works or reports are written.
STARTUP_SHARE = 0.2
# Reports alone take longer than this, in seconds, if only for the modules that they load.
REPORTING = 0.2
MARK = "DIFFINST_TEST_KILL_RESUME"
PROGRAM = "import sys; from bench.cli import main; sys.exit(main())"


@dataclass
class Results:
    """A results folder that run-suite works in, as seen from outside."""

    root: Path

    def start(self) -> subprocess.Popen[bytes]:
        """The command, always the same one; its processes carry a mark in their environment."""
        suite = self.root.parent / "minute.yaml"
        suite.write_text(SUITE)
        # The folder of the tests holds one named bench, which must not be taken for the package.
        source = str(Path(bench.__file__).parents[1])
        variables = {MARK: str(self.root), "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        command = [sys.executable, "-c", PROGRAM, str(suite), "--results", str(self.root), "--device", "cpu"]
        with self.screen.open("ab") as screen:
            return subprocess.Popen(
                command, cwd=self.root.parent, env=os.environ | variables, stdout=screen, stderr=screen
            )

    @property
    def screen(self) -> Path:
        return self.root.with_suffix(".txt")

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # ended meanwhile, or somebody else's
                if process.environ().get(MARK) == str(self.root):
                    found.append(process)
        return found

    def attempts(self) -> dict[str, int]:
        """Node id -> how often it was started."""
        paths = (self.root / ".store").glob("*/attempts.txt")
        return {path.parent.name: len(path.read_text().splitlines()) for path in paths}

    def node(self, kind: str) -> Path:
        (folder,) = (self.root / ".store").glob(f"{kind}-*")
        return folder

    def done(self) -> dict[str, dict[str, Any]]:
        """Node id -> what its done.json says."""
        paths = (self.root / ".store").glob("*/done.json")
        return {path.parent.name: json.loads(path.read_text()) for path in paths}

    def files(self, folder: str, pattern: str) -> dict[str, bytes]:
        paths = sorted(path for path in (self.root / folder).glob(pattern) if path.is_file())
        return {str(path.relative_to(self.root)): path.read_bytes() for path in paths}


@dataclass
class Timing:
    """How long the parts of the undisturbed run took, in seconds; the parts of a later run are expected to be alike.

    startup: until the first node starts. nodes: node id -> its duration. report: after the last node.
    """

    startup: float
    nodes: dict[str, float]
    report: float

    def left(self, results: Results) -> float:
        """Expected work left, startup not included."""
        done = results.done()
        left = self.report
        for node_id, duration in self.nodes.items():
            if node_id not in done:
                losses = results.root / ".store" / node_id / "losses.jsonl"
                finished = losses.read_text().count("\n") if losses.is_file() else 0
                left += duration * (1 - finished / ITERATIONS)
        return left

    @property
    def total(self) -> float:
        return sum(self.nodes.values()) + self.report


@dataclass
class Kills:
    """What ten kills met.

    landed: kills that ended the command. hit: node ids that were at work. outlived: processes that did not go.
    half_written: records or done files that could not be read. resumable: kills that left a checkpoint to go on from.
    last_code: exit code of the run that was left alone after them.
    """

    landed: int = 0
    hit: list[str] = field(default_factory=list)
    outlived: list[str] = field(default_factory=list)
    half_written: list[str] = field(default_factory=list)
    resumable: int = 0
    last_code: int | None = None


def wait_for(condition: Callable[[], Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(met)


def run_undisturbed(results: Results) -> Timing:
    began = time.monotonic()
    process = results.start()
    wait_for(lambda: results.attempts() or process.poll() is not None, 300)
    startup = time.monotonic() - began
    assert process.wait(300) == 0, results.screen.read_text()
    last = max(path.stat().st_mtime for path in (results.root / ".store").glob("*/done.json"))
    durations = {node_id: done["duration_s"] for node_id, done in results.done().items()}
    return Timing(startup, durations, report=time.time() - last)


def wait_for_moment(
    results: Results, process: subprocess.Popen[bytes], timing: Timing, number: int, draws: random.Random
) -> None:
    """Let kill `number` (from 0) wait for its random moment in the run that `process` is.

    Most kills share the whole work evenly: number i strikes at a random place of the i-th tenth of it.
    """
    in_startup, place = draws.random() < STARTUP_SHARE, draws.random()
    left, before = timing.left(results), sum(results.attempts().values())

    def ended() -> bool:
        return process.poll() is not None

    def started() -> bool:
        return sum(results.attempts().values()) > before

    def nodes_done() -> bool:
        return len(results.done()) == len(NODES)

    if nodes_done():
        lock = results.root / ".lock"
        wait_for(lambda: lock.read_text() == f"{process.pid}\n" or ended(), 300)
        wait_for(ended, place * REPORTING)
    elif in_startup:
        wait_for(lambda: started() or ended(), place * timing.startup)
    else:
        wait_for(lambda: started() or ended(), 300)
        target = (number + place) / KILLS * timing.total - (timing.total - left)
        # On a machine that has become faster the last node may end before the moment: then this is the moment.
        wait_for(lambda: nodes_done() or ended(), max(target, 0.0))


def run_with_kills(results: Results, timing: Timing) -> Kills:
    draws, kills = random.Random(SEED), Kills()
    for number in range(KILLS):
        before = results.attempts()
        process = results.start()
        wait_for_moment(results, process, timing, number, draws)
        process.kill()
        kills.landed += process.wait() == -signal.SIGKILL
        # A worker that was still loading its modules looks for its parent when it has loaded them.
        if not wait_for(lambda: not results.processes(), 60):
            kills.outlived += [f"kill {number}: {' '.join(found.cmdline())}" for found in results.processes()]
        kills.half_written += half_written(results)
        finished = results.done()
        after = results.attempts()
        kills.hit += [node for node in after if after[node] > before.get(node, 0) and node not in finished]
        checkpoints = results.root.glob(".store/train-*/checkpoint.safetensors")
        kills.resumable += any(path.parent.name not in finished for path in checkpoints)
    kills.last_code = results.start().wait(300)
    return kills


def half_written(results: Results) -> list[str]:
    """What is wrong with the records and the node results that are there."""
    faults = []
    for path in results.root.glob("minute/*/*.json"):
        try:
            record = load_record(path)
        except RecordError as error:
            faults.append(str(error))
        else:
            faults += [f"{path}: {record.reason}"] * (record.status != "ok")
    for node_id in results.attempts():
        try:
            Store(results.root).result(node_id)
        except StoreError as error:
            faults.append(str(error))
    return faults


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Timing]:
    results = Results(tmp_path_factory.mktemp("undisturbed") / "results")
    return results, run_undisturbed(results)


@pytest.fixture(scope="module")
def killed(
    undisturbed: tuple[Results, Timing], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Results, Results, Kills]:
    results = Results(tmp_path_factory.mktemp("killed") / "results")
    return results, undisturbed[0], run_with_kills(results, undisturbed[1])


def test_every_kill_landed_and_the_command_ends_well(killed: tuple[Results, Results, Kills]) -> None:
    results, _, kills = killed
    assert kills.landed == KILLS
    assert kills.last_code == 0, results.screen.read_text()
    # The moments were worth it: nodes were cut off, a training among them that had something to go on from.
    assert len(kills.hit) >= 2
    assert kills.resumable >= 1
    assert sum(results.attempts().values()) == len(NODES) + len(kills.hit)


def test_nothing_is_left_behind(killed: tuple[Results, Results, Kills]) -> None:
    results, other, kills = killed
    assert not kills.outlived
    assert not kills.half_written
    assert not results.processes()
    names = [
        [str(path.relative_to(folder.root)) for path in sorted(folder.root.rglob("*")) if path.is_file()]
        for folder in (results, other)
    ]
    assert names[0] == names[1]
    assert not [name for name in names[0] if name.endswith((".tmp", ".partial")) or "history" in name]


def test_the_weights_are_the_same(killed: tuple[Results, Results, Kills]) -> None:
    found, expected = (load_file(folder.node("train") / "model.safetensors") for folder in killed[:2])
    assert found.keys() == expected.keys()
    different = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not different


def test_the_losses_are_the_same(killed: tuple[Results, Results, Kills]) -> None:
    found, expected = ((folder.node("train") / "losses.jsonl").read_text() for folder in killed[:2])
    assert expected.count("\n") == ITERATIONS
    assert found == expected


def test_the_predictions_are_the_same(killed: tuple[Results, Results, Kills]) -> None:
    found, expected = (folder.files(".store", "predict-*/predictions/*") for folder in killed[:2])
    assert len(expected) == 4  # two shards of each cell
    assert found.keys() == expected.keys()
    assert [name for name, content in expected.items() if found[name] != content] == []


def test_the_node_outputs_are_the_same(killed: tuple[Results, Results, Kills]) -> None:
    found, expected = (folder.done() for folder in killed[:2])
    assert sorted(node.split("-")[0] for node in expected) == NODES
    assert found.keys() == expected.keys()
    for node, done in expected.items():
        assert (found[node]["spec"], found[node]["files"]) == (done["spec"], done["files"])
        if done["kind"] != "latency":
            assert found[node]["outputs"] == done["outputs"]


def test_the_metrics_are_the_same(killed: tuple[Results, Results, Kills]) -> None:
    pairs = [Store(folder.root).records("minute") for folder in killed[:2]]
    assert [len(records) for records in pairs] == [2, 2]
    for found, expected in zip(*pairs):
        assert found.run_id == expected.run_id
        assert found.nodes == expected.nodes
        assert found.per_class == expected.per_class
        names = [name for name in expected.metrics if not name.startswith(("latency_s", "peak_memory_bytes"))]
        assert {name: found.metrics[name] for name in names} == {name: expected.metrics[name] for name in names}
        assert expected.metrics["segm/AP"].value  # neither missing nor 0, which would be equal whatever happened
        assert found.metrics["latency_s/total"].value


def test_the_tables_and_plots_are_the_same(killed: tuple[Results, Results, Kills]) -> None:
    found, expected = (folder.files("minute", "*/report/*") for folder in killed[:2])
    assert {Path(name).suffix for name in expected} == {".md", ".csv", ".tex", ".png", ".svg"}
    assert [name for name in expected if found[name] != expected[name]] == []
