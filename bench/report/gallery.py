"""Pictures of a report: which images tell most, and detections beside ground truth drawn over them, as small files.

Colours say what is right, not which class: blue and a full line for what was found, orange and a broken line for what
was missed or is wrong, so that it can be told without colours too.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from bench.report.evidence import CellEvidence, match_class, region_mask
from bench.stats.breakdown import RIGHT, Scene, best_threshold, classify_errors, image_f1

LONG_SIDE = 320  # pixels of a drawn picture
_MAX_ENLARGED = 4.0
_QUALITY = 78
_RIGHT_COLOUR, _WRONG_COLOUR, _CROWD_COLOUR = (40, 150, 255), (255, 120, 0), (150, 150, 150)
_FILL, _LINE_WIDTH, _DASH = 0.30, 2, 5
_COLOUR_KEPT, _SHADE = 0.35, 0.35


@dataclass(frozen=True)
class Choice:
    """Positions of images in the order of the ground truth. apart: (image, best cell, worst cell), farthest first."""

    best: tuple[int, ...]
    worst: tuple[int, ...]
    apart: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Panel:
    """One drawn picture. text: what it shows, in words. uri: 'data:image/webp;base64,...'. Sizes in pixels."""

    title: str
    text: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Shown:
    """An image with its ground truth and one or two predictions."""

    image_id: int
    heading: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class CellScores:
    """threshold: score from which detections are shown. f1: (I,), NaN where there is nothing to say."""

    threshold: float
    f1: np.ndarray


def score_images(cell: CellEvidence) -> CellScores:
    """How well a cell segments each image, at the score threshold that suits it best over all images."""
    table = cell.matches
    num_instances = table.num_instances.sum(axis=0)
    threshold = best_threshold(table.score, table.matched[0], table.ignored[0], int(num_instances.sum()))
    shown = table.score >= threshold
    return CellScores(
        threshold, image_f1(table.matched[:, shown], table.ignored[:, shown], table.image[shown], num_instances)
    )


def choose(f1: np.ndarray, num_instances: np.ndarray, *, of: int, count: int) -> Choice:
    """The images of the best and the worst result of one cell, and those that cells disagree about most.

    Among equals, images with more instances come first, as they say more.

    Args:
        f1: (C, I) of each cell and image, NaN for nothing to say.
        num_instances: (I,).
        of: the cell whose best and worst are meant.
        count: of each kind at most; no image is both among the best and the worst.
    """
    own = f1[of]
    known = [int(i) for i in np.flatnonzero(~np.isnan(own))]
    ranked = sorted(known, key=lambda i: (-own[i], -num_instances[i], i))
    share = min(count, (len(ranked) + 1) // 2)
    best = ranked[:share]
    left = [i for i in known if i not in best]
    worst = sorted(left, key=lambda i: (own[i], -num_instances[i], i))[:count]
    apart = []
    if len(f1) > 1:
        both = [int(i) for i in np.flatnonzero((~np.isnan(f1)).sum(axis=0) > 1)]
        high = {i: int(np.nanargmax(f1[:, i])) for i in both}
        low = {i: int(np.nanargmin(f1[:, i])) for i in both}
        distance = {i: float(f1[high[i], i] - f1[low[i], i]) for i in both}
        order = sorted(both, key=lambda i: (-distance[i], -num_instances[i], i))
        apart = [(i, high[i], low[i]) for i in order if distance[i] > 0][:count]
    return Choice(tuple(best), tuple(worst), tuple(apart))


def show(image_id: int, heading: str, cells: Sequence[tuple[str, CellEvidence, CellScores]]) -> Shown:
    """Draw an image: its ground truth as the first cell finds it, then what each cell predicts.

    Raises:
        NotThere: the picture cannot be read.
    """
    truth = cells[0][1].truth
    picture = truth.picture(image_id)
    position = truth.image_ids.index(image_id)
    panels = []
    for number, (title, cell, scores) in enumerate(cells):
        scene, results = _shown(cell, image_id, scores.threshold)
        errors = classify_errors(scene, match_class)
        if number == 0:
            items = truth.annotations.get(image_id, [])
            found, total = int(errors.found.sum()), int((~scene.is_crowd).sum())
            states = [None if crowd else bool(hit) for crowd, hit in zip(scene.is_crowd, errors.found)]
            text = f"{_count(total, 'instance')}, {found} of them found by {title}" if total else "no instances"
            panels.append(_panel("Ground truth", text, picture, items, states, cell.iou_type))
        right = int((errors.kind == RIGHT).sum())
        text = f"{right} of {_count(len(results), 'detection')} right" if results else "no detections"
        text += f"; F1 {scores.f1[position]:.2f}"
        states = [bool(kind == RIGHT) for kind in errors.kind]
        panels.append(_panel(title, text, picture, results, states, cell.iou_type))
    return Shown(image_id, heading, tuple(panels))


def _shown(cell: CellEvidence, image_id: int, threshold: float) -> tuple[Scene, list[dict[str, Any]]]:
    scene = cell.scene(image_id)
    kept = scene.score >= threshold
    results = [result for result, keep in zip(cell.counted(image_id), kept) if keep]
    return (
        Scene(
            scene.score[kept],
            scene.category[kept],
            scene.truth_category,
            scene.is_crowd,
            scene.overlaps[kept],
            scene.open_categories,
        ),
        results,
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _panel(
    title: str,
    text: str,
    picture: np.ndarray,
    items: Sequence[dict[str, Any]],
    states: Sequence[bool | None],
    iou_type: str,
) -> Panel:
    drawn = draw_regions(picture, items, states, iou_type)
    out = io.BytesIO()
    drawn.save(out, "WEBP", quality=_QUALITY, method=4)
    uri = "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode("ascii")
    return Panel(title, text, uri, drawn.width, drawn.height)


def draw_regions(
    picture: np.ndarray, items: Sequence[dict[str, Any]], states: Sequence[bool | None], iou_type: str
) -> Image.Image:
    """A picture of `LONG_SIDE` pixels with regions over it.

    Args:
        picture: (h, w, 3) uint8.
        items: annotations or results, best first. states: found or right; None for a crowd region.
        iou_type: 'segm' for masks, 'bbox' for boxes.
    """
    height, width = picture.shape[:2]
    scale = min(LONG_SIDE / max(height, width), _MAX_ENLARGED)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    filter_ = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    small = Image.fromarray(picture).resize(size, filter_)
    # Paler than it is, so that what is drawn over it stands out whatever its colours are.
    grey = np.asarray(small.convert("L"), dtype=np.float32)[..., None]
    canvas = _COLOUR_KEPT * np.asarray(small, dtype=np.float32) + (1 - _COLOUR_KEPT) * grey
    rows, columns = np.indices(canvas.shape[:2])
    dashes = ((rows + columns) // _DASH) % 2 == 0
    for item, state in reversed(list(zip(items, states))):  # the best on top
        colour = np.array(
            _CROWD_COLOUR if state is None else _RIGHT_COLOUR if state else _WRONG_COLOUR, dtype=np.float32
        )
        mask = _region(item, (height, width), size, iou_type)
        edge = mask & ~_shrunk(mask, _LINE_WIDTH)
        halo = ~mask & ~_shrunk(~mask, 1, outside=True)
        if iou_type == "segm":
            inside = mask & ~edge
            canvas[inside] = (1 - _FILL) * canvas[inside] + _FILL * colour
        canvas[halo | edge] *= _SHADE
        canvas[edge if state else edge & dashes] = colour
    return Image.fromarray(canvas.round().astype(np.uint8))


def _region(item: dict[str, Any], full: tuple[int, int], size: tuple[int, int], iou_type: str) -> np.ndarray:
    """(H, W) bool at the size of the drawn picture."""
    if iou_type == "bbox":
        x, y, width, height = item["bbox"]
        across, down = size[0] / full[1], size[1] / full[0]
        mask = np.zeros((size[1], size[0]), dtype=bool)
        left, top = max(int(x * across), 0), max(int(y * down), 0)
        mask[top : round((y + height) * down), left : round((x + width) * across)] = True
        return mask
    mask = region_mask(item, full)
    grown = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(grown) > 127


def _shrunk(mask: np.ndarray, by: int, *, outside: bool = False) -> np.ndarray:
    """Without the pixels at its border; outside: what lies beyond the picture's border counts as."""
    for _ in range(by):
        wide = np.pad(mask, 1, constant_values=outside)
        mask = mask & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return mask
