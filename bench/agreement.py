"""How nearly two runs found the same: detections of the same images, paired one by one.

That two implementations are the same thing is not told by equal scores: those of an untrained model are nothing, and a
score can hide what differs. Here every detection of one run needs its twin in the other: of the same class in the same
image, with the same box to a pixel; and then the largest difference of a box, a score and a mask is told.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import BenchError
from diffinst.evaluation.predictions import PREDICTIONS_FOLDER, Record, iter_predictions
from diffinst.ops.rle import decode_rle

# Pixels: a twin's box lies no further away, by its worst side.
MATCH_PX = 1.0
_MAX_LISTED = 10


@dataclass
class Agreement:
    """What `compare_detections` found; over pairs of twins, unless said.

    base, head: detections of either run. unmatched: the first of those without a twin: side, image id, category id,
    score. largest_box_px: of any side, in pixels of the file. masks: pairs that have masks; identical_masks: of them,
    those equal to the last pixel; smallest_mask_iou: 1 where there are none; most_pixels: by which one differs from its
    twin, which tells a small mask with one pixel more from another mask.
    """

    images: int = 0
    base: int = 0
    head: int = 0
    matched: int = 0
    largest_box_px: float = 0.0
    largest_score_difference: float = 0.0
    masks: int = 0
    identical_masks: int = 0
    smallest_mask_iou: float = 1.0
    most_pixels: int = 0
    unmatched: list[tuple[str, int, int, float]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def read_predictions(node: Path) -> Iterator[Record] | None:
    """What a prediction node in the folder `node` found, image by image; None if it is not there."""
    folder = node / PREDICTIONS_FOLDER
    return iter_predictions(folder) if folder.is_dir() else None


def compare_detections(base: Iterable[Record], head: Iterable[Record]) -> Agreement:
    """Pair the detections of two runs.

    Args:
        base, head: as of `diffinst.evaluation.predictions`, in any order.
    Raises:
        BenchError: they are not of the same images.
    """
    found = Agreement()
    by_image = {record["image_id"]: record for record in base}
    others = {record["image_id"]: record for record in head}
    if different := set(by_image) ^ set(others):
        raise BenchError(f"the runs predict different images: {len(different)} are of one alone, as {min(different)}")
    for image_id in sorted(by_image):
        _compare_image(by_image[image_id], others[image_id], found)
    found.images = len(by_image)
    return found


def _compare_image(base: Record, head: Record, found: Agreement) -> None:
    boxes = {"base": _boxes_xyxy(base), "head": _boxes_xyxy(head)}
    free: dict[str, set[int]] = {"base": set(range(len(base["score"]))), "head": set(range(len(head["score"])))}
    of_class: dict[int, list[int]] = defaultdict(list)
    for position, category_id in enumerate(head["category_id"]):
        of_class[category_id].append(position)
    pairs = []
    for mine, category_id in enumerate(base["category_id"]):
        theirs = of_class[category_id]
        apart = np.abs(boxes["base"][mine] - boxes["head"][theirs]).max(axis=1) if theirs else ()
        pairs += [(float(pixels), mine, other) for pixels, other in zip(apart, theirs) if pixels <= MATCH_PX]
    for pixels, mine, other in sorted(pairs):
        if mine not in free["base"] or other not in free["head"]:
            continue
        free["base"].remove(mine)
        free["head"].remove(other)
        found.matched += 1
        found.largest_box_px = max(found.largest_box_px, pixels)
        difference = abs(base["score"][mine] - head["score"][other])
        found.largest_score_difference = max(found.largest_score_difference, difference)
        if base["segmentation"] is not None and head["segmentation"] is not None:
            _compare_masks(base["segmentation"][mine], head["segmentation"][other], found)
    found.base += len(base["score"])
    found.head += len(head["score"])
    for side, record in (("base", base), ("head", head)):
        for position in sorted(free[side])[: _MAX_LISTED - len(found.unmatched)]:
            found.unmatched.append(
                (side, record["image_id"], record["category_id"][position], record["score"][position])
            )


def _compare_masks(base: dict[str, Any], head: dict[str, Any], found: Agreement) -> None:
    found.masks += 1
    if base == head:
        found.identical_masks += 1
        return
    mine, other = decode_rle(base), decode_rle(head)
    if mine.shape != other.shape:
        raise BenchError(
            f"masks of one image are of {mine.shape} and {other.shape} pixels: the runs saw different files"
        )
    union = int((mine | other).sum())
    iou = int((mine & other).sum()) / union if union else 1.0
    pixels = int((mine != other).sum())
    found.identical_masks += int(pixels == 0)
    found.most_pixels = max(found.most_pixels, pixels)
    found.smallest_mask_iou = min(found.smallest_mask_iou, iou)


def _boxes_xyxy(record: Record) -> np.ndarray:
    """(D, 4) float64."""
    boxes = np.asarray(record["bbox"], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def judge(found: Agreement, *, max_box_px: float, min_mask_iou: float) -> Sequence[str]:
    """Why the two are not the same within these limits; nothing if they are."""
    reasons = []
    if found.base != found.matched or found.head != found.matched:
        reasons.append(f"{found.base - found.matched} of base and {found.head - found.matched} of head have no twin")
    if found.largest_box_px > max_box_px:
        reasons.append(f"a box is {found.largest_box_px:.2g} px off, more than {max_box_px:g}")
    if found.smallest_mask_iou < min_mask_iou:
        reasons.append(f"a mask has IoU {found.smallest_mask_iou:.5f} with its twin, less than {min_mask_iou:g}")
    return reasons
