"""Which detections are right, image by image: what average precision is made of, for resampling images.

An evaluator of its own, written from the definition of the COCO and LVIS numbers (greedy matching by score, one IoU
threshold and one range of sizes at a time), so that it also checks the one that the scores come from. IoU and areas of
masks are pycocotools'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
# Least and largest area in pixels, both included, as in pycocotools.
SIZES: dict[str, tuple[float, float]] = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
# Just below 1, as in pycocotools: a detection must be able to match itself.
_HIGHEST_THRESHOLD = 1 - 1e-10
_MASKS_AT_ONCE = 255  # pycocotools counts them in a byte


@dataclass(frozen=True)
class MatchTable:
    """Detections of all images, by category and then by falling score, and whether each is right.

    image_ids: (I,) int64. category_ids: (K,) int64. thresholds: (T,) IoU.
    image: (D,) int32, index into image_ids. category: (D,) int32, index into category_ids, rising. score: (D,) float64.
    matched: (T, D) bool, the detection has found an instance. ignored: (T, D) bool, it counts neither as right nor as
    wrong. num_instances: (K, I) int16 instances to be found.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    thresholds: np.ndarray
    image: np.ndarray
    category: np.ndarray
    score: np.ndarray
    matched: np.ndarray
    ignored: np.ndarray
    num_instances: np.ndarray


@dataclass(frozen=True)
class _Detections:
    """Detections by category, image and falling score. region: their boxes (xywh) or RLEs. area: (D,) pixels."""

    category: np.ndarray
    image: np.ndarray
    score: np.ndarray
    area: np.ndarray
    region: list[Any]

    def at(self, kept: np.ndarray) -> _Detections:
        region = [self.region[place] for place in kept]
        return _Detections(self.category[kept], self.image[kept], self.score[kept], self.area[kept], region)

    def groups(self) -> Iterator[tuple[int, int, slice]]:
        """(category, image, where) of each pair that has detections."""
        if not len(self.image):
            return
        changes = np.flatnonzero(np.diff(self.category) | np.diff(self.image)) + 1
        bounds = [0, *changes.tolist(), len(self.image)]
        for first, end in zip(bounds, bounds[1:]):
            yield int(self.category[first]), int(self.image[first]), slice(first, end)


def build_matches(
    content: dict[str, Any],
    results: Sequence[dict[str, Any]],
    image_ids: Sequence[int],
    iou_type: str,
    *,
    max_detections: int = 100,
) -> MatchTable:
    """`build_size_matches` for instances of all sizes together."""
    all_sizes = {"all": SIZES["all"]}
    return build_size_matches(content, results, image_ids, iou_type, sizes=all_sizes, max_detections=max_detections)[
        "all"
    ]


def build_size_matches(
    content: dict[str, Any],
    results: Sequence[dict[str, Any]],
    image_ids: Sequence[int],
    iou_type: str,
    *,
    sizes: Mapping[str, tuple[float, float]] = SIZES,
    max_detections: int = 100,
    federated: bool = False,
) -> dict[str, MatchTable]:
    """Match detections with the ground truth of their image and category.

    Instances of another size are there to be matched, but neither are to be found nor make their matches right or
    wrong; a detection of another size that matches nothing is no mistake.

    Args:
        content: COCO ground truth: 'images' (with sizes, for masks), 'annotations' (with areas) and 'categories'.
        results: COCO results of these images.
        image_ids: images to evaluate, in the order that breaks ties of score.
        iou_type: 'bbox' or 'segm'.
        sizes: name -> least and largest area, pixels; one table is built for each.
        max_detections: per image and category, the best by score.
        federated: by the rules of LVIS (arXiv:1908.03195): images list 'neg_category_ids', where a category that is
            not annotated is known to be absent, and 'not_exhaustive_category_ids', where a detection without a match
            is no mistake; detections of categories of which nothing is known in an image, and of area 0, are left out.
    """
    field = "bbox" if iou_type == "bbox" else "segmentation"
    category_ids = sorted(category["id"] for category in content["categories"])
    category_of = {category_id: place for place, category_id in enumerate(category_ids)}
    image_of = {image_id: place for place, image_id in enumerate(image_ids)}
    images = {image_of[image["id"]]: image for image in content["images"] if image["id"] in image_of}
    truth: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for annotation in content["annotations"]:
        if annotation["image_id"] in image_of:
            key = category_of[annotation["category_id"]], image_of[annotation["image_id"]]
            truth.setdefault(key, []).append(annotation)

    bounds = np.array(list(sizes.values()))
    num_instances = np.zeros((len(sizes), len(category_ids), len(image_ids)), dtype=np.int16)
    not_counted: dict[tuple[int, int], np.ndarray] = {}
    for key, instances in truth.items():
        is_crowd = _is_crowd(instances)
        not_counted[key] = is_crowd | _is_outside([instance["area"] for instance in instances], bounds)
        num_instances[:, key[0], key[1]] = (~not_counted[key]).sum(axis=1)

    detections = _sorted(results, category_of, image_of, field, max_detections)
    unsure = np.zeros(len(detections.image), dtype=bool)
    if federated:
        detections, unsure = _federated(detections, truth, images, category_ids)
    shape = (len(sizes), len(IOU_THRESHOLDS), len(detections.image))
    matched, ignored = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for category, image, place in detections.groups():
        instances = truth.get((category, image), [])
        if not instances:
            continue
        is_crowd = _is_crowd(instances)
        size = (images[image].get("height"), images[image].get("width"))
        regions = [instance[field] for instance in instances]
        overlaps = _iou(detections.region[place], regions, is_crowd, size, iou_type)
        matched[..., place], ignored[..., place] = _match(
            overlaps, is_crowd, not_counted[category, image], IOU_THRESHOLDS
        )
    ignored |= ~matched & (_is_outside(detections.area, bounds) | unsure)[:, None]

    order = np.lexsort((-detections.score, detections.category))
    shared = {
        "image_ids": np.array(image_ids, dtype=np.int64),
        "category_ids": np.array(category_ids, dtype=np.int64),
        "thresholds": IOU_THRESHOLDS,
        "image": detections.image[order],
        "category": detections.category[order],
        "score": detections.score[order],
    }
    return {
        name: MatchTable(
            matched=matched[place][:, order],
            ignored=ignored[place][:, order],
            num_instances=num_instances[place],
            **shared,
        )
        for place, name in enumerate(sizes)
    }


def match_greedily(overlaps: np.ndarray, is_crowd: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each detection, best score first, takes the instance it overlaps most among those still free.

    An instance is taken before a crowd region, and a crowd region by as many detections as overlap it, which then count
    as neither right nor wrong. Of equal overlaps the later instance is taken, as in pycocotools.

    Args:
        overlaps: (D, G) IoU, detections by falling score.
        is_crowd: (G,) bool.
        thresholds: (T,) least IoU of a match, rising.
    Returns:
        (T, D) bool found an instance or a crowd region; (T, D) bool found a crowd region.
    """
    matched, ignored = _match(overlaps, is_crowd, is_crowd[None], thresholds)
    return matched[0], ignored[0]


def _match(
    overlaps: np.ndarray, is_crowd: np.ndarray, not_counted: np.ndarray, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`match_greedily` for several sets of regions that do not count, crowd regions always among them.

    Args:
        not_counted: (A, G) bool: these are taken after the others, and what takes them is ignored.
    Returns:
        (A, T, D) bool found a region; (A, T, D) bool found one that does not count.
    """
    num_detections, num_regions = overlaps.shape
    matched = np.zeros((len(not_counted), len(thresholds), num_detections), dtype=bool)
    ignored = np.zeros_like(matched)
    least = np.minimum(thresholds, _HIGHEST_THRESHOLD)
    is_near = overlaps >= least[:1]
    is_free = np.ones((len(not_counted), len(thresholds), num_regions), dtype=bool)
    # Most detections are near nothing, and most others near one region only.
    for detection in np.flatnonzero(is_near.any(axis=1)):
        near = np.flatnonzero(is_near[detection])
        overlap, is_out = overlaps[detection, near], not_counted[:, None, near]
        eligible = is_free[..., near] & (overlap >= least[:, None])
        if len(near) > 1:
            # Regions that count win over others whatever the overlap.
            has_counted = (eligible & ~is_out).any(axis=-1, keepdims=True)
            eligible &= is_out != has_counted
            best = len(near) - 1 - np.where(eligible, overlap, -1.0)[..., ::-1].argmax(axis=-1, keepdims=True)
            eligible &= np.arange(len(near)) == best
        matched[..., detection] = eligible.any(axis=-1)
        ignored[..., detection] = (eligible & is_out).any(axis=-1)
        is_free[..., near] &= ~eligible | is_crowd[near]
    return matched, ignored


def _sorted(
    results: Sequence[dict[str, Any]],
    category_of: Mapping[int, int],
    image_of: Mapping[int, int],
    field: str,
    max_detections: int,
) -> _Detections:
    """The best of each category and image; of equal scores those that come first."""
    results = [result for result in results if result["image_id"] in image_of]
    region = [result[field] for result in results]
    found = _Detections(
        category=np.array([category_of[result["category_id"]] for result in results], dtype=np.int32),
        image=np.array([image_of[result["image_id"]] for result in results], dtype=np.int32),
        score=np.array([result["score"] for result in results], dtype=np.float64),
        area=_areas(region, field),
        region=region,
    )
    found = found.at(np.lexsort((-found.score, found.image, found.category)))
    rank = np.zeros(len(region), dtype=np.int64)
    for _, _, place in found.groups():
        rank[place] = np.arange(place.stop - place.start)
    return found.at(np.flatnonzero(rank < max_detections))


def _federated(
    detections: _Detections,
    truth: Mapping[tuple[int, int], Any],
    images: Mapping[int, dict[str, Any]],
    category_ids: Sequence[int],
) -> tuple[_Detections, np.ndarray]:
    """Detections of which something is known, and which of them cannot be called wrong."""
    absent = {image: set(entry["neg_category_ids"]) for image, entry in images.items()}
    incomplete = {image: set(entry["not_exhaustive_category_ids"]) for image, entry in images.items()}
    is_known, unsure = detections.area > 0, np.zeros(len(detections.area), dtype=bool)
    for category, image, place in detections.groups():
        if (category, image) not in truth and category_ids[category] not in absent[image]:
            is_known[place] = False
        unsure[place] = category_ids[category] in incomplete[image]
    return detections.at(np.flatnonzero(is_known)), unsure[is_known]


def _is_crowd(instances: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([bool(instance.get("iscrowd", 0)) for instance in instances], dtype=bool)


def _is_outside(area: Any, bounds: np.ndarray) -> np.ndarray:
    """(A, N) bool: areas that are not in a range of `bounds` (A, 2)."""
    area = np.asarray(area, dtype=np.float64)
    return (area < bounds[:, :1]) | (area > bounds[:, 1:])


def _areas(regions: list[Any], field: str) -> np.ndarray:
    if field == "bbox":
        return np.array([box[2] * box[3] for box in regions], dtype=np.float64)
    parts = [coco_mask.area(regions[at : at + _MASKS_AT_ONCE]) for at in range(0, len(regions), _MASKS_AT_ONCE)]
    return np.concatenate([np.zeros(0), *parts])


def _iou(
    regions: list[Any],
    instances: list[Any],
    is_crowd: np.ndarray,
    size: tuple[int | None, int | None],
    iou_type: str,
) -> np.ndarray:
    """(D, G) IoU; with a crowd region, the share of the detection that lies in it."""
    if iou_type == "segm":
        instances = [_rle(region, size) for region in instances]
    overlaps = coco_mask.iou(regions, instances, is_crowd.astype(np.uint8).tolist())
    return np.asarray(overlaps, dtype=np.float64).reshape(len(regions), len(instances))


def _rle(segmentation: Any, size: tuple[int | None, int | None]) -> dict[str, Any]:
    """Polygons, uncompressed or compressed RLE as compressed RLE."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, *size)
    return segmentation
