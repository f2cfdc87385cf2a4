"""The embedded data set: textured shapes over textured backgrounds, as a COCO folder. Loads no torch.

Everything is drawn in integer arithmetic from the raw output of PCG64, whose stream is fixed for all time, and the
image files hold uncompressed PNG data: the same parameters give the same bytes on every machine, whatever its libm or
zlib.

Four classes differ in outline. Colour and texture are typical of the class in three objects of four and arbitrary in
the fourth, so they help a small network without being enough. Objects overlap; masks are what remains visible.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask

from diffinst.errors import DataError

CLASS_NAMES = ("disc", "square", "triangle", "ring")
FORMAT_VERSION = 1  # raise when any pixel or annotation changes: older folders are then refused instead of mixed in
MAX_IMAGES = 1_000_000
MAX_OBJECTS = 5
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 32, 4096

# Image ids do not depend on how many images there are, so noise that belongs to an image stays with it.
_FIRST_IMAGE_ID = {"train": 1, "val": MAX_IMAGES + 1}

# Two colours typical of each class, in the order of CLASS_NAMES.
_OBJECT_COLOURS = (
    ((224, 82, 62), (240, 156, 56)),
    ((62, 118, 214), (66, 186, 206)),
    ((88, 172, 76), (232, 204, 76)),
    ((146, 88, 200), (232, 116, 170)),
)
# Dark and light end of each background.
_BACKGROUND_COLOURS = (
    ((92, 98, 108), (150, 156, 164)),
    ((118, 104, 88), (186, 170, 148)),
    ((82, 100, 92), (142, 160, 146)),
    ((170, 168, 160), (222, 218, 208)),
    ((60, 64, 76), (104, 108, 122)),
    ((128, 112, 112), (192, 176, 172)),
)

_NORM = 256  # the circle around an undistorted object has this radius in its own coordinates
_SUB = 4  # samples a pixel and axis
_UNIT = 2 * _SUB  # fixed-point units a pixel: samples lie at odd units
_VISIBLE_PERCENT = 60  # no object may hide more of another than leaves this
_PLACEMENT_TRIES = 12

IntArray = np.ndarray[Any, np.dtype[Any]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]
ImageArray = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class ShapeObject:
    """One drawn object: its class index into CLASS_NAMES and its visible mask (size, size) bool, never empty."""

    label: int
    mask: BoolArray


class _Draws:
    """Integers from the raw 64-bit output of PCG64 (numpy's own distributions may change between releases)."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def below(self, bound: int) -> int:
        """An integer in [0, bound)."""
        return ((int(self._bits.random_raw()) >> 32) * bound) >> 32

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + self.below(high - low + 1)

    def bytes(self, *shape: int) -> IntArray:
        """Integers in [0, 255] of a shape."""
        raw = np.asarray(self._bits.random_raw(int(np.prod(shape))), dtype=np.uint64)
        return (raw >> np.uint64(56)).astype(np.int64).reshape(shape)


@dataclass(frozen=True)
class _Placed:
    """Where an object lies and what it looks like; lengths in fixed-point units, turn as (c, s, hypotenuse)."""

    label: int
    centre: tuple[int, int]
    radius: int
    turn: tuple[int, int, int]
    colour: tuple[int, int, int]
    texture: int
    period: int


def _turn(draws: _Draws) -> tuple[int, int, int]:
    # Pythagorean rotations: cos = (q*q - p*p) / n, sin = 2pq / n with n = q*q + p*p are exact rationals.
    p, q = draws.between(-64, 64), 64
    sign = 1 - 2 * draws.below(2)
    return sign * (q * q - p * p), sign * 2 * p * q, q * q + p * p


def _value_noise(draws: _Draws, size: int, cell: int) -> IntArray:
    """Smooth noise (size, size) in [0, 255] that changes over about `cell` pixels."""
    lattice = draws.bytes(size // cell + 2, size // cell + 2)
    position = np.arange(size) * 256 // cell
    index, t = position >> 8, position & 255
    weight = t * t * (768 - 2 * t) >> 16
    rows = (lattice[index] * (256 - weight)[:, None] + lattice[index + 1] * weight[:, None]) >> 8
    return (rows[:, index] * (256 - weight) + rows[:, index + 1] * weight) >> 8


def _draw_background(draws: _Draws, size: int) -> IntArray:
    """(size, size, 3) in [0, 255]: clouds of two colours, half of them with soft bands or a weave."""
    low, high = (np.array(colour) for colour in _BACKGROUND_COLOURS[draws.below(len(_BACKGROUND_COLOURS))])
    level = (2 * _value_noise(draws, size, max(size // 4, 4)) + _value_noise(draws, size, max(size // 14, 2))) // 3
    y, x = np.mgrid[:size, :size]
    pattern, period = draws.below(4), draws.between(5, 10)
    if pattern == 0:
        c, s, n = _turn(draws)
        level = level + np.where((c * x + s * y) // (n * period) & 1, 28, -28)
    elif pattern == 1:
        level = level + np.where((x // period + y // period) & 1, 20, -20)
    level = np.clip(level, 0, 255)[..., None]
    return low + (high - low) * level // 255


def _inside(label: int, u: IntArray, v: IntArray, inset: int) -> BoolArray:
    """Which points of the object's own coordinates lie at least `inset` within its outline."""
    if label == 0:
        return u * u + v * v <= (_NORM - inset) ** 2
    if label == 1:
        return np.maximum(abs(u), abs(v)) <= 196 - inset
    if label == 2:
        # Three half-planes at distance 144; 887 / 1024 and 1 / 2 are cosine and sine of 30 degrees.
        return (v <= 144 - inset) & (887 * abs(u) - 512 * v <= 1024 * (144 - inset))
    return (u * u + v * v <= (_NORM - inset) ** 2) & (u * u + v * v >= (116 + inset) ** 2)


def _texture(kind: int, u: IntArray, v: IntArray, period: int) -> BoolArray:
    """Which points take the second tone: stripes, checks, dots, or none."""
    if kind == 0:
        return u // period & 1 == 1
    if kind == 1:
        return (u // period + v // period) & 1 == 1
    if kind == 2:
        return (u % (2 * period) - period) ** 2 + (v % (2 * period) - period) ** 2 <= (3 * period // 5) ** 2
    return np.zeros(u.shape, dtype=bool)


def _pixel_sums(samples: BoolArray) -> IntArray:
    """(h * _SUB, w * _SUB) samples -> (h, w) how many of each pixel's samples are set."""
    bits = samples.view(np.uint8)
    rows = sum((bits[start::_SUB] for start in range(1, _SUB)), bits[::_SUB])
    return sum((rows[:, start::_SUB] for start in range(1, _SUB)), rows[:, ::_SUB]).astype(np.int64)


class _Rendering:
    """An object sampled on the pixels of the window that holds it."""

    def __init__(self, item: _Placed, size: int) -> None:
        reach = item.radius * 5 // 4 + _UNIT  # the corners of the triangle are the farthest points
        (cx, cy) = item.centre
        self.top, self.left = max((cy - reach) // _UNIT, 0), max((cx - reach) // _UNIT, 0)
        bottom, right = min((cy + reach) // _UNIT + 1, size), min((cx + reach) // _UNIT + 1, size)
        self.window = np.s_[self.top : bottom, self.left : right]
        # 32 bits hold every intermediate up to MAX_IMAGE_SIZE and take half the time.
        dy = np.arange(self.top * _SUB, bottom * _SUB, dtype=np.int32) * 2 + 1 - cy
        dx = np.arange(self.left * _SUB, right * _SUB, dtype=np.int32) * 2 + 1 - cx
        c, s, n = item.turn
        self._item = item
        self._u = (c * dx[None, :] + s * dy[:, None]) // n
        self._v = (c * dy[:, None] - s * dx[None, :]) // n
        self._outline = _inside(item.label, self._u * _NORM // item.radius, self._v * _NORM // item.radius, 0)
        self.coverage = _pixel_sums(self._outline)  # 0.._SUB**2
        self.mask = self.coverage * 2 > _SUB * _SUB

    def paint(self, canvas: IntArray) -> None:
        """Draw the object and its shadow onto the canvas (size, size, 3), in place."""
        item = self._item
        rim_inset = _NORM * _UNIT * 5 // (item.radius * 4)  # 1.25 pixels
        core = _inside(item.label, self._u * _NORM // item.radius, self._v * _NORM // item.radius, rim_inset)
        second = _pixel_sums(core & _texture(item.texture, self._u, self._v, item.period))
        first = _pixel_sums(core) - second
        rim = self.coverage - first - second
        window = canvas[self.window]

        shadow = np.zeros_like(self.coverage)
        shadow[2:, 2:] = self.coverage[:-2, :-2]
        window[:] = window * (256 - 5 * shadow[..., None]) >> 8

        colour = np.array(item.colour)
        tones = first[..., None] * colour + second[..., None] * (colour * 5 // 8) + rim[..., None] * (colour * 3 // 8)
        height, width = self.coverage.shape
        y = (np.arange(height) + self.top) * _UNIT - item.centre[1]
        x = (np.arange(width) + self.left) * _UNIT - item.centre[0]
        light = 256 - (y[:, None] + x[None, :]) * 24 // item.radius  # brighter towards the top left
        full = _SUB * _SUB
        window[:] = (window * (full - self.coverage[..., None]) + (tones * light[..., None] >> 8)) // full


def _draw_object(draws: _Draws, size: int) -> _Placed:
    label = draws.below(len(CLASS_NAMES))
    looks_like = label if draws.below(4) else draws.below(len(CLASS_NAMES))
    feels_like = label if draws.below(4) else draws.below(len(CLASS_NAMES))
    radius = draws.between(size * _UNIT // 10, size * _UNIT // 4)
    margin = radius * 9 // 8
    return _Placed(
        label=label,
        centre=(draws.between(margin, size * _UNIT - margin), draws.between(margin, size * _UNIT - margin)),
        radius=radius,
        turn=_turn(draws),
        colour=_OBJECT_COLOURS[looks_like][draws.below(2)],
        texture=feels_like,
        period=draws.between(5 * _UNIT // 2, 4 * _UNIT),
    )


def draw_image(
    *, seed: int, split: Literal["train", "val"], index: int, size: int
) -> tuple[ImageArray, list[ShapeObject]]:
    """One image and its objects, a function of the arguments alone.

    Args:
        size: height and width in pixels, MIN_IMAGE_SIZE to MAX_IMAGE_SIZE. Objects measure about size / 5 to size / 2.

    Returns:
        (size, size, 3) uint8 RGB, and 1 to MAX_OBJECTS objects, each with at least 60 % of its outline visible.
    """
    draws = _Draws(seed, 0 if split == "train" else 1, index)
    canvas = _draw_background(draws, size)
    wanted = draws.between(1, MAX_OBJECTS)
    labels: list[int] = []
    visible: list[BoolArray] = []
    full_areas: list[int] = []
    for _ in range(wanted):
        for _ in range(_PLACEMENT_TRIES):
            item = _draw_object(draws, size)
            rendering = _Rendering(item, size)
            hidden = np.zeros((size, size), dtype=bool)
            hidden[rendering.window] = rendering.mask
            remaining = [mask & ~hidden for mask in visible]
            if all(100 * left.sum() >= _VISIBLE_PERCENT * area for left, area in zip(remaining, full_areas)):
                rendering.paint(canvas)
                labels.append(item.label)
                visible = [*remaining, hidden]
                full_areas.append(int(hidden.sum()))
                break
    grain = (draws.bytes(size, size) >> 5) - 4
    image = np.clip(canvas + grain[..., None], 0, 255).astype(np.uint8)
    return image, [ShapeObject(label, mask) for label, mask in zip(labels, visible)]


def _encode_png(image: ImageArray) -> bytes:
    """An 8-bit RGB PNG whose deflate stream is stored, not compressed, so that no zlib release changes the bytes."""
    height, width, _ = image.shape
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)  # filter type 0 before each row
    rows[:, 1:] = image.reshape(height, -1)
    data = rows.tobytes()
    blocks = [data[start : start + 65535] for start in range(0, len(data), 65535)]
    stream = b"\x78\x01"
    for number, block in enumerate(blocks):
        is_last = number == len(blocks) - 1
        stream += struct.pack("<BHH", is_last, len(block), len(block) ^ 0xFFFF) + block
    stream += struct.pack(">I", zlib.adler32(data))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", stream) + chunk(b"IEND", b"")


def _annotation(annotation_id: int, image_id: int, item: ShapeObject) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(item.mask, dtype=np.uint8))
    rows, columns = np.flatnonzero(item.mask.any(axis=1)), np.flatnonzero(item.mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": item.label + 1,
        "iscrowd": 0,
        "area": int(item.mask.sum()),
        "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
        "segmentation": {"size": list(item.mask.shape), "counts": rle["counts"].decode("ascii")},
    }


def _write_split(folder: Path, split: Literal["train", "val"], *, num_images: int, size: int, seed: int) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / split).mkdir()
    for index in range(num_images):
        image_id = _FIRST_IMAGE_ID[split] + index
        image, objects = draw_image(seed=seed, split=split, index=index, size=size)
        file_name = f"{image_id:07d}.png"
        (folder / split / file_name).write_bytes(_encode_png(image))
        images.append({"id": image_id, "file_name": file_name, "height": size, "width": size})
        for item in objects:
            annotations.append(_annotation(len(annotations) + 1, image_id, item))
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(CLASS_NAMES, start=1)],
    }
    (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")


@dataclass(frozen=True)
class _Parameters:
    format_version: int
    num_train: int
    num_val: int
    image_size: int
    seed: int


def _check_existing(folder: Path, wanted: _Parameters) -> None:
    try:
        found = json.loads((folder / "shapes.json").read_text())
    except (OSError, ValueError):
        found = None
    if found != asdict(wanted):
        raise DataError(
            f"{folder}: holds something else than the shapes set asked for ({asdict(wanted)}; found {found}). "
            "Remove the folder or choose another one."
        )


def generate(folder: str | Path, *, num_train: int, num_val: int, image_size: int, seed: int) -> Path:
    """Write `folder/annotations/instances_{train,val}.json` and `folder/{train,val}/*.png`, unless they are there.

    The folder appears whole or not at all; a second process that asks for the same folder waits for the first.

    Returns:
        The folder.

    Raises:
        DataError: the folder holds something else, or cannot be written.
    """
    folder = Path(folder)
    counts_fit = 1 <= num_train <= MAX_IMAGES and 1 <= num_val <= MAX_IMAGES
    if not (counts_fit and MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE and seed >= 0):
        raise DataError(
            f"shapes: impossible parameters: {num_train} and {num_val} images (1 to {MAX_IMAGES}), size {image_size} "
            f"({MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE}), seed {seed} (0 or more)"
        )
    wanted = _Parameters(FORMAT_VERSION, num_train, num_val, image_size, seed)
    if folder.exists():
        _check_existing(folder, wanted)
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f".{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                _check_existing(folder, wanted)
                return folder
            partial = folder.parent / f".{folder.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
            (partial / "annotations").mkdir(parents=True)
            _write_split(partial, "train", num_images=num_train, size=image_size, seed=seed)
            _write_split(partial, "val", num_images=num_val, size=image_size, seed=seed)
            (partial / "shapes.json").write_text(json.dumps(asdict(wanted)) + "\n")
            os.replace(partial, folder)  # noqa: PTH105 (says that an existing target is replaced in one step)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot write the shapes set: {error}. Choose a writable place with --data-root or "
            "DIFFINST_CACHE."
        ) from error
    return folder
