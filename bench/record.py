"""One run's record: what was run, on what, with which result. A JSON file that stands alone and is read for years.

A record says `ok`, `failed` (with a reason and the end of the log) or `skipped` (with a reason); a missing record is a
missing file. What was not measured is null with a reason, never 0. Records hold no host names, user names or machine
paths: `scrub` takes them out before writing.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import string
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from bench.errors import NewerRecordError, RecordError

SCHEMA_VERSION: Final = 2


def _upgrade_1(content: dict[str, Any]) -> dict[str, Any]:
    """Version 2 added what version 1 did not know of: errors, resamples, checks, code and the environment's id."""
    return content | {"schema_version": 2}


# From an older schema version to the next one; each takes and returns the parsed JSON.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _upgrade_1}

FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Status = Literal["ok", "failed", "skipped"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Metric(_Part):
    """One number with its unit and direction; `value` is None exactly when `reason` says why there is none.

    unit: 'fraction', 's', 'bytes', 'FLOP', ... higher_is_better: None where neither direction is better.
    standard_error: in the metric's unit, where one run tells it; the 95 % interval is value +- 1.96 of it. error_of:
    what would have to be drawn again for the value to vary so ('images'); set exactly when there is a standard error.
    """

    value: int | FiniteFloat | None
    unit: str
    higher_is_better: bool | None
    reason: str | None = None
    standard_error: Annotated[FiniteFloat, Field(ge=0)] | None = None
    error_of: Literal["images"] | None = None

    @model_validator(mode="after")
    def _reason_for_nothing(self) -> Self:
        if (self.value is None) != (self.reason is not None):
            raise ValueError("a metric has either a value or a reason why it has none")
        if (self.standard_error is None) != (self.error_of is None):
            raise ValueError("a standard error says of what, and nothing says so without one")
        if self.value is None and self.standard_error is not None:
            raise ValueError("a metric without a value has no standard error")
        return self


# First part of a metric's name, or the whole -> unit, and whether more is better.
_UNITS: dict[str, tuple[str, bool | None]] = {
    "segm": ("fraction", True),
    "bbox": ("fraction", True),
    "latency_s": ("s", False),
    "training_step_s": ("s", False),
    "peak_memory_bytes": ("bytes", False),
    "num_parameters": ("parameters", False),
    "flops": ("FLOP", False),
    "num_images": ("images", None),
    "num_instances": ("instances", None),
}


def metric(name: str, value: float | None, reason: str | None = None) -> Metric:
    """A metric with the unit and direction that belong to its name; `reason` counts only where there is no value.

    Raises:
        KeyError: no unit is known for the name.
    """
    unit, higher_is_better = _UNITS[name.split("/")[0]]
    why = None if value is not None else reason or "not measured"
    return Metric(value=value, unit=unit, higher_is_better=higher_is_better, reason=why)


_BASE64 = string.ascii_letters.encode() + string.digits.encode() + b"+/"


class Resamples(_Part):
    """A metric of resampled images, in the order of the draws, so that two records can be compared image by image.

    Records whose `images`, `seed` and `count` are equal were drawn together: the spread of the differences of their
    values is the standard error of the difference.

    images: digest of the image ids, in the order of the draws, a colon and a digest of what is labelled on them, which
    older records lack. seed, count: of the draws, see `bench.stats.bootstrap`.
    values: `count` little-endian float32 numbers in base64; NaN where a draw has no instance.
    """

    of: Literal["images"] = "images"
    images: str
    num_images: int
    seed: int
    count: int
    values: str

    @model_validator(mode="after")
    def _all_there(self) -> Self:
        if problem := check_resamples(self.values, self.count):
            raise ValueError(problem)
        return self


def check_resamples(values: str, count: int) -> str | None:
    """What is wrong with `Resamples.values` of so many draws; None if nothing.

    Told without decoding, which would take as long as all the rest of reading a record.
    """
    padding = values.encode(errors="replace").translate(None, _BASE64)
    if padding not in (b"", b"=", b"==") or len(values) % 4 or not values.endswith(padding.decode()):
        return "values are not base64"
    size = len(values) // 4 * 3 - len(padding)
    return None if size == 4 * count else f"values hold {size} bytes instead of 4 for each of {count} draws"


def pack_resamples(values: Sequence[float]) -> str:
    """`Resamples.values` of numbers."""
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode("ascii")


def unpack_resamples(values: str) -> list[float]:
    """The numbers of `Resamples.values`.

    Raises:
        ValueError: not base64, or no whole number of float32.
    """
    return [value for (value,) in struct.iter_unpack("<f", binascii.a2b_base64(values, strict_mode=True))]


class SampleMarks(_Part):
    """Numbers of the samples, from 0, that bear a mark; None exactly when `reason` says why it cannot be told."""

    samples: list[Annotated[int, Field(ge=0)]] | None
    reason: str | None = None

    @model_validator(mode="after")
    def _reason_for_nothing(self) -> Self:
        if (self.samples is None) != (self.reason is not None):
            raise ValueError("marks are either samples or a reason why they cannot be told")
        return self


class NodeRun(_Part):
    """When and from which source a node of this run was computed (it may be shared with other runs, and older).

    attempts: how often it was started, the finishing attempt included; duration_s is that of the last attempt only.
    environment_id: as the record's, of this node's process. device: that it computed on, a GPU by its name; None where
    the node uses none, and like environment_id in records from before it was noted.
    """

    started_at: str
    duration_s: FiniteFloat
    attempts: int
    commit: str | None
    dirty: bool | None
    environment_id: str | None = None
    device: str | None = None


class RunRecord(_Part):
    """One row of a suite's table. Times are UTC, ISO 8601; durations are in seconds.

    measure: what was to be measured, how long at least, and the device asked for ('auto' if none was). nodes: node kind
    -> node id. node_runs: node kind -> when it ran. samples: name -> scope -> raw values, in the unit that ends the
    name ('latency_s'). sample_marks: name -> 'contended' or 'throttled' -> which samples were (see
    `bench.measure.disturbances`), whatever the scope; empty where nobody looked. per_class: metric name -> class name
    -> value; per_class_errors: the same -> standard error over images, where it is told. resamples: metric name -> its
    values on resampled images. checks: name -> what was compared and the largest difference ('evaluators'). code: node
    kind -> digest of the code that it ran; empty in records of version 1. environment: of the process that took the
    measurements; environment_id: digest of what of it can change a number or a time. duration_s: sum over the run's
    nodes. log: the end of the failed node's log, if one failed.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    suite: str
    run_id: str
    label: str
    status: Status
    reason: str | None = None
    axes: dict[str, Any]
    config: dict[str, Any]
    measure: dict[str, Any] = {}
    nodes: dict[str, str]
    node_runs: dict[str, NodeRun] = {}
    metrics: dict[str, Metric] = {}
    samples: dict[str, dict[str, list[FiniteFloat]]] = {}
    sample_marks: dict[str, dict[str, SampleMarks]] = {}
    per_class: dict[str, dict[str, FiniteFloat | None]] = {}
    per_class_errors: dict[str, dict[str, FiniteFloat | None]] = {}
    resamples: dict[str, Resamples] = {}
    checks: dict[str, dict[str, Any]] = {}
    code: dict[str, str] = {}
    environment_id: str | None = None
    environment: dict[str, Any] = {}
    command: str
    started_at: str | None
    finished_at: str | None
    duration_s: FiniteFloat | None
    log: str | None = None

    @model_validator(mode="after")
    def _reason_for_failure(self) -> Self:
        if (self.status == "ok") != (self.reason is None):
            raise ValueError("a record that is not 'ok' says why, and one that is 'ok' has no reason")
        return self

    def same_result(self, other: RunRecord) -> bool:
        """Whether both give the same numbers for the same run, whatever command line asked for it, and whenever."""
        ignored = {"command", "measure", "node_runs", "started_at", "finished_at", "duration_s", "log"}
        ignored |= {"environment", "environment_id"}
        return self.model_dump(exclude=ignored) == other.model_dump(exclude=ignored)


def dump_record(record: RunRecord) -> str:
    """The record as JSON text, keys in the order of the fields, one line per list of numbers."""
    content = record.model_dump(mode="json")
    for entry in content["metrics"].values():
        for name in ("reason", "standard_error", "error_of"):
            if entry[name] is None:
                del entry[name]
    for run in content["node_runs"].values():
        for name in ("environment_id", "device"):
            if run[name] is None:
                del run[name]
    return dump_json(content)


def load_record(path: Path) -> RunRecord:
    """Read one record file.

    Raises:
        RecordError: the file is unreadable, not a record, or of a schema version this program does not know
            (NewerRecordError: of one that is to come).
    """
    return parse_record(parse_json(read_bytes(path), str(path)), str(path))


def parse_record(content: Any, source: str) -> RunRecord:
    """A record from parsed JSON; `source` names it in errors. Older schema versions are upgraded, newer ones refused.

    Raises:
        RecordError: see `load_record`.
    """
    return _validated(_upgraded(content, source), source)


def parse_plain(content: Any, source: str) -> dict[str, Any]:
    """The plain JSON object of a record, checked as by `parse_record`: what the file has and, of fields that it lacks,
    what they are without it.

    Raises:
        RecordError: see `load_record`.
    """
    content = _upgraded(content, source)
    _validated(content, source)
    fields = RunRecord.model_fields
    return {name: content[name] if name in content else field.get_default() for name, field in fields.items()}


def read_bytes(path: Path) -> bytes:
    """
    Raises:
        RecordError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from error


def parse_json(data: bytes, source: str) -> Any:
    """
    Raises:
        RecordError: it is no JSON; `source` names it.
    """
    try:
        return from_json(data, cache_strings="all")
    except ValueError as error:
        raise RecordError(f"{source}: not valid JSON ({error}). Restore the file or delete it and run again") from error


def _upgraded(content: Any, source: str) -> dict[str, Any]:
    """The content of a record of any known version as that of today's."""
    if not isinstance(content, dict) or not isinstance(content.get("schema_version"), int):
        raise RecordError(f"{source}: not a run record (no schema_version)")
    while content["schema_version"] in UPGRADES:
        content = UPGRADES[content["schema_version"]](content)
    version = content["schema_version"]
    if version != SCHEMA_VERSION:
        refusal = NewerRecordError if version > SCHEMA_VERSION else RecordError
        raise refusal(
            f"{source}: schema version {version}, but this program reads up to {SCHEMA_VERSION}. "
            "Upgrade it to the version that wrote the record, or a newer one"
        )
    return content


def _validated(content: dict[str, Any], source: str) -> RunRecord:
    try:
        # Strict: reports read the content as it stands, and a number in quotes is none to them.
        return RunRecord.model_validate(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the record"
        raise RecordError(f"{source}: {place}: {first['msg']}. Restore the file or delete it and run again") from error


# A line break inside a list of numbers; JSON strings hold no line breaks, so no string is ever touched.
_NUMBER_LIST = re.compile(r"\[\n\s*([-+0-9.eE]+(?:,\s+[-+0-9.eE]+)*)\s+\]")


def dump_json(content: Any) -> str:
    """JSON for people and for diffs: indented, lists of numbers on one line, a final line break; NaN is refused."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    return _NUMBER_LIST.sub(lambda match: "[" + re.sub(r",\s+", ", ", match[1]) + "]", text) + "\n"


# An absolute POSIX path of at least two parts that is no part of a word, of a URL or of a relative path.
_ABSOLUTE_PATH = re.compile(r"(?<![\w./<>~-])/(?:[^\s/'\"`,;:()<>|]+/)+([^\s/'\"`,;:()<>|]*)")


def scrub(value: Any, replacements: Mapping[str, str]) -> Any:
    """A copy of JSON-able `value` in which no string, keys included, tells the machine.

    Args:
        replacements: text -> what stands for it, such as {'/home/ann/coco': '<data-root>', 'ann-laptop': '<host>'};
            longer texts go first. Every absolute path left after that keeps its last part only: '<path>/last'.
    """
    ordered = sorted(((text, mark) for text, mark in replacements.items() if text), key=lambda pair: -len(pair[0]))
    patterns = [(re.compile(rf"(?<![\w.-]){re.escape(text)}(?![\w-])"), mark) for text, mark in ordered]

    def clean(item: Any) -> Any:
        if isinstance(item, str):
            for pattern, mark in patterns:
                item = pattern.sub(mark.replace("\\", r"\\"), item)
            return _ABSOLUTE_PATH.sub(lambda match: f"<path>/{match[1]}", item)
        if isinstance(item, Mapping):
            return {clean(key): clean(entry) for key, entry in item.items()}
        if isinstance(item, (list, tuple)):
            return [clean(entry) for entry in item]
        return item

    return clean(value)
