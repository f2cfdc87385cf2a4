"""The COCO and LVIS numbers from match tables: of the images as they are, and of resampled ones.

Computed without the evaluator that the scores come from, so that the two check each other (`largest_difference`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.stats.bootstrap import Matches, Resampler, draw_weights, in_chunks

NUM_RESAMPLES = 1000
SEED = 0
TOLERANCE = 1e-6  # between two evaluators: both compute with 53 bits, so this is a mistake and not rounding
# Metrics whose resampled values a record keeps, so that it can be compared with another one image by image.
PAIRED = ("AP", "AP50", "AP75", "APr", "APc", "APf")

_THRESHOLDS = {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6)}
_SIZES = {"s": "small", "m": "medium", "l": "large"}
_RECALL_LIMITS = (1, 10, 100)


@dataclass(frozen=True)
class Resampled:
    """One number: of the images as they are, and its values on resamples (B,); None, NaN where there is no instance."""

    value: float | None
    drawn: np.ndarray

    @property
    def standard_error(self) -> float | None:
        """Of the value, over images; None where the resamples do not tell."""
        defined = self.drawn[~np.isnan(self.drawn)]
        return float(np.std(defined, ddof=1)) if self.value is not None and len(defined) > 1 else None


def number_names(frequencies: Sequence[str] | None) -> tuple[str, ...]:
    """What can be computed: the twelve numbers of COCO, or with frequencies of the categories the nine of LVIS."""
    sized = tuple(f"AP{letter}" for letter in _SIZES)
    if frequencies is not None:
        return (*_THRESHOLDS, *sized, "APr", "APc", "APf")
    recalls = (*(f"AR{limit}" for limit in _RECALL_LIMITS), *(f"AR{letter}" for letter in _SIZES))
    return (*_THRESHOLDS, *sized, *recalls)


def resample_scores(
    tables: Mapping[str, Matches],
    *,
    frequencies: Sequence[str] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = SEED,
) -> tuple[dict[str, Resampled], list[Resampled]]:
    """All numbers of one evaluation with their resamples.

    Args:
        tables: match tables of the sizes 'all', 'small', 'medium' and 'large'.
        frequencies: 'r', 'c' or 'f' for each category, for the numbers of LVIS.
    Returns:
        by name, and AP of each category.
    """
    num_images = len(tables["all"].image_ids)
    resamplers = {size: Resampler(table) for size, table in tables.items()}
    unit = np.ones((num_images, 1), dtype=np.int32)
    values, of_categories = _numbers(resamplers, unit, frequencies)
    # One image gives the same resample again and again, which tells nothing.
    count = num_resamples if num_images > 1 else 0
    weights = draw_weights(num_images, count, seed)
    parts = in_chunks(lambda part: _numbers(resamplers, part, frequencies), weights)
    found = {
        name: Resampled(_defined(value[0]), np.concatenate([part[name] for part, _ in parts]) if parts else np.zeros(0))
        for name, value in values.items()
    }
    drawn = np.concatenate([part for _, part in parts], axis=1) if parts else np.zeros((len(of_categories), 0))
    return found, [Resampled(_defined(value), row) for value, row in zip(of_categories[:, 0], drawn)]


def _numbers(
    resamplers: Mapping[str, Resampler], weights: np.ndarray, frequencies: Sequence[str] | None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """By name (B,), and AP of each category (K, B)."""
    found: dict[str, np.ndarray] = {}
    precision = resamplers["all"].average_precision(weights)
    of_categories = precision.mean(axis=1)
    for name, thresholds in _THRESHOLDS.items():
        found[name] = _mean_of_categories(precision[:, thresholds].mean(axis=1))
    for letter, size in _SIZES.items():
        found[f"AP{letter}"] = _mean_of_categories(resamplers[size].average_precision(weights).mean(axis=1))
    if frequencies is not None:
        for letter in "rcf":
            found[f"AP{letter}"] = _mean_of_categories(of_categories[[entry == letter for entry in frequencies]])
        return found, of_categories
    for limit in _RECALL_LIMITS:
        found[f"AR{limit}"] = _mean_of_categories(resamplers["all"].recall(weights, max_detections=limit))
    for letter, size in _SIZES.items():
        found[f"AR{letter}"] = _mean_of_categories(resamplers[size].recall(weights))
    return found, of_categories


def _mean_of_categories(values: np.ndarray) -> np.ndarray:
    """(K, B) -> (B,): over the categories that have instances; NaN where none has."""
    is_defined = ~np.isnan(values)
    count = is_defined.sum(axis=0)
    total = np.where(is_defined, values, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def largest_difference(
    ours: Mapping[str, float | None], theirs: Mapping[str, float | None]
) -> tuple[float, str | None]:
    """How far two evaluators are apart on the names that both have, and where most; (0, None) if nowhere.

    A number that only one of them can compute is infinitely far.
    """
    most, where = 0.0, None
    for name in ours.keys() & theirs.keys():
        one, other = ours[name], theirs[name]
        if one is None or other is None:
            difference = 0.0 if one is other else math.inf
        else:
            difference = abs(one - other)
        # Of equal ones the first by name, so that the same two always give the same answer.
        if difference > most or (where is not None and difference == most and name < where):
            most, where = difference, name
    return most, where


# What of a ground truth decides scores; ids of annotations and names of images and classes do not.
_OF_INSTANCES = ("image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")
_OF_IMAGES = ("id", "neg_category_ids", "not_exhaustive_category_ids")


def digest_of_labels(content: Mapping[str, Any]) -> str:
    """16 hex digits of what is labelled on the images of a COCO or LVIS file's content, in any order."""
    texts = []
    for what, names in (("images", _OF_IMAGES), ("annotations", _OF_INSTANCES)):
        for entry in content[what]:
            kept = {name: entry[name] for name in names if name in entry}
            texts.append(json.dumps(kept, sort_keys=True, separators=(",", ":"), default=_listed))
    digest = hashlib.sha256()
    for text in sorted(texts):
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()[:16]


def _listed(value: Any) -> Any:
    """A set or an array as a list, bytes as text."""
    if isinstance(value, bytes):
        return value.decode("ascii")
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else sorted(value)


def digest_of_images(image_ids: np.ndarray) -> str:
    """SHA-256 of the image ids in the order of the draws."""
    return hashlib.sha256(np.asarray(image_ids, dtype="<i8").tobytes()).hexdigest()
