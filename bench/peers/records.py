"""A COCO or LVIS file as detectron2's list of dictionaries, one an image, labels counted from 0 in the job's order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.peers.protocol import Job, PeerError

_XYWH = 1  # detectron2.structures.BoxMode.XYWH_ABS

Record = dict[str, Any]


def read_records(job: Job, *, annotated: bool) -> list[Record]:
    """The job's images, in the job's order.

    Args:
        annotated: with ground truth for training, crowd annotations left out as the harness does; else without any.
    Raises:
        PeerError: the file or an image is missing, or a category is not in the job.
    """
    content = _read(job.annotations)
    images = {image["id"]: image for image in content["images"]}
    named = zip(job.image_ids, job.file_names, strict=True)
    records = {image_id: _image_record(job, images, image_id, name) for image_id, name in named}
    if annotated:
        agnostic = bool(job.data.get("class_agnostic"))
        labels = {category: label for label, category in enumerate(job.category_ids)}
        for annotation in content.get("annotations", []):
            record = records.get(annotation["image_id"])
            if record is None or annotation.get("iscrowd"):
                continue
            category = annotation["category_id"]
            if not agnostic and category not in labels:
                raise PeerError(
                    f"{job.annotations}: annotation {annotation['id']} is of category {category}, which the job does "
                    "not list. Give the categories of this file"
                )
            record["annotations"].append(
                {
                    "bbox": annotation["bbox"],
                    "bbox_mode": _XYWH,
                    "category_id": 0 if agnostic else labels[category],
                    "segmentation": _segmentation(annotation["segmentation"], record),
                    "iscrowd": 0,
                }
            )
    return list(records.values())


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PeerError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise PeerError(f"{path}: is not JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise PeerError(f"{path}: is not a COCO file: it has no list 'images'")
    return content


def _image_record(job: Job, images: dict[int, Record], image_id: int, file_name: str) -> Record:
    if image_id not in images:
        raise PeerError(f"{job.annotations}: has no image {image_id}. Give image ids of this file")
    image = images[image_id]
    path = job.images / file_name
    if not path.is_file():
        raise PeerError(f"{path}: no such file, though {job.annotations} lists it as image {image_id}")
    return {
        "file_name": str(path),
        "height": image["height"],
        "width": image["width"],
        "image_id": image_id,
        "annotations": [],
    }


def _segmentation(segmentation: Any, record: Record) -> Any:
    """One mask as compressed RLE, so that it is resized and cropped as the harness does it.

    detectron2 would need one more package to crop polygons, and does not read uncompressed RLE.
    """
    from pycocotools import mask

    if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
        return segmentation
    encoded = mask.frPyObjects(segmentation, record["height"], record["width"])
    return mask.merge(encoded) if isinstance(encoded, list) else encoded
