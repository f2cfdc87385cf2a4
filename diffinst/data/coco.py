"""COCO-format data sets: a strict reader of the json, and images with their ground truth.

The whole json is checked before any image is read; images are decoded when they are asked for. Every error names the
file, the annotation and the image, says what is allowed and what to do.
"""

from __future__ import annotations

import json
import logging
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import hotcoco.mask
import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from torch import Tensor

from diffinst.config import DataConfig
from diffinst.data import catalog
from diffinst.data.catalog import Split
from diffinst.data.transforms import (
    Recipe,
    plan_test,
    plan_training,
    shortest_edge_size,
    transform_image,
    transform_target,
)
from diffinst.errors import DataError
from diffinst.structures import Sample, Target

_logger = logging.getLogger(__name__)

# Splits whose decoded images fit into this many bytes are kept in memory after the first reading.
CACHE_BYTES = 512 * 1024**2

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


class CocoDataset:
    """The images of one split with their ground truth; crowd annotations are left out, images without any are kept.

    Categories are numbered from 0 in the order of their ids, whether they occur or not.

    Args:
        annotations: COCO json file.
        images_dir: folder that its file names are relative to.
        data: sizes, augmentation, class_agnostic, skip_invalid.
        split: for messages only.
        image_ids: ids that make up the split; None for all of the file.

    Raises:
        DataError: the json is malformed, an id is not in it, or image files are missing.
    """

    def __init__(
        self,
        annotations: str | Path,
        images_dir: str | Path,
        *,
        data: DataConfig,
        split: Split,
        image_ids: Iterable[int] | None = None,
    ) -> None:
        self.annotations_path = Path(annotations)
        self.images_dir = Path(images_dir)
        self.split = split
        self._data = data
        read = self._read()
        self.num_skipped = len(read.skipped)
        self._infos = self._select(read, image_ids)
        self._instances = [
            [item for item in read.instances.get(info.id, ()) if not item.is_crowd] for info in self._infos
        ]
        self._has_masks = read.has_masks
        self.image_ids: list[int] = [info.id for info in self._infos]
        if data.class_agnostic:
            self.class_names: tuple[str, ...] = (CLASS_AGNOSTIC_NAME,)
            self.category_ids: tuple[int, ...] = (1,)
            self._label_of = dict.fromkeys(read.categories, 0)
        else:
            self.class_names = tuple(read.categories.values())
            self.category_ids = tuple(read.categories)
            self._label_of = {category: label for label, category in enumerate(self.category_ids)}
        self.check_images_exist()
        self._keeps_images = sum(3 * info.height * info.width for info in self._infos) <= CACHE_BYTES
        self._images: dict[int, np.ndarray] = {}
        self._rles: dict[int, list[dict[str, Any]]] = {}

    def _read(self) -> CocoAnnotations:
        return read_annotations(self.annotations_path, skip_invalid=self._data.skip_invalid)

    def _select(self, read: CocoAnnotations, image_ids: Iterable[int] | None) -> list[ImageInfo]:
        if image_ids is None:
            return list(read.images.values())
        wanted = sorted(set(image_ids))
        missing = [image_id for image_id in wanted if image_id not in read.images]
        if missing:
            raise DataError(
                f"{self.annotations_path}: image {missing[0]} of the id list is not in this file ({len(missing)} of "
                f"{len(wanted)} are not); take the list that belongs to the {self.split} split"
            )
        return [read.images[image_id] for image_id in wanted]

    def __len__(self) -> int:
        return len(self._infos)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_instances(self) -> int:
        """Instances that are not crowds."""
        return sum(map(len, self._instances))

    def image_labels(self) -> list[set[int]]:
        """The classes of each image."""
        return [{self._label_of[item.category_id] for item in instances} for instances in self._instances]

    @property
    def class_image_counts(self) -> list[int]:
        """On how many images of the split each class is."""
        counts = Counter(label for labels in self.image_labels() for label in labels)
        return [counts[label] for label in range(self.num_classes)]

    def check_images_exist(self) -> None:
        """Look up every file of the split without opening it.

        Raises:
            DataError: names the first missing file and says how many are missing.
        """
        try:
            present = {path.name for path in self.images_dir.iterdir()}
            # Names may have a folder, as those of LVIS do; to list it once is faster than to look up each file.
            for folder in {info.file_name.rpartition("/")[0] for info in self._infos} - {""}:
                if (self.images_dir / folder).is_dir():
                    present |= {f"{folder}/{path.name}" for path in (self.images_dir / folder).iterdir()}
        except OSError as error:
            raise DataError(
                f"{self.images_dir}: cannot list the image folder of {self.annotations_path}: {error.strerror}; check "
                "the path"
            ) from error
        missing = [
            info
            for info in self._infos
            if info.file_name not in present and not (self.images_dir / info.file_name).is_file()
        ]
        if missing:
            more = f" {len(missing)} of {len(self)} files are missing." if len(missing) > 1 else ""
            raise DataError(
                f"{self.annotations_path}: image {missing[0].id}: no file {self.images_dir / missing[0].file_name}. "
                f"Put it there, or leave the image out with an id list ({self.split}_image_ids).{more}"
            )

    def load_image(self, index: int) -> np.ndarray:
        """(h, w, 3) uint8 RGB; do not write to it, it may be kept for the next call.

        Raises:
            DataError: the file is missing, damaged, or not of the size that the json says.
        """
        if index in self._images:
            return self._images[index]
        info = self._infos[index]
        path = self.images_dir / info.file_name
        try:
            image = read_image(path)
        except DataError as error:
            raise DataError(f"{self.annotations_path}: image {info.id}: {error}") from error
        if image.shape[:2] != (info.height, info.width):
            raise DataError(
                f"{self.annotations_path}: image {info.id}: {path} is {image.shape[0]} x {image.shape[1]} (height x "
                f"width, turned as EXIF says), but the json says {info.height} x {info.width}; correct the entry or "
                "replace the file"
            )
        if self._keeps_images:
            self._images[index] = image
        return image

    def target(self, index: int) -> Target:
        """Ground truth in pixels of the file: boxes clipped to the image, masks (M, height, width) or None."""
        info, instances = self._infos[index], self._instances[index]
        boxes = torch.tensor([item.bbox for item in instances], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        limit = torch.tensor([info.width, info.height] * 2, dtype=torch.float64)
        boxes = torch.minimum(boxes.clamp(min=0), limit)
        labels = torch.tensor([self._label_of[item.category_id] for item in instances], dtype=torch.int64)
        return Target(boxes.to(torch.float32), labels, self._masks(index) if self._has_masks else None)

    def _masks(self, index: int) -> Tensor:
        info = self._infos[index]
        if not self._instances[index]:
            return torch.zeros((0, info.height, info.width), dtype=torch.bool)
        if index not in self._rles:
            self._rles[index] = [
                compress_segmentation(item.segmentation, info.height, info.width)
                for item in self._instances[index]
                if item.segmentation is not None
            ]
        # hotcoco decodes what pycocotools would, but faster, and without its deprecation warning on NumPy 2.
        decoded = hotcoco.mask.decode(self._rles[index])  # (h, w, M)
        return torch.from_numpy(np.ascontiguousarray(decoded.transpose(2, 0, 1)).view(np.bool_))

    def training_sample(self, index: int, generator: torch.Generator) -> Sample:
        """Flipped, cropped and resized as the generator decides, with its ground truth."""
        image = self.load_image(index)
        recipe = plan_training(self._size(index), self._data, generator)
        target = transform_target(self.target(index), recipe, crop_boxes=self._data.crop_boxes)
        return Sample(transform_image(image, recipe), self.image_ids[index], self._size(index), target)

    def test_sample(self, index: int) -> Sample:
        """Resized, without ground truth."""
        recipe = plan_test(self._size(index), self._data)
        return Sample(transform_image(self.load_image(index), recipe), self.image_ids[index], self._size(index))

    def original_sample(self, index: int) -> Sample:
        """As it is in its file, without ground truth."""
        size = self._size(index)
        image = transform_image(self.load_image(index), Recipe(original=size, final=size))
        return Sample(image, self.image_ids[index], size)

    def file_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every image as it is in its file."""
        return [self._size(index) for index in range(len(self))]

    def _size(self, index: int) -> tuple[int, int]:
        return self._infos[index].height, self._infos[index].width

    def test_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of every test sample, without reading an image."""
        return [
            shortest_edge_size((info.height, info.width), self._data.shortest_edge_test, self._data.longest_edge_test)
            for info in self._infos
        ]


def open_dataset(data: DataConfig, split: Split, root: str | Path | None = None) -> CocoDataset:
    """Find a split by the name in its configuration and read it; see `catalog.resolve`."""
    paths = catalog.resolve(data, split, root)
    if catalog.annotation_format(data) == "lvis":
        # Imported here: that module builds on this one.
        from diffinst.data.lvis import LvisDataset

        return LvisDataset(paths.annotations, paths.images, data=data, split=split, image_ids=paths.image_ids)
    return CocoDataset(paths.annotations, paths.images, data=data, split=split, image_ids=paths.image_ids)
