"""What the page shows out of the store: curves, errors, losses and pictures; where it cannot, why, in a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.report.cells import REPEAT_AXES, Record, axis_value, value_of
from bench.report.evidence import CellEvidence, EvidenceReader, Losses, NotThere, match_class
from bench.report.gallery import CellScores, Shown, choose, score_images, show
from bench.report.html.chart_views import ChartView, curve_chart
from bench.report.html.charts import thinned
from bench.report.html.views import cell_names
from bench.report.metrics import axis_label, axis_text
from bench.stats.breakdown import ERROR_KINDS, ERROR_TEXT, Breakdown, error_breakdown, precision_at_recalls

MAX_CELLS = 12  # whose predictions are read
_MAX_CURVES = 6
_MAX_LOSSES = 6
_MAX_REASONS = 4
_RECALLS = tuple(float(value) for value in np.linspace(0.0, 1.0, 101))


@dataclass(frozen=True)
class ErrorRow:
    """Errors of a cell. kinds: (AP50 gained x100, number, share of the largest gain in percent) for each kind."""

    name: str
    ap: str
    right: str
    kinds: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True)
class EvidenceView:
    """What could be had. notes: of each part, why something is missing or left out."""

    curves: tuple[ChartView, ...] = ()
    curve_notes: tuple[str, ...] = ()
    errors: tuple[ErrorRow, ...] = ()
    error_notes: tuple[str, ...] = ()
    losses: tuple[ChartView, ...] = ()
    loss_notes: tuple[str, ...] = ()
    gallery: tuple[tuple[str, tuple[Shown, ...]], ...] = ()
    gallery_notes: tuple[str, ...] = ()
    is_generated: bool = True

    error_kinds: tuple[tuple[str, str], ...] = field(default=tuple((kind, ERROR_TEXT[kind]) for kind in ERROR_KINDS))

    @property
    def num_pictures(self) -> int:
        return sum(len(shown.panels) for _, group in self.gallery for shown in group)


@dataclass(frozen=True)
class _Cell:
    name: str
    value: float
    evidence: CellEvidence


def view_evidence(
    records: Sequence[Record], reader: EvidenceReader | None, metric: str | None, *, pictures: int
) -> EvidenceView:
    """Read what the records name and make views of it.

    Args:
        reader: None where no store is given.
        metric: by which cells are ranked.
        pictures: of each kind; 0 for no gallery.
    """
    if reader is None:
        reason = ("Predictions, losses and pictures are not in the records, and no store was given.",)
        return EvidenceView(curve_notes=reason, error_notes=reason, loss_notes=reason, gallery_notes=reason)
    cells, notes = _read(records, reader, metric)
    losses, loss_notes = _losses(records, reader)
    view = {"losses": losses, "loss_notes": loss_notes}
    if not cells:
        return EvidenceView(curve_notes=notes, error_notes=notes, gallery_notes=notes, **view)  # type: ignore[arg-type]
    gallery, gallery_notes = _gallery(cells, pictures)
    return EvidenceView(
        curves=tuple(_curves(cells)),
        curve_notes=notes,
        errors=tuple(_errors(cells)),
        error_notes=notes,
        gallery=gallery,
        gallery_notes=(*notes, *gallery_notes),
        is_generated=all(_dataset(cell.evidence.record) == "shapes" for cell in cells),
        **view,  # type: ignore[arg-type]
    )


def _read(records: Sequence[Record], reader: EvidenceReader, metric: str | None) -> tuple[list[_Cell], tuple[str, ...]]:
    """The best cells with predictions and others evenly over the rest, best first, and what is left out and why."""
    ranked = []
    name_of = cell_names(records)
    for record in records:
        value = value_of([record], metric).mean if metric is not None else None
        if value is not None:
            ranked.append((value, record))
    if not ranked:
        return [], ("No run with a score.",)
    ranked.sort(key=lambda entry: -entry[0])
    chosen = [ranked[i] for i in thinned(len(ranked), MAX_CELLS)]
    cells: list[_Cell] = []
    reasons: dict[str, list[str]] = {}
    for value, record in chosen:
        name = name_of(record)
        try:
            cells.append(_Cell(name, value, reader.cell(record)))
        except NotThere as reason:
            reasons.setdefault(str(reason), []).append(name)
    notes = []
    if len(chosen) < len(ranked):
        notes.append(f"{len(chosen)} of {len(ranked)} cells are looked at: the best, the worst, and others between.")
    for why, names in list(reasons.items())[:_MAX_REASONS]:
        some = "; ".join(names) if len(names) < 4 else f"{len(names)} cells"
        notes.append(f"Not for {'any cell' if len(names) == len(chosen) else some}: {why.rstrip('.')}.")
    if len(reasons) > _MAX_REASONS:
        notes.append(f"{len(reasons) - _MAX_REASONS} more reasons are left out.")
    return cells, tuple(notes)


def _curves(cells: Sequence[_Cell]) -> list[ChartView]:
    shown = [cells[i] for i in thinned(len(cells), _MAX_CURVES)]
    charts = []
    for position, threshold in ((0, "0.50"), (5, "0.75")):
        curves = [(cell.name, _RECALLS, precision_curve(cell.evidence, position)) for cell in shown]
        charts.append(
            curve_chart(
                f"Precision against recall at IoU {threshold}",
                curves,
                x_label="Recall",
                y_label="Precision",
                ordered=True,
                x_range=(0.0, 1.0),
                y_range=(0.0, 1.0),
                notes=("Interpolated, the mean over classes; the area below a curve is its AP at this IoU.",),
            )
        )
    return charts


def precision_curve(cell: CellEvidence, threshold: int) -> list[float]:
    """Precision at 101 recalls, the mean over classes with instances; threshold: position in the match table."""
    table = cell.matches
    ends = np.searchsorted(table.category, np.arange(len(table.category_ids) + 1))
    curves = []
    for category, (first, end) in enumerate(zip(ends, ends[1:])):
        total = int(table.num_instances[category].sum())
        if total:
            counted = ~table.ignored[threshold, first:end]
            curves.append(precision_at_recalls(table.matched[threshold, first:end][counted], total))
    return [float(value) for value in np.mean(curves, axis=0)] if curves else [0.0] * len(_RECALLS)


def _errors(cells: Sequence[_Cell]) -> list[ErrorRow]:
    found = [(cell, error_breakdown(cell.evidence.scenes(), match_class)) for cell in cells]
    most = max((gain for _, breakdown in found for gain in breakdown.cost.values()), default=0.0) or 1.0
    return [_error_row(cell, breakdown, most) for cell, breakdown in found]


def _error_row(cell: _Cell, breakdown: Breakdown, most: float) -> ErrorRow:
    kinds = tuple(
        (f"{100 * breakdown.cost[kind]:.1f}", str(breakdown.counts[kind]), round(100 * breakdown.cost[kind] / most, 1))
        for kind in ERROR_KINDS
    )
    ap = "none" if breakdown.ap is None else f"{100 * breakdown.ap:.1f}"
    return ErrorRow(cell.name, ap, f"{breakdown.num_right} of {breakdown.num_instances}", kinds)


def _losses(records: Sequence[Record], reader: EvidenceReader) -> tuple[tuple[ChartView, ...], tuple[str, ...]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(str(record.get("nodes", {}).get("train")), []).append(record)
    found: list[tuple[str, Losses]] = []
    reasons: dict[str, None] = {}
    for members in groups.values():
        try:
            found.append((_shared_name(members, records), reader.losses(members[0])))
        except NotThere as reason:
            if any(member.get("status") != "missing" for member in members):
                reasons[str(reason)] = None
    notes = [f"{reason[:1].upper()}{reason[1:]}." for reason in list(reasons)[:3]]
    if len(reasons) > 3:
        notes.append(f"So it is for {len(reasons) - 3} more trainings.")
    if not found:
        return (), tuple(notes or ["Nothing was trained."])
    if len(found) > _MAX_LOSSES:
        notes.append(f"{_MAX_LOSSES} of {len(found)} trainings are shown.")
        found = [found[i] for i in thinned(len(found), _MAX_LOSSES)]
    total = curve_chart(
        "Training loss",
        [(name, losses.iterations, losses.total) for name, losses in found],
        x_label="Iteration",
        y_label="Sum of all losses",
        log_y=_is_wide(value for _, losses in found for value in losses.total),
    )
    name, first = found[0]
    parts = curve_chart(
        f"Parts of the loss, {name}",
        [(part, first.iterations, values) for part, values in sorted(first.parts.items())],
        x_label="Iteration",
        y_label="Loss, summed over stages",
        log_y=_is_wide(value for values in first.parts.values() for value in values),
    )
    return (total, parts), tuple(notes)


def _is_wide(values: object) -> bool:
    numbers = list(values)  # type: ignore[call-overload]
    return min(numbers) > 0 and max(numbers) / min(numbers) > 5


def _shared_name(members: Sequence[Record], records: Sequence[Record]) -> str:
    """The axis values that all runs of a training share and not all records have; else how many runs it is for."""
    names = dict.fromkeys(name for record in records for name in record.get("axes", {}) if name not in ("eval_seed",))
    parts = []
    for name in names:
        own = {axis_text(axis_value(member, name)) for member in members}
        every = {axis_text(axis_value(record, name)) for record in records}
        if len(own) == 1 and len(every) > 1 and (name in REPEAT_AXES or len(members) > 1 or len(records) == len(every)):
            parts.append(f"{axis_label(name)} {own.pop()}")
    return ", ".join(parts) or f"training of {len(members)} cell{'' if len(members) == 1 else 's'}"


def _gallery(
    cells: Sequence[_Cell], pictures: int
) -> tuple[tuple[tuple[str, tuple[Shown, ...]], ...], tuple[str, ...]]:
    if pictures == 0:
        return (), ("Pictures were left out (--no-gallery).",)
    best = cells[0]
    same = [cell for cell in cells if _is_same_data(cell.evidence, best.evidence)]
    scores = [score_images(cell.evidence) for cell in same]
    num_instances = best.evidence.matches.num_instances.sum(axis=0)
    choice = choose(np.stack([score.f1 for score in scores]), num_instances, of=0, count=pictures)
    ids = best.evidence.truth.image_ids
    notes = [
        f"Shown are detections with a score of at least {scores[0].threshold:.2f} ({best.name}; of each cell, the "
        "score at which its F1 at IoU 0.5 over all images is highest). An image's F1 is the mean over IoU 0.50 to 0.95."
    ]

    def drawn(places: Sequence[tuple[int, tuple[int, ...]]]) -> tuple[Shown, ...]:
        found = []
        for place, members in places:
            try:
                shown = [(same[i].name, same[i].evidence, scores[i]) for i in members]
                found.append(show(ids[place], _heading(scores, place, members), shown))
            except NotThere as reason:
                notes.append(f"Image {ids[place]} is left out: {reason}.")
        return tuple(found)

    groups = [
        (f"Best of {best.name}", drawn([(place, (0,)) for place in choice.best])),
        (f"Worst of {best.name}", drawn([(place, (0,)) for place in choice.worst])),
        ("Largest disagreement between two cells", drawn([(place, (high, low)) for place, high, low in choice.apart])),
    ]
    if len(same) < 2:
        notes.append("There are no two cells of the same images whose predictions are here: no disagreements.")
    return tuple((title, group) for title, group in groups if group), tuple(notes)


def _heading(scores: Sequence[CellScores], place: int, members: tuple[int, ...]) -> str:
    values = " and ".join(f"{scores[i].f1[place]:.2f}" for i in members)
    return f"F1 {values}"


def _is_same_data(one: CellEvidence, other: CellEvidence) -> bool:
    return one.truth is other.truth or (
        one.truth.image_ids == other.truth.image_ids
        and _dataset(one.record) == _dataset(other.record)
        and one.truth.class_agnostic == other.truth.class_agnostic
    )


def _dataset(record: Record) -> str:
    return str(record.get("config", {}).get("data", {}).get("dataset"))
