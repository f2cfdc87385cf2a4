"""Gates: how much a metric must change, relatively and absolutely, before a comparison speaks of it.

    level: 0.05                       # chance of any false alarm over the whole table
    calibration: calibration.yaml     # noise floors written by `diffbench calibrate`; relative to this file
    require: [segm/AP, latency_s/total]
    gates:
      segm/*:          {relative: 0.02, absolute: 0.005}
      latency_s/total: {relative: 0.05, absolute: 0.0005, noise: 0.02}

A pattern is that of a shell; the first that matches a metric counts, and a metric that none matches is not judged.
A gate that matches no metric measured in any cell is told as missing: its name may be misspelt.
`relative` is a fraction of the better of the two values, `absolute` is in the record's unit. `noise` is a standard
deviation from run to run, of the logarithm for times and memory, in the metric's unit for AP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from bench.errors import SuiteError, SuiteErrors
from bench.fields import Invalid, check_mapping, check_value, show, unknown
from bench.yaml_source import Item, read_yaml

# What the first part of a metric's name may be.
METRIC_KINDS = (
    "segm",
    "bbox",
    "latency_s",
    "training_step_s",
    "peak_memory_bytes",
    "num_parameters",
    "flops",
    "benchmark_s",
)

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Gate(BaseModel):
    """relative: fraction of the better value. absolute: in the record's unit. noise: see the module; None: unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    relative: NonNegative
    absolute: NonNegative
    noise: NonNegative | None = None


class _Head(BaseModel):
    """The file's own keys, as far as they are single values; for checking."""

    level: Annotated[float, Field(ge=0.0001, le=0.5)] = 0.05
    calibration: str | None = None
    require: list[str] = []


@dataclass(frozen=True)
class Gates:
    """gates: pattern -> gate, in order. require: patterns, each of which a metric of every cell must match."""

    gates: Mapping[str, Gate]
    require: tuple[str, ...] = ()
    level: float = 0.05
    calibration: Path | None = None
    file: Path | None = None

    def of(self, metric: str) -> Gate | None:
        """The gate of a metric: that of the first pattern which matches its name."""
        for pattern, gate in self.gates.items():
            if fnmatchcase(metric, pattern):
                return gate
        return None


# Without a gates file; docs/gates.md lists them. Half a point of AP; times by 5 %; what is counted, by anything.
DEFAULT_GATES = Gates(
    {
        "segm/AP": Gate(relative=0.01, absolute=0.005),
        "bbox/AP": Gate(relative=0.01, absolute=0.005),
        "latency_s/total": Gate(relative=0.05, absolute=0.0005),
        "peak_memory_bytes/*": Gate(relative=0.05, absolute=16 * 2**20),
        "num_parameters": Gate(relative=0.0, absolute=0.0),
        "flops": Gate(relative=0.0, absolute=0.0),
        "benchmark_s/*": Gate(relative=0.1, absolute=0.0),
    }
)

_KEYS = ("level", "calibration", "require", "gates")


def load_gates(path: Path) -> Gates:
    """Read a gates file.

    Raises:
        SuiteErrors: everything that is wrong in it, with its place.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SuiteErrors([SuiteError(f"cannot be read ({reason})", file=path)]) from error
    root, problems = read_yaml(text, path)
    gates = _read(root, path, problems)
    if problems or gates is None:
        raise SuiteErrors(sorted(problems, key=lambda error: (error.line or 0, error.column or 0)))
    return gates


def _read(root: Item, path: Path, problems: list[SuiteError]) -> Gates | None:
    if not isinstance(root.value, dict):
        problems.append(root.place.error("", f"{show(root.plain())} is not allowed. Allowed: a mapping with gates"))
        return None
    head: dict[str, Any] = {}
    for name, item in root.value.items():
        if name not in _KEYS:
            problems.append(root.key_places[name].error(name, unknown(name, _KEYS)))
        elif name != "gates":
            value = check_value(_Head, name, item, name, problems)
            if not isinstance(value, Invalid):
                head[name] = value
    patterns = root.value.get("gates")
    if patterns is None or not isinstance(patterns.value, dict) or not patterns.value:
        place = (patterns or root).place
        problems.append(place.error("gates", "needs a mapping from metric patterns to {relative: ..., absolute: ...}"))
        return None
    gates = _gates(patterns, problems)
    require = _require(root.value.get("require"), head.get("require", []), gates, problems)
    calibration = head.get("calibration")
    return Gates(
        gates,
        require,
        head.get("level", _Head().level),
        None if calibration is None else path.parent / calibration,
        path,
    )


def _gates(patterns: Item, problems: list[SuiteError]) -> dict[str, Gate]:
    found: dict[str, Gate] = {}
    for pattern, item in patterns.value.items():
        key, place = f"gates.{pattern}", patterns.key_places[pattern]
        if message := _unknown_kind(pattern):
            problems.append(place.error(key, message))
        for earlier in found:
            if fnmatchcase(pattern, earlier):
                problems.append(place.error(key, f"is never reached: '{earlier}' above matches first. Move it up"))
                break
        known = len(problems)
        values = check_mapping(Gate, item, key, problems)
        missing = [name for name in ("relative", "absolute") if name not in values]
        if len(problems) == known and missing:
            problems.append(item.place.error(key, f"needs {' and '.join(missing)}. Write 0 for no threshold"))
        if len(problems) == known:
            found[pattern] = Gate(**values)
    return found


def _require(
    item: Item | None, patterns: list[str], gates: Mapping[str, Gate], problems: list[SuiteError]
) -> tuple[str, ...]:
    if item is None or not isinstance(item.value, list):
        return ()
    for number, (pattern, entry) in enumerate(zip(patterns, item.value)):
        key = f"require[{number}]"
        if message := _unknown_kind(pattern):
            problems.append(entry.place.error(key, message))
        elif not any(fnmatchcase(pattern, gate) or fnmatchcase(gate, pattern) for gate in gates):
            problems.append(entry.place.error(key, f"no gate is for '{pattern}'. Add one under gates, or leave it out"))
    return tuple(patterns)


def _unknown_kind(pattern: str) -> str:
    kind = pattern.partition("/")[0]
    if any(fnmatchcase(known, kind) for known in METRIC_KINDS):
        return ""
    return unknown(kind, METRIC_KINDS).replace("unknown key", f"no metric begins with '{kind}'", 1)
