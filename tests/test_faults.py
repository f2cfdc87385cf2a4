"""Faults while a suite runs: kills, torn files, full disks. What was stored survives, and the rest is made again.

`fault_driver` strikes at a chosen moment (see `fault_points`) and then runs the same command undisturbed. The slow
tests strike at every moment there is.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_plan import WORKER, make_plan
from rich.console import Console

import bench
from bench.errors import StoreError
from bench.execute import RunOutcome, run_plan
from bench.measure.source import Source
from bench.plan import Plan
from bench.record import load_record
from bench.store import Store

HERE = Path(__file__).parent
MEMORY = Path("/dev/shm")
Job = dict[str, Any]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: flushing thousands of files takes a disk minutes."""
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


def strike(place: Path, which: str, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """What `fault_driver` found, the undisturbed run first."""
    shutil.rmtree(place / which, ignore_errors=True)
    (place / which).mkdir()
    source = str(Path(bench.__file__).parents[1])
    variables = {"PYTHONPATH": os.pathsep.join([source, str(HERE)]), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, str(HERE / "fault_driver.py"), str(place / which), which],
        input="".join(json.dumps(job) + "\n" for job in jobs),
        capture_output=True,
        text=True,
        env=os.environ | variables,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(jobs) + 1
    assert found[0]["code"] == 0
    return found


def faults_of(found: dict[str, Any]) -> list[str]:
    """What is not as it has to be after one strike and the run after it."""
    job, faults = found["job"], []
    if "Traceback" in found["screen"]:
        faults.append("a traceback")
    if found["unreadable"]:
        faults.append(f"unreadable: {found['unreadable']}")
    if found["again"] != 0:
        faults.append(f"the next run ends with {found['again']}: {found['screen_again']}")
    if found["differing"] or found["left"]:
        faults.append(f"differing: {found['differing']}, left: {found['left']}")
    own = [line for line in found["screen"].splitlines() if line.startswith("run-suite: /")]
    if job["action"] in ("full", "refused"):
        said = "no space left on the device" if job["action"] == "full" else "no permission to write"
        if found["code"] != 2 or len(own) != 1 or said not in own[0]:
            faults.append(f"code {found['code']}, said {own}")
    elif job["action"] == "kill one":  # a job: told, and the suite goes on; after its last line it does not matter
        if found["code"] not in (0, 1, -9):
            faults.append(f"code {found['code']}")
    elif found["code"] != -9:
        faults.append(f"was not struck: code {found['code']}")
    return [f"{job} {found['moment']}: {fault}" for fault in faults]


def test_a_few_faults(place: Path) -> None:
    jobs: list[Job] = [
        {"action": "kill all", "at": 40},
        {"action": "kill one", "at": 35},
        {"action": "tear", "at": 57},
        {"action": "full", "at": 50},
        {"action": "refused", "at": 77},
    ]
    found = strike(place, "fake", jobs)
    assert found[0]["moments"] > 200
    assert [fault for one in found[1:] for fault in faults_of(one)] == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, about three times what the plan takes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") is not None and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip("only root on Linux may mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def run(root: Path, plan: Plan, **options: Any) -> RunOutcome:
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        console = Console(file=nowhere)
        return run_plan(plan, Store(root), console=console, worker_command=WORKER, **options)


def test_a_disk_that_fills_up(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.execute.source_state", Source)  # the patch of a changed checkout may have any size
    ballast, root = small_disk / "ballast", small_disk / "results"
    filled = 0
    for free in (0, 4, 8, 16, 40, 64):  # KiB
        ballast.unlink(missing_ok=True)
        usage = os.statvfs(small_disk)
        with ballast.open("wb") as file:
            file.write(bytes(max(0, usage.f_bavail * usage.f_bsize - free * 1024)))
        try:
            outcome = run(root, make_plan())
        except StoreError as error:
            reasons = [str(error)]
        else:
            assert outcome.exit_code == (2 if outcome.failures else 0)
            assert {failure.category for failure in outcome.failures.values()} <= {"user"}
            reasons = [failure.reason for failure in outcome.failures.values()]
        filled += bool(reasons)
        for reason in reasons:
            assert "no space left on the device" in reason
            assert str(root) in reason
    assert filled >= 3
    ballast.unlink()
    assert run(root, make_plan()).exit_code == 0
    assert run(small_disk.with_name("other"), make_plan()).exit_code == 0
    results = [Store(folder).records("fake") for folder in (root, small_disk.with_name("other"))]
    assert [record.metrics for record in results[0]] == [record.metrics for record in results[1]]
    assert not list(root.rglob("*.tmp"))


def test_a_child_out_of_memory_ends_its_own_run(tmp_path: Path) -> None:
    outcome = run(tmp_path / "results", make_plan(accidents={1: "limited memory"}))
    assert (len(outcome.ok), len(outcome.failed), outcome.exit_code) == (3, 1, 1)
    assert {failure.category for failure in outcome.failures.values()} == {"memory"}
    record = load_record(outcome.records[outcome.failed[0]])
    assert (record.status, record.reason) == ("failed", "predict: out of memory: MemoryError")


TENSOR = """
import resource, sys, torch
from bench.server import _describe
resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
try:
    torch.empty(2**35, dtype=torch.uint8)
except Exception as error:
    sys.stdout.write(" ".join([_describe(error)["category"], _describe(error)["text"]]))
"""


def test_what_torch_says_without_memory_is_understood() -> None:
    done = subprocess.run([sys.executable, "-c", TENSOR], capture_output=True, text=True, check=True, cwd=HERE.parent)
    assert done.stdout == "memory out of memory: a single request for 32.0 GiB failed"


COMMAND = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from fake_plan import WORKER, make_plan
from bench.errors import BenchError
from bench.execute import run_plan
from bench.store import Store
try:
    sys.exit(run_plan(make_plan(), Store(Path(sys.argv[2])), worker_command=WORKER).exit_code)
except BenchError as error:
    sys.stderr.write(f"refused: {error}")
    sys.exit(2)
"""


def test_two_commands_at_once_are_one_after_the_other_or_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-c", COMMAND, str(HERE), str(tmp_path / "results")]
    started = [
        subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    ended = [(process.communicate()[1], process.returncode) for process in started]
    assert {code for _, code in ended} <= {0, 2}
    assert 0 in {code for _, code in ended}
    for said, code in ended:
        assert code == 0 or "in use by another run-suite (process" in said
    assert run(tmp_path / "alone", make_plan()).exit_code == 0
    records = [Store(tmp_path / name).records("fake") for name in ("results", "alone")]
    assert [record.metrics for record in records[0]] == [record.metrics for record in records[1]]
    assert {Store(tmp_path / "results").attempts(node) for node in make_plan().nodes} == {1}


@pytest.mark.slow
def test_a_kill_at_every_moment_of_a_plan(place: Path) -> None:
    count = strike(place, "fake", [])[0]["moments"]
    jobs = [{"action": "kill all", "at": at} for at in range(1, count + 1)]
    found = strike(place, "fake", jobs)[1:]
    assert len(found) >= 200
    assert [fault for one in found for fault in faults_of(one)] == []


@pytest.mark.slow
@pytest.mark.parametrize("action", ["tear", "full", "refused", "kill one"])
def test_another_fault_at_many_moments_of_a_plan(place: Path, action: str) -> None:
    count = strike(place, "fake", [])[0]["moments"]
    # Before them only the command itself is at work, and a lock of an earlier day may be all that can be written.
    jobs = [{"action": action, "at": at} for at in range(16, count + 1, 4)]
    assert [fault for one in strike(place, "fake", jobs)[1:] for fault in faults_of(one)] == []


@pytest.mark.slow
def test_a_kill_at_every_moment_of_a_real_suite(place: Path) -> None:
    count = strike(place, "real", [])[0]["moments"]
    jobs: list[Job] = [{"action": "kill all", "at": at} for at in range(1, count + 1)]
    jobs += [{"action": "tear", "at": at} for at in range(10, count + 1, 5)]
    found = strike(place, "real", jobs)[1:]
    assert len(found) >= 200
    assert [fault for one in found for fault in faults_of(one)] == []


@pytest.mark.slow
def test_a_kill_at_random_times_of_a_real_suite(place: Path) -> None:
    seconds, draws = strike(place, "real", [])[0]["seconds"], random.Random(4)
    jobs = [{"action": "delay", "delay_s": draws.uniform(0, seconds)} for _ in range(60)]
    found = [one for one in strike(place, "real", jobs)[1:] if one["code"] == -9]  # a faster run had ended before
    assert len(found) >= 20
    assert [fault for one in found for fault in faults_of(one)] == []


@pytest.mark.slow
@pytest.mark.parametrize("action", ["full", "kill one"])
def test_another_fault_at_many_moments_of_a_real_suite(place: Path, action: str) -> None:
    count = strike(place, "real", [])[0]["moments"]
    jobs = [{"action": action, "at": at} for at in range(16, count + 1, 6)]
    assert [fault for one in strike(place, "real", jobs)[1:] for fault in faults_of(one)] == []
