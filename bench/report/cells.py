"""Records -> cells: which axes vary, which runs repeat each other, and what is known of a metric in a cell.

A record here is the plain JSON object of `bench.record.RunRecord`; the functions read it and change nothing. Where a
plan is known, a cell without a record is passed as an object with status 'missing', its axes and its configuration.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from itertools import chain
from typing import Any, Literal, TypeVar

from bench.report.metrics import axis_text
from bench.stats.paired import SeedKey, seed_parts, why_not_together
from bench.stats.student import combine, two_sided_quantile

Record = Mapping[str, Any]
_Answer = TypeVar("_Answer")
State = Literal["ok", "failed", "skipped", "missing", "unmeasured", "incomparable", "absent"]

# States that have to be told; 'absent' is a combination of axis values that the suite does not ask for.
STATES: tuple[State, ...] = ("failed", "skipped", "missing", "unmeasured", "incomparable")
STATE_TEXT: dict[State, str] = {
    "failed": "failed",
    "skipped": "skipped",
    "missing": "missing",
    "unmeasured": "not measured",
    "incomparable": "not comparable",
    "absent": "not in the suite",
}
# Runs that differ in these axes only repeat one measurement; a cell shows their mean and how sure it is.
REPEAT_AXES = ("seed", "eval_seed", "round")


@dataclass(frozen=True)
class Value:
    """What is known of one metric in one cell, in the record's unit.

    mean: over the runs that measured it; None in every state but 'ok'. spread: sample standard deviation, None for one.
    low, high: mean 5th and 95th percentile, where the records have them. count of `total` runs measured it.
    reason: why it is not there, from the record, in one line.
    half: half the 95 % interval of the mean, where the records' own standard errors and the seeds give one. over: what
    would have to be drawn again for the value to vary so: 'images', '2 trainings', '3 evaluation seeds'.
    """

    state: State
    mean: float | None = None
    spread: float | None = None
    low: float | None = None
    high: float | None = None
    count: int = 0
    total: int = 0
    reason: str = ""
    half: float | None = None
    over: tuple[str, ...] = ()


class Records(tuple[Record, ...]):
    """The records of one report; what is asked of all of them for each of its tables is worked out once.

    A record is never changed, so an answer stays right.
    """

    @cached_property
    def answers(self) -> dict[Callable[..., Any], Any]:
        """Function -> what it said of these records."""
        return {}


def once(function: Callable[[Sequence[Record]], _Answer]) -> Callable[[Sequence[Record]], _Answer]:
    """A function of records that remembers what it said of `Records`; its answer is not to be changed."""

    @wraps(function)
    def ask(records: Sequence[Record]) -> _Answer:
        if not isinstance(records, Records):
            return function(records)
        if function not in records.answers:
            records.answers[function] = function(records)
        answer: _Answer = records.answers[function]
        return answer

    return ask


@lru_cache(maxsize=1024)
def bare(name: str) -> str:
    """'sampler.num_proposals' -> 'num_proposals'; field names are unique over the sections."""
    return name.rpartition(".")[2]


def axes_of(record: Record) -> dict[str, Any]:
    """The record's axes under bare names, in their order; lists become tuples and mappings text, to be hashable."""
    return {bare(name): _hashable(value) for name, value in record.get("axes", {}).items()}


def axis_value(record: Record, name: str) -> Any:
    """The value of axis or configuration field `name` in a record; None where the record does not have it."""
    wanted, axes = bare(name), record.get("axes", {})
    if wanted in axes:  # the usual case; tables of thousands of records ask for nothing else
        return _hashable(axes[wanted])
    for axis, value in axes.items():
        if bare(axis) == wanted:
            return _hashable(value)
    for section in record.get("config", {}).values():
        if isinstance(section, Mapping) and wanted in section:
            return _hashable(section[wanted])
    return None


@once
def metric_names(records: Sequence[Record]) -> list[str]:
    """Every metric name in the records, in order of first appearance, measured or not."""
    return list(dict.fromkeys(chain.from_iterable(record.get("metrics", ()) for record in records)))


def is_metric(records: Sequence[Record], name: str) -> bool:
    """Does a suite mean a metric by `name`? Metrics have a slash or stand in the records."""
    return "/" in name or name in metric_names(records)


def ordered(values: Iterable[Any]) -> list[Any]:
    """Distinct values, numbers rising; anything else in order of first appearance."""
    distinct = list(dict.fromkeys(values))
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct):
        return sorted(distinct)
    return distinct


@once
def varying_axes(records: Sequence[Record]) -> list[str]:
    """Axes with more than one value over the records, repeats (seeds) left out, in the order of the records' axes."""
    names = dict.fromkeys(name for record in records for name in axes_of(record) if name not in REPEAT_AXES)
    return [name for name in names if len({axis_value(record, name) for record in records}) > 1]


def latest(records: Sequence[Record]) -> tuple[list[Record], int]:
    """One record per cell: of several with the same axes, seeds included, the one that ended last.

    Such records come from two versions of a suite, or of the code; averaging them would mix two experiments.

    Returns:
        The records kept, in their order, and how many were left out.
    """
    newest: dict[tuple[tuple[str, Any], ...], Record] = {}
    for record in records:
        key = tuple(sorted(axes_of(record).items(), key=lambda item: item[0]))
        held = newest.get(key)
        if held is None or _age(record) > _age(held):
            newest[key] = record
    kept = {id(record) for record in newest.values()}
    return [record for record in records if id(record) in kept], len(records) - len(newest)


def sort_records(records: Iterable[Record]) -> list[Record]:
    """Records in the order of their axes' values (numbers as numbers), whatever order the files were read in."""

    def key(record: Record) -> tuple[Any, ...]:
        values = [_sort_key(value) for value in axes_of(record).values()]
        return (*values, (2, 0.0, str(record.get("run_id", ""))))

    return sorted(records, key=key)


def group_by(records: Sequence[Record], names: Sequence[str]) -> dict[tuple[Any, ...], list[Record]]:
    """Records by their values of the axes `names`."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(axis_value(record, name) for name in names), []).append(record)
    return groups


def value_of(records: Sequence[Record], metric: str) -> Value:
    """What the runs of one cell (they differ in seeds only) say about `metric`; no runs at all is 'absent'.

    AP of runs that were scored on different images is not averaged: the cell is 'incomparable'.
    """
    if len(records) == 1:
        return _value_of_one(records[0], metric)
    return _value_of_runs(records, metric) if records else Value("absent")


def _value_of_one(record: Record, metric: str) -> Value:
    """What `_value_of_runs` says of one run, and most cells of a large table are one."""
    number = _number(record, metric)
    if number is None:
        return Value(absence_of(record), total=1, reason=reason_of_absence(record, metric))
    error = record["metrics"][metric].get("standard_error")
    half = None if error is None else two_sided_quantile(0.05, math.inf) * math.sqrt(error**2)
    low = high = None
    if metric.startswith(
        ("latency_s", "training_step_s")
    ):  # asking for the ends of all metrics is half the time of a large table
        low, high = _number(record, f"{metric}/p5"), _number(record, f"{metric}/p95")
    over = () if error is None else ("images",)
    return Value("ok", mean=number, low=low, high=high, count=1, total=1, half=half, over=over)


def _value_of_runs(records: Sequence[Record], metric: str) -> Value:
    measured = [(record, number) for record in records if (number := _number(record, metric)) is not None]
    numbers = [number for _, number in measured]
    if numbers:
        several = len(measured) > 1
        apart = why_not_together([record for record, _ in measured]) if several and is_score(metric) else None
        if apart:
            return Value("incomparable", total=len(records), reason=apart)
        half, over = _interval(records, metric)
        lows, highs = ([_number(record, f"{metric}/{end}") for record in records] for end in ("p5", "p95"))
        return Value(
            "ok",
            mean=statistics.fmean(numbers),
            spread=statistics.stdev(numbers) if len(numbers) > 1 else None,
            low=_mean(lows),
            high=_mean(highs),
            count=len(numbers),
            total=len(records),
            half=half,
            over=over,
        )
    # With nothing measured, the gravest state speaks for the cell.
    states = [absence_of(record) for record in records]
    first = min(range(len(records)), key=lambda index: STATES.index(states[index]))
    return Value(states[first], total=len(records), reason=reason_of_absence(records[first], metric))


def is_measured(record: Record, metric: str) -> bool:
    """Does a record have a number for `metric`?"""
    return _number(record, metric) is not None


def absence_of(record: Record) -> State:
    """The state of a record's metric that has no number.

    Raises:
        ValueError: the record's status is none that records have.
    """
    status = record.get("status", "missing")
    state: State = "unmeasured" if status == "ok" else status
    if state not in STATES:
        raise ValueError(f"record {record.get('run_id')}: unknown status {status!r}")
    return state


def is_score(metric: str) -> bool:
    """Is it AP or AR, a number of a set of images?"""
    return metric.startswith(("segm/", "bbox/"))


def runs_of(records: Sequence[Record], metric: str) -> dict[SeedKey, tuple[Record, float]]:
    """(training seed, evaluation seed) -> the run and its number, of those that measured it."""
    found = {}
    for record in records:
        if (number := _number(record, metric)) is not None:
            found[axis_value(record, "seed"), axis_value(record, "eval_seed")] = record, number
    return found


def _interval(records: Sequence[Record], metric: str) -> tuple[float | None, tuple[str, ...]]:
    """Half the 95 % interval of the mean of runs, and over what; (None, ()) where a run has no error of its own.

    Variances of independent parts add up: that of the images, the same in all runs and therefore not made smaller by
    their number, and that of the seeds (`seed_parts`). Few seeds are paid for by Student's t, its degrees of freedom
    put together after Welch and Satterthwaite.
    """
    if all(record.get("metrics", {}).get(metric, {}).get("standard_error") is None for record in records):
        return None, ()  # times and sizes, and scores from before there were errors: most of a large table
    runs = runs_of(records, metric)
    errors = [record["metrics"][metric].get("standard_error") for record, _ in runs.values()]
    if not errors or any(error is None for error in errors):
        return None, ()
    seeds = seed_parts({key: number for key, (_, number) in runs.items()})
    images = (statistics.fmean(error**2 for error in errors), math.inf)
    error, degrees = combine([images, *((variance, df) for variance, df, _ in seeds)])
    return two_sided_quantile(0.05, degrees) * error, ("images", *(of for _, _, of in seeds))


def unit_of(records: Iterable[Record], metric: str) -> str:
    """The unit that the records give for `metric`; '' where none does."""
    for record in records:
        entry = record.get("metrics", {}).get(metric)
        if entry and entry.get("unit"):
            return str(entry["unit"])
    return ""


def _number(record: Record, metric: str) -> float | None:
    if record.get("status") != "ok":
        return None
    value = record.get("metrics", {}).get(metric, {}).get("value")
    return float(value) if value is not None and math.isfinite(value) else None


def reason_of_absence(record: Record, metric: str) -> str:
    """Why a record has no number for `metric`, in one line."""
    entry = record.get("metrics", {}).get(metric, {})
    text = entry.get("reason") if record.get("status") == "ok" else record.get("reason")
    lines = str(text or "").strip().splitlines()
    if lines:
        return lines[0].strip()
    return "no reason recorded" if record.get("status") != "missing" else "no record yet"


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None


def _age(record: Record) -> tuple[str, str]:
    # The end: it is that of the newest node, while the start is that of a data set which old and new may share.
    return str(record.get("finished_at") or record.get("started_at") or ""), str(record.get("run_id") or "")


def _hashable(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return axis_text(value)
    return tuple(_hashable(item) for item in value) if isinstance(value, list | tuple) else value


def _sort_key(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 0, float(value), ""
    return 1, 0.0, str(value)
