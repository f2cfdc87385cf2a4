"""The server's own rules: whole events, one attempt in a folder, and an end told in words."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fake_plan import WORKER

from bench import server, store
from bench.errors import StoreError
from bench.plan import Node
from bench.server import Job
from diffinst.errors import DataError


def make_job(folder: Path) -> tuple[Job, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    node = Node(id="train-1", kind="train", inputs=(), spec={})
    return Job(node, folder, inputs={}, environment={"machine": "box"}, report=events.append), events


def test_progress_is_thinned_out_but_its_end_is_told(tmp_path: Path) -> None:
    job, events = make_job(tmp_path)
    for done in range(1, 1001):
        job.progress(done, 1000, "loss 1.0")
    assert len(events) < 100
    assert events[-1] == {"event": "progress", "done": 1000, "total": 1000, "text": "loss 1.0"}


@pytest.mark.parametrize(
    ("error", "category", "text"),
    [
        (DataError("a.json: annotation 3: no area"), "user", "a.json: annotation 3: no area"),
        (MemoryError(), "memory", "out of memory: MemoryError"),
        (
            type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"),
            "memory",
            "out of memory: CUDA out of memory",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory", "out of memory: DefaultCPUAllocator"),
        (OSError(12, "Cannot allocate memory"), "memory", "out of memory"),
        (ValueError("two\n  lines"), "crash", "ValueError: two lines"),
        (ZeroDivisionError(), "crash", "ZeroDivisionError"),
    ],
)
def test_errors_are_sorted(error: Exception, category: str, text: str) -> None:
    event = server._describe(error)
    assert event["category"] == category
    assert event["text"].startswith(text)
    assert "\n" not in event["text"]


def test_an_event_fits_one_write() -> None:
    reader, writer = os.pipe()
    server._send(writer, {"event": "error", "category": "crash", "type": "ValueError", "text": "ä" * 2000})
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        data = file.read()
    assert len(data) <= 4096
    assert json.loads(data)["text"].endswith("ä ...")


def test_nobody_listening_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    server._send(writer, {"event": "ready"})
    os.close(writer)


def test_an_attempt_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _ = make_job(tmp_path)
    with (tmp_path / ".lock").open("w") as earlier:
        fcntl.flock(earlier, fcntl.LOCK_EX)
        threading.Timer(0.2, lambda: fcntl.flock(earlier, fcntl.LOCK_UN)).start()
        start = time.monotonic()
        assert server._run_job(lambda job: {"answer": 42}, job) == 0
        assert time.monotonic() - start > 0.15
        fcntl.flock(earlier, fcntl.LOCK_EX)
        monkeypatch.setattr(server, "_FOLDER_LOCK_TIMEOUT_S", 0.1)
        with pytest.raises(StoreError, match="another process works here"):
            server._run_job(lambda job: {}, job)
    done = json.loads((tmp_path / "done.json").read_text())
    assert (done["outputs"], done["attempts"], done["environment"]) == ({"answer": 42}, 1, {"machine": "box"})


def test_a_stopped_attempt_claims_nothing(tmp_path: Path) -> None:
    job, _ = make_job(tmp_path)

    def work(job: Job) -> dict[str, Any]:
        job.request_stop()
        return {}

    assert server._run_job(work, job) == server.EXIT_STOPPED
    assert not (tmp_path / "done.json").exists()


def test_it_ends_when_its_input_ends_or_its_parent_is_another() -> None:
    done = subprocess.run(
        [*WORKER, "--serve", str(os.getpid())], stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False
    )
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"event": "ready", "threads": 1}
    orphan = subprocess.run([*WORKER, "--serve", "1"], stdin=subprocess.PIPE, timeout=20, check=False)
    assert orphan.returncode == 1


def test_the_worker_leaves_before_loading_torch_if_its_parent_is_gone() -> None:
    # With torch out of reach, an attempt to load it would end in a traceback.
    code = "import sys; sys.modules['torch'] = None; from bench.start import main; main(['--serve', '1'])"
    orphan = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    assert orphan.returncode == server.EXIT_FAILED
    assert orphan.stderr == ""


@pytest.mark.parametrize("jump_s", [-86_400, 86_400])
def test_a_clock_that_jumps_changes_no_duration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: int) -> None:
    job, _ = make_job(tmp_path)

    class Clock(datetime):
        jumped = 0

        @classmethod
        def now(cls, _zone: Any = None) -> datetime:
            return datetime(2026, 1, 2, 12, tzinfo=UTC) + timedelta(seconds=cls.jumped)

    def work(job: Job) -> dict[str, Any]:
        Clock.jumped = jump_s
        return {}

    monkeypatch.setattr(store, "datetime", Clock)
    assert server._run_job(work, job) == 0
    done = json.loads((tmp_path / "done.json").read_text())
    assert done["started_at"] == "2026-01-02T12:00:00Z"
    assert "2026-01-02T12:00:00Z" <= done["finished_at"] < "2026-01-02T13:00:00Z"
    assert 0 <= done["duration_s"] < 3600


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    event = server._describe(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "attempts.txt")))
    assert event["category"] == "user"
    assert event["text"].startswith(f"{tmp_path}/attempts.txt: cannot be written: no space left on the device. Free")
    assert server._describe(OSError(errno.ENOENT, "No such file", "x"))["category"] == "crash"
