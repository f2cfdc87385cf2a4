"""`PYTHON bench/peers/run_peer.py JOB.json`: what the harness starts in a peer's own interpreter, one process a job.

See `bench.peers.protocol` for what goes in and out. Exit codes: 0 done, 2 a mistake that the user can put right (an
"error" line says which), 3 stopped on request with its progress kept, 1 anything else (the traceback is on standard
error).
"""

from __future__ import annotations

import bdb
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Run as a file: its folder would hide packages of the same names as its modules, and its package is two levels up.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.peers import detectron, inference, original, training_step
from bench.peers.environment import process_facts
from bench.peers.protocol import Channel, Job, PeerError, Stopped, read_job, stop_when_asked
from bench.peers.records import read_records

EXIT_FAILED, EXIT_MISTAKE, EXIT_STOPPED = 1, 2, 3
ENGINES = ("detectron2", "original")


def run(job: Job, channel: Channel, stop: Callable[[], bool]) -> dict[str, Any]:
    """Do the job; returns its result.

    Raises:
        PeerError: a mistake of the user's. Stopped: the harness asked for it.
    """
    engine = job.engine.get("name")
    if engine not in ENGINES:
        raise PeerError(f"engine.name is {engine!r}, this runner has {' and '.join(ENGINES)}")
    detectron.import_detectron2()
    _prepare_torch(job)
    job.folder.mkdir(parents=True, exist_ok=True)
    if job.kind == "train":
        if engine == "original":
            raise PeerError("engine original does not train. Name its weights: `engine_weights: PATH`")
        result = detectron.train(job, channel, stop)
    elif job.kind == "training_step":
        if engine != "original":
            raise PeerError(f"measure.training_step is not for engine {engine}. Allowed for: original")
        result = training_step.measure(job, channel, stop)
    else:
        detector = original.detector(job) if engine == "original" else detectron.detector(job)
        records = read_records(job, annotated=False)
        do = inference.predict if job.kind == "predict" else inference.measure
        result = do(detector, records, job, channel, stop)
        result["num_parameters"] = detectron.count_parameters(detector.model)
    result["environment"] = {**process_facts(job.device), **(original.describe(job) if engine == "original" else {})}
    return result


def _prepare_torch(job: Job) -> None:
    import torch

    if job.threads:
        torch.set_num_threads(job.threads)
    try:
        torch.empty(1, device=job.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise PeerError(f"--device {job.device}: cannot be used here ({reason}). Use 'cpu', or leave it out") from error


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    if len(arguments) != 1:
        sys.stderr.write("usage: PYTHON bench/peers/run_peer.py JOB.json (started by run-suite)\n")
        return EXIT_MISTAKE
    channel = Channel.take_over_stdout()
    with Path(
        os.devnull
    ).open() as nothing:  # the released code waits for a debugger's commands when its numbers run away
        os.dup2(nothing.fileno(), 0)
    stop = stop_when_asked()
    try:
        channel.result(run(read_job(Path(arguments[0])), channel, stop))
        return 0
    except PeerError as error:
        channel.error(str(error))
        return EXIT_MISTAKE
    except Stopped as reason:
        channel.error(str(reason))
        return EXIT_STOPPED
    except bdb.BdbQuit:
        channel.error("the checkout's code stopped in its debugger trap: its numbers ran away. Try other weights")
        return EXIT_FAILED
    except BaseException as error:  # the process ends here, and the harness has to hear why
        traceback.print_exc()
        channel.error(f"{type(error).__name__}: {error}")
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
