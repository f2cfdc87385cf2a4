"""Tiny COCO folders for the tests of data and scoring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask


def rle_of(mask: np.ndarray) -> dict[str, Any]:
    """Compressed RLE of a (h, w) mask, as a COCO file holds it."""
    encoding = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(encoding["size"]), "counts": encoding["counts"].decode()}


def block_mask(size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    """(height, width) uint8 with ones inside the xyxy box."""
    mask = np.zeros(size, dtype=np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return mask


def block(annotation_id: int, image: int, category: int, box: tuple[int, int, int, int], /, **changes: Any) -> Any:
    """An annotation: a filled rectangle given as xyxy, segmented by a polygon; a change to ... removes the key."""
    x1, y1, x2, y2 = box
    annotation = {
        "id": annotation_id,
        "image_id": image,
        "category_id": category,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": 0,
        "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
    }
    return {key: value for key, value in (annotation | changes).items() if value is not ...}


def tiny_content() -> dict[str, Any]:
    """Three images of 20 x 30 (height x width), categories 3 and 7; the third image is empty but for a crowd.

    Image 11: a polygon and a compressed RLE. Image 5: an uncompressed RLE. File names are '<id>.png'.
    """
    crowd = np.zeros((20, 30), dtype=np.uint8)
    crowd[:10] = 1
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 20, "width": 30} for i in (11, 5, 8)],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            block(1, 11, 7, (2, 4, 12, 14)),
            block(2, 11, 3, (10, 2, 30, 8), segmentation=rle_of(block_mask((20, 30), (10, 2, 30, 8)))),
            # Column by column: 40 unset (columns 0 and 1), then 20 set (column 2), then the rest.
            block(9, 5, 3, (2, 0, 3, 20), segmentation={"size": [20, 30], "counts": [40, 20, 540]}),
            block(4, 8, 7, (0, 0, 30, 10), iscrowd=1, segmentation=rle_of(crowd)),
        ],
    }


def write_set(folder: Path, content: dict[str, Any], *, images: bool = True) -> tuple[Path, Path]:
    """Write a content and random images of its sizes; (annotation file, image folder)."""
    annotations, pictures = folder / "instances.json", folder / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    annotations.write_text(json.dumps(content))
    for entry in content["images"] if images else ():
        shape = (entry["height"], entry["width"], 3)
        pixels = np.random.default_rng(entry["id"]).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / entry["file_name"])
    return annotations, pictures
