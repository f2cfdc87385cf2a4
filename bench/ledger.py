"""Claims beside what was measured for them: which records count, what speaks against them, and the verdict.

A function of claim files, suites and records alone: data sets and weights on this machine play no part, so that a
reader without them gets the same ledger and the same tables.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bench.claims import Claim
from bench.fields import did_you_mean
from bench.report.cells import Record, bare
from bench.stats.student import two_sided_quantile
from bench.store import Store
from bench.suite import CUSTOM_PATHS, FREE_FIELDS, Suite, SuiteCell, axis_value_text, load_suite
from bench.verdict import Judgement, Measured, judge, spread
from diffinst.config import SECTIONS

# What the harness evaluates on these data sets.
SPLITS = {"coco": "val2017", "lvis": "val"}
_REPEATED = ("seed", "eval_seed")
_MAX_DIFFERENCES = 3


@dataclass(frozen=True)
class FoundRecord:
    """A record and where it is: results/SUITE/MACHINE/RUN_ID.json."""

    record: Record
    path: Path

    @property
    def machine(self) -> str:
        return self.path.parent.name


@dataclass(frozen=True)
class Attempt:
    """What a suite's cells say about a claim, or about no claim.

    cells: that differ in seeds only. records: those that `measured` is made of; empty without it. reason: why there is
    no measurement. command: of the record, or the one to run. others: machines with records that were not taken.
    """

    suite: Suite
    cells: tuple[SuiteCell, ...]
    measured: Measured | None
    records: tuple[FoundRecord, ...]
    reason: str
    command: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class LedgerRow:
    """A claim, the verdict on it, and the attempt that the verdict rests on (None: no suite is tied to the claim)."""

    claim: Claim
    judgement: Judgement
    attempt: Attempt | None


def load_paper_suites(folder: Path) -> list[Suite]:
    """The suites of a folder that have `claims:`, in order of file name.

    Raises:
        SuiteErrors: one is wrong.
    """
    suites = [load_suite(path) for path in sorted(folder.glob("*.yaml"))]
    return [suite for suite in suites if suite.claims is not None]


def check_ties(suite: Suite, claims: Mapping[str, Claim]) -> None:
    """Whether the claims that a suite is tied to exist.

    Raises:
        SuiteError: one does not.
    """
    for tie in suite.claims or ():
        if tie.claim not in claims:
            hint = did_you_mean(tie.claim, claims)
            raise tie.place.error("claims", f"no claim has the id '{tie.claim}'.{hint}")


def find_records(results: Path, suite: str) -> list[FoundRecord]:
    """The current records of a suite on all machines.

    Raises:
        RecordError: one is unreadable.
    """
    folder = results / suite
    machines = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return [
        FoundRecord(record.model_dump(mode="json"), folder / machine / f"{record.run_id}.json")
        for machine in machines
        for record in Store(results).records(suite, machine)
    ]


def make_ledger(claims: Mapping[str, Claim], suites: Sequence[Suite], results: Path) -> list[LedgerRow]:
    """A row for every claim, superseded values after the one that took their place.

    Raises:
        SuiteError: a suite is tied to a claim that does not exist.
        RecordError: a record is unreadable.
    """
    attempts: dict[str, list[Attempt]] = {}
    for suite in suites:
        check_ties(suite, claims)
        records = find_records(results, suite.name)
        for tie in suite.claims or ():
            cells = tuple(cell for cell in suite.cells if tie.fits(cell.axes))
            if cells:
                attempts.setdefault(tie.claim, []).append(attempt(suite, cells, records, claims[tie.claim]))
    rows = []
    for claim in claims.values():
        best = min(attempts.get(claim.id, []), key=lambda found: _rank(found, claim), default=None)
        rows.append(LedgerRow(claim, judgement_of(claim, best), best))
        rows += [LedgerRow(old, judgement_of(old, None), None) for old in claim.earlier()]
    return rows


def judgement_of(claim: Claim, found: Attempt | None) -> Judgement:
    """The verdict on a claim from an attempt at it; without one, from the claim alone."""
    needs = found.reason if found is not None else "no suite is tied to it"
    return judge(claim, found.measured if found is not None else None, needs=needs)


def attempt(
    suite: Suite,
    cells: Sequence[SuiteCell],
    records: Sequence[FoundRecord],
    claim: Claim | None,
    metric: str | None = None,
) -> Attempt:
    """What the records say about cells that differ in seeds only.

    Of several machines, one that measured what was asked goes before one that did not, and then the latest: never the
    one whose number suits. A record belongs to a cell whose axes it has; what else differs speaks against it.

    Args:
        records: all of the suite.
        claim: None where the cells measure no published number; then `metric` is read.
    """
    metric = claim.fields.metric if claim is not None else metric
    by_axes = {_key(cell.axes): cell for cell in cells}
    mine = [(found, by_axes[key]) for found in records if (key := _key(found.record["axes"])) in by_axes]
    usable = [(found, cell) for found, cell in mine if metric and _value(found.record, metric) is not None]
    command = command_of(suite, cells)
    if not usable:
        return Attempt(suite, tuple(cells), None, (), _reason(cells[0], mine, metric, claim), command)
    groups: dict[str, list[tuple[FoundRecord, tuple[str, ...]]]] = {}
    for found, cell in usable:
        groups.setdefault(found.machine, []).append((found, objections(found.record, cell, claim)))
    # Runs that measured something else do not mix with those that did not.
    chosen = {machine: _without_objections(group) for machine, group in groups.items()}
    order = sorted(chosen, key=lambda machine: (not chosen[machine][0][1], _latest(chosen[machine])), reverse=True)
    taken = chosen[order[0]]
    runs = tuple(found for found, _ in taken)
    against = tuple(dict.fromkeys(text for _, texts in taken for text in texts))
    assert metric is not None
    measured = _measured([found.record for found in runs], metric, against, claim)
    recorded = runs[0].record["command"] or command
    return Attempt(suite, tuple(cells), measured, runs, "", recorded, tuple(order[1:]))


def objections(record: Record, cell: SuiteCell, claim: Claim | None) -> tuple[str, ...]:
    """Why a record does not measure what the claim, or the suite's cell, is about; empty where it does."""
    config = record["config"]
    found = list(_against_claim(record, claim)) if claim is not None else []
    different = _differences(config, cell)
    if different:
        more = f" and {len(different) - _MAX_DIFFERENCES} more" if len(different) > _MAX_DIFFERENCES else ""
        found.append(f"other settings than the suite's: {', '.join(different[:_MAX_DIFFERENCES])}{more}")
    return tuple(found)


def _against_claim(record: Record, claim: Claim) -> Iterable[str]:
    fields, config = claim.fields, record["config"]
    data, model, sampler, train = (config.get(name, {}) for name in ("data", "model", "sampler", "train"))
    engine = config.get("engine", {"name": "diffinst"})
    if data.get("dataset") != fields.dataset:
        yield f"data {data.get('dataset')}, not {fields.dataset}"
    else:
        split = SPLITS.get(fields.dataset, "val")
        if split != fields.split:
            yield f"split {split}, not {fields.split}"
        count = record["metrics"].get("num_images", {}).get("value")
        if count is None:
            yield "the record does not say on how many images"
        elif count != fields.images:
            yield f"{count} of {fields.images} images"
    if data.get("val_image_ids") is not None:
        yield "a list of images, not the whole split"
    if data.get("class_agnostic"):
        yield "class-agnostic"
    if engine["name"] != fields.engine:
        yield f"engine {engine['name']}, not {fields.engine}"
    elif fields.engine == "diffinst":
        asked = {"backbone": fields.backbone, "sampling_steps": fields.sampling_steps}
        asked["num_proposals"] = fields.num_proposals
        for name, want in asked.items():
            has = model.get(name, sampler.get(name))
            if want is not None and has != want:
                yield f"{name} {has}, not {want}"
        if sampler.get("tta"):
            yield "with test-time augmentation"
    weights = engine.get("engine_weights", "none") if engine["name"] != "diffinst" else model.get("weights", "none")
    yield from _against_weights(weights, train, data, claim)


def _against_weights(weights: str, train: Mapping[str, Any], data: Mapping[str, Any], claim: Claim) -> Iterable[str]:
    fields = claim.fields
    if fields.evidence == "weights":
        if weights == "none":
            yield "trained here; it takes the published weights"
        elif (name := PurePosixPath(weights).name) != fields.weights_file:
            yield f"weights {name}, not the published {fields.weights_file}"
    elif fields.evidence == "training":
        if weights != "none":
            yield "weights from a file, of whose training nothing is recorded"
            return
        seen = train.get("iterations", 0) * train.get("batch_size", 0)
        wanted = (fields.iterations or 0) * (fields.batch_size or 0)
        if seen < wanted:
            yield f"trained on {seen} images in all, of the {wanted} of the published schedule"
        if data.get("train_image_ids") is not None:
            yield "trained on a list of images, not the whole split"


def _differences(config: Mapping[str, Any], cell: SuiteCell) -> list[str]:
    """'sampler.eta 0 instead of 1' for each setting that differs from the suite's and can change the number."""
    sections: dict[str, dict[str, Any]] = {name: part.model_dump(mode="json") for name, part in cell.config}
    is_peer = not cell.engine.is_default
    if is_peer:
        # Of the rest, a peer looks at some; what it does is in its own section.
        sections = {"data": sections["data"], "engine": cell.engine.model_dump(mode="json")}
        left_out = {"python", "checkout"}
    else:
        left_out = set()
        if sections["model"]["weights"] != "none":
            del sections["train"]
    found = []
    for section, values in sections.items():
        defaults = SECTIONS[section]().model_dump(mode="json") if section in SECTIONS else {}
        for name, want in values.items():
            if name in left_out or name in FREE_FIELDS or name in _REPEATED:
                continue
            # A field that is younger than the record has what was done before there was a choice.
            has = config.get(section, {}).get(name, defaults.get(name))
            if _comparable(name, has) != _comparable(name, want):
                found.append(f"{section}.{name} {axis_value_text(has)} instead of {axis_value_text(want)}")
    return found


def _comparable(name: str, value: Any) -> Any:
    """Of a path, its last part: folders differ between machines."""
    is_path = name in {*CUSTOM_PATHS, "train_image_ids", "val_image_ids"} or name.endswith("weights")
    return PurePosixPath(value).name if is_path and isinstance(value, str) else value


def _measured(records: Sequence[Record], metric: str, against: tuple[str, ...], claim: Claim | None) -> Measured:
    scale = claim.fields.scale if claim is not None else 100.0 if metric.startswith(("segm/", "bbox/")) else 1.0
    is_training = claim.fields.evidence == "training" if claim is not None else _is_trained(records)
    # Noise of one model says nothing about another training: seeds of the kind that matters make the spread.
    groups: dict[Any, list[float]] = {}
    for record in records:
        key = record["config"]["train"]["seed"] if is_training else _seeds(record)
        groups.setdefault(key, []).append(_value(record, metric) * scale)  # type: ignore[operator]
    values = [statistics.fmean(group) for group in groups.values()]
    mean = statistics.fmean(values)
    interval, basis = spread(values), f"{len(values)} {'trainings' if is_training else 'runs'}"
    error = records[0]["metrics"][metric].get("standard_error")
    # What images do to one training says nothing about another one.
    if interval is None and len(records) == 1 and error is not None and not is_training:
        half = two_sided_quantile(0.05, math.inf) * error * scale
        interval, basis = (mean - half, mean + half), f"{records[0]['metrics'][metric]['error_of']} of one run"
    elif interval is None and claim is not None and claim.fields.deterministic:
        interval, basis = (mean, mean), "nothing is drawn at random"
    return Measured(mean, interval, basis if interval else "", len(records), against)


def _is_trained(records: Sequence[Record]) -> bool:
    return all(record["config"]["model"].get("weights", "none") == "none" for record in records)


def _seeds(record: Record) -> tuple[Any, Any]:
    return record["config"]["sampler"]["eval_seed"], record["config"]["train"]["seed"]


def _without_objections(
    group: list[tuple[FoundRecord, tuple[str, ...]]],
) -> list[tuple[FoundRecord, tuple[str, ...]]]:
    return [entry for entry in group if not entry[1]] or group


def _latest(group: Sequence[tuple[FoundRecord, tuple[str, ...]]]) -> tuple[str, str]:
    return max((found.record["started_at"] or "", found.record["run_id"]) for found, _ in group)


def _value(record: Record, metric: str) -> float | None:
    if record["status"] != "ok":
        return None
    value = record["metrics"].get(metric, {}).get("value")
    return None if value is None else float(value)


def _key(axes: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    return frozenset((bare(name), axis_value_text(value)) for name, value in axes.items())


def _reason(
    cell: SuiteCell,
    mine: Sequence[tuple[FoundRecord, SuiteCell]],
    metric: str | None,
    claim: Claim | None,
) -> str:
    """Why cells have no number: a failed run, or what it takes to run them."""
    for found, _ in mine:
        if found.record["status"] != "ok":
            return f"{found.record['status']} on {found.machine}: {str(found.record['reason']).splitlines()[0]}"
        why = found.record["metrics"].get(metric, {}).get("reason") if metric else None
        return f"not measured on {found.machine}: {why or 'no value'}"
    return f"no record; it takes {needs_of(cell, claim)}"


def needs_of(cell: SuiteCell, claim: Claim | None = None) -> str:
    """What one has to have to run a cell, whether it is here or not."""
    data, model, train = cell.config.data, cell.config.model, cell.config.train
    weights = cell.engine.engine_weights if not cell.engine.is_default else model.weights
    parts = [f"data {data.dataset}"] if data.dataset != "shapes" else []
    if weights != "none":
        where = ""
        if claim is not None and claim.fields.weights == "public":
            where = f" (published: {claim.fields.weights_where})" if claim.fields.weights_where else " (published)"
        elif claim is not None:
            where = " (not published)"
        parts.append(f"{weights}{where}")
    else:
        parts.append(f"a training of {train.iterations} iterations of {train.batch_size} images")
        if model.backbone_weights not in ("none", "imagenet") and cell.engine.is_default:
            parts.append(model.backbone_weights)
    if cell.engine.is_external:
        parts.append(f"an interpreter with {cell.engine.name}")
    return ", ".join(parts)


def command_of(suite: Suite, cells: Sequence[SuiteCell]) -> str:
    """The command that runs just these cells, without what all cells of the suite share and without seeds."""
    names = [name for name in suite.cells[0].axes if name not in _REPEATED]
    terms = []
    for name in names:
        values = {axis_value_text(cell.axes[name]) for cell in cells}
        everywhere = {axis_value_text(cell.axes[name]) for cell in suite.cells}
        # A value with '/' (a path) follows from another axis, and would only make the pattern long.
        if len(values) == 1 and len(everywhere) > 1 and not any("/" in value or " " in value for value in values):
            terms.append(f"{name}={values.pop()}")
    only = f" --only '{' '.join(terms)}'" if terms else ""
    return f"run-suite {_from_here(suite.path)} --data-root DIR{only}"


def _from_here(path: Path) -> str:
    """A path as one gives it in the project's folder, so that no report tells where that is."""
    here = Path.cwd()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else path.as_posix()


def _rank(found: Attempt, claim: Claim) -> tuple[int, bool]:
    """Measured as asked, measured otherwise, not measured; then the kind of evidence that the claim wants."""
    state = 2 if found.measured is None else 1 if found.measured.objections else 0
    cell = found.cells[0]
    has_weights = cell.config.model.weights != "none" or cell.engine.has_weights
    return state, has_weights != (claim.fields.evidence == "weights")
