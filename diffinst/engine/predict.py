"""Photographs in, annotated photographs and COCO results out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffinst.checkpoint import replacing
from diffinst.config import DataConfig, SamplerConfig
from diffinst.data.coco import read_image
from diffinst.data.transforms import plan_test, transform_image
from diffinst.drawing import draw_detections, enlarge
from diffinst.engine.inference import detect
from diffinst.errors import DataError
from diffinst.model import DiffusionInst
from diffinst.ops.rle import encode_masks
from diffinst.structures import Detections, Sample

RESULTS_NAME = "predictions.json"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_KEEPS_ITS_FORMAT = {".jpg", ".jpeg"}  # everything else is written as PNG
_COORDINATE_DIGITS = 2
_SHORTEST_DRAWN_SIDE = 360  # pixels; smaller pictures are drawn enlarged, results stay in the file's own pixels


@dataclass(frozen=True)
class Photograph:
    """An image file, the name it is drawn under (relative to the output folder), and the id its noise belongs to."""

    path: Path
    output: Path
    image_id: int


def find_photographs(inputs: Iterable[Path]) -> list[Photograph]:
    """Image files among `inputs` and in folders of `inputs`, sub-folders included, in order of path.

    The id of '000000000139.jpg' is 139, as in COCO; of any other file it is made from its name. So a photograph gives
    the same detections whatever lies beside it.

    Raises:
        DataError: an input does not exist, a folder has no image, or two files would be drawn under one name.
    """
    found: list[Photograph] = []
    seen: set[Path] = set()
    for given in inputs:
        if not given.exists():
            raise DataError(f"{given}: no such file or folder. Check the path")
        inside = [path for path in sorted(given.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
        if given.is_dir() and not inside:
            raise DataError(f"{given}: no image in this folder. Looked for {', '.join(IMAGE_SUFFIXES)}")
        for path in inside if given.is_dir() else [given]:
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            name = path.relative_to(given) if given.is_dir() else Path(path.name)
            suffix = path.suffix if path.suffix.lower() in _KEEPS_ITS_FORMAT else ".png"
            found.append(Photograph(path, name.with_suffix(suffix), _image_id(path)))
    by_output: dict[Path, Path] = {}
    for photograph in found:
        other = by_output.setdefault(photograph.output, photograph.path)
        if other != photograph.path:
            raise DataError(
                f"{photograph.path} and {other} would both be drawn as {photograph.output}. "
                "Rename one of them, or give the folder that holds both"
            )
    return found


def predict(
    model: DiffusionInst,
    photographs: Sequence[Photograph],
    out_dir: Path,
    *,
    data: DataConfig,
    settings: SamplerConfig,
    class_names: Sequence[str] = (),
    draw_threshold: float = 0.3,
    on_image: Callable[[Photograph, Detections], None] | None = None,
) -> Path:
    """Detect on photographs one by one; write each with its detections drawn, and all detections as COCO results.

    Small photographs are drawn enlarged; the results are in the file's own pixels.

    Args:
        model: on its device; set to evaluation mode.
        photographs: from `find_photographs`.
        out_dir: made if missing; files of an earlier call are replaced.
        data: sizes at test time.
        settings: sampling and post-processing.
        class_names: K names.
        draw_threshold: detections with a lower score are in the results but not in the pictures.
        on_image: called after each photograph.
    Returns:
        Path of the results: a JSON list of COCO results with file names and class names; category id is label plus 1.
    Raises:
        DataError: a file is damaged or no image; nothing is written for it or those after it. Or the folder cannot be
            written.
    """
    model.eval()
    results: list[dict[str, Any]] = []
    with _writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
    for photograph in photographs:
        image = read_image(photograph.path)
        detections = detect_image(model, image, photograph.image_id, data=data, settings=settings)
        drawn = draw_detections(
            *enlarge(image, detections, _SHORTEST_DRAWN_SIDE), class_names, score_threshold=draw_threshold
        )
        with _writing(out_dir):
            _write_image(out_dir / photograph.output, drawn)
        results.extend(coco_results(detections, photograph, class_names))
        if on_image is not None:
            on_image(photograph, detections)
    path = out_dir / RESULTS_NAME
    with _writing(out_dir), replacing(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{folder}: cannot be written ({reason}). Choose a folder that can, with --out DIR") from error


def detect_image(
    model: DiffusionInst, image: np.ndarray, image_id: int, *, data: DataConfig, settings: SamplerConfig
) -> Detections:
    """Detections of one (height, width, 3) uint8 RGB image, in its pixels, on the CPU."""
    height, width = image.shape[:2]
    resized = transform_image(image, plan_test((height, width), data))
    batch = model.make_batch([Sample(resized, image_id, (height, width))])
    return detect(model, batch, settings)[0].to("cpu")


def coco_results(
    detections: Detections, photograph: Photograph, class_names: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """One COCO result a detection: bbox as [x, y, width, height] in pixels, masks as RLE, best score first."""
    encodings = None if detections.masks is None else encode_masks(detections.masks)
    for i, (box, score, label) in enumerate(
        zip(detections.boxes_xyxy.tolist(), detections.scores.tolist(), detections.labels.tolist())
    ):
        x1, y1, x2, y2 = box
        result: dict[str, Any] = {
            "image_id": photograph.image_id,
            "file_name": photograph.path.name,
            "category_id": label + 1,
            "category": class_names[label] if label < len(class_names) else f"class {label}",
            "score": round(score, 6),
            "bbox": [round(value, _COORDINATE_DIGITS) for value in (x1, y1, x2 - x1, y2 - y1)],
        }
        if encodings is not None:
            result["segmentation"] = encodings[i]
        yield result


def _image_id(path: Path) -> int:
    if path.stem.isascii() and path.stem.isdigit():
        return int(path.stem)
    # 52 bits: exact in every JSON reader, and no two of a million names are likely to meet.
    return int(hashlib.sha256(path.name.encode()).hexdigest()[:13], 16)


def _write_image(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        if path.suffix.lower() in _KEEPS_ITS_FORMAT:
            Image.fromarray(image).save(temporary, format="JPEG", quality=92)
        else:
            Image.fromarray(image).save(temporary, format="PNG")
