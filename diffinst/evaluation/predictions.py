"""Predictions on disk: one record an image in JSON-lines shards that are whole or absent, so that a killed run goes on.

A shard `predictions-00000.jsonl` holds one record a line and ends with a line that counts them and gives the SHA-256 of
all bytes before it. It is written beside its place and renamed, so a shard that fails this check was damaged later.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from diffinst.errors import DataError
from diffinst.ops.rle import encode_masks

if TYPE_CHECKING:  # scoring what is stored needs no torch
    from diffinst.structures import Detections

Record = dict[str, Any]

PREDICTIONS_FOLDER = "predictions"  # of the shards, in the folder of whoever predicts
_PATTERN = "predictions-[0-9][0-9][0-9][0-9][0-9].jsonl"
_KEYS = {"image_id", "category_id", "score", "bbox", "segmentation"}


def to_record(image_id: int, detections: Detections, category_ids: Sequence[int]) -> Record:
    """Detections of one image as plain values.

    Args:
        detections: in pixels of the original file, on any device.
        category_ids: the data set's category id of each label.

    Returns:
        image_id, and lists of equal length: category_id, score, bbox ([x, y, width, height] pixels), segmentation
        (compressed RLE with "size" and "counts"; None in place of the list where there are no masks).
    """
    boxes = detections.boxes_xyxy.detach().cpu().double()
    boxes[:, 2:] -= boxes[:, :2]
    encodings = detections.encodings
    if encodings is None and detections.masks is not None:
        encodings = encode_masks(detections.masks)
    return {
        "image_id": int(image_id),
        "category_id": [int(category_ids[label]) for label in detections.labels.tolist()],
        "score": detections.scores.tolist(),
        "bbox": boxes.tolist(),
        "segmentation": encodings,
    }


def to_coco_results(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Records -> the flat list of a COCO results file, by rising image id, order within an image kept."""
    results: list[dict[str, Any]] = []
    for record in sorted(records, key=lambda record: record["image_id"]):
        segmentations = record["segmentation"]
        for position, (category_id, score, bbox) in enumerate(
            zip(record["category_id"], record["score"], record["bbox"])
        ):
            result = {"image_id": record["image_id"], "category_id": category_id, "score": score, "bbox": bbox}
            if segmentations is not None:
                result["segmentation"] = segmentations[position]
            results.append(result)
    return results


def _read_shard(path: Path) -> list[Record]:
    way_out = "Delete this file and run the same command again: only its images are predicted anew."
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. {way_out}") from error
    body_end = content.rfind(b"\n", 0, max(len(content) - 1, 0)) + 1
    body, footer_line = content[:body_end], content[body_end:]
    try:
        footer = json.loads(footer_line)
        expected = footer["sha256"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: is cut off: its last line holds no checksum. {way_out}") from error
    if hashlib.sha256(body).hexdigest() != expected:
        raise DataError(f"{path}: is damaged: its content does not match its checksum. {way_out}")
    records = [json.loads(line) for line in body.splitlines()]
    if footer.get("num_images") != len(records) or any(record.keys() != _KEYS for record in records):
        raise DataError(f"{path}: its records are not what this version writes. {way_out}")
    return records


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob(_PATTERN))


def iter_predictions(folder: str | Path) -> Iterator[Record]:
    """All records of a folder, shard by shard.

    Raises:
        DataError: a shard is damaged, or an image comes twice; names the shard.
    """
    seen: set[int] = set()
    for path in _shards(Path(folder)):
        for record in _read_shard(path):
            if record["image_id"] in seen:
                raise DataError(
                    f"{path}: image {record['image_id']} is in an earlier shard too. Delete one of the two shards."
                )
            seen.add(record["image_id"])
            yield record


class PredictionWriter:
    """Collects records and writes them in shards; on an existing folder it goes on after the images that are there.

    Use it in a `with` block: leaving it, also by an exception, writes what has been collected.

    Args:
        folder: made if missing.
        shard_size: images a shard; at most this many are lost by a kill.

    Raises:
        DataError: the folder cannot be written, or holds a damaged shard.
    """

    def __init__(self, folder: str | Path, *, shard_size: int = 64) -> None:
        if shard_size < 1:
            raise ValueError(f"shard_size ({shard_size}) must be at least 1")
        self._folder = Path(folder)
        self._shard_size = shard_size
        self._pending: list[Record] = []
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob(f".{_PATTERN}.partial"):
                leftover.unlink()
        except OSError as error:
            raise DataError(
                f"{self._folder}: cannot write predictions: {error.strerror}; choose a writable folder"
            ) from error
        self.done_ids: set[int] = {record["image_id"] for record in iter_predictions(self._folder)}

    def add(self, record: Record) -> None:
        """Take one image's record (`to_record`); it is on disk once its shard is full.

        Raises:
            ValueError: the image has a record already, or keys are missing.
        """
        if record.keys() != _KEYS:
            raise ValueError(f"a record has the keys {sorted(_KEYS)}, not {sorted(record)}")
        if record["image_id"] in self.done_ids:
            raise ValueError(f"image {record['image_id']} has a record already")
        self.done_ids.add(record["image_id"])
        self._pending.append(record)
        if len(self._pending) >= self._shard_size:
            self.flush()

    def flush(self) -> None:
        """Write what is collected as a shard, smaller than `shard_size` if need be."""
        if not self._pending:
            return
        body = "".join(json.dumps(record, separators=(",", ":")) + "\n" for record in self._pending).encode()
        footer = {"num_images": len(self._pending), "sha256": hashlib.sha256(body).hexdigest()}
        # The lowest number that is free: a shard that was lost comes back under its own name.
        path = next(path for n in count() if not (path := self._folder / f"predictions-{n:05d}.jsonl").exists())
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as file:
                file.write(body + json.dumps(footer).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written: {error.strerror}; the run can be repeated and goes on here"
            ) from error
        self._pending = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.flush()
