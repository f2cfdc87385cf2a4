"""A COCO file becomes detectron2's records: order, labels, crowds, missing things."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.peers.protocol import Job, PeerError
from bench.peers.records import read_records
from diffinst.ops.rle import decode_rle

POLYGON = [[0.0, 0.0, 4.0, 0.0, 4.0, 4.0]]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    images = [{"id": number, "file_name": f"{number}.png", "height": 6, "width": 8} for number in (1, 2, 3)]
    for image in images:
        (tmp_path / str(image["file_name"])).touch()
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 9, "bbox": [0, 0, 4, 4], "segmentation": POLYGON},
        {"id": 2, "image_id": 3, "category_id": 7, "bbox": [0, 0, 1, 6], "segmentation": POLYGON, "iscrowd": 1},
        {
            "id": 3,
            "image_id": 3,
            "category_id": 7,
            "bbox": [0, 0, 1, 2],
            "segmentation": {"size": [6, 8], "counts": [0, 2, 46]},
        },
    ]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return Job(
        kind="train",
        engine={},
        folder=tmp_path,
        annotations=path,
        images=tmp_path,
        image_ids=[3, 1],
        file_names=["3.png", "1.png"],
        class_names=["a", "b"],
        category_ids=[7, 9],
        train={},
        data={},
        sampler={},
        measure={},
    )


def test_order_labels_and_crowds(job: Job) -> None:
    records = read_records(job, annotated=True)
    assert [record["image_id"] for record in records] == [3, 1]
    assert [[item["category_id"] for item in record["annotations"]] for record in records] == [[0], [1]]
    assert read_records(job, annotated=False)[0]["annotations"] == []


def test_images_lie_where_the_job_says(job: Job) -> None:
    # LVIS v1 names no files, and those that v0.5 names do not exist.
    content = json.loads(job.annotations.read_text())
    for image in content["images"]:
        del image["file_name"]
    content["images"][0]["file_name"] = "COCO_val2014_1.png"
    job.annotations.write_text(json.dumps(content))
    (job.images / "val2017").mkdir()
    (job.images / "val2017" / "other.png").touch()
    records = read_records(replace(job, file_names=["val2017/other.png", "1.png"]), annotated=True)
    names = [str(job.images / "val2017" / "other.png"), str(job.images / "1.png")]
    assert [record["file_name"] for record in records] == names


def decoded(segmentation: dict[str, Any]) -> np.ndarray:
    return decode_rle({"size": segmentation["size"], "counts": segmentation["counts"].decode()})


def test_polygons_and_uncompressed_masks_are_encoded(job: Job) -> None:
    runs, polygon = [record["annotations"][0]["segmentation"] for record in read_records(job, annotated=True)]
    assert decoded(runs).sum() == decoded(runs)[:2, 0].sum() == 2
    triangle = decoded(polygon)
    assert triangle.shape == (6, 8)
    # Pixels right of the diagonal by their centres: 3, 2 and 1 of the first three rows.
    assert triangle.nonzero()[0].tolist() == [0, 0, 0, 1, 1, 2]
    assert triangle.nonzero()[1].tolist() == [1, 2, 3, 2, 3, 3]


def test_class_agnostic(job: Job) -> None:
    records = read_records(replace(job, category_ids=[1], data={"class_agnostic": True}), annotated=True)
    assert [item["category_id"] for record in records for item in record["annotations"]] == [0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_ids": [4]}, "has no image 4"),
        ({"category_ids": [7]}, "annotation 1 is of category 9"),
        ({"annotations": Path("absent.json")}, "absent.json: cannot be read"),
        ({"images": Path("elsewhere")}, "3.png: no such file"),
    ],
)
def test_what_is_missing(job: Job, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PeerError, match=message):
        read_records(replace(job, **changes), annotated=True)


def test_a_file_of_another_kind(job: Job) -> None:
    job.annotations.write_text("[]")
    with pytest.raises(PeerError, match="has no list 'images'"):
        read_records(job, annotated=False)
