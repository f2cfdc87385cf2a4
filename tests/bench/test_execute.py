"""Plans run with quick fake nodes: what is run, what is recorded, and how every kind of end is told."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_plan
import psutil
import pytest
from fake_plan import WORKER, make_plan
from fake_worker import LIKE_A_PATH
from rich.console import Console

from bench import execute
from bench.errors import BenchError, StoreError
from bench.execute import LATE_MODULES, RunOutcome, late_modules, run_plan
from bench.measure.environment import environment_id
from bench.measure.source import Source
from bench.plan import Plan, needed_nodes
from bench.store import Store

HERE = Path(fake_plan.__file__).parent
RUN = "import json, sys; sys.path.insert(0, {here!r}); import fake_plan as f; from bench.execute import run_plan; "
RUN += "from bench.store import Store; from pathlib import Path; "
RUN += "sys.exit(run_plan(f.make_plan(**{options!r}), Store(Path({root!r})), worker_command=f.WORKER).exit_code)"


def run(plan: Plan, root: Path, **options: Any) -> RunOutcome:
    console = Console(file=(root.parent / "screen.txt").open("a"), force_terminal=False, width=400)
    with console.file:
        return run_plan(plan, Store(root), console=console, worker_command=WORKER, **options)


def start(root: Path, **options: Any) -> subprocess.Popen[bytes]:
    """The same in a process of its own, to be killed."""
    code = RUN.format(here=str(HERE), options=options, root=str(root))
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, start_new_session=True)


def record(root: Path, outcome: RunOutcome, run_id: str) -> dict[str, Any]:
    return json.loads((root / "fake" / outcome.machine / f"{run_id}.json").read_text())


def results(root: Path) -> dict[str, Any]:
    """All of a store that is a result: node files and outputs, and the records without times and attempts."""
    found: dict[str, Any] = {}
    for path in sorted((root / ".store").rglob("*")):
        if path.name in {"data.txt", "model.txt", "predictions.txt", "node.json"}:
            found[str(path.relative_to(root))] = path.read_text()
        elif path.name == "done.json":
            done = json.loads(path.read_text())
            found[str(path.relative_to(root))] = (done["spec"], done["files"])
    for path in sorted(root.glob("fake/**/*.json")):
        content = json.loads(path.read_text())
        found[str(path.relative_to(root))] = {
            key: content[key] for key in ("status", "reason", "metrics", "samples", "per_class", "nodes", "axes")
        }
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)
    return value


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "results"


def test_every_run_gets_its_record(root: Path) -> None:
    outcome = run(make_plan(), root)
    assert outcome.exit_code == 0
    assert len(outcome.ok) == 4
    assert len(outcome.executed) == 1 + 2 + 4 + 4
    last = record(root, outcome, f"{3:016x}")
    # 5 steps, repeated 2 times: 10 lines, in hundredths.
    assert last["metrics"]["segm/AP"]["value"] == 0.1
    assert last["metrics"]["segm/APl"] == {
        "value": None,
        "unit": "fraction",
        "higher_is_better": True,
        "reason": "no large instance",
    }
    assert last["per_class"] == {"segm/AP": {"disc": 0.1, "ring": None}}
    assert last["samples"] == {"latency_s": {"total": [0.25, 0.5]}}
    # Numbers in base64 stay as they are where other texts lose their paths.
    assert last["resamples"]["segm/AP"]["values"] == LIKE_A_PATH
    assert last["checks"] == {"evaluators": {"max_difference": 0.0}}
    assert last["axes"] == {"steps": 5, "times": 2}
    assert last["environment"]["machine"] == outcome.machine
    assert last["environment"]["cpu"]["logical_cores"] >= 1
    assert last["metrics"]["flops"]["reason"] == "not asked for"
    assert set(last["node_runs"]) == {"dataset", "train", "predict", "score"}
    assert last["duration_s"] == pytest.approx(sum(part["duration_s"] for part in last["node_runs"].values()))
    screen = (root.parent / "screen.txt").read_text()
    assert "ok      steps=5 times=2  segm/AP 0.1000" in screen


def test_the_record_names_the_patch_and_the_lock_that_are_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source("0" * 40, dirty=True, patch=b"--- a/bench/x.py\n")
    monkeypatch.setattr(execute, "source_state", lambda: source)
    outcome = run(make_plan(), root)
    last = record(root, outcome, outcome.ok[-1])
    environment = last["environment"]
    assert environment["diff"] == {"sha256": source.digest, "bytes": 17, "file": f"provenance/{source.file_name}"}
    assert (root / environment["diff"]["file"]).read_bytes() == source.patch
    lock = (root / environment["packages_lock"]["file"]).read_text()
    assert hashlib.sha256(lock.encode()).hexdigest() == environment["packages_lock"]["sha256"]
    assert "numpy==" in lock
    assert last["environment_id"] == environment_id(environment)


def test_each_node_says_where_it_ran(root: Path) -> None:
    outcome = run(make_plan(), root)
    last = record(root, outcome, outcome.ok[-1])
    runs = last["node_runs"]
    # The prediction tells its process, the others none: one environment for all of them would be wrong.
    assert runs["predict"]["device"] == "a fake"
    assert "device" not in runs["score"]
    assert runs["predict"]["environment_id"] == last["environment_id"] != runs["score"]["environment_id"]


def test_a_patch_that_tells_the_machine_stays_with_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source("0" * 40, dirty=True, patch=f"+data: {Path.home()}/coco\n".encode())
    monkeypatch.setattr(execute, "source_state", lambda: source)
    outcome = run(make_plan(), root)
    diff = record(root, outcome, outcome.ok[-1])["environment"]["diff"]
    assert diff["file"] == f".store/provenance/{source.file_name}"
    assert diff["reason"].startswith("not among what is committed: it")
    assert (root / diff["file"]).read_bytes() == source.patch
    assert not list((root / "provenance").glob("*.patch"))


def test_a_second_time_nothing_runs_and_nothing_changes(root: Path) -> None:
    outcome = run(make_plan(), root)
    before = {path: path.read_bytes() for path in root.rglob("*.json")}
    again = run(make_plan(), root, command=("run-suite", "--other"))
    assert again.executed == []
    assert again.ok == outcome.ok
    assert {path: path.read_bytes() for path in root.rglob("*.json")} == before


def test_a_training_is_not_repeated_for_predictions_that_are_there(root: Path) -> None:
    plan = make_plan()
    store = Store(root)
    run(plan, root)
    for name in ("train-0000000000000000/model.txt", "score-0000000000000003/done.json"):
        (store.nodes_folder / name).unlink()
    assert [node.id for node in needed_nodes(plan, store.is_done)] == ["score-0000000000000003"]
    (store.nodes_folder / "predict-0000000000000001/predictions.txt").write_text("cut")
    (store.nodes_folder / "score-0000000000000001/done.json").unlink()
    needed = [node.id for node in needed_nodes(plan, store.is_done)]
    assert needed == [
        "train-0000000000000000",
        "predict-0000000000000001",
        "score-0000000000000001",
        "score-0000000000000003",
    ]


def test_every_way_to_fail_is_told(root: Path) -> None:
    outcome = run(make_plan(accidents={0: "raise", 1: "exit", 2: "segfault", 3: "memory"}), root)
    assert outcome.exit_code == 1
    assert len(outcome.failed) == 4
    reasons = [record(root, outcome, f"{number:016x}")["reason"] for number in range(4)]
    assert reasons == [
        "predict: ValueError: bad thing in <results>/.store/predict-0000000000000000",
        "predict: ended with exit code 3 and no result",
        "predict: crashed with SIGSEGV",
        "predict: out of memory: tried to allocate 7 GiB",
    ]
    raised = record(root, outcome, f"{0:016x}")
    assert 'raise ValueError(f"bad thing in {job.folder}")' in raised["log"]
    assert str(root.parent) not in json.dumps(raised)


def test_evaluators_that_disagree_fail_the_run_and_are_nobodys_mistake(root: Path) -> None:
    outcome = run(make_plan(accidents={1: "disagree"}), root)
    assert (outcome.exit_code, len(outcome.ok), len(outcome.failed)) == (1, 3, 1)
    failed = record(root, outcome, outcome.failed[0])
    assert failed["reason"] == "predict: two evaluators disagree on segm/AP: 0.5 and 0.6"


def test_a_failure_that_cannot_be_noted_ends_one_run_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_store: Store, node_id: str, _reason: str) -> None:
        raise StoreError(f"{node_id}/failure.txt: cannot be written")

    monkeypatch.setattr(Store, "note_failure", refuse)
    outcome = run(make_plan(accidents={1: "exit"}), root)
    assert (outcome.exit_code, outcome.failed, len(outcome.ok)) == (1, [f"{1:016x}"], 3)
    assert record(root, outcome, f"{1:016x}")["reason"] == "predict: ended with exit code 3 and no result"
    screen = (root.parent / "screen.txt").read_text().splitlines()
    (place,) = (i for i, line in enumerate(screen) if "ended with exit code 3 and no result (log:" in line)
    assert (
        "why is not noted for next time: predict-0000000000000001/failure.txt: cannot be written" in screen[place + 1]
    )


def test_a_failure_ends_one_run(root: Path) -> None:
    outcome = run(make_plan(accidents={1: "exit"}), root)
    assert outcome.exit_code == 1
    assert outcome.failed == [f"{1:016x}"]
    assert len(outcome.ok) == 3
    failed = record(root, outcome, f"{1:016x}")
    assert failed["status"] == "failed"
    assert failed["metrics"]["segm/AP"]["value"] is None
    assert failed["metrics"]["segm/AP"]["reason"] == "the run failed"
    assert failed["metrics"]["latency_s/total"]["reason"] == "not asked for"
    screen = (root.parent / "screen.txt").read_text()
    assert "failed  steps=3 times=2: predict: ended with exit code 3" in screen
    # A run has one line; a node that went well has none besides, unless it is a training or a data set.
    kinds = [line.split("]")[1].split()[0] for line in screen.splitlines() if line.startswith("[")]
    assert sorted(kinds) == ["dataset", "predict", "train", "train", "train", "train"]
    assert len([line for line in screen.splitlines() if line.startswith(("ok", "failed"))]) == 4
    # When the failed attempt was, and on what it ran as far as it had said.
    assert failed["node_runs"]["predict"]["attempts"] == 1
    assert failed["duration_s"] == pytest.approx(sum(part["duration_s"] for part in failed["node_runs"].values()))
    assert failed["finished_at"] >= failed["node_runs"]["predict"]["started_at"]
    assert failed["environment"]["process"] == {"device": "a fake"}
    assert failed["node_runs"]["predict"]["device"] == "a fake"
    assert failed["node_runs"]["predict"]["environment_id"] == failed["environment_id"]
    # The plan says so until it is tried again.
    store = Store(root)
    node_id = failed["nodes"]["predict"]
    assert store.unfinished(node_id) == "failed before: predict: ended with exit code 3 and no result"
    store.begin(make_plan(accidents={1: "exit"}).nodes[node_id])
    assert store.unfinished(node_id) == "begun before, goes on from what is there"


@pytest.mark.parametrize(
    ("step", "category", "reason"),
    [
        (1, "memory", "predict: out of memory: killed by the kernel (SIGKILL)"),
        (0, "killed", "predict: killed (SIGKILL); most often this is the kernel short of memory"),
    ],
)
def test_the_kernels_count_tells_whether_memory_was_short(
    root: Path, monkeypatch: pytest.MonkeyPatch, step: int, category: str, reason: str
) -> None:
    monkeypatch.setattr(execute, "_oom_kills", itertools.count(7, step).__next__)  # read before and after each run
    outcome = run(make_plan(accidents={1: "kill"}), root)
    assert {(failure.category, failure.reason) for failure in outcome.failures.values()} == {(category, reason)}


def test_a_killed_run_is_told_from_others(root: Path) -> None:
    outcome = run(make_plan(accidents={1: "kill", 2: "kill the worker"}), root)
    assert outcome.exit_code == 1
    reasons = [record(root, outcome, f"{number:016x}")["reason"] for number in (1, 2)]
    assert reasons[0].startswith("predict: killed (SIGKILL)") or reasons[0].startswith("predict: out of memory")
    assert reasons[1].startswith("predict: the worker process ended")
    # A new worker has done the rest.
    assert outcome.ok == [f"{0:016x}", f"{3:016x}"]


def test_a_failed_run_is_tried_again_and_its_record_kept(root: Path) -> None:
    outcome = run(make_plan(accidents={0: "exit"}), root)
    (Store(root).nodes_folder / "predict-0000000000000000/node.json").unlink()  # the accident is in the fake's spec
    again = run(make_plan(), root)
    assert again.executed == ["predict-0000000000000000", "score-0000000000000000"]
    assert record(root, again, f"{0:016x}")["status"] == "ok"
    kept = json.loads((root / "fake" / outcome.machine / "history" / f"{0:016x}.1.json").read_text())
    assert kept["status"] == "failed"


def test_bad_input_fails_what_builds_on_it_with_exit_code_2(root: Path) -> None:
    outcome = run(make_plan(dataset={"user_error": True}), root)
    assert outcome.exit_code == 2
    assert len(outcome.failed) == 4
    assert outcome.executed == ["dataset-0000000000000000"]
    reason = record(root, outcome, f"{2:016x}")["reason"]
    assert reason == "dataset: photo.jpg: corrupt JPEG. Replace it or take image 7 off the list"


def test_a_worker_that_cannot_start_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_WORKER_BROKEN", "1")
    with pytest.raises(BenchError, match="worker process cannot start: ModuleNotFoundError: No module named 'torch'"):
        run(make_plan(), root)


def test_two_runs_on_one_folder(root: Path) -> None:
    with Store(root).lock(), pytest.raises(StoreError, match=f"in use by another run-suite .process {os.getpid()}"):
        run(make_plan(), root)


def test_an_interrupt_keeps_partial_work(root: Path) -> None:
    model = root / ".store/train-0000000000000000/model.txt"
    process = start(root, steps=(60, 1), pause_s=0.01)
    wait_for(lambda: model.exists() and len(model.read_text()) > 10)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    written = len(model.read_text().splitlines())
    assert 5 <= written < 60
    assert not list(root.glob("fake/*/*.json"))
    assert start(root, steps=(60, 1), pause_s=0.01).wait(60) == 0
    done = json.loads((model.parent / "done.json").read_text())
    assert done["outputs"]["resumed_at"] == written
    assert done["attempts"] == 2


def test_a_second_interrupt_ends_what_does_not_stop(root: Path) -> None:
    pids = root / ".store/predict-0000000000000000/pids"
    process = start(root, accidents={0: "ignore stop"})
    wait_for(pids.exists)
    job = int(wait_for(pids.read_text))
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert not psutil.pid_exists(job)


def test_no_process_survives_a_kill_of_the_parent(root: Path) -> None:
    pids = root / ".store/predict-0000000000000000/pids"
    process = start(root, accidents={0: "hang with a helper"})
    job, helper = (int(pid) for pid in wait_for(lambda: pids.exists() and pids.read_text().split()))
    worker = psutil.Process(job).ppid()
    process.kill()
    process.wait()
    wait_for(lambda: not psutil.pid_exists(job) and not psutil.pid_exists(worker))
    os.kill(helper, signal.SIGKILL)  # knows nothing of all this, unlike the loading processes of torch


def check_kills(tmp_path: Path, parts: list[float], **options: Any) -> None:
    """Kill a run at these parts of its undisturbed duration, one after the other, then let it finish."""
    root, undisturbed = tmp_path / "results", tmp_path / "undisturbed"
    began = time.monotonic()
    assert start(undisturbed, **options).wait() == 0
    duration = time.monotonic() - began
    kills = 0
    for part in parts:
        process = start(root, **options)
        try:
            process.wait(part * duration)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills >= 2
    assert start(root, **options).wait() == 0
    assert results(root) == results(undisturbed)
    assert not [path for path in root.rglob(".*.tmp") if ".store" not in path.parts]


def test_killed_at_any_moment_it_ends_the_same(tmp_path: Path) -> None:
    check_kills(tmp_path, [0.4, 0.7, 0.85], steps=(6, 4), pause_s=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_many_random_moments_it_ends_the_same(tmp_path: Path, seed: int) -> None:
    draws = random.Random(seed)
    check_kills(tmp_path, [draws.uniform(0.15, 0.6) for _ in range(15)], steps=(12, 9), pause_s=0.05)


def test_modules_of_the_nodes_that_are_to_run_are_imported_before_the_first(tmp_path: Path) -> None:
    plan = make_plan()
    train, other = list(plan.nodes.values())[:2]
    codes = {train.code: {"diffinst.backbones.swin:Swin": "0", "diffinst.backbones.swinging:x": "0"}}
    swin = dataclasses.replace(plan, codes=codes)
    assert late_modules(swin, [train]) == ["diffinst.backbones.swin"]
    assert late_modules(swin, []) == late_modules(dataclasses.replace(plan, codes={}), [train, other]) == []
    for name, code in ((LATE_MODULES[1], 0), ("diffinst.no_such", 1)):
        done = subprocess.run(
            [sys.executable, "-m", "bench.start", "--serve", str(os.getpid()), name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=Path(__file__).parents[2],
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stderr


def test_a_worker_without_torchvisions_operators_does_not_start() -> None:
    code = "from bench import worker; from diffinst.ops import library; library.find_spec = lambda _: None; "
    done = subprocess.run(
        [sys.executable, "-c", f"{code} worker.main(['--serve', '{os.getpid()}'])"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "compiled operators do not load" in done.stderr.splitlines()[-1]
