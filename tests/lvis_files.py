"""Tiny LVIS files and random federated scenes for the tests of data and scoring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from coco_files import block, block_mask, rle_of, tiny_content
from PIL import Image

SIZE = (120, 160)
Box = tuple[int, int, int, int]


def tiny_lvis() -> dict[str, Any]:
    """`coco_files.tiny_content` as an LVIS v1 file, without the crowd; images 11 and 5 in train2017, 8 in val2017."""
    content = tiny_content()
    content["annotations"] = [entry for entry in content["annotations"] if not entry["iscrowd"]]
    for entry in content["annotations"]:
        del entry["iscrowd"]
    for image in content["images"]:
        folder = "val2017" if image["id"] == 8 else "train2017"
        image["coco_url"] = f"http://images.cocodataset.org/{folder}/{image.pop('file_name')}"
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    content["images"][2]["neg_category_ids"] = [7]
    content["images"][1]["not_exhaustive_category_ids"] = [3]
    for category, frequency, count in zip(content["categories"], "fr", (400, 3)):
        category |= {"frequency": frequency, "image_count": count, "synonyms": [category["name"]]}
    return content


def write_lvis(folder: Path, content: dict[str, Any], *, flat: bool = False) -> tuple[Path, Path]:
    """`folder/lvis.json`, and images below `folder/coco` where `coco_url` says or, if flat, all in it; both paths."""
    annotations, root = folder / "lvis.json", folder / "coco"
    root.mkdir(parents=True)
    annotations.write_text(json.dumps(content))
    for entry in content["images"]:
        path = root / Path(*entry["coco_url"].split("/")[-1 if flat else -2 :])
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(entry["id"]).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return annotations, root


def record(image_id: int, *detections: tuple[int, float, Box]) -> dict[str, Any]:
    """Detections (category, score, xyxy box) of an image, their masks filling their boxes."""
    return {
        "image_id": image_id,
        "category_id": [category for category, _, _ in detections],
        "score": [score for _, score, _ in detections],
        "bbox": [[x1, y1, x2 - x1, y2 - y1] for _, _, (x1, y1, x2, y2) in detections],
        "segmentation": [rle_of(block_mask(SIZE, box)) for _, _, box in detections],
    }


def federated_scene(
    seed: int, *, num_images: int = 10, num_categories: int = 12, most: int = 12
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An LVIS content and a record for each of its images.

    Instances of all sizes, near misses, wrong classes, equal scores; classes that an image does not show, that it is
    not annotated for exhaustively, and of which nothing is known; every fifth image without instances, every fourth
    without detections; empty masks, and boxes whose mask is smaller.

    Args:
        most: false positives an image, at most; image 3 has 330 more.
    """
    draws = np.random.default_rng(seed)
    annotations: list[Any] = []
    records = []
    images = []
    for image_id in range(1, num_images + 1):
        shown = draws.permutation(num_categories)[:4] + 1
        detections: list[tuple[int, float, Box]] = []
        for _ in range(0 if image_id % 5 == 0 else int(draws.integers(1, 7))):
            width, height = (int(side) for side in draws.integers(4, 115, 2))
            x, y = int(draws.integers(0, SIZE[1] - width + 1)), int(draws.integers(0, SIZE[0] - height + 1))
            category = int(draws.choice(shown))
            annotations.append(block(len(annotations) + 1, image_id, category, (x, y, x + width, y + height)))
            for _ in range(int(draws.integers(0, 4))):
                moved = np.array([x, y, x + width, y + height]) + draws.integers(-4, 5, 4)
                x1, y1, x2, y2 = (int(side) for side in moved.clip(0, (*SIZE[::-1], *SIZE[::-1])))
                if x1 < x2 and y1 < y2:
                    label = category if draws.random() < 0.8 else int(draws.integers(1, num_categories + 1))
                    detections.append((label, float(np.float32(draws.integers(1, 20) / 20)), (x1, y1, x2, y2)))
        for _ in range(int(draws.integers(0, most)) + (330 if image_id == 3 else 0)):
            x, y = (int(corner) for corner in draws.integers(0, 90, 2))
            box = (x, y, x + int(draws.integers(2, 30)), y + int(draws.integers(2, 30)))
            label = int(draws.integers(1, num_categories + 1))
            detections.append((label, float(np.float32(draws.integers(1, 200) / 200)), box))
        found = record(image_id, *(detections if image_id % 4 else ()))
        for place in range(len(found["segmentation"])):
            if draws.random() < 0.1:  # nothing left of the mask, or a corner
                x, y, width, height = found["bbox"][place]
                part = (x, y, x + width // 2, y + height // 2) if draws.random() < 0.5 else (0, 0, 0, 0)
                found["segmentation"][place] = rle_of(block_mask(SIZE, part))
        records.append(found)
        present = {entry["category_id"] for entry in annotations if entry["image_id"] == image_id}
        others = [number for number in range(1, num_categories + 1) if number not in present]
        images.append(
            {
                "id": image_id,
                "coco_url": f"http://images.cocodataset.org/val2017/{image_id:012d}.jpg",
                "height": SIZE[0],
                "width": SIZE[1],
                "neg_category_ids": sorted(int(number) for number in draws.permutation(others)[: len(others) // 2]),
                "not_exhaustive_category_ids": sorted(number for number in present if draws.random() < 0.3),
            }
        )
    categories = [
        {"id": number, "name": f"class {number}", "frequency": "rcf"[number % 3], "image_count": 5 * number}
        for number in range(1, num_categories + 1)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}, records
