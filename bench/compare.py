"""Two sets of records -> one verdict for each cell and metric, and one exit code. Needs neither the model nor the data.

Cells are matched by suite and axes; runs that differ in seeds only are one cell. In order, the first rule that holds:

1. A run of one side only is `missing` or `extra`, one that did not succeed is `failed`; so is a metric without a value.
   A cell without a measurement that a gate judges is `missing`, and so is what a gate of a file matches in no cell.
2. Measured under other conditions: `not comparable` (bench.comparability).
3. Equal values are the `same`. Counts (parameters, operations) have no noise: past the gate or not.
4. An effect is `better` or `worse` for three reasons together: relative and absolute, past the gate's thresholds, and
   statistical, rejected by Holm's procedure over all tests of the table at the gates' level.
5. The `same` if the 95 % interval of the effect lies within the thresholds. Otherwise `too noisy to tell`, with the
   smallest effect that would have been called whatever the other tests said. A time is too noisy as well where one side
   was disturbed more than the other: its shares of contended or throttled samples differ by more than `UNLIKE_SHARES`.

The standard error of an effect is put together from what varies: for times, the samples of a run and the floor from run
to run; for memory, the floor; for AP, the images (resampled together where both match tables are at hand or the records
carry resamples drawn together, else the records' standard errors) and the floor. Without a floor, several runs of a
cell stand in for it, paired by their seeds; one run without a floor says nothing about times and memory. The two sides
of a race (`bench.race`) are compared image by image, and its rounds, of which each starts both sides anew, say how much
runs differ.

Effects are logarithms of ratios, but differences for AP. `relative` is a fraction of the better value, so that swapping
base and head swaps `better` and `worse`.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from bench.calibration import NO_NOISE, Noise
from bench.comparability import Kind, differences, is_race, kind_of, machine_of, remarks
from bench.fields import did_you_mean
from bench.gates import DEFAULT_GATES, Gate, Gates
from bench.report.cells import REPEAT_AXES, Record, axes_of, latest, sort_records
from bench.report.latency import disturbed_share
from bench.report.metrics import axis_text
from bench.stats.bootstrap import Interval, Matches, bootstrap_difference, holm
from bench.stats.latency import Ratio, log_error, p_of, paired_ratio
from bench.stats.paired import paired_difference, why_not_together
from bench.stats.student import combine, two_sided_quantile

# 'segm' and 'bbox' -> match table of a record's run, or None where it is not at hand.
ReadMatches = Callable[[Record], Mapping[str, Matches] | None]

_BENCHMARKS = "benchmark_s/"
_QUANTILE = re.compile(r"^(.*)/p(\d\d?)$")
_RESAMPLED = ("AP", "AP50", "AP75")
# By how much the disturbed shares of two sides may differ for their times to be judged.
UNLIKE_SHARES = 0.25
MIN_ROUNDS = 3  # of a race; fewer say too little about how much runs differ
_CLOSE = 1e-9  # relative: an effect this near to a threshold has reached it; an AP's error up to it is rounding


class Outcome(StrEnum):
    WORSE = "worse"
    FAILED = "failed"
    MISSING = "missing"
    EXTRA = "extra"
    NOT_COMPARABLE = "not comparable"
    NOISY = "too noisy to tell"
    BETTER = "better"
    SAME = "same"


class ExitCode(IntEnum):
    """What a comparison ends with."""

    FINE = 0
    REGRESSION = 1
    USAGE = 2
    MISSING_OR_EXTRA = 3
    FAILED = 4
    NOT_COMPARABLE = 5
    INCONCLUSIVE = 6


# Of several, the first: a regression is certain whatever else is unknown, then what was lost, then what was not told.
PRECEDENCE: tuple[tuple[Outcome, ExitCode], ...] = (
    (Outcome.WORSE, ExitCode.REGRESSION),
    (Outcome.FAILED, ExitCode.FAILED),
    (Outcome.MISSING, ExitCode.MISSING_OR_EXTRA),
    (Outcome.EXTRA, ExitCode.MISSING_OR_EXTRA),
    (Outcome.NOT_COMPARABLE, ExitCode.NOT_COMPARABLE),
    (Outcome.NOISY, ExitCode.INCONCLUSIVE),
)


@dataclass(frozen=True)
class Row:
    """One verdict. metric: '' where it is about a whole run. base, head: means over the cell's runs, in `unit`.

    change: head / base - 1, but head - base for AP (`is_ratio` tells); low, high: its 95 % interval. smallest: size of
    the smallest change for the worse that would have been called. p_value: of no effect, before Holm's procedure.
    reason: why, one line. path: file of the head's (or else base's) first record, where it came from one.
    """

    suite: str
    cell: str
    metric: str
    outcome: Outcome
    base: float | None = None
    head: float | None = None
    unit: str = ""
    is_ratio: bool = True
    change: float | None = None
    low: float | None = None
    high: float | None = None
    smallest: float | None = None
    p_value: float | None = None
    reason: str = ""
    machine: str = ""
    path: str | None = None


@dataclass(frozen=True)
class Comparison:
    """rows: by suite, cell and metric. notes: what differs between the two sides and may; one line each."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[Outcome, int]:
        """How many rows have each outcome, the gravest first."""
        return {outcome: sum(row.outcome is outcome for row in self.rows) for outcome in Outcome}

    @property
    def exit_code(self) -> ExitCode:
        """See `PRECEDENCE`; a comparison of nothing is not fine."""
        found = {row.outcome for row in self.rows}
        for outcome, code in PRECEDENCE:
            if outcome in found:
                return code
        return ExitCode.FINE if found else ExitCode.MISSING_OR_EXTRA


@dataclass(frozen=True)
class _Effect:
    """For the worse if positive, on the scale of the metric's kind. error: None where nothing tells how sure it is.

    is_paired: of ratios image by image, which the ratio of the means need not equal.
    """

    size: float
    margin: float
    error: float | None
    degrees: float
    basis: str
    is_paired: bool = False


@dataclass(frozen=True)
class _Pending:
    row: Row
    effect: _Effect


def compare(
    base: Sequence[Record],
    head: Sequence[Record],
    gates: Gates = DEFAULT_GATES,
    noise: Noise = NO_NOISE,
    *,
    read_matches: ReadMatches | None = None,
    num_resamples: int = 1000,
) -> Comparison:
    """Judge every gated metric of every cell of `base` and `head`; see the module for the rules.

    Args:
        base, head: JSON objects of RunRecord, with 'machine' and 'path' beside the fields where they were read from
            files. Of several records of one run the latest counts.
        noise: floors from `bench.calibration`; a gate's own noise counts where it is larger.
        read_matches: gives a record's match tables, so that AP is compared image by image.
    """
    judge = _Judge(gates, noise, read_matches, num_resamples)
    found: list[Row | _Pending] = []
    notes: dict[str, None] = {}
    for pairs in _cells(base, head):
        complete = []
        for old, new in pairs:
            if old is None or new is None or old.get("status") != "ok" or new.get("status") != "ok":
                found.append(_incomplete(old, new))
            else:
                complete.append((old, new))
                notes.update(dict.fromkeys(remarks(old, new)))
        if complete:
            found += judge.cell(complete)
    found += judge.idle_gates()
    return Comparison(_decide(found, gates.level), tuple(notes))


# -- which runs belong together ----------------------------------------------------------------------------------------

_Pair = tuple[Record | None, Record | None]


def _cells(base: Sequence[Record], head: Sequence[Record]) -> Iterator[list[_Pair]]:
    """The pairs of runs of each cell. On several machines, each is paired with itself, and else with another one."""
    cells: dict[tuple[Any, ...], list[_Pair]] = defaultdict(list)
    sides = _runs(base), _runs(head)
    for key in dict.fromkeys((*sides[0], *sides[1])):
        old, new = sides[0].get(key, {}), sides[1].get(key, {})
        shared = [machine for machine in old if machine in new]
        pairs: list[_Pair] = [(old[machine], new[machine]) for machine in shared]
        if not shared and old and new:
            pairs = [(next(reversed(old.values())), next(reversed(new.values())))]
        pairs += [(record, None) for record in old.values() if all(record is not one for one, _ in pairs)]
        pairs += [(None, record) for record in new.values() if all(record is not one for _, one in pairs)]
        suite, *axes = key
        for pair in pairs:
            machines = tuple(None if record is None else machine_of(record) for record in pair)
            # A run that one side lacks belongs to the cell of its machine.
            place = machines[0] if machines[1] is None else machines[1]
            cells[(suite, place, *(axis for axis in axes if axis[0] not in REPEAT_AXES))].append(pair)
    yield from cells.values()


def _runs(records: Sequence[Record]) -> dict[tuple[Any, ...], dict[str, Record]]:
    """(suite, axes, seeds included) -> machine -> its latest record, machines in order of age."""
    by_place: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        by_place[str(record.get("suite")), machine_of(record)].append(record)
    found: dict[tuple[Any, ...], dict[str, Record]] = defaultdict(dict)
    for place in sorted(by_place):
        for record in latest(sort_records(by_place[place]))[0]:
            axes = sorted(axes_of(record).items(), key=lambda item: item[0])
            found[(place[0], *axes)][place[1]] = record
    return {key: dict(sorted(machines.items(), key=_start)) for key, machines in found.items()}


def _start(item: tuple[str, Record]) -> str:
    return str(item[1].get("started_at") or "")


def _incomplete(old: Record | None, new: Record | None) -> Row:
    """The row of a run that one side lacks or that did not succeed."""
    shown = new if new is not None else old
    assert shown is not None
    row = replace(_blank(shown), cell=_label(shown, with_seeds=True))
    if new is None:
        return replace(row, outcome=Outcome.MISSING, reason="in base only")
    if old is None:
        return replace(row, outcome=Outcome.EXTRA, reason="in head only")
    said = [
        f"{side} {record.get('status')}: {_first_line(record.get('reason'))}"
        for side, record in (("base", old), ("head", new))
        if record.get("status") != "ok"
    ]
    return replace(row, outcome=Outcome.FAILED, reason="; ".join(said))


def _blank(record: Record) -> Row:
    path = record.get("path")
    return Row(
        suite=str(record.get("suite")),
        cell=_label(record),
        metric="",
        outcome=Outcome.SAME,
        machine=machine_of(record),
        path=None if path is None else str(path),
    )


def _label(record: Record, *, with_seeds: bool = False) -> str:
    axes = {name: value for name, value in axes_of(record).items() if with_seeds or name not in REPEAT_AXES}
    return " ".join(f"{name}={axis_text(value)}" for name, value in axes.items()) or "the only cell"


def _first_line(text: Any) -> str:
    lines = str(text or "").strip().splitlines()
    return lines[0].strip() if lines else "no reason recorded"


# -- one cell ----------------------------------------------------------------------------------------------------------

Pairs = Sequence[tuple[Record, Record]]
# 'segm' or 'bbox' -> intervals of the resampled differences of each pair, None where there are no match tables, or why
# they are not comparable.
_Resampled = dict[str, list[Mapping[str, Interval]] | str | None]


class _Judge:
    """What is the same for all cells of a comparison."""

    def __init__(self, gates: Gates, noise: Noise, read_matches: ReadMatches | None, num_resamples: int) -> None:
        self.gates, self.noise = gates, noise
        self.read_matches, self.num_resamples = read_matches, num_resamples
        self._gate_of: dict[str, Gate | None] = {}
        # Of all cells so far: metrics that were measured and have a gate, those without one, suites, and whether any
        # cell is of stored runs and not of a race.
        self._judged: set[str] = set()
        self._others: set[str] = set()
        self._suites: set[str] = set()
        self._has_runs = False

    def gate(self, metric: str) -> Gate | None:
        if metric not in self._gate_of:
            self._gate_of[metric] = self.gates.of(metric)
        return self._gate_of[metric]

    def cell(self, pairs: Pairs) -> Iterator[Row | _Pending]:
        """The rows of one cell; those that need a test are pending."""
        blank = _blank(pairs[0][1])
        names = dict.fromkeys(name for pair in pairs for record in pair for name in record.get("metrics", {}))
        reasons = _reasons(pairs)
        resampled: _Resampled = {}
        measured = set()
        self._suites.add(blank.suite)
        self._has_runs = self._has_runs or not all(is_race(old, new) for old, new in pairs)
        for metric in names:
            gate = self.gate(metric)
            if gate is None:
                self._others.add(metric)
                continue
            entries = [tuple(record.get("metrics", {}).get(metric, {}) for record in pair) for pair in pairs]
            has = [any(pair[side].get("value") is not None for pair in entries) for side in (0, 1)]
            if any(has):
                measured.add(metric)
                yield self._row(blank, metric, gate, pairs, entries, reasons, resampled)
        for pattern in self.gates.require:
            if not any(fnmatchcase(metric, pattern) for metric in measured):
                why = "required, and measured on neither side"
                yield replace(blank, metric=pattern, outcome=Outcome.MISSING, reason=why)
        if not measured and not self.gates.require:
            why = "nothing that a gate judges was measured on either side"
            yield replace(blank, outcome=Outcome.MISSING, reason=why)
        self._judged |= measured

    def idle_gates(self) -> Iterator[Row]:
        """After all cells: the gates of a file that judge none of them. The built-in ones are for any suite."""
        if self.gates.file is None or not self._suites:
            return
        measured = self._judged | set(self._others)
        for pattern in self.gates.gates:
            if not self._has_runs and kind_of(pattern) != "time":
                continue  # a race measures nothing but times; its gates file may be that of the runs
            if pattern.startswith(_BENCHMARKS) != any(name.startswith(_BENCHMARKS) for name in measured):
                continue  # likewise files of benchmarks, and the gates of both may stand in one file
            if not any(fnmatchcase(metric, pattern) for metric in self._judged):
                why = f"this gate of {self.gates.file} matches nothing that was measured, in any cell. Correct its name"
                yield Row(
                    suite=", ".join(sorted(self._suites)),
                    cell="every cell",
                    metric=pattern,
                    outcome=Outcome.MISSING,
                    reason=f"{why} or remove it.{did_you_mean(pattern, sorted(self._others))}",
                )

    def _row(
        self,
        blank: Row,
        metric: str,
        gate: Gate,
        pairs: Pairs,
        entries: Sequence[tuple[Mapping[str, Any], ...]],
        reasons: Mapping[Kind, Sequence[str]],
        resampled: _Resampled,
    ) -> Row | _Pending:
        kind = kind_of(metric)
        for side, outcome, name in ((1, Outcome.MISSING, "head"), (0, Outcome.EXTRA, "base")):
            for pair in entries:
                if pair[side].get("value") is None:
                    why = f"not measured in {name}: {_first_line(pair[side].get('reason'))}"
                    return replace(blank, metric=metric, outcome=outcome, reason=why)
        values = [tuple(float(entry["value"]) for entry in pair) for pair in entries]
        is_ratio = kind in ("time", "memory", "count")
        can_log = all(value > 0 for pair in values for value in pair)
        means = [_mean([pair[side] for pair in values], is_ratio and can_log) for side in (0, 1)]
        unit = str(entries[0][1].get("unit") or "")
        row = replace(blank, metric=metric, base=means[0], head=means[1], unit=unit, is_ratio=is_ratio)
        if reasons[kind]:
            return replace(row, outcome=Outcome.NOT_COMPARABLE, reason="; ".join(reasons[kind]))
        directions = {entry.get("higher_is_better") for pair in entries for entry in pair}
        units = {entry.get("unit") for pair in entries for entry in pair}
        if len(directions) > 1 or len(units) > 1:
            return replace(row, outcome=Outcome.NOT_COMPARABLE, reason="unit or direction differs")
        if kind == "score":
            if apart := next((told for pair in pairs if (told := why_not_together(pair))), ""):
                return replace(row, outcome=Outcome.NOT_COMPARABLE, reason=apart)
            head = metric.partition("/")[0]
            if head not in resampled:
                resampled[head] = self._resample(head, pairs)
            if isinstance(unlike := resampled[head], str):
                return replace(row, outcome=Outcome.NOT_COMPARABLE, reason=unlike)
        if all(old == new for old, new in values):
            return replace(row, outcome=Outcome.SAME, change=0.0, reason="equal")
        (higher,) = directions
        if higher is None:
            return replace(row, outcome=Outcome.NOT_COMPARABLE, reason="neither direction is better")
        if is_ratio and not can_log:
            return _with_zero(row, gate, kind)
        if kind == "time" and (disturbed := _unlike_shares(pairs, metric)):
            return replace(row, outcome=Outcome.NOISY, reason=disturbed)
        row = replace(row, change=means[1] / means[0] - 1 if is_ratio else means[1] - means[0])
        found = self._effect(row, gate, kind, pairs, values, -1.0 if higher else 1.0, resampled)
        if kind == "count":
            return _exact(row, found)
        if found.is_paired:
            row = replace(row, change=math.expm1(-found.size if higher else found.size))
        return _Pending(row, found)

    def _effect(
        self,
        row: Row,
        gate: Gate,
        kind: Kind,
        pairs: Pairs,
        values: Sequence[tuple[float, ...]],
        sign: float,
        resampled: _Resampled,
    ) -> _Effect:
        assert row.base is not None
        assert row.head is not None
        better = max(row.base, row.head) if sign < 0 else min(row.base, row.head)
        if row.is_ratio:
            effects = [sign * math.log(new / old) for old, new in values]
            margin = math.log1p(max(gate.relative, gate.absolute / better))
        else:
            effects = [sign * (new - old) for old, new in values]
            margin = max(gate.relative * abs(better), gate.absolute)
        if kind == "count":
            return _Effect(statistics.fmean(effects), margin, 0.0, math.inf, "exact")
        machines = sorted({machine_of(record) for pair in pairs for record in pair})
        if (raced := _raced(pairs, row.metric) if kind == "time" else None) is not None:
            return self._race_effect(raced, [sign * math.log(ratio.value) for ratio in raced], margin)
        size = statistics.fmean(effects)
        within, basis = self._within(row.metric, kind, pairs, resampled)
        between = self._between(machines, row.metric, kind, gate, effects)
        if between is None and kind != "score":
            why = "one run a side and no noise floor (diffbench calibrate, or noise in the gate)"
            return _Effect(size, margin, None, math.inf, why)
        if kind == "time" and within is None and between is not None and between[0] == 0:
            return _Effect(size, margin, None, math.inf, "too few samples, and no noise floor above 0")
        if between is None and within is None:
            return _Effect(size, margin, None, math.inf, "one run a side, no interval and no noise floor")
        parts = list(within or [])
        if between is not None:
            variance, degrees, said = between
            # The spread of paired runs holds the samples' share already; that of images is the same in all runs.
            parts = parts if kind == "score" or said != "runs" else []
            parts.append((variance, degrees))
            basis = ", ".join(part for part in (basis if len(parts) > 1 else "", said) if part)
        error, degrees = combine(parts)
        if kind == "score" and error <= _CLOSE:
            why = "nothing varies: no interval over images, no spread over runs and no noise floor above 0"
            return _Effect(size, margin, None, math.inf, why)
        return _Effect(size, margin, error, degrees, basis)

    @staticmethod
    def _race_effect(raced: Sequence[Ratio], effects: Sequence[float], margin: float) -> _Effect:
        """Of the rounds of a race: their spread holds the images' share already."""
        size, basis = statistics.fmean(effects), "image by image, rounds"
        if len(raced) < MIN_ROUNDS:
            why = f"a race of {len(raced)} round{'' if len(raced) == 1 else 's'}, at least {MIN_ROUNDS} are needed"
            return _Effect(size, margin, None, math.inf, why, is_paired=True)
        error = math.sqrt(statistics.variance(effects) / len(effects))
        return _Effect(size, margin, error, len(effects) - 1.0, basis, is_paired=True)

    def _within(
        self,
        metric: str,
        kind: Kind,
        pairs: Pairs,
        resampled: _Resampled,
    ) -> tuple[list[tuple[float, float]] | None, str]:
        """Variances that one run of each side shows by itself: of its samples, or of its images."""
        if kind == "time":
            errors = [_sample_error(record, metric) for pair in pairs for record in pair]
            if any(error is None for error in errors):
                return None, ""
            scale = 1 / len(pairs) ** 2
            return [(error[0] ** 2 * scale, error[1]) for error in errors if error is not None], "samples"
        if kind != "score":
            return None, ""
        head, _, name = metric.partition("/")
        drawn = resampled.get(head)
        if isinstance(drawn, list) and name in _RESAMPLED:
            found = [intervals[name] for intervals in drawn]
            if all(interval.standard_error is not None for interval in found):
                # The same images in all runs: their share does not shrink with the number of runs.
                variance = statistics.fmean((interval.standard_error or 0.0) ** 2 for interval in found)
                return [(variance, max(1, found[0].count - 1))], "images, paired"
        if drawn is None:
            carried = [paired_difference([old], [new], metric) for old, new in pairs]
            known = [interval.standard_error for interval in carried if interval is not None]
            if len(known) == len(pairs) and all(error is not None for error in known):
                variance = statistics.fmean((error or 0.0) ** 2 for error in known)
                return [(variance, math.inf)], "images, paired"
        stored = [[_standard_error(record, metric) for record in pair] for pair in pairs]
        if any(error is None for pair in stored for error in pair):
            return None, ""
        variance = statistics.fmean(sum((error or 0.0) ** 2 for error in pair) for pair in stored)
        return [(variance, math.inf)], "images"

    def _between(
        self, machines: Sequence[str], metric: str, kind: Kind, gate: Gate, effects: Sequence[float]
    ) -> tuple[float, float, str] | None:
        """Variance of the effect from run to run, its degrees of freedom, and where it is from."""
        floor = self.noise.of(machines, metric)
        floors = [] if floor is None else [(floor.noise, float(floor.degrees_of_freedom))]
        if gate.noise is not None:
            floors.append((gate.noise, math.inf))
        count = len(effects)
        known = [(2 * noise**2 / count, degrees, "noise floor") for noise, degrees in floors]
        # A floor of AP may be from runs of one seed: it does not take the place of what several seeds show.
        if count > 1 and (kind == "score" or not floors):
            known.append((statistics.variance(effects) / count, count - 1.0, "runs"))
        # The one that allows more, as little may be known of the larger one.
        return max(known, key=lambda entry: entry[0] * two_sided_quantile(0.05, entry[1]) ** 2, default=None)

    def _resample(self, head: str, pairs: Pairs) -> list[Mapping[str, Interval]] | str | None:
        """Differences of resampled images of each pair; see `_Resampled`."""
        if self.read_matches is None:
            return None
        found: list[Mapping[str, Interval]] = []
        for pair in pairs:
            old, new = ((self.read_matches(record) or {}).get(head) for record in pair)
            if old is None or new is None:
                return None
            if not np.array_equal(old.image_ids, new.image_ids):
                return f"scored on {len(old.image_ids)} and {len(new.image_ids)} images, which are not the same ones"
            found.append(bootstrap_difference(old, new, num_resamples=self.num_resamples))
        return found


def _reasons(pairs: Pairs) -> dict[Kind, list[str]]:
    found: dict[Kind, dict[str, None]] = defaultdict(dict)
    for old, new in pairs:
        for kind, texts in differences(old, new).items():
            found[kind].update(dict.fromkeys(texts))
    return {kind: list(texts) for kind, texts in found.items()}


def _mean(values: Sequence[float], is_log: bool) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.geometric_mean(values) if is_log else statistics.fmean(values)


def _sample_error(record: Record, metric: str) -> tuple[float, float] | None:
    name, _, scope = metric.partition("/")
    q = 0.5
    if name in ("latency_s", "training_step_s") and (match := _QUANTILE.match(scope)):
        scope, q = match[1], int(match[2]) / 100
    samples = record.get("samples", {}).get(name, {}).get(scope)
    error = None if samples is None else log_error(samples, q)
    return None if error is None else (error.standard_error, error.degrees_of_freedom)


def _raced(pairs: Pairs, metric: str) -> list[Ratio] | None:
    """The ratios of each round of a race, image by image; None if it was none, or has no samples of the metric."""
    if not all(is_race(old, new) for old, new in pairs):
        return None
    name, _, scope = metric.partition("/")
    found = []
    for pair in pairs:
        sides = [record.get("samples", {}).get(name, {}).get(scope) or [] for record in pair]
        ratio = paired_ratio(*sides) if len(sides[0]) == len(sides[1]) and len(sides[0]) % 2 == 0 else None
        if ratio is None:
            return None
        found.append(ratio)
    return found


def _unlike_shares(pairs: Pairs, metric: str) -> str:
    """Why the times are not judged, if one side was disturbed more than the other."""
    name = metric.partition("/")[0]
    shares = [disturbed_share([pair[side] for pair in pairs], name) for side in (0, 1)]
    if shares[0] is None or shares[1] is None or abs(shares[0] - shares[1]) <= UNLIKE_SHARES:
        return ""
    texts = " and ".join(f"{share:.0%}" for share in shares)
    return f"disturbed unlike: {texts} of the samples were contended or throttled; time them again"


def _standard_error(record: Record, metric: str) -> float | None:
    value = record.get("metrics", {}).get(metric, {}).get("standard_error")
    return None if value is None else float(value)


def _with_zero(row: Row, gate: Gate, kind: Kind) -> Row:
    """A count of 0, or a scope that was never entered, on one side: there is no ratio."""
    assert row.base is not None
    assert row.head is not None
    if kind == "time":
        return replace(row, outcome=Outcome.NOT_COMPARABLE, reason="timing scope entered on one side only")
    if abs(row.head - row.base) < gate.absolute:
        return replace(row, outcome=Outcome.SAME, reason="exact")
    return replace(row, outcome=Outcome.WORSE if row.head > row.base else Outcome.BETTER, reason="exact")


def _exact(row: Row, effect: _Effect) -> Row:
    if abs(effect.size) < effect.margin * (1 - _CLOSE):
        return replace(row, outcome=Outcome.SAME, reason="exact, within the gate")
    return replace(row, outcome=Outcome.WORSE if effect.size > 0 else Outcome.BETTER, reason="exact")


# -- the whole table ---------------------------------------------------------------------------------------------------


def _decide(found: Sequence[Row | _Pending], level: float) -> tuple[Row, ...]:
    """Rows with their outcomes: all tests of the table are decided together."""
    tested = [entry for entry in found if isinstance(entry, _Pending) and entry.effect.error is not None]
    p_values = [p_of(entry.effect.size, entry.effect.error or 0.0, entry.effect.degrees) for entry in tested]
    rejected = holm(p_values, level=level)
    decisions = {id(entry): (p_value, reject) for entry, p_value, reject in zip(tested, p_values, rejected)}
    rows = []
    for entry in found:
        if isinstance(entry, Row):
            rows.append(entry)
        elif id(entry) in decisions:
            rows.append(_judged(entry.row, entry.effect, *decisions[id(entry)], level / len(tested)))
        else:
            rows.append(replace(entry.row, outcome=Outcome.NOISY, reason=entry.effect.basis))
    return tuple(rows)


def _judged(row: Row, effect: _Effect, p_value: float, is_rejected: bool, strictest: float) -> Row:
    assert effect.error is not None
    half = two_sided_quantile(0.05, effect.degrees) * effect.error
    sign = 1.0 if (row.change or 0.0) * effect.size >= 0 else -1.0
    ends = sorted((sign * (effect.size - half), sign * (effect.size + half)))
    needed = max(effect.margin, two_sided_quantile(strictest, effect.degrees) * effect.error)
    if row.is_ratio:
        ends, needed = [math.expm1(end) for end in ends], math.expm1(needed)
    passes = abs(effect.size) >= effect.margin * (1 - _CLOSE)
    if passes and is_rejected:
        outcome = Outcome.WORSE if effect.size > 0 else Outcome.BETTER
    else:
        outcome = Outcome.SAME if abs(effect.size) + half < effect.margin else Outcome.NOISY
    return replace(
        row, outcome=outcome, low=ends[0], high=ends[1], smallest=needed, p_value=p_value, reason=effect.basis
    )
