"""Jobs are checked, and only the protocol reaches standard output."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench.peers.protocol import Channel, Job, PeerError, read_job


def content(folder: Path, **changes: Any) -> dict[str, Any]:
    """A whole job."""
    return {
        "protocol": 1,
        "kind": "predict",
        "engine": {"name": "detectron2", "recipe": "x.yaml", "engine_weights": "none", "options": {}},
        "folder": str(folder / "out"),
        "annotations": str(folder / "instances.json"),
        "images": str(folder),
        "image_ids": [3, 1],
        "file_names": ["3.png", "1.png"],
        "class_names": ["a"],
        "category_ids": [7],
        "train": {},
        "data": {},
        "sampler": {},
        "weights": None,
        "device": "cpu",
        "threads": 1,
        "measure": {},
    } | changes


def read(folder: Path, **changes: Any) -> Job:
    path = folder / "job.json"
    path.write_text(json.dumps(content(folder, **changes)))
    return read_job(path)


def test_a_job_is_read(tmp_path: Path) -> None:
    job = read(tmp_path, unknown="ignored")
    assert (job.kind, job.image_ids, job.weights, job.weights_path) == ("predict", [3, 1], None, None)
    assert job.folder == tmp_path / "out"


def test_trained_weights_go_before_named_ones(tmp_path: Path) -> None:
    engine = {"name": "detectron2", "engine_weights": "/w.pth"}
    assert read(tmp_path, engine=engine).weights_path == Path("/w.pth")
    assert read(tmp_path, engine=engine, weights="/trained.pth").weights_path == Path("/trained.pth")
    assert read(tmp_path, engine={"name": "detectron2", "options": None}).options == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": 2}, "protocol is 2"),
        ({"kind": "guess"}, "kind is 'guess', allowed are train, predict, latency"),
        ({"image_ids": None, "category_ids": None}, "has no category_ids, image_ids"),
        ({"image_ids": []}, "no images are asked for"),
    ],
)
def test_what_is_wrong_with_a_job(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PeerError, match=message):
        read(tmp_path, **changes)


def test_a_file_that_is_no_job(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="cannot be read"):
        read_job(tmp_path / "absent.json")
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(PeerError, match="is not JSON"):
        read_job(tmp_path / "job.json")


def test_lines_of_the_channel(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    channel = Channel(writing)
    channel.progress(1, 3, "images")
    channel.progress(2, 3, "too soon")
    channel.progress(3, 3, "images")
    channel.error("two\n  lines")
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = [json.loads(line) for line in pipe]
    assert lines == [{"progress": [1, 3, "images"]}, {"progress": [3, 3, "images"]}, {"error": "two lines"}]
