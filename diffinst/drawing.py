"""Detections drawn over a photograph: translucent masks with contours, boxes, labels that do not cover each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffinst.structures import Detections

Colour = tuple[int, int, int]

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


@dataclass(frozen=True)
class DrawingStyle:
    """How detections look; sizes in pixels grow with the image and are given for a longer side of 1000.

    mask_opacity: in [0, 1]. line_width, font_size: at a longer side of 1000 pixels, never below 1 and 11.
    """

    mask_opacity: float = 0.42
    line_width: float = 2.6
    font_size: float = 17.0


def colour_of(label: int) -> Colour:
    """The colour of a class: the same in every picture; after the palette's end, darker and lighter tones of it."""
    base = PALETTE[label % len(PALETTE)]
    tone = (label // len(PALETTE)) % 3
    if tone == 0:
        return base
    target, share = (255, 0.45) if tone == 1 else (0, 0.4)
    red, green, blue = (round(channel + (target - channel) * share) for channel in base)
    return red, green, blue


def enlarge(image: np.ndarray, detections: Detections, shortest_side: int) -> tuple[np.ndarray, Detections]:
    """Repeat pixels of a small picture, so that labels do not cover what they name.

    Args:
        image: (height, width, 3) uint8 RGB.
        detections: in pixels of this image.
        shortest_side: the whole factor is the least that makes the shorter side this long.
    Returns:
        Image and detections, each pixel `factor` x `factor` pixels; the given ones if the image is large enough.
    """
    factor = -(-shortest_side // min(image.shape[:2]))
    if factor <= 1:
        return image, detections
    masks = detections.masks
    if masks is not None:
        masks = masks.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    larger = replace(detections, boxes_xyxy=detections.boxes_xyxy * factor, masks=masks)
    return image.repeat(factor, axis=0).repeat(factor, axis=1), larger


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
        masks = detections.masks.cpu().numpy()
        for i in shown[::-1]:
            _paint_mask(
                painted, masks[i], colour_of(int(labels[i])), style.mask_opacity, max(1, round(line_width * 0.7))
            )
    canvas = Image.fromarray(painted)
    draw = ImageDraw.Draw(canvas)
    for i in shown[::-1]:
        _draw_box(draw, boxes_xyxy[i], colour_of(int(labels[i])), line_width)
    font = ImageFont.load_default(size=max(11.0, style.font_size * scale))
    taken: list[tuple[float, float, float, float]] = []
    for i in shown:
        label = int(labels[i])
        name = class_names[label] if label < len(class_names) else f"class {label}"
        _draw_label(draw, f"{name} {scores[i]:.2f}", boxes_xyxy[i], colour_of(label), font, canvas.size, taken)
    return np.asarray(canvas)


def _paint_mask(image: np.ndarray, mask: np.ndarray, colour: Colour, opacity: float, width: int) -> None:
    """Tint the mask's pixels and draw its inner contour, in place; works inside the mask's bounds only."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return
    part = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    inside, pixels = mask[part], image[part]
    tint = np.asarray(colour, dtype=np.float32)
    pixels[inside] = (pixels[inside] * (1 - opacity) + tint * opacity).round().astype(np.uint8)
    # White mixed in keeps the contour visible on its own tint.
    pixels[_contour(inside, width)] = (tint * 0.75 + 255 * 0.25).round().astype(np.uint8)


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
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
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
