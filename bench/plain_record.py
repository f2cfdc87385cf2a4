"""Records as plain JSON objects, for reports of thousands of them: read and checked in half the time.

A record in the form that `bench.record.dump_record` gives it is checked while it is parsed, and what several records
have in common byte for byte (packages, settings, what a node says of itself) is parsed once. Whatever is not surely a
record of today's version goes the long way over `bench.record`, which upgrades it or says what is wrong with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import DecodeError, Meta, Raw, Struct
from msgspec.json import Decoder, decode
from msgspec.structs import asdict

from bench.record import Status, check_resamples, parse_json, parse_plain, read_bytes

# What fits into 64 bits: of larger ones, the long way says what they are.
_Int = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
_Number = _Int | float


class _Layout(Struct, forbid_unknown_fields=True, gc=False):
    """The fields of a `RunRecord`. Raw: what many records have in common, and what is looked at apart."""

    schema_version: Literal[2]
    suite: str
    run_id: str
    label: str
    status: Status
    axes: dict[str, Any]
    config: dict[str, Raw]
    nodes: dict[str, str]
    command: str
    started_at: str | None
    finished_at: str | None
    duration_s: _Number | None
    reason: str | None = None
    measure: Raw = Raw(b"{}")
    node_runs: dict[str, Raw] = {}
    metrics: dict[str, dict[str, Any]] = {}
    samples: dict[str, dict[str, list[_Number]]] = {}
    sample_marks: Raw = Raw(b"{}")
    per_class: dict[str, dict[str, _Number | None]] = {}
    per_class_errors: dict[str, dict[str, _Number | None]] = {}
    resamples: dict[str, dict[str, Any]] = {}
    checks: Raw = Raw(b"{}")
    code: Raw = Raw(b"{}")
    environment_id: str | None = None
    environment: dict[str, Raw] = {}
    log: str | None = None


class _NodeRun(Struct, forbid_unknown_fields=True):
    """The fields of a `NodeRun`."""

    started_at: str
    duration_s: _Number
    attempts: int
    commit: str | None
    dirty: bool | None
    environment_id: str | None = None
    device: str | None = None


class _SampleMarks(Struct, forbid_unknown_fields=True):
    """The fields of a `SampleMarks`."""

    samples: list[Annotated[int, Meta(ge=0)]] | None
    reason: str | None = None

    def __post_init__(self) -> None:
        if (self.samples is None) != (self.reason is not None):
            raise ValueError("marks are either samples or a reason why they cannot be told")


_LAYOUT = Decoder(_Layout)
_ANYTHING = Decoder(Any)
_OBJECT = Decoder(dict[str, Any])
_TEXTS = Decoder(dict[str, str])
_CHECKS = Decoder(dict[str, dict[str, Any]])
_MARKS = Decoder(dict[str, dict[str, _SampleMarks]])
_NODE_RUN = Decoder(_NodeRun)


class PlainReader:
    """Reads records of one report; parts that are equal in several of them are one object, and not to be changed."""

    def __init__(self) -> None:
        # What a part has to be -> its bytes -> the part, of all records so far.
        self._known: dict[Decoder[Any], dict[bytes, Any]] = {}

    def load(self, path: Path) -> dict[str, Any]:
        """One record file as the plain JSON object of its record, checked as by `bench.record.load_record`.

        Raises:
            RecordError: see there.
        """
        data = read_bytes(path)
        found = self.usual(data)
        return parse_plain(parse_json(data, str(path)), str(path)) if found is None else found

    def usual(self, data: bytes) -> dict[str, Any] | None:
        """The record in the form that most have; None if it is not surely one, which says nothing against it."""
        try:
            found = _LAYOUT.decode(data)
            if (found.status == "ok") != (found.reason is None):
                return None
            if not all(map(_is_usual, found.metrics.values())) or not all(map(_is_whole, found.resamples.values())):
                return None
            content: dict[str, Any] = asdict(found)
            content["measure"] = self._part(found.measure, _OBJECT)
            content["checks"] = self._part(found.checks, _CHECKS)
            content["code"] = self._part(found.code, _TEXTS)
            content["sample_marks"] = self._part(found.sample_marks, _MARKS)
            content["config"] = self._parts(found.config, _ANYTHING)
            content["environment"] = self._parts(found.environment, _ANYTHING)
            content["node_runs"] = self._parts(found.node_runs, _NODE_RUN)
        except (DecodeError, ValueError, RecursionError):
            return None
        return content

    def _parts(self, parts: Mapping[str, Raw], kind: Decoder[Any]) -> dict[str, Any]:
        return {name: self._part(part, kind) for name, part in parts.items()}

    def _part(self, part: Raw, kind: Decoder[Any]) -> Any:
        """A part as it stands, parsed when its bytes are seen for the first time."""
        known, data = self._known.setdefault(kind, {}), bytes(part)
        if data not in known:
            kind.decode(data)
            known[data] = decode(data)
        return known[data]


def load_plain(path: Path) -> dict[str, Any]:
    """One record file, see `PlainReader.load`; of many, one reader takes half the time."""
    return PlainReader().load(path)


def _is_usual(entry: Mapping[str, Any]) -> bool:
    """Is it surely a `Metric`, in a form that is told at a glance? If not, it may still be one."""
    if type(entry.get("unit")) is not str or "higher_is_better" not in entry:
        return False
    value, direction = entry.get("value"), entry["higher_is_better"]
    if direction is not None and type(direction) is not bool:
        return False
    if value is None:
        return len(entry) == 4 and "value" in entry and type(entry.get("reason")) is str
    if type(value) is not float and type(value) is not int or not -math.inf < value < math.inf:
        return False
    error = entry.get("standard_error")
    is_exact = len(entry) == 3
    return (
        is_exact
        or len(entry) == 5
        and type(error) is float
        and 0 <= error < math.inf
        and entry.get("error_of") == "images"
    )


def _is_whole(entry: Mapping[str, Any]) -> bool:
    """Is it surely a `Resamples` with all its fields?"""
    images, values = entry.get("images"), entry.get("values")
    numbers = entry.get("num_images"), entry.get("seed"), entry.get("count")
    if len(entry) != 6 or entry.get("of") != "images" or type(images) is not str or type(values) is not str:
        return False
    return all(type(number) is int for number in numbers) and check_resamples(values, entry["count"]) is None
