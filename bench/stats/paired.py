"""Records of the same images compared image by image, from the resampled values that they carry.

Records are plain JSON objects of `bench.record.RunRecord`. Two whose resamples are of the same images, seed and count
were drawn together: what the images have in common cancels in the difference.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from bench.record import unpack_resamples
from bench.stats.bootstrap import Interval

# (training seed, evaluation seed) of a run -> its number.
SeedKey = tuple[Hashable, Hashable]


def image_sets(records: Sequence[Mapping[str, Any]]) -> list[tuple[int | None, str]]:
    """The different sets of images that records are scored on, each with its size; ('' for a digest not recorded).

    A record without a digest counts as of the set of the others of its size, and one whose digest does not tell the
    labels as of that of the others with its ids.
    """
    return _different([_image_set(record) for record in records])


def _image_set(record: Mapping[str, Any]) -> tuple[int | None, str]:
    """What a record itself says of its images."""
    count = record.get("metrics", {}).get("num_images", {}).get("value")
    return count, min((entry["images"] for entry in record.get("resamples", {}).values()), default="")


def _different(sets: Iterable[tuple[int | None, str]]) -> list[tuple[int | None, str]]:
    found = dict.fromkeys(sets)
    with_digest = {count for count, digest in found if digest}
    with_labels = {digest.partition(":")[0] for _, digest in found if ":" in digest}
    known = [(count, digest) for count, digest in found if count is not None and digest not in with_labels]
    return [(count, digest) for count, digest in known if digest or count not in with_digest]


def place_of_images(records: Sequence[Mapping[str, Any]], sets: Sequence[tuple[int | None, str]]) -> int:
    """Place in `sets`, see `image_sets`, of the images that records are scored on; the first where they do not say.

    Where the digest is missing, or does not tell the labels, it is the first set that it can be.
    """
    return _place(tuple(_image_set(record) for record in records), tuple(sets))


@lru_cache(maxsize=1024)
def _place(own: tuple[tuple[int | None, str], ...], sets: tuple[tuple[int | None, str], ...]) -> int:
    for count, digest in _different(own):
        for place, (other, its_digest) in enumerate(sets):
            same = digest in ("", its_digest) or its_digest.startswith(f"{digest}:")
            if count == other and same:
                return place
    return 0


def why_not_together(records: Sequence[Mapping[str, Any]]) -> str | None:
    """Why AP of these records can neither be averaged nor compared: they are of different images. None if it can."""
    sets = image_sets(records)
    if len(sets) < 2:
        return None
    counts = sorted({count for count, _ in sets if count is not None})
    if len(counts) > 1:
        sizes = f"{', '.join(str(count) for count in counts[:-1])} and {counts[-1]}"
        return f"scored on {sizes} images: AP depends on how many there are"
    if len({digest.partition(":")[0] for _, digest in sets}) == 1:
        return f"scored on the same {counts[0]} images, which are not labelled the same"
    return f"scored on {counts[0]} images each, which are not the same ones"


def mean_resamples(runs: Sequence[Mapping[str, Any]], metric: str) -> tuple[tuple[str, int, int], np.ndarray] | None:
    """What the resamples were drawn from, and their means over the runs (B,); None where a run has none like it."""
    entries = [run.get("resamples", {}).get(metric) for run in runs]
    if not entries or any(entry is None for entry in entries):
        return None
    images = _as_far_as_all_tell([entry["images"] for entry in entries if entry is not None])
    drawn = {(of, entry["seed"], entry["count"]) for of, entry in zip(images, entries) if entry is not None}
    if len(drawn) != 1 or any(entry["num_images"] < 2 for entry in entries if entry is not None):
        return None
    values = [unpack_resamples(entry["values"]) for entry in entries if entry is not None]
    return drawn.pop(), np.mean(np.array(values, dtype=np.float64), axis=0)


def paired_difference(
    base: Sequence[Mapping[str, Any]], head: Sequence[Mapping[str, Any]], metric: str
) -> Interval | None:
    """Difference head - base of the means of two sets of runs and its error over images; None if not drawn together.

    Every run has a value for the metric.
    """
    sides = [mean_resamples(runs, metric) for runs in (base, head)]
    if sides[0] is None or sides[1] is None:
        return None
    images = _as_far_as_all_tell([side[0][0] for side in sides if side is not None])
    if images[0] != images[1] or sides[0][0][1:] != sides[1][0][1:]:
        return None
    difference = sides[1][1] - sides[0][1]
    difference = difference[~np.isnan(difference)]
    means = [statistics.fmean(run["metrics"][metric]["value"] for run in runs) for runs in (base, head)]
    error = float(np.std(difference, ddof=1)) if len(difference) > 1 else None
    num_images = base[0]["resamples"][metric]["num_images"]
    return Interval(means[1] - means[0], error, "images", num_images)


def _as_far_as_all_tell(images: Sequence[str]) -> list[str]:
    """Digests 'ids:labels' without their labels where one of them is of before labels were told."""
    is_told = all(":" in digest for digest in images)
    return [digest if is_told else digest.partition(":")[0] for digest in images]


def seed_parts(numbers: Mapping[SeedKey, float]) -> list[tuple[float, float, str]]:
    """What seeds add to the variance of a mean over runs: (variance, degrees of freedom, of what).

    Trainings: the spread of their means, which holds what evaluation seeds of their own add. Evaluation seeds that all
    trainings share, or those of a single one: the spread of their means. Both parts hold how a training and a seed
    suit each other, so their sum is rather too large than too small.
    """
    by_training: dict[Hashable, dict[Hashable, float]] = {}
    for (training, evaluation), number in numbers.items():
        by_training.setdefault(training, {})[evaluation] = number
    parts = []
    if len(by_training) > 1:
        means = [statistics.fmean(runs.values()) for runs in by_training.values()]
        parts.append((statistics.variance(means) / len(means), len(means) - 1.0, f"{len(means)} trainings"))
    evaluations = {frozenset(runs) for runs in by_training.values()}
    (shared, *others) = evaluations or {frozenset()}
    if not others and len(shared) > 1:
        means = [statistics.fmean(runs[seed] for runs in by_training.values()) for seed in shared]
        parts.append((statistics.variance(means) / len(means), len(means) - 1.0, f"{len(means)} evaluation seeds"))
    return parts
