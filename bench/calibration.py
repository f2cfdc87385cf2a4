"""Noise floors: how much a metric varies from run to run where nothing changed, by metric and class of machine.

Written by `diffbench calibrate` from runs of the same suite, the same code, on machines of the same class, and read by
`diffbench compare`. For times and memory the floor is the standard deviation of the logarithm from run to run, pooled
over the cells; for AP the standard deviation over evaluation seeds where there are several, otherwise over the runs.
Cells of one run share its good or bad luck, so a floor is known with as many degrees of freedom as there are runs, less
one, however many cells there are. Runs of the same seeds may have the same AP to the last bit: its floor is then 0,
which says nothing about other seeds, and `compare` does not take it for certainty.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from bench.comparability import differences, kind_of, machine_of
from bench.errors import BenchError, SuiteError, SuiteErrors
from bench.fields import check_mapping, show, unknown
from bench.report.cells import Record, axes_of, latest
from bench.yaml_source import Item, Place, read_yaml

VERSION: Final = 1
MIN_RUNS = 3  # fewer say too little about how much runs differ

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Floor(BaseModel):
    """noise: standard deviation from run to run; scale: of what. degrees_of_freedom: that it is known with."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    noise: NonNegative
    degrees_of_freedom: Annotated[int, Field(ge=1)]
    scale: Literal["log", "absolute"]
    cells: Annotated[int, Field(ge=1)] = 1


@dataclass(frozen=True)
class Noise:
    """machines: class of machine -> metric -> floor."""

    machines: Mapping[str, Mapping[str, Floor]] = field(default_factory=dict)

    def of(self, machines: Sequence[str], metric: str) -> Floor | None:
        """The floor of a metric, the larger one where the machines differ; None unless it is known for all of them."""
        floors = [self.machines.get(machine, {}).get(metric) for machine in machines]
        known = [floor for floor in floors if floor is not None]
        return max(known, key=lambda floor: floor.noise) if known and len(known) == len(floors) else None


NO_NOISE = Noise()


def calibrate(runs: Sequence[Sequence[Record]], names: Sequence[str]) -> Noise:
    """Noise floors from repeated runs.

    Args:
        runs: the records of each run, of one suite or several; all of the same suites, code and settings.
        names: what each run is called in an error.
    Raises:
        BenchError: too few runs of a machine class, runs that differ in more than luck, or the same run twice.
    """
    by_machine: dict[str, list[tuple[str, dict[tuple[Any, ...], Record]]]] = defaultdict(list)
    for name, records in zip(names, runs):
        for machine in dict.fromkeys(machine_of(record) for record in records):
            kept = _latest([record for record in records if machine_of(record) == machine])
            by_machine[machine].append((name, {_key(record): record for record in kept}))
    if not by_machine:
        raise BenchError(f"calibrate: no records. Give at least {MIN_RUNS} results of the same suite")
    machines = {}
    for machine, found in sorted(by_machine.items()):
        if len(found) < MIN_RUNS:
            raise BenchError(
                f"calibrate: {len(found)} run{'' if len(found) == 1 else 's'} on {machine or 'an unnamed machine'}, at "
                f"least {MIN_RUNS} are needed to tell noise. Run the suite again into another results folder"
            )
        _check_same(found)
        machines[machine] = _floors([cells for _, cells in found])
    return Noise(machines)


def dump_calibration(noise: Noise, suffix: str) -> str:
    """The file's text: JSON for '.json', otherwise YAML."""
    machines = {
        machine: {metric: floor.model_dump() for metric, floor in floors.items()}
        for machine, floors in noise.machines.items()
    }
    content = {"version": VERSION, "machines": machines}
    if suffix == ".json":
        return json.dumps(content, indent=2) + "\n"
    head = "# Noise floors, written by diffbench calibrate: standard deviations from run to run.\n"
    return head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def load_calibration(path: Path) -> Noise:
    """Read a calibration file.

    Raises:
        SuiteErrors: everything that is wrong in it, with its place.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root, problems = (_from_json(text, path), []) if path.suffix == ".json" else read_yaml(text, path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        hint = "Write it with diffbench calibrate"
        raise SuiteErrors([SuiteError(f"cannot be read ({reason}). {hint}", file=path)]) from error
    noise = _read(root, problems)
    if problems:
        raise SuiteErrors(sorted(problems, key=lambda error: (error.line or 0, error.column or 0)))
    return noise


# -- from runs ---------------------------------------------------------------------------------------------------------


def _key(record: Record) -> tuple[Any, ...]:
    return (record.get("suite"), *sorted(axes_of(record).items(), key=lambda item: item[0]))


def _latest(records: Sequence[Record]) -> list[Record]:
    """Those that count, suite by suite: two suites may have cells of the same axes."""
    by_suite: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        by_suite[record.get("suite")].append(record)
    return [record for found in by_suite.values() for record in latest(found)[0]]


def _check_same(found: Sequence[tuple[str, Mapping[tuple[Any, ...], Record]]]) -> None:
    """All runs have the same cells, measured in the same way, and none is another one's copy."""
    first_name, first = found[0]
    for name, cells in found[1:]:
        for key in {**first, **cells}:
            if key not in cells or key not in first:
                owner, other = (first_name, name) if key in first else (name, first_name)
                label = (first.get(key) or cells[key]).get("label")
                raise BenchError(
                    f"calibrate: cell '{label}' is in {owner}, not in {other}. Give runs of the same suite"
                )
            one, two = first[key], cells[key]
            _check_pair(one, two, first_name, name)
    seen: dict[str, str] = {}
    for name, cells in found:
        text = json.dumps([record.get("samples") for record in cells.values()], sort_keys=True)
        if any(record.get("samples") for record in cells.values()) and text in seen:
            raise BenchError(f"calibrate: {seen[text]} and {name} hold the same samples. Give each run once")
        seen[text] = name


def _check_pair(one: Record, two: Record, one_name: str, two_name: str) -> None:
    for record, name in ((one, one_name), (two, two_name)):
        if record.get("status") != "ok":
            raise BenchError(f"calibrate: cell '{record.get('label')}' of {name} {record.get('status')}. Run it again")
    reasons = list(dict.fromkeys(text for texts in differences(one, two).values() for text in texts))
    commits = [record.get("environment", {}).get("commit") for record in (one, two)]
    if all(commits) and commits[0] != commits[1]:
        reasons.append(f"commit {str(commits[0])[:10]} and {str(commits[1])[:10]}")
    if reasons:
        raise BenchError(
            f"calibrate: {one_name} and {two_name} differ in more than luck, in cell '{one.get('label')}': "
            f"{'; '.join(reasons)}. Give runs of the same code and suite"
        )


def _floors(runs: Sequence[Mapping[tuple[Any, ...], Record]]) -> dict[str, Floor]:
    metrics = dict.fromkeys(name for cells in runs for record in cells.values() for name in record.get("metrics", {}))
    floors = {}
    for metric in metrics:
        kind = kind_of(metric)
        found = _score_variances(runs, metric) if kind == "score" else _log_variances(runs, metric)
        if kind in ("score", "time", "memory") and found:
            noise = math.sqrt(statistics.fmean(variance for variance, _ in found))
            degrees = min(count for _, count in found)
            scale: Literal["log", "absolute"] = "absolute" if kind == "score" else "log"
            floors[metric] = Floor(noise=noise, degrees_of_freedom=degrees, scale=scale, cells=len(found))
    return floors


def _values(runs: Sequence[Mapping[tuple[Any, ...], Record]], key: tuple[Any, ...], metric: str) -> list[float]:
    entries = [cells[key].get("metrics", {}).get(metric, {}) for cells in runs]
    return [float(entry["value"]) for entry in entries if entry.get("value") is not None]


def _log_variances(runs: Sequence[Mapping[tuple[Any, ...], Record]], metric: str) -> list[tuple[float, int]]:
    found = []
    for key in runs[0]:
        values = _values(runs, key, metric)
        if len(values) == len(runs) and min(values) > 0:
            found.append((statistics.variance([math.log(value) for value in values]), len(values) - 1))
    return found


def _score_variances(runs: Sequence[Mapping[tuple[Any, ...], Record]], metric: str) -> list[tuple[float, int]]:
    """Over evaluation seeds, each the mean of its runs (which may be equal to the last bit), or over runs."""
    cells: dict[tuple[Any, ...], list[list[float]]] = defaultdict(list)
    for key in runs[0]:
        values = _values(runs, key, metric)
        if len(values) == len(runs):
            suite, *axes = key
            cells[(suite, *(axis for axis in axes if axis[0] != "eval_seed"))].append(values)
    found = []
    for seeds in cells.values():
        values = [statistics.fmean(values) for values in seeds] if len(seeds) > 1 else seeds[0]
        found.append((statistics.variance(values), len(values) - 1))
    return found


# -- from a file -------------------------------------------------------------------------------------------------------


def _from_json(text: str, path: Path) -> Item:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SuiteErrors([SuiteError(f"not valid JSON ({error})", file=path)]) from error

    def item(value: Any) -> Item:
        place = Place(path)
        if isinstance(value, dict):
            return Item({key: item(entry) for key, entry in value.items()}, place, dict.fromkeys(value, place))
        return Item([item(entry) for entry in value] if isinstance(value, list) else value, place)

    return item(content)


def _read(root: Item, problems: list[SuiteError]) -> Noise:
    if not isinstance(root.value, dict) or "version" not in root.value:
        problems.append(root.place.error("", "no calibration file (no version). Write it with diffbench calibrate"))
        return NO_NOISE
    version = root.value["version"]
    if version.value != VERSION:
        message = f"{show(version.plain())} is not allowed. Allowed: {VERSION}. Write the file again"
        problems.append(version.place.error("version", message))
        return NO_NOISE
    for name in root.value:
        if name not in ("version", "machines"):
            problems.append(root.key_places[name].error(name, unknown(name, ("version", "machines"))))
    machines = root.value.get("machines")
    if machines is None or not isinstance(machines.value, dict):
        problems.append((machines or root).place.error("machines", "needs a mapping from machines to metrics"))
        return NO_NOISE
    found: dict[str, dict[str, Floor]] = {}
    for machine, metrics in machines.value.items():
        if not isinstance(metrics.value, dict):
            problems.append(metrics.place.error(f"machines.{machine}", "needs a mapping from metrics to floors"))
            continue
        for metric, item in metrics.value.items():
            key, known = f"machines.{machine}.{metric}", len(problems)
            values = check_mapping(Floor, item, key, problems)
            missing = [name for name, info in Floor.model_fields.items() if info.is_required() and name not in values]
            if len(problems) == known and missing:
                problems.append(item.place.error(key, f"needs {' and '.join(missing)}"))
            if len(problems) == known:
                found.setdefault(machine, {})[metric] = Floor(**values)
    return Noise(found)
