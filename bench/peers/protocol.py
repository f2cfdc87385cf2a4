"""What the harness and a peer say to each other: a job in a JSON file, one JSON object a line on standard output.

The peer writes {"progress": [done, total, text]} while it works, and at the end {"result": {...}} or {"error": "..."},
which is one line of text.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

PROTOCOL = 1
KINDS = ("train", "predict", "latency", "training_step")
_PROGRESS_INTERVAL_S = 0.2


class PeerError(Exception):
    """What a user can put right, on one line: what was wrong, where, what is allowed and the way out."""


class Stopped(Exception):
    """The harness asked the peer to stop, or is gone."""


@dataclass(frozen=True)
class Job:
    """One training, prediction, or measurement of a detection or a training step; the sections are those of the suite,
    as plain values.

    engine: name, python, checkout, recipe, engine_weights, options. folder: where results go. annotations, images: COCO
    or LVIS file and the folder of its images. image_ids: in the order of work. file_names: of these images, below the
    folder. category_ids: the file's own, one a class.
    weights: file that this engine's training wrote, or None. threads: of the CPU, None for torch's own choice.
    """

    kind: str
    engine: dict[str, Any]
    folder: Path
    annotations: Path
    images: Path
    image_ids: list[int]
    file_names: list[str]
    class_names: list[str]
    category_ids: list[int]
    train: dict[str, Any]
    data: dict[str, Any]
    sampler: dict[str, Any]
    measure: dict[str, Any]
    weights: Path | None = None
    device: str = "cpu"
    threads: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Upstream option name -> value, as the suite gives them."""
        return self.engine.get("options") or {}

    @property
    def weights_path(self) -> Path | None:
        """The weights to predict with: those that were trained here, else those that the suite names, else None."""
        given = self.engine.get("engine_weights") or "none"
        return self.weights if self.weights is not None else None if given == "none" else Path(given)


_PATHS = ("folder", "annotations", "images", "weights")
_DEFAULTS: dict[str, Any] = {"train": {}, "data": {}, "sampler": {}, "measure": {}, "weights": None}


def read_job(path: Path) -> Job:
    """The job of a file.

    Raises:
        PeerError: it cannot be read, is of another protocol, or lacks something.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PeerError(f"{path}: cannot be read: {error.strerror}. It is written by run-suite") from error
    except ValueError as error:
        raise PeerError(f"{path}: is not JSON ({error}). It is written by run-suite") from error
    if not isinstance(content, dict) or content.get("protocol") != PROTOCOL:
        found = content.get("protocol") if isinstance(content, dict) else None
        raise PeerError(f"{path}: protocol is {found!r}, this runner speaks {PROTOCOL}. Use the harness it came with")
    if content.get("kind") not in KINDS:
        raise PeerError(f"{path}: kind is {content.get('kind')!r}, allowed are {', '.join(KINDS)}")
    content = {**_DEFAULTS, **{name: value for name, value in content.items() if value is not None}}
    names = {field.name for field in fields(Job)}
    known: dict[str, Any] = {
        name: Path(value) if name in _PATHS and value else value for name, value in content.items() if name in names
    }
    missing = sorted(names - set(known) - {"device", "threads"})
    if missing:
        raise PeerError(f"{path}: has no {', '.join(missing)}. It is written by run-suite")
    job = Job(**known)
    if not job.image_ids:
        raise PeerError(f"{job.annotations}: no images are asked for. Name a split that has some")
    return job


class Channel:
    """The way back to the harness. Writes to its own copy of standard output; stray prints go to standard error."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._last_progress = 0.0

    @classmethod
    def take_over_stdout(cls) -> Channel:
        """Keep standard output for the protocol; from now on prints of any library reach standard error."""
        descriptor = os.dup(1)
        os.dup2(2, 1)
        return cls(descriptor)

    def progress(self, done: int, total: int, text: str) -> None:
        """Tell how far the work is; calls in quick succession are dropped, but never the last."""
        now = time.monotonic()
        if done >= total or now - self._last_progress >= _PROGRESS_INTERVAL_S:
            self._last_progress = now
            self._send({"progress": [done, total, text]})

    def result(self, values: dict[str, Any]) -> None:
        self._send({"result": values})

    def error(self, message: str) -> None:
        self._send({"error": " ".join(message.split())})

    def _send(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]


def stop_when_asked() -> Callable[[], bool]:
    """A function that says whether to stop: after SIGTERM or SIGINT, or when the process that started this is gone."""
    parent, asked = os.getppid(), []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.append(True))
    return lambda: bool(asked) or os.getppid() != parent
