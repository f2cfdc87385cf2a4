"""Stands in for `bench/peers/run_peer.py` in tests: plain Python, run as a program with a job file.

`options: {mode: ...}` of the engine says how it behaves; without it, as it should.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def say(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def rle(runs: list[int]) -> str:
    """Run lengths (at most three) as pycocotools writes them."""
    text = ""
    for run in runs:
        more = True
        while more:
            low, run = run & 31, run >> 5
            more = run != (-1 if low & 16 else 0)
            text += chr(48 + (low | 32 if more else low))
    return text


def train(job: dict[str, Any]) -> dict[str, Any]:
    folder, iterations = Path(job["folder"]), job["train"]["iterations"]
    losses = folder / "losses.jsonl"
    done = len(losses.read_text().splitlines()) if losses.exists() else 0
    stopping: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    for iteration in range(done, iterations):
        with losses.open("a") as file:
            line = {"iteration": iteration + 1, "learning_rate": 0.1, "losses": {"loss": iterations - iteration}}
            file.write(json.dumps(line) + "\n")
        say(progress=[iteration + 1, iterations, "training"])
        time.sleep(job["engine"]["options"].get("pause_s", 0.0))
        if stopping:
            say(error="stopped")
            sys.exit(3)
    (folder / "weights.pth").write_text(str(job["train"]["seed"]))
    return {"num_parameters": 7, "last_losses": {"loss": 1.0}, "weights": "weights.pth"}


def predict(job: dict[str, Any]) -> dict[str, Any]:
    images = {image["id"]: image for image in json.loads(Path(job["annotations"]).read_text())["images"]}
    with (Path(job["folder"]) / "results.jsonl").open("w") as file:
        for number, image_id in enumerate(job["image_ids"]):
            height, width = images[image_id]["height"], images[image_id]["width"]
            record = {
                "image_id": image_id,
                "category_id": [job["category_ids"][0]],
                "score": [0.5],
                "bbox": [[0, 0, width, height]],
                "segmentation": [{"size": [height, width], "counts": rle([0, height * width])}],
            }
            file.write(json.dumps(record) + "\n")
            say(progress=[number + 1, len(images), "images"])
    return {
        "num_images": len(job["image_ids"]),
        "environment": {"python": "CPython 3.10.0", "packages": {"torch": "2.1"}},
    }


def latency(job: dict[str, Any]) -> dict[str, Any]:
    return {
        "samples": {"latency_s": {"total": [0.25] * job["measure"]["latency_images"]}},
        "peak_memory_bytes": {"rss": 1000, "cuda_allocated": None, "cuda_reserved": None},
        "num_parameters": 7,
        "flops": None,
        "environment": {
            "python": "CPython 3.10.0",
            "packages": {"torch": "2.1"},
            "threads": {"intra_op": job["threads"]},
        },
    }


def training_step(job: dict[str, Any]) -> dict[str, Any]:
    return {
        "samples": {"training_step_s": {"total": [0.5] * job["measure"]["training_step_count"]}},
        "peak_memory_bytes": {"rss": 2000, "cuda_allocated": None, "cuda_reserved": None},
        "num_parameters": 7,
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    mode = job["engine"]["options"].get("mode")
    sys.stdout.write("a library says hello\n")
    sys.stderr.write("loading\n")
    match mode:
        case "mistake":
            say(error="detectron2 is not installed. Install it")
            sys.exit(2)
        case "crash":
            say(error="ValueError: bad thing")
            sys.exit(1)
        case "traceback":
            raise RuntimeError("no protocol at all")
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "silent":
            return
        case "variables":
            say(result={"found": [name for name in ("PYTHONPATH", "VIRTUAL_ENV") if name in os.environ]})
            return
        case "helper":  # outlives its parent and holds its pipes
            helper = subprocess.Popen(["sleep", "30"])
            say(result={"pid": helper.pid})
            return
        case "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            (Path(job["folder"]) / "pid").write_text(str(os.getpid()))
            time.sleep(60)
    kinds = {"train": train, "predict": predict, "latency": latency, "training_step": training_step}
    say(result=kinds[job["kind"]](job))


if __name__ == "__main__":
    main()
