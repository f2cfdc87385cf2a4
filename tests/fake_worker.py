"""Stands in for `bench.worker` in tests: quick node kinds that load nothing, run as a program."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from typing import Any

from bench.errors import EvaluatorError
from bench.server import Job, serve
from diffinst.errors import DataError

LIKE_A_PATH = "/aaa/bbb/ccc+/dd"  # three numbers in base64


def dataset(job: Job) -> dict[str, Any]:
    """Write one file that later nodes need."""
    if "user_error" in job.node.spec:
        raise DataError("photo.jpg: corrupt JPEG. Replace it or take image 7 off the list")
    path = job.folder / "data.txt"
    path.write_text(str(job.node.spec["value"]))
    job.files.append(path)
    return {"num_images": 3}


def train(job: Job) -> dict[str, Any]:
    """Count to `steps` in a file, one number at a time, going on where an earlier attempt was killed."""
    path = job.folder / "model.txt"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    lines = [line for line in lines if line.endswith("\n")]
    path.write_text("".join(lines))
    steps = job.node.spec["steps"]
    for step in range(len(lines), steps):
        with path.open("a") as file:
            file.write(f"{step}\n")
        time.sleep(job.node.spec.get("pause_s", 0.01))
        job.progress(step + 1, steps, f"loss {steps - step}")
        if job.stop():
            return {}
    job.files.append(path)
    return {"resumed_at": len(lines)}


def predict(job: Job) -> dict[str, Any]:
    """Repeat the model, or end in one of the ways in which runs end."""
    job.describe_process({"device": "a fake"})
    model = (job.inputs["train"].folder / "model.txt").read_text()
    match job.node.spec.get("accident"):
        case "disagree":
            raise EvaluatorError("two evaluators disagree on segm/AP: 0.5 and 0.6")
        case "raise":
            raise ValueError(f"bad thing in {job.folder}")
        case "exit":
            os._exit(3)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "memory":
            raise MemoryError("tried to allocate 7 GiB")
        case "limited memory":
            resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
            (job.folder / "predictions.txt").write_bytes(bytearray(2**31))
        case "kill the worker":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(30)
        case "hang with a helper":
            helper = subprocess.Popen(["sleep", "60"])
            (job.folder / "pids").write_text(f"{os.getpid()} {helper.pid}")
            time.sleep(60)
        case "ignore stop":
            (job.folder / "pids").write_text(str(os.getpid()))
            while True:
                time.sleep(0.05)
    time.sleep(job.node.spec.get("pause_s", 0.0))
    path = job.folder / "predictions.txt"
    path.write_text(model * job.node.spec["times"])
    job.files.append(path)
    return {}


def score(job: Job) -> dict[str, Any]:
    """The number of predictions, in hundredths."""
    text = (job.inputs["predict"].folder / "predictions.txt").read_text()
    value = len(text.splitlines()) / 100
    job.environment["pid_of_score"] = "a process"
    return {
        "metrics": {
            "segm/AP": {"value": value, "unit": "fraction", "higher_is_better": True},
            "segm/APl": {"value": None, "unit": "fraction", "higher_is_better": True, "reason": "no large instance"},
        },
        "per_class": {"segm/AP": {"disc": value, "ring": None}},
        "samples": {"latency_s": {"total": [0.25, 0.5]}},
        "resamples": {
            "segm/AP": {"images": "0", "num_images": 3, "seed": 0, "count": 3, "values": LIKE_A_PATH},
        },
        "checks": {"evaluators": {"max_difference": 0.0}},
    }


if __name__ == "__main__":
    if os.environ.get("FAKE_WORKER_BROKEN"):
        sys.exit("ModuleNotFoundError: No module named 'torch'")
    serve({"dataset": dataset, "train": train, "predict": predict, "score": score}, int(sys.argv[2]))
