"""The strict reader of COCO json files, and of image files. Loads no torch.

The whole json is checked before any image is read. Every error names the file, the annotation and the image, says what
is allowed and what to do.
"""

from __future__ import annotations

import json
import logging
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from diffinst.errors import DataError
from diffinst.ops.rle import decode_rle

_logger = logging.getLogger(__name__)

# What Pillow raises for files that are cut off, damaged or no images.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}

CLASS_AGNOSTIC_NAME = "object"


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An entry of `images`. Sizes in pixels."""

    id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Instance:
    """A checked entry of `annotations`.

    bbox: x, y, width, height in pixels; width and height above 0. area: pixels, None where the file gives none.
    segmentation: polygons, a compressed or an uncompressed RLE as in the file; None in files with boxes only.
    """

    id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float | None
    is_crowd: bool
    segmentation: list[list[float]] | dict[str, Any] | None


@dataclass(frozen=True)
class CocoAnnotations:
    """A checked annotation file.

    images: by rising id. instances: by image id, in file order; images without any are absent.
    categories: name by id, rising ids. has_masks: False where no annotation has a segmentation.
    skipped: one message per malformed annotation that was dropped.
    """

    source: str
    images: dict[int, ImageInfo]
    instances: dict[int, list[Instance]]
    categories: dict[int, str]
    has_masks: bool
    skipped: list[str] = field(default_factory=list)


class _Malformed(Exception):
    """What is wrong with one entry, and what is allowed."""


def decode_rle_counts(counts: str | bytes) -> np.ndarray:
    """Run lengths of a compressed COCO RLE string, (R,) int64; background first.

    Each run is written in groups of five bits from the lowest, six bits a character from '0' on, the sixth saying that
    more follow; from the fourth run on the difference to the run two before is written (pycocotools maskApi.c,
    rleFrString).

    Raises:
        ValueError: the string holds other characters or ends within a run.
    """
    if isinstance(counts, str) and not counts.isascii():
        raise ValueError("holds characters that no RLE has")
    raw = counts.encode("ascii") if isinstance(counts, str) else counts
    codes = np.frombuffer(raw, dtype=np.uint8).astype(np.int64) - 48
    if not len(codes):
        return np.zeros(0, dtype=np.int64)
    if codes.min() < 0 or codes.max() > 63:
        raise ValueError("holds characters that no RLE has")
    is_last = codes & 32 == 0
    if not is_last[-1]:
        raise ValueError("is cut off")
    ends = np.flatnonzero(is_last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    if place.max() > 11:
        raise ValueError("holds a run that is too long")
    runs = np.add.reduceat((codes & 31) << (5 * place), starts)
    negative = codes[ends] & 16 != 0
    runs = np.where(negative, runs - (1 << (5 * (ends - starts + 1))), runs)
    runs[1::2] = np.cumsum(runs[1::2])  # runs 1, 3, 5, ...: each adds to the one two before
    runs[2::2] = np.cumsum(runs[2::2])  # run 0 stands alone: run 2 is the first that is written whole
    return runs


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_rle(segmentation: dict[str, Any], image: ImageInfo) -> None:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if size != [image.height, image.width]:
        raise _Malformed(
            f"mask has size {size}, but the image is {[image.height, image.width]} (height, width); both must agree"
        )
    if isinstance(counts, str):
        try:
            runs = decode_rle_counts(counts)
        except ValueError as error:
            raise _Malformed(f"the RLE string {error}; expected what pycocotools.mask.encode writes") from error
    elif isinstance(counts, list) and all(_is_integer(count) for count in counts):
        try:
            runs = np.array(counts, dtype=np.int64)
        except OverflowError as error:
            raise _Malformed("a run of the RLE is too long") from error
    else:
        raise _Malformed(f"RLE counts are a {type(counts).__name__}; allowed: a string, or a list of whole numbers")
    if len(runs) and runs.min() < 0:
        raise _Malformed("the RLE holds a negative run; runs are 0 or more")
    if int(runs.sum()) != image.height * image.width:
        raise _Malformed(
            f"the RLE covers {int(runs.sum())} pixels, but the image has {image.height} x {image.width} = "
            f"{image.height * image.width}"
        )
    if not int(runs[1::2].sum()):
        raise _Malformed("the mask has no pixel; it needs at least one")


def _check_polygons(polygons: list[Any], image: ImageInfo) -> None:
    if not polygons:
        raise _Malformed("the list of polygons is empty; it needs at least one")
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            found = f"{len(polygon)} numbers" if isinstance(polygon, list) else f"a {type(polygon).__name__}"
            raise _Malformed(f"a polygon is {found}; it must be x, y pairs of at least 3 points")
        try:
            is_finite = bool(np.isfinite(sum(polygon)))
        except TypeError as error:
            raise _Malformed("a polygon holds something else than numbers") from error
        # Coordinates far off the image are a mistake, and rasterising them would take time and memory without bound.
        reach = 2 * max(image.height, image.width)
        if not is_finite or max(polygon) > reach or min(polygon) < -reach:
            raise _Malformed(
                f"a polygon leaves the image ({image.height} x {image.width}) far behind; "
                f"coordinates must lie within [-{reach}, {reach}]"
            )


def _parse_annotation(entry: Any, images: dict[int, ImageInfo], categories: dict[int, str]) -> tuple[int, Instance]:
    """(image id, instance) of a checked entry whose id is known to be an integer."""
    image_id, category_id = entry.get("image_id"), entry.get("category_id")
    if not _is_integer(image_id) or image_id not in images:
        raise _Malformed(f"image_id {image_id!r} is not listed in 'images'")
    if not _is_integer(category_id) or category_id not in categories:
        allowed = ", ".join(map(str, list(categories)[:10])) + (", ..." if len(categories) > 10 else "")
        raise _Malformed(f"category_id {category_id!r} is not listed in 'categories'; allowed: {allowed}")
    image = images[image_id]
    box = entry.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(type(value) in (int, float) for value in box)):
        raise _Malformed(f"bbox is {box!r}; it must be [x, y, width, height] in pixels")
    try:
        x, y, width, height = map(float, box)
    except OverflowError as error:
        raise _Malformed("bbox holds a number that is too large") from error
    if not np.isfinite(x + y + width + height):
        raise _Malformed(f"bbox {box} is not finite")
    if width <= 0 or height <= 0:
        side = "width" if width <= 0 else "height"
        word = "zero" if min(width, height) == 0 else "negative"
        raise _Malformed(f"bbox {box} has {word} {side}; width and height must be above 0")
    if x + width <= 0 or y + height <= 0 or x >= image.width or y >= image.height:
        raise _Malformed(f"bbox {box} lies outside the image, which is {image.width} wide and {image.height} high")
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise _Malformed(f"iscrowd is {crowd!r}; allowed: 0, 1")
    area = entry.get("area")
    if area is not None and not (type(area) in (int, float) and np.isfinite(area) and area >= 0):
        raise _Malformed(f"area is {area!r}; it must be a number of pixels, 0 or more")
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, dict):
        _check_rle(segmentation, image)
    elif isinstance(segmentation, list):
        _check_polygons(segmentation, image)
    elif segmentation is not None:
        raise _Malformed(
            f"segmentation is a {type(segmentation).__name__}; allowed: polygons, or an RLE with size and counts"
        )
    return image_id, Instance(
        id=entry["id"],
        category_id=category_id,
        bbox=(x, y, width, height),
        area=None if area is None else float(area),
        is_crowd=bool(crowd),
        segmentation=segmentation,
    )


def _entries(content: Any, key: str, source: str) -> list[dict[str, Any]]:
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise DataError(
            f"{source}: has no list '{key}'; a COCO file is an object with the lists 'images', 'annotations' and "
            "'categories'"
        )
    for position, entry in enumerate(content[key]):
        if not isinstance(entry, dict) or not _is_integer(entry.get("id")):
            raise DataError(f"{source}: entry {position} of '{key}' has no whole number 'id'; give each a unique one")
    return content[key]


def parse_annotations(content: Any, source: str, *, skip_invalid: bool = False) -> CocoAnnotations:
    """Check the content of a COCO json file whole.

    Args:
        content: the parsed json.
        source: what messages call the file.
        skip_invalid: drop malformed annotations, with a warning, instead of stopping at them.

    Raises:
        DataError: names the first fault and how many there are. Faults of images and categories are never skipped.
    """
    categories: dict[int, str] = {}
    for entry in sorted(_entries(content, "categories", source), key=lambda entry: entry["id"]):
        name = entry.get("name")
        if entry["id"] in categories:
            raise DataError(f"{source}: category id {entry['id']} is listed twice; ids must be unique")
        if not isinstance(name, str) or not name:
            raise DataError(f"{source}: category {entry['id']}: name is {name!r}; it must be a text that is not empty")
        categories[entry["id"]] = name
    if not categories:
        raise DataError(f"{source}: lists no category; at least one is needed")

    images: dict[int, ImageInfo] = {}
    for entry in sorted(_entries(content, "images", source), key=lambda entry: entry["id"]):
        image_id = entry["id"]
        name, height, width = entry.get("file_name"), entry.get("height"), entry.get("width")
        if image_id in images:
            raise DataError(
                f"{source}: image id {image_id} is listed twice; ids must be unique, remove one of the entries"
            )
        if not isinstance(name, str) or not name:
            raise DataError(
                f"{source}: image {image_id}: file_name is {name!r}; it must name a file in the image folder"
            )
        # What lies elsewhere would not count when the content of a data set is compared.
        if name.startswith("/") or ".." in name.split("/"):
            raise DataError(
                f"{source}: image {image_id}: file_name is {name!r}; it must be a path below the image folder, without "
                "'..'. Write it relative to a folder that holds all images, and set the image folder to that"
            )
        if not (_is_integer(height) and _is_integer(width) and height > 0 and width > 0):
            raise DataError(
                f"{source}: image {image_id} ({name}): height {height!r} and width {width!r} must be whole numbers "
                "above 0"
            )
        images[image_id] = ImageInfo(image_id, name, height, width)
    if not images:
        raise DataError(f"{source}: lists no image; at least one is needed")

    instances: dict[int, list[Instance]] = {}
    faults: list[str] = []
    seen: set[int] = set()
    without_mask: list[tuple[int, int]] = []
    num_masks = 0
    for entry in _entries(content, "annotations", source):
        try:
            if entry["id"] in seen:
                raise _Malformed("its id is used twice; annotation ids must be unique")
            seen.add(entry["id"])
            image_id, instance = _parse_annotation(entry, images, categories)
        except _Malformed as fault:
            faults.append(f"{source}: annotation {entry['id']} (image {entry.get('image_id')}): {fault}")
            continue
        if instance.segmentation is None:
            without_mask.append((instance.id, image_id))
        else:
            num_masks += 1
        instances.setdefault(image_id, []).append(instance)
    if num_masks and without_mask:
        for annotation_id, image_id in without_mask:
            faults.append(
                f"{source}: annotation {annotation_id} (image {image_id}): has no segmentation, but others of the "
                "file have; give all or none"
            )
            instances[image_id] = [item for item in instances[image_id] if item.id != annotation_id]
    if faults and not skip_invalid:
        more = f" {len(faults)} annotations of the file are malformed." if len(faults) > 1 else ""
        raise DataError(
            f"{faults[0]}. Correct or remove it, or set skip_invalid: true to leave out malformed annotations.{more}"
        )
    if faults:
        _logger.warning("left out %d malformed annotations, the first: %s", len(faults), faults[0])
    return CocoAnnotations(source, images, instances, categories, num_masks > 0 or not without_mask, faults)


def read_json(path: Path) -> Any:
    """Parse a json file.

    Raises:
        DataError: it cannot be read or is not json; names the position.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; check the path") from error
    except ValueError as error:
        raise DataError(
            f"{path}: is not valid json: {error}; the file may be incomplete, fetch or write it again"
        ) from error


def read_annotations(path: str | Path, *, skip_invalid: bool = False) -> CocoAnnotations:
    """Read and check a COCO json file; see `parse_annotations`."""
    return parse_annotations(read_json(Path(path)), str(path), skip_invalid=skip_invalid)


def compress_segmentation(segmentation: list[list[float]] | dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Polygons, uncompressed or compressed RLE -> compressed RLE as pycocotools takes it (union of the polygons)."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def decode_segmentation(segmentation: list[list[float]] | dict[str, Any], height: int, width: int) -> np.ndarray:
    """Polygons or RLE -> (height, width) bool."""
    return decode_rle(compress_segmentation(segmentation, height, width))


def read_image(path: Path, *, reduce_depth: bool = False) -> np.ndarray:
    """Decode an image file, turned as its EXIF orientation says.

    Args:
        reduce_depth: read greyscale of 16 bits, by its upper 8, as Pillow reads colours of 16 bits, instead of refusing
            it: only who looks at a picture can say whether its values use that range.
    Returns:
        (h, w, 3) uint8 RGB.

    Raises:
        DataError: missing, damaged, no image, or of more than 8 bits a channel.
    """
    try:
        with Image.open(path) as file:
            if reduce_depth and file.mode.startswith("I;16"):
                grey = (np.asarray(ImageOps.exif_transpose(file)) >> 8).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            if file.mode not in _EIGHT_BIT_MODES:
                raise DataError(f"{path}: pixels of mode {file.mode} are not supported; save it with 8 bits a channel")
            return np.asarray(ImageOps.exif_transpose(file).convert("RGB"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such image file; put it there or remove its entry") from error
    except _DECODING_ERRORS as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be decoded: {reason}; the file is damaged or no image, replace it") from error
