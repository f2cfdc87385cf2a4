"""Scores of stored predictions: by two evaluators, with the errors that the images bring.

The scores are hotcoco's. `diffinst.evaluation.matches` matches the same detections by itself; every number that both
compute has to agree, and its match tables are resampled for the standard errors (`bench.stats.bootstrap`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.errors import EvaluatorError
from bench.record import Metric, Resamples, metric, pack_resamples
from bench.stats import match_files
from bench.stats.scores import (
    NUM_RESAMPLES,
    PAIRED,
    SEED,
    TOLERANCE,
    Resampled,
    digest_of_images,
    digest_of_labels,
    largest_difference,
    resample_scores,
)
from diffinst.config import DataConfig
from diffinst.data.catalog import annotation_format
from diffinst.evaluation import matches, scoring
from diffinst.evaluation.coco_ap import CocoScores, IouType, Scorable, unique_names
from diffinst.evaluation.predictions import Record

EVALUATORS = (f"hotcoco {version('hotcoco')}", matches.__name__)


@dataclass
class Accuracy:
    """What a score node finds; all of it JSON-able but `files`, the match tables that it wrote."""

    metrics: dict[str, Metric]
    per_class: dict[str, dict[str, float | None]]
    per_class_errors: dict[str, dict[str, float | None]] = field(default_factory=dict)
    resamples: dict[str, Resamples] = field(default_factory=dict)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def outputs(self) -> dict[str, Any]:
        """The node's outputs."""
        return {
            "metrics": {name: value.model_dump() for name, value in self.metrics.items()},
            "per_class": self.per_class,
            "per_class_errors": self.per_class_errors,
            "resamples": {name: value.model_dump() for name, value in self.resamples.items()},
            "checks": self.checks,
        }


def measure_accuracy(
    data: DataConfig,
    annotations: str | Path,
    predictions: Iterable[Record],
    folder: Path,
    *,
    iou_types: Sequence[IouType],
    image_ids: Iterable[int] | None = None,
) -> Accuracy:
    """Score predictions twice, compare, resample; the match tables go to `folder`.

    Args:
        data, annotations, predictions, image_ids: as for `scoring.score_split`.
        iou_types: what to score; the metrics of the others have no value.

    Raises:
        DataError: see `scoring.score_split`.
        EvaluatorError: the evaluators disagree.
    """
    scorable = scoring.prepare(data, annotations, predictions, image_ids=image_ids)
    scores = scoring.evaluate(data, scorable, iou_types)
    no_masks = "the model predicts boxes only"
    found = Accuracy(
        metrics={
            name: metric(name, scores.metrics.get(name), scores.reasons.get(name, no_masks))
            for name in scoring.metric_names(data)
        },
        per_class={f"{name}/AP": values for name, values in scores.per_class.items()},
    )
    found.metrics["num_images"] = metric("num_images", scores.num_images)
    found.metrics["num_instances"] = metric("num_instances", scores.num_instances)
    if annotation_format(data) == "lvis":
        rare = {category["id"] for category in scorable.content["categories"] if category["frequency"] == "r"}
        count = sum(annotation["category_id"] in rare for annotation in scorable.content["annotations"])
        found.metrics["num_instances/rare"] = metric("num_instances/rare", count)
    compared: dict[str, float] = {}
    labels = digest_of_labels(scorable.content)
    for iou_type in iou_types:
        if iou_type not in scorable.missing:
            compared |= _check_and_resample(data, scorable, scores, iou_type, folder, labels, found)
    if compared:
        found.checks["evaluators"] = {
            "evaluators": list(EVALUATORS),
            "compared": sorted(compared),
            "max_difference": max(compared.values()),
        }
    return found


def _check_and_resample(
    data: DataConfig,
    scorable: Scorable,
    scores: CocoScores,
    iou_type: IouType,
    folder: Path,
    labels: str,
    found: Accuracy,
) -> dict[str, float]:
    """Differences by name of what both evaluators compute; classes together under 'per_class'."""
    tables = scoring.match(data, scorable, iou_type)
    path = folder / match_files.file_name(iou_type)
    match_files.write_matches(path, tables)
    found.files.append(path)
    categories = sorted(scorable.content["categories"], key=lambda category: category["id"])
    is_lvis = annotation_format(data) == "lvis"
    numbers, of_categories = resample_scores(
        tables,
        frequencies=[category["frequency"] for category in categories] if is_lvis else None,
        num_resamples=NUM_RESAMPLES,
        seed=SEED,
    )
    ours = {f"{iou_type}/{name}": number.value for name, number in numbers.items()}
    drawn_of = dict(zip(unique_names(categories), of_categories))
    by_class = {name: number.value for name, number in drawn_of.items()}
    listed = scores.per_class[iou_type]
    found.per_class_errors[f"{iou_type}/AP"] = {
        name: None if value is None else drawn_of[name].standard_error for name, value in listed.items()
    }
    differences = {name: compare_evaluators({name: value}, scores.metrics) for name, value in ours.items()}
    differences[f"{iou_type}/AP per class"] = compare_evaluators(
        {f"{iou_type}/AP of '{name}'": value for name, value in by_class.items() if name in listed},
        {f"{iou_type}/AP of '{name}'": value for name, value in listed.items()},
    )
    for name, number in numbers.items():
        _add_error(found, f"{iou_type}/{name}", number, tables["all"], labels)
    return differences


def compare_evaluators(ours: dict[str, float | None], theirs: dict[str, float | None]) -> float:
    """The largest difference between the numbers of the two evaluators.

    Args:
        ours: of the match tables. theirs: of hotcoco, the same names among others.

    Raises:
        EvaluatorError: it is more than rounding explains.
    """
    difference, name = largest_difference(ours, theirs)
    if name is not None and difference > TOLERANCE:
        theirs_text, ours_text = (_text(values[name]) for values in (theirs, ours))
        apart = "" if math.isinf(difference) else f", {difference:.1e} apart where {TOLERANCE:g} is allowed"
        raise EvaluatorError(
            f"two evaluators disagree on {name}: {theirs_text} ({EVALUATORS[0]}) and {ours_text} "
            f"({EVALUATORS[1]}){apart}. One of them is wrong, so none of the scores is recorded"
        )
    return difference


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.9f}"


def _add_error(found: Accuracy, name: str, number: Resampled, table: matches.MatchTable, labels: str) -> None:
    error = number.standard_error
    if error is None or found.metrics[name].value is None:
        return
    found.metrics[name] = found.metrics[name].model_copy(update={"standard_error": error, "error_of": "images"})
    if name.partition("/")[2] in PAIRED:
        found.resamples[name] = Resamples(
            images=f"{digest_of_images(table.image_ids)}:{labels}",
            num_images=len(table.image_ids),
            seed=SEED,
            count=NUM_RESAMPLES,
            values=pack_resamples(number.drawn.tolist()),
        )
