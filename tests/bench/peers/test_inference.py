"""Predicting goes on where it was stopped, and timing counts what it should; with a model and a clock of our own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.peers import inference
from bench.peers.inference import Detector, encode, measure, predict, to_line
from bench.peers.protocol import Channel, Job, Stopped
from diffinst.ops.rle import decode_rle


class Instances:
    """As much of detectron2's as is used here."""

    def __init__(
        self, scores: torch.Tensor, boxes: torch.Tensor, classes: torch.Tensor, masks: torch.Tensor | None
    ) -> None:
        self.scores, self.pred_classes = scores, classes
        self.pred_boxes = SimpleNamespace(tensor=boxes)
        self.pred_masks = masks

    def to(self, _device: str) -> Instances:
        return self

    def has(self, name: str) -> bool:
        return getattr(self, name) is not None

    def __getitem__(self, index: torch.Tensor) -> Instances:
        masks = None if self.pred_masks is None else self.pred_masks[index]
        return Instances(self.scores[index], self.pred_boxes.tensor[index], self.pred_classes[index], masks)


def instances(with_masks: bool = True) -> Instances:
    masks = torch.zeros(2, 4, 5)
    masks[0, 1:3, 2] = 1
    boxes = torch.tensor([[2.0, 1.0, 3.0, 3.0], [0.0, 0.0, 5.0, 4.0]])
    return Instances(torch.tensor([0.25, 0.75]), boxes, torch.tensor([1, 0]), masks if with_masks else None)


class Fake(Detector):
    """Every image gives the same two detections; `seen` are the images in order."""

    seen: list[int] = []

    def load(self, record: dict[str, Any]) -> dict[str, Any]:
        return record

    def detect(self, inputs: dict[str, Any]) -> Any:
        self.seen.append(inputs["image_id"])
        return instances()


@pytest.fixture
def channel() -> Iterator[Channel]:
    with Path(os.devnull).open("w") as nothing:
        yield Channel(nothing.fileno())


def job(folder: Path, **measured: Any) -> Job:
    return Job(
        kind="predict",
        engine={},
        folder=folder,
        annotations=folder,
        images=folder,
        image_ids=[1, 2, 3],
        file_names=["1.png", "2.png", "3.png"],
        class_names=["a", "b"],
        category_ids=[7, 9],
        train={},
        data={},
        sampler={},
        measure=measured,
    )


def detector(**changes: Any) -> Fake:
    Fake.seen = []
    return Fake(model=None, image_format="RGB", shortest_edge=4, longest_edge=8, **changes)


RECORDS = [{"image_id": number} for number in (1, 2, 3)]


def test_a_line_has_the_data_sets_own_ids_and_plain_values() -> None:
    line = to_line(5, instances(), [7, 9])
    assert line["image_id"] == 5
    assert line["category_id"] == [9, 7]
    assert line["score"] == [0.25, 0.75]
    assert line["bbox"] == [[2, 1, 1, 2], [0, 0, 5, 4]]
    assert [mask["size"] for mask in line["segmentation"]] == [[4, 5], [4, 5]]
    json.dumps(line)


def test_masks_come_back_from_their_rle() -> None:
    masks = instances().pred_masks
    assert masks is not None
    assert [decode_rle(item).tolist() for item in encode(masks)] == masks.bool().tolist()
    assert encode(masks[:0]) == []


def test_a_model_of_boxes_has_no_masks() -> None:
    assert to_line(5, instances(with_masks=False), [7, 9])["segmentation"] is None


def test_the_same_call_goes_on_after_a_stop(tmp_path: Path, channel: Channel) -> None:
    with pytest.raises(Stopped, match="after 1 of 3 images"):
        predict(detector(), RECORDS, job(tmp_path), channel, lambda: True)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"image_id": 2, "sco')  # cut by a kill
    fake = detector()
    assert predict(fake, RECORDS, job(tmp_path), channel, lambda: False) == {"num_images": 3}
    assert fake.seen == [2, 3]
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["image_id"] for line in lines] == [1, 2, 3]


def test_the_best_are_written_within_the_images_context(tmp_path: Path, channel: Channel) -> None:
    entered: list[int] = []

    @contextlib.contextmanager
    def around(image_id: int) -> Iterator[None]:
        entered.append(image_id)
        yield

    predict(detector(max_detections=1, around=around), RECORDS[:1], job(tmp_path), channel, lambda: False)
    assert entered == [1]
    assert json.loads((tmp_path / "results.jsonl").read_text())["score"] == [0.75]


def test_timing_goes_round_until_both_minima_are_reached(tmp_path: Path, channel: Channel) -> None:
    ticks = itertools.count()  # each look at the clock takes a second: one second an image, two between images
    fake = detector()
    asked = job(tmp_path, warmup=2, latency_images=2, latency_seconds=10.0)
    result = measure(fake, RECORDS, asked, channel, lambda: False, clock=lambda: float(next(ticks)))
    samples = result["samples"]["latency_s"]["total"]
    assert samples == [1.0] * len(samples)
    assert len(samples) > 2
    assert fake.seen == [1, 2, *itertools.islice(itertools.cycle([1, 2, 3]), len(samples))]
    assert result["peak_memory_bytes"]["rss"] > 10e6
    assert result["peak_memory_bytes"]["cuda_allocated"] is None


def test_timing_can_be_stopped(tmp_path: Path, channel: Channel) -> None:
    with pytest.raises(Stopped, match="after 1 timed"):
        measure(detector(), RECORDS, job(tmp_path), channel, lambda: True)


def test_peak_memory_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference.Path, "is_file", lambda self: False)
    assert inference.peak_resident_bytes() > 10e6
