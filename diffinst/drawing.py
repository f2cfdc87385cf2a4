"""Detections drawn over a picture: translucent masks with contours, boxes, labels that do not collide; and a legend."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffinst.structures import Detections

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Hues of equal weight, neighbours far apart, told apart by colour-blind readers too (after Okabe and Ito, Paul Tol).
PALETTE: tuple[Colour, ...] = (
    (0, 158, 222),
    (240, 110, 20),
    (0, 170, 120),
    (222, 90, 170),
    (250, 190, 20),
    (130, 110, 230),
    (220, 50, 60),
    (110, 200, 230),
    (150, 190, 40),
    (170, 110, 60),
)

# The legend: dark letters on light paper, narrower than this in no picture (pixels), and not quite opaque over one.
_PAPER: Colour = (248, 248, 246)
_INK: Colour = (32, 34, 38)
_NARROWEST_LEGEND = 180
_PANEL_OPACITY = 0.85


@dataclass(frozen=True)
class DrawingStyle:
    """How detections look; sizes in pixels grow with the image and are given for a longer side of 1000.

    mask_opacity: in [0, 1]. line_width, font_size, legend_font_size: at a longer side of 1000 pixels, never below 1, 11
    and 13.
    """

    mask_opacity: float = 0.42
    line_width: float = 2.6
    font_size: float = 17.0
    legend_font_size: float = 19.0


def colour_of(label: int) -> Colour:
    """The colour of a class: the same in every picture; after the palette's end, darker and lighter tones of it."""
    base = PALETTE[label % len(PALETTE)]
    tone = (label // len(PALETTE)) % 3
    if tone == 0:
        return base
    target, share = (255, 0.45) if tone == 1 else (0, 0.4)
    red, green, blue = (round(channel + (target - channel) * share) for channel in base)
    return red, green, blue


def enlarge(
    image: np.ndarray, detections: Detections, shortest_side: int, longest_side: int
) -> tuple[np.ndarray, Detections]:
    """Repeat pixels of a small picture, so that labels do not cover what they name.

    Args:
        image: (height, width, 3) uint8 RGB.
        detections: in pixels of this image.
        shortest_side: the whole factor is the least that makes the shorter side this long,
        longest_side: but none that makes the longer side longer than this.
    Returns:
        Image and detections, each pixel `factor` x `factor` pixels; the given ones if the image is large enough.
    """
    factor = min(-(-shortest_side // min(image.shape[:2])), longest_side // max(image.shape[:2]))
    if factor <= 1:
        return image, detections
    masks = detections.masks
    if masks is not None:
        masks = masks.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    larger = replace(detections, boxes_xyxy=detections.boxes_xyxy * factor, masks=masks)
    return image.repeat(factor, axis=0).repeat(factor, axis=1), larger


def add_legend(
    image: np.ndarray,
    labels: Sequence[int],
    class_names: Sequence[str] = (),
    *,
    over: bool = False,
    style: DrawingStyle | None = None,
) -> np.ndarray:
    """Name the classes drawn in a picture: colour, name and how many, in order of class.

    Args:
        image: (height, width, 3) uint8 RGB; left unchanged.
        labels: of all that is drawn, in any order; without any the picture stays as it is.
        class_names: K names; a class without one is shown by its number.
        over: False: in a band below, which makes the picture higher, and wider where names need it. True: over the
            lower left corner, for a picture whose size must not change; lines that would reach above its lower half are
            counted only, and where not even one fits there is no legend.
        style: size of the letters.
    Returns:
        (height', width', 3) uint8 RGB.
    """
    if not labels:
        return image.copy()
    style = style or DrawingStyle()
    height, width = image.shape[:2]
    font = _font(max(13.0, style.legend_font_size * max(height, width) / 1000))
    counts = Counter(labels)
    entries = [(_name(label, class_names), f": {counts[label]}", colour_of(label)) for label in sorted(counts)]
    if not over:
        band = _draw_legend(_place_legend(entries, font, max(width, _NARROWEST_LEGEND)), font)
        canvas = np.full((height + band.shape[0], max(width, band.shape[1]), 3), _PAPER, dtype=np.uint8)
        canvas[:height, :width] = image
        canvas[height:, : band.shape[1]] = band
        return canvas
    legend = _place_legend(entries, font, width)
    shown = len(entries)
    while legend.height > height // 2 or legend.width > width:
        shown = min(shown - 1, sum(entry.y + legend.line <= height // 2 for entry in legend.entries))
        if shown < 1:
            return image.copy()
        more = (f"and {len(entries) - shown} more", "", _PAPER)
        legend = _place_legend([*entries[:shown], more], font, width)
    drawn = image.copy()
    corner = drawn[height - legend.height :, : legend.width]
    corner[:] = (_draw_legend(legend, font) * _PANEL_OPACITY + corner * (1 - _PANEL_OPACITY)).round().astype(np.uint8)
    return drawn


@dataclass(frozen=True)
class _LegendEntry:
    """A square of colour with its upper left corner at (x, y), and a text beside it."""

    x: int
    y: int
    text: str
    colour: Colour


@dataclass(frozen=True)
class _Legend:
    """Sizes in pixels; square: side of the squares of colour; line: from one line to the next."""

    entries: list[_LegendEntry]
    width: int
    height: int
    square: int
    line: int


def _place_legend(entries: Sequence[tuple[str, str, Colour]], font: Font, max_width: int) -> _Legend:
    """Names with their counts line by line, no wider than `max_width`: a name that needs more is cut."""
    square = round(font.getbbox("Ag")[3] - font.getbbox("Ag")[1])
    margin = gap = max(3, round(square * 0.45))
    placed: list[_LegendEntry] = []
    x = y = margin
    right = 0
    for name, count, colour in entries:
        text = _shortened(name, count, font, max_width - 2 * margin - square - gap)
        entry_width = square + gap + math.ceil(font.getlength(text))
        if x > margin and x + entry_width + margin > max_width:
            x, y = margin, y + square + gap
        placed.append(_LegendEntry(x, y, text, colour))
        right = max(right, x + entry_width)
        x += entry_width + 2 * square
    return _Legend(placed, right + margin, y + square + margin, square, square + gap)


def _draw_legend(legend: _Legend, font: Font) -> np.ndarray:
    """(height, width, 3) uint8."""
    canvas = Image.new("RGB", (legend.width, legend.height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    top = font.getbbox("Ag")[1]
    for entry in legend.entries:
        last = entry.x + legend.square - 1, entry.y + legend.square - 1
        draw.rectangle((entry.x, entry.y, *last), fill=entry.colour)
        draw.text((entry.x + legend.line, entry.y - top), entry.text, font=font, fill=_INK)
    return np.asarray(canvas)


def _shortened(name: str, count: str, font: Font, max_width: float) -> str:
    """Name and count; the end of a name that is too wide is left out."""
    for kept in range(len(name), 0, -1):
        text = (name if kept == len(name) else f"{name[:kept].rstrip()}..") + count
        if font.getlength(text) <= max_width:
            return text
    return count


def draw_detections(
    image: np.ndarray,
    detections: Detections,
    class_names: Sequence[str] = (),
    *,
    score_threshold: float = 0.0,
    max_detections: int | None = None,
    style: DrawingStyle | None = None,
) -> np.ndarray:
    """Draw detections, the best on top.

    Args:
        image: (height, width, 3) uint8 RGB; left unchanged.
        detections: in pixels of this image, best score first.
        class_names: K names; a class without one is shown by its number.
        score_threshold: detections below it are not drawn.
        max_detections: at most so many are drawn, the best ones.
        style: sizes and opacity.
    Returns:
        (height, width, 3) uint8 RGB.
    Raises:
        ValueError: the image is not (height, width, 3) uint8, or the masks have another size.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be (height, width, 3) uint8, not {image.shape} {image.dtype}")
    if detections.masks is not None and tuple(detections.masks.shape[1:]) != image.shape[:2]:
        raise ValueError(f"masks are {tuple(detections.masks.shape[1:])}, the image is {image.shape[:2]}")
    style = style or DrawingStyle()
    scores = detections.scores.cpu().numpy()
    shown = np.flatnonzero(scores >= score_threshold)[:max_detections]
    if len(shown) == 0:
        return image.copy()
    scale = max(image.shape[:2]) / 1000
    line_width = max(1, round(style.line_width * scale))
    labels = detections.labels.cpu().numpy()
    boxes_xyxy = detections.boxes_xyxy.cpu().numpy()
    painted = image.copy()
    if detections.masks is not None:
        _paint_masks(
            painted,
            [detections.masks[i].cpu().numpy() for i in shown],
            [colour_of(int(labels[i])) for i in shown],
            style.mask_opacity,
            max(1, round(line_width * 0.7)),
        )
    canvas = Image.fromarray(painted)
    draw = ImageDraw.Draw(canvas)
    for i in shown[::-1]:
        _draw_box(draw, boxes_xyxy[i], colour_of(int(labels[i])), line_width)
    font = _font(max(11.0, style.font_size * scale))
    taken: list[tuple[float, float, float, float]] = []
    for i in shown:
        label = int(labels[i])
        name = _name(label, class_names)
        _draw_label(draw, f"{name} {scores[i]:.2f}", boxes_xyxy[i], colour_of(label), font, canvas.size, taken)
    return np.asarray(canvas)


@functools.lru_cache(maxsize=8)
def _font(size: float) -> Font:
    """The font that comes with matplotlib, for names that are not English, too; Pillow's own knows few accents."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(path, size)
    return ImageFont.load_default(size=size)


def _name(label: int, class_names: Sequence[str]) -> str:
    return class_names[label] if label < len(class_names) else f"class {label}"


def _paint_masks(
    image: np.ndarray, masks: Sequence[np.ndarray], colours: Sequence[Colour], opacity: float, width: int
) -> None:
    """Tint the masks' pixels and draw their inner contours, in place; the first is on top.

    A pixel is tinted once, however many masks it is in: a crowd of them would hide the picture.
    """
    free = np.ones(image.shape[:2], dtype=bool)
    contours = []
    for mask, colour in zip(masks, colours):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if len(rows) == 0:
            continue
        part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        tint = np.asarray(colour, dtype=np.float32)
        tinted, pixels = mask[part] & free[part], image[part]
        pixels[tinted] = (pixels[tinted] * (1 - opacity) + tint * opacity).round().astype(np.uint8)
        free[part] &= ~mask[part]
        # White mixed in keeps the contour visible on its own tint.
        contours.append((part, _contour(mask[part], width), (tint * 0.75 + 255 * 0.25).round().astype(np.uint8)))
    for part, contour, light in contours[::-1]:
        image[part][contour] = light


def _contour(mask: np.ndarray, width: int) -> np.ndarray:
    """Pixels of the mask within `width` steps (up, down, left, right) of one outside; beyond the border is outside."""
    core = np.pad(mask, 1)
    for _ in range(width):
        inner = core.copy()
        inner[1:] &= core[:-1]
        inner[:-1] &= core[1:]
        inner[:, 1:] &= core[:, :-1]
        inner[:, :-1] &= core[:, 1:]
        core = inner
    return mask & ~core[1:-1, 1:-1]


def _draw_box(draw: ImageDraw.ImageDraw, box_xyxy: np.ndarray, colour: Colour, width: int) -> None:
    x1, y1, x2, y2 = (round(float(value)) for value in box_xyxy)
    # Box corners lie between pixels: the last pixel inside is one before x2 and y2.
    x2, y2 = max(x2 - 1, x1), max(y2 - 1, y1)
    draw.rectangle((x1, y1, x2, y2), outline=colour, width=min(width, max(1, min(x2 - x1, y2 - y1) // 2)))


def _draw_label(
    draw: ImageDraw.ImageDraw,
    text: str,
    box_xyxy: np.ndarray,
    colour: Colour,
    font: Font,
    size: tuple[int, int],
    taken: list[tuple[float, float, float, float]],
) -> None:
    """A label over the box's upper left corner; where that is outside or taken, inside, then lower; else left out.

    A label that would hide a better detection's label is worth less than the picture.
    """
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    pad = max(2.0, (bottom - top) * 0.22)
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    x1, y1, _, y2 = (float(value) for value in box_xyxy)
    x = min(max(x1, 0.0), max(size[0] - width, 0.0))
    for y in (y1 - height, y1, y2 - height, y2):
        y = min(max(y, 0.0), max(size[1] - height, 0.0))
        area = (x, y, x + width, y + height)
        if not any(_overlap(area, other) for other in taken):
            break
    else:
        return
    taken.append(area)
    draw.rectangle(area, fill=colour)
    draw.text((x + pad - left, y + pad - top), text, font=font, fill=_ink_on(colour))


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _ink_on(colour: Colour) -> Colour:
    """Black or white, whichever stands out more (relative luminance, WCAG 2.1)."""
    linear = [(channel / 255) ** 2.2 for channel in colour]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if (luminance + 0.05) ** 2 > 0.05 * 1.05 else (255, 255, 255)
