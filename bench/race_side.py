"""One side of a race: a process that loads a detector and times one image whenever it is told to.

    PYTHONPATH=CHECKOUT PYTHON -P bench/race_side.py

Run as a file, so that it can use the code of another checkout, older than races are: of `bench.worker` there it needs
what makes a detector out of a job. One JSON object a line: first in comes the job (see `bench.race`), out comes 'ready'
or 'error'; then for each {"image": INDEX} in, the seconds of its scopes and its marks out. It ends with its input.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def main() -> int:
    """See the module."""
    channel = os.dup(1)
    os.dup2(2, 1)  # a stray print goes to the log, not into the protocol

    def send(content: dict[str, Any]) -> None:
        os.write(channel, json.dumps(content).encode() + b"\n")

    try:
        facts, run_one = load(json.loads(sys.stdin.readline()))
        send({"ready": facts})
        for line in sys.stdin:
            send(run_one(json.loads(line)["image"]))
    except Exception as error:  # the process ends here; the other end has to hear why
        traceback.print_exc()
        # By its name: the class is that of the other checkout.
        is_mistake = any(base.__name__ == "DiffInstError" for base in type(error).__mro__)
        text = " ".join(str(error).split())
        send({"error": text if is_mistake else f"{type(error).__name__}: {text}", "is_mistake": is_mistake})
        return 1
    return 0


def load(content: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Facts about this side, and the function that times one image."""
    import torch

    from bench import worker
    from bench.measure.environment import machine_environment, process_environment
    from bench.measure.latency import TOTAL, ScopeTimer
    from bench.plan import Node
    from bench.server import Input, Job

    node = Node(**{**content["node"], "inputs": tuple(content["node"]["inputs"])})
    inputs = {item["kind"]: Input(**{**item, "folder": Path(item["folder"])}) for item in content["inputs"]}
    job = Job(node, inputs["dataset"].folder, inputs, environment={}, report=lambda _event: None)
    device = worker._device(job)
    dataset = worker._val_dataset(job)
    detector = worker._detector(job, dataset, device)
    read = dataset.test_sample if detector.resized else dataset.original_sample
    samples = [read(index) for index in range(min(len(dataset), content["max_images"]))]
    watch = watch_of(device)

    def run_one(index: int) -> dict[str, Any]:
        timer = ScopeTimer(device)
        watch.before()
        with timer(TOTAL):
            detector.detect([samples[index]], timer)
        found = watch.after(timer.elapsed_s[TOTAL])
        elapsed = {scope: timer.elapsed_s.get(scope, 0.0) for scope in (*detector.scopes, TOTAL)}
        return {"elapsed_s": elapsed, "contended": found.contended, "throttled": found.throttled}

    facts = {
        "on_cpu": torch.device(device).type == "cpu",
        "images": list(dataset.image_ids[: len(samples)]),
        "sizes": [list(size) for size in dataset.file_sizes()[: len(samples)]],
        "scopes": [*detector.scopes, TOTAL],
        "environment": machine_environment() | {"process": process_environment(device)},
    }
    return facts, run_one


def watch_of(device: str) -> Any:
    """What marks disturbed samples, for both sides in the same way, whatever their checkouts know of it."""
    import torch

    disturbances, throttle = our_module("disturbances"), None
    if torch.device(device).type == "cuda":
        gpu = our_module("gpu")
        found: Any = torch.cuda.get_device_properties(device)
        # The only name of it that CUDA and its driver's library share; see `bench.measure.moments`.
        pci = f"{found.pci_domain_id:08x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"

        def throttle() -> Any:
            return disturbances.held_back(gpu.gpu_now(pci).get("clock_reasons"))

    return disturbances.Watch(device, throttle=throttle)


def our_module(name: str) -> Any:
    """A module of `bench.measure` of the checkout that races, not of the one that is timed."""
    path = Path(__file__).resolve().parent / "measure" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"race_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
