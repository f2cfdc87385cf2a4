"""Predicting and timing: the same for every peer, with each image resized and given as the harness does it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers.protocol import Channel, Job, PeerError, Stopped
from bench.peers.records import Record

RESULTS_NAME = "results.jsonl"
_MAX_LOADED_IMAGES = 64  # decoded before timing begins, as in the harness


def _unchanged(image_id: int) -> AbstractContextManager[None]:  # noqa: ARG001 - told the image, like the others
    return nullcontext()


@dataclass(frozen=True)
class Detector:
    """A model in evaluation mode that takes detectron2's inputs.

    image_format: "RGB" or "BGR". shortest_edge, longest_edge: what images are resized to. max_detections: the best ones
    that are written, of a model that sets no limit itself. around: image id -> context that a prediction runs in, for
    instance one that gives the noise.
    """

    model: Any
    image_format: str
    shortest_edge: int
    longest_edge: int
    max_detections: int | None = None
    around: Callable[[int], AbstractContextManager[None]] = _unchanged

    def load(self, record: Record) -> dict[str, Any]:
        """The input of one image, decoded and resized; normalising and padding it is the model's part."""
        import torch
        from detectron2.data import detection_utils
        from detectron2.data import transforms as T

        try:
            image = detection_utils.read_image(record["file_name"], format=self.image_format)
        except (OSError, SyntaxError) as error:
            raise PeerError(f"{record['file_name']}: cannot be decoded ({error})") from error
        resize = T.ResizeShortestEdge([self.shortest_edge, self.shortest_edge], self.longest_edge)
        resized = resize.get_transform(image).apply_image(image)
        pixels = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        return {"image": pixels, "height": image.shape[0], "width": image.shape[1]}

    def detect(self, inputs: dict[str, Any]) -> Any:
        """detectron2's Instances of one image, in pixels of its file."""
        import torch

        with torch.no_grad():
            return self.model([inputs])[0]["instances"]


def predict(
    detector: Detector, records: Sequence[Record], job: Job, channel: Channel, stop: Callable[[], bool]
) -> dict[str, Any]:
    """Write `results.jsonl`, a line an image; images that have one, from a run that was stopped, are left out."""
    path = job.folder / RESULTS_NAME
    done = _keep_whole_lines(path)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            image_id = record["image_id"]
            if image_id in done:
                continue
            inputs = detector.load(record)
            with detector.around(image_id):
                instances = detector.detect(inputs)
            if detector.max_detections is not None:
                instances = instances[instances.scores.argsort(descending=True)[: detector.max_detections]]
            file.write(json.dumps(to_line(image_id, instances, job.category_ids)) + "\n")
            file.flush()
            done.add(image_id)
            channel.progress(len(done), len(records), "images")
            if stop():
                raise Stopped(f"stopped after {len(done)} of {len(records)} images")
    return {"num_images": len(done)}


def _keep_whole_lines(path: Path) -> set[int]:
    """Drop a line that a kill has cut; the image ids of the others."""
    if not path.is_file():
        return set()
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    path.write_text("".join(lines), encoding="utf-8")
    return {json.loads(line)["image_id"] for line in lines}


def to_line(image_id: int, instances: Any, category_ids: Sequence[int]) -> dict[str, Any]:
    """Instances as lists of equal length: category_id, score, bbox (x, y, width, height), and RLE masks or None."""
    instances = instances.to("cpu")
    boxes = instances.pred_boxes.tensor.double()
    boxes[:, 2:] -= boxes[:, :2]
    return {
        "image_id": image_id,
        "category_id": [category_ids[label] for label in instances.pred_classes.tolist()],
        "score": instances.scores.tolist(),
        "bbox": boxes.tolist(),
        "segmentation": encode(instances.pred_masks) if instances.has("pred_masks") else None,
    }


def encode(masks: Any) -> list[dict[str, Any]]:
    """(D, H, W) masks, whose pixels are 0 or 1 -> compressed RLE with text counts."""
    from pycocotools import mask

    if not len(masks):
        return []
    encoded = mask.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8)))
    return [{"size": list(item["size"]), "counts": item["counts"].decode()} for item in encoded]


def measure(
    detector: Detector,
    records: Sequence[Record],
    job: Job,
    channel: Channel,
    stop: Callable[[], bool],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Seconds of single images, decoded and resized beforehand, from pixels to masks of the file's size; peak memory.

    As in the harness: going round the images, after a warm-up, until as many images and seconds as asked are timed.
    """
    import torch

    asked = job.measure
    num_warmup, min_images = int(asked.get("warmup", 3)), int(asked.get("latency_images", 10))
    min_seconds = float(asked.get("latency_seconds", 3.0))
    on_cuda = job.device.startswith("cuda")

    def synchronise() -> None:
        if on_cuda:
            torch.cuda.synchronize()

    inputs = [detector.load(record) for record in records[:_MAX_LOADED_IMAGES]]
    for index in range(num_warmup):
        detector.detect(inputs[index % len(inputs)])
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    samples: list[float] = []
    begin = clock()
    while len(samples) < min_images or clock() - begin < min_seconds:
        synchronise()
        start = clock()
        detector.detect(inputs[len(samples) % len(inputs)])
        synchronise()
        samples.append(clock() - start)
        channel.progress(min(len(samples), min_images), min_images, "timed images")
        if stop():
            raise Stopped(f"stopped after {len(samples)} timed images")
    return {
        "samples": {"latency_s": {"total": samples}},
        "peak_memory_bytes": peak_memory_bytes(on_cuda=on_cuda),
        "flops": None,
    }


def peak_memory_bytes(*, on_cuda: bool) -> dict[str, int | None]:
    """As `bench.measure.memory` has it: 'rss' of this process, 'cuda_allocated' and 'cuda_reserved' since the reset."""
    import torch

    return {
        "rss": peak_resident_bytes(),
        "cuda_allocated": torch.cuda.max_memory_allocated() if on_cuda else None,
        "cuda_reserved": torch.cuda.max_memory_reserved() if on_cuda else None,
    }


def peak_resident_bytes() -> int:
    """Of this process, since it began."""
    import resource
    import sys

    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but there
