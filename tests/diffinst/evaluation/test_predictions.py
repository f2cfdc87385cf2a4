from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffinst.errors import DataError
from diffinst.evaluation.predictions import (
    PredictionWriter,
    iter_predictions,
    to_coco_results,
    to_record,
)
from diffinst.ops.rle import decode_rle
from diffinst.structures import Detections


def _record(image_id: int, score: float = 0.5) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "category_id": [3],
        "score": [score],
        "bbox": [[1.0, 2.0, 3.0, 4.0]],
        "segmentation": [{"size": [4, 5], "counts": "0d0"}],
    }


def _write(folder: Path, image_ids: range, shard_size: int = 2) -> None:
    with PredictionWriter(folder, shard_size=shard_size) as writer:
        for image_id in image_ids:
            writer.add(_record(image_id))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_record_by_hand() -> None:
    masks = torch.zeros((2, 4, 5), dtype=torch.bool)
    masks[0, 1:3, 2] = True
    detections = Detections(
        boxes_xyxy=torch.tensor([[1.0, 2.0, 4.5, 3.0], [0.0, 0.0, 5.0, 4.0]]),
        scores=torch.tensor([0.75, 0.25]),
        labels=torch.tensor([1, 0]),
        masks=masks,
    )
    record = to_record(12, detections, category_ids=(3, 7))
    assert json.loads(json.dumps(record)) == record
    assert record["image_id"] == 12
    assert record["category_id"] == [7, 3]
    assert record["score"] == [0.75, 0.25]
    assert record["bbox"] == [[1.0, 2.0, 3.5, 1.0], [0.0, 0.0, 5.0, 4.0]]
    for rle, mask in zip(record["segmentation"], masks):
        assert np.array_equal(decode_rle(rle), mask.numpy())
    assert detections.boxes_xyxy[0].tolist() == [1.0, 2.0, 4.5, 3.0]  # the input is left alone


def test_scores_are_kept_to_the_last_bit() -> None:
    scores = torch.rand(20, generator=torch.Generator().manual_seed(0))
    record = to_record(1, Detections(torch.rand(20, 4), scores, torch.zeros(20, dtype=torch.int64)), (1,))
    assert record["segmentation"] is None
    back = torch.tensor(json.loads(json.dumps(record))["score"])
    assert torch.equal(back, scores)


def test_nothing_detected() -> None:
    empty = Detections(
        torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4, 5).bool()
    )
    record = to_record(3, empty, (1,))
    assert record == {"image_id": 3, "category_id": [], "score": [], "bbox": [], "segmentation": []}
    assert to_coco_results([record]) == []


def test_coco_results_go_by_image() -> None:
    boxes_only = _record(1, 0.25) | {"segmentation": None}
    assert to_coco_results([_record(2), boxes_only]) == [
        {"image_id": 1, "category_id": 3, "score": 0.25, "bbox": [1.0, 2.0, 3.0, 4.0]},
        {
            "image_id": 2,
            "category_id": 3,
            "score": 0.5,
            "bbox": [1.0, 2.0, 3.0, 4.0],
            "segmentation": {"size": [4, 5], "counts": "0d0"},
        },
    ]


def test_shards(tmp_path: Path) -> None:
    _write(tmp_path, range(5))
    assert _names(tmp_path) == [f"predictions-0000{number}.jsonl" for number in range(3)]
    assert [record["image_id"] for record in iter_predictions(tmp_path)] == [0, 1, 2, 3, 4]
    assert list(iter_predictions(tmp_path))[3] == _record(3)
    lines = (tmp_path / "predictions-00000.jsonl").read_bytes().splitlines(keepends=True)
    footer = json.loads(lines[-1])
    assert footer == {"num_images": 2, "sha256": hashlib.sha256(b"".join(lines[:-1])).hexdigest()}


def test_nothing_predicted_leaves_no_shard(tmp_path: Path) -> None:
    _write(tmp_path, range(0))
    assert _names(tmp_path) == []
    assert list(iter_predictions(tmp_path)) == []


def test_going_on_where_it_stopped(tmp_path: Path) -> None:
    _write(tmp_path, range(3))
    (tmp_path / ".predictions-00009.jsonl.partial").write_text("half a line")
    with PredictionWriter(tmp_path, shard_size=2) as writer:
        assert writer.done_ids == {0, 1, 2}
        for image_id in range(3, 6):
            writer.add(_record(image_id))
    assert _names(tmp_path) == [f"predictions-0000{number}.jsonl" for number in range(4)]
    assert [record["image_id"] for record in iter_predictions(tmp_path)] == [*range(6)]


def test_an_error_loses_nothing_that_is_complete(tmp_path: Path) -> None:
    def predict() -> None:
        with PredictionWriter(tmp_path, shard_size=10) as writer:
            writer.add(_record(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict()
    assert [record["image_id"] for record in iter_predictions(tmp_path)] == [1]


def test_shards_appear_whole(tmp_path: Path) -> None:
    writer = PredictionWriter(tmp_path, shard_size=2)
    writer.add(_record(1))
    assert _names(tmp_path) == []
    writer.add(_record(2))
    assert _names(tmp_path) == ["predictions-00000.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-20], "is cut off"),
        (lambda content: content[: content.index(b"\n") + 1], "is cut off"),
        (lambda content: content[:100], "is cut off"),
        (lambda content: b"", "is cut off"),
        (lambda content: content + b"[]\n", "is cut off"),
        (lambda content: content.replace(b"0.5", b"0.6", 1), "is damaged"),
        (lambda content: content[content.index(b"\n") + 1 :], "is damaged"),
    ],
)
def test_damaged_shards_are_named(tmp_path: Path, change: Any, message: str) -> None:
    _write(tmp_path, range(5))
    path = tmp_path / "predictions-00001.jsonl"
    path.write_bytes(change(path.read_bytes()))
    for read in (lambda: list(iter_predictions(tmp_path)), lambda: PredictionWriter(tmp_path)):
        with pytest.raises(DataError, match=rf"predictions-00001\.jsonl: {message}.*Delete this file"):
            read()
    path.unlink()
    with PredictionWriter(tmp_path, shard_size=2) as writer:
        assert writer.done_ids == {0, 1, 4}
        writer.add(_record(2))
        writer.add(_record(3))
    assert sorted(record["image_id"] for record in iter_predictions(tmp_path)) == [*range(5)]


def test_records_of_another_kind(tmp_path: Path) -> None:
    body = b'{"image_id":1}\n'
    footer = json.dumps({"num_images": 1, "sha256": hashlib.sha256(body).hexdigest()}).encode() + b"\n"
    (tmp_path / "predictions-00000.jsonl").write_bytes(body + footer)
    with pytest.raises(DataError, match="not what this version writes"):
        list(iter_predictions(tmp_path))


def test_an_image_in_two_shards(tmp_path: Path) -> None:
    _write(tmp_path, range(2))
    (tmp_path / "predictions-00007.jsonl").write_bytes((tmp_path / "predictions-00000.jsonl").read_bytes())
    with pytest.raises(DataError, match=r"predictions-00007\.jsonl: image 0 is in an earlier shard too"):
        list(iter_predictions(tmp_path))


def test_wrong_calls(tmp_path: Path) -> None:
    writer = PredictionWriter(tmp_path)
    writer.add(_record(1))
    with pytest.raises(ValueError, match="image 1 has a record already"):
        writer.add(_record(1))
    with pytest.raises(ValueError, match="a record has the keys"):
        writer.add({"image_id": 2})
    with pytest.raises(ValueError, match="shard_size"):
        PredictionWriter(tmp_path, shard_size=0)


def test_an_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/x: cannot write predictions: .*writable folder"):
        PredictionWriter(tmp_path / "file" / "x")


@pytest.mark.parametrize("lost", [(0,), (1,), (2,), (0, 1), (0, 2), (0, 1, 2)])
def test_lost_shards_come_back_as_they_were(tmp_path: Path, lost: tuple[int, ...]) -> None:
    _write(tmp_path, range(6))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for number in lost:
        (tmp_path / f"predictions-0000{number}.jsonl").unlink()
    with PredictionWriter(tmp_path, shard_size=2) as writer:
        for image_id in sorted(set(range(6)) - writer.done_ids):
            writer.add(_record(image_id))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_every_flipped_byte_of_a_shard_is_found(tmp_path: Path) -> None:
    _write(tmp_path, range(2))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"predictions-00000\.jsonl: .* Delete this file"):
            pytest.fail(f"byte {place} goes unseen: {list(iter_predictions(tmp_path))}")
