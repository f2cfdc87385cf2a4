"""Which value of a table is the best beyond chance: those, and only those, are printed bold.

In each comparison group the best value is tested against the next best: a paired difference on the same images, from
the resamples that the records carry, with what seeds add where there are several. All tests of a table are decided
together by Holm's procedure, so the chance of any bold value that is owed to chance stays below 5 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from operator import itemgetter
from typing import Any

from bench.comparability import IMAGES_AND_LABELS
from bench.report.cells import Record, Value, is_score, runs_of, value_of
from bench.stats.bootstrap import holm
from bench.stats.latency import p_of
from bench.stats.paired import image_sets, paired_difference, place_of_images, seed_parts
from bench.stats.student import combine

Cells = Mapping[tuple[Any, ...], Sequence[Record]]


@dataclass(frozen=True)
class Best:
    """cells: (metric, key of the cell) of values that are best beyond chance. num_tests: that were decided together."""

    cells: frozenset[tuple[str, tuple[Any, ...]]] = frozenset()
    num_tests: int = 0


def find_best(
    cells: Cells, metrics: Sequence[str], values: Mapping[tuple[str, tuple[Any, ...]], Value] | None = None
) -> Best:
    """The best cells of each metric, images and rules of scoring; records that were not drawn together give none.

    Args:
        values: what `value_of` says of each metric and cell, where the caller knows it already.
    """
    tests: list[tuple[tuple[str, tuple[Any, ...]], float]] = []
    scores = [metric for metric in metrics if is_score(metric)]
    sets = _comparable_sets(cells) if scores else {}
    for metric in scores:
        groups: dict[tuple[Any, ...], list[tuple[float, tuple[Any, ...]]]] = {}
        for key, records in cells.items():
            mean = (value_of(records, metric) if values is None else values[metric, key]).mean
            if mean is not None:
                groups.setdefault(sets[key], []).append((mean, key))
        for group in groups.values():
            if len(group) > 1:
                (_, best), (_, second) = nlargest(2, group, key=itemgetter(0))
                p_value = _p_value(cells[second], cells[best], metric)
                if p_value is not None:
                    tests.append(((metric, best), p_value))
    rejected = holm([p_value for _, p_value in tests])
    return Best(frozenset(cell for (cell, _), is_best in zip(tests, rejected) if is_best), len(tests))


def _comparable_sets(cells: Cells) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """By key, what is equal for cells whose values can be compared."""
    sets = image_sets([record for records in cells.values() for record in records])
    found = {}
    rules: dict[int, tuple[str, ...]] = {}  # by the section's identity: most records share one
    for key, records in cells.items():
        data = records[0].get("config", {}).get("data", {})
        if id(data) not in rules:
            rules[id(data)] = tuple(str(data.get(name)) for name in IMAGES_AND_LABELS)
        # AP under other rules is another number, also on images of the same ids.
        found[key] = (*rules[id(data)], place_of_images(records, sets))
    return found


def _p_value(base: Sequence[Record], head: Sequence[Record], metric: str) -> float | None:
    """Chance of so large a difference between equals; None where the records do not tell."""
    runs = [runs_of(records, metric) for records in (base, head)]
    if runs[0].keys() != runs[1].keys() or any(len(side) == 0 for side in runs):
        return None
    sides = [[side[key][0] for key in runs[0]] for side in runs]
    found = paired_difference(sides[0], sides[1], metric)
    # Without any spread the images tell nothing.
    if found is None or not found.standard_error:
        return None
    differences = {key: runs[1][key][1] - runs[0][key][1] for key in runs[0]}
    seeds = [(variance, degrees) for variance, degrees, _ in seed_parts(differences)]
    error, degrees = combine([(found.standard_error**2, float("inf")), *seeds])
    return p_of(found.value, error, degrees)
