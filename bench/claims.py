"""Published numbers: claim files, checked whole, and the lock that holds them to what was reviewed.

    source: {name: ..., kind: ..., url: ..., revision: ..., date: '2023-01-03', place: ...}     # all needed
    defaults: {quantity: mask AP, metric: segm/AP, ...}           # fields of all claims below
    groups:
      - name: val                                                 # fields of these claims go under `common`
        common: {dataset: coco, split: val2017, images: 5000}
        claims:
          - {id: r50-1, value: 37.3, sampling_steps: 1, superseded: [...]}

A claim's own field wins over its group's, that over the file's. `Claim` says what the fields mean. Loads no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from bench.errors import BenchError, SuiteError, SuiteErrors
from bench.fields import INVALID, check_value, show, unknown
from bench.suite import METRICS
from bench.yaml_source import Item, Place, read_yaml

LOCK_NAME = "claims.lock"
SourceKind = Literal["readme", "model zoo", "paper"]
Publicity = Literal["public", "partly", "not public"]
EvidenceKind = Literal["weights", "training", "none"]

Finite = Annotated[float, Field(allow_inf_nan=False)]
Half = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

_ID = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_UNKNOWN = "unknown"
# What a file has to say of its source -> what it may say, where that is not plain.
_SOURCE_NEEDS = {
    "name": "a text for people",
    "kind": ", ".join(get_args(SourceKind)),
    "url": "its address",
    "revision": f"a commit or version, or {_UNKNOWN}",
    "date": f"a day as 2022-12-31, or {_UNKNOWN}",
    "place": "a table or section",
}
_LOCK_HEAD = """\
# The claim files as they were reviewed, a line a value: `diffbench verify` holds them to it.
# After a change on purpose: diffbench claims --lock, and review the difference of this file with that of the claims.
"""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Source(_Part):
    """Where a file's claims stand.

    name: for people. kind: what it is. revision: commit or version. date: of the revision, or from when on the values
    stand there, ISO 8601. Either is '' where it is not known: a file says `unknown` then, and leaves out neither.
    place: table or section. note: what else is to be known.
    """

    name: str
    kind: SourceKind
    url: str
    revision: str = ""
    date: str = ""
    place: str
    note: str = ""


class Superseded(_Part):
    """A value that the same source gave earlier, and from when to when (ISO dates); revision: one that has it."""

    value: Finite
    since: str
    until: str
    revision: str = ""


class ClaimFields(_Part):
    """What one claim says. Every field but `value` has a default here; `_missing` says which are needed when.

    value: as published. quantity, unit: for people. metric: of a record, times `scale` it is in the unit; null: the
    harness does not measure it.
    method, dataset, split, images, backbone, sampling_steps, num_proposals: of what; images is the size of the split.
    row, column: where in the source's table. protocol: how it was measured there, as far as the source says.
    engine: which engine of the harness measures it.
    weights, config: how far they are published; weights_where: and where. weights_file: what the suites call them once
    they are imported. assumed: what had to be assumed because the configuration is not public, or not wholly.
    server: only an evaluation server can score the split.
    evidence: what can check it: the published weights; a training (of at least `iterations` of `batch_size` images);
    or nothing here, for the reason `why_not`.
    deterministic: nothing is drawn at random when the weights are measured, so that one run is its own interval.
    tolerance_within: how far a measured value may be off and still count as the same. tolerance_sampling: how far
    sampling (of images, of noise) can move it. Both in the unit; tolerance_basis: why these.
    contradicted: what another revision of the same source says instead; such a value is not measured.
    """

    value: Finite = 0.0
    quantity: str = ""
    unit: str = ""
    metric: str | None = None
    scale: Finite = 100.0
    method: str = ""
    dataset: str = ""
    split: str = ""
    images: Count | None = None
    backbone: str | None = None
    sampling_steps: Count | None = None
    num_proposals: Count | None = None
    row: str = ""
    column: str = ""
    protocol: str = ""
    engine: str = "diffinst"
    weights: Publicity = "not public"
    weights_where: str = ""
    weights_file: str | None = None
    config: Publicity = "not public"
    config_where: str = ""
    assumed: str = ""
    server: bool = False
    evidence: EvidenceKind = "none"
    why_not: str = ""
    iterations: Count | None = None
    batch_size: Count | None = None
    deterministic: bool = False
    tolerance_within: Half | None = None
    tolerance_sampling: Half | None = None
    tolerance_basis: str = ""
    contradicted: str = ""
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """A published number, its source and where its file has it.

    id: unique over all files; that of a superseded value ends with '@' and the last day it stood.
    is_superseded: one that the source itself replaced.
    """

    id: str
    fields: ClaimFields
    source: Source
    superseded: tuple[Superseded, ...] = ()
    place: Place = field(default=Place(None), compare=False)
    is_superseded: bool = False

    @property
    def value_text(self) -> str:
        """The value as the source prints it: 37.3, 48.0, 0.043."""
        value = self.fields.value
        whole = value.is_integer() and not self.fields.unit.startswith(("AP", "%"))
        return str(int(value)) if whole else str(value)

    def earlier(self) -> Iterator[Claim]:
        """The superseded values as claims of their own, which the source contradicts."""
        for old in self.superseded:
            says = f"given from {old.since} to {old.until}; the source says {self.value_text} since"
            source = self.source.model_copy(update={"revision": old.revision, "date": old.since})
            fields = self.fields.model_copy(update={"value": old.value, "contradicted": says})
            yield Claim(f"{self.id}@{old.until}", fields, source, (), self.place, is_superseded=True)


def claim_files(folder: Path) -> list[Path]:
    """The claim files of a folder, in order of name.

    Raises:
        BenchError: there are none.
    """
    paths = sorted(folder.glob("*.yaml")) if folder.is_dir() else []
    if not paths:
        raise BenchError(f"{folder}: no claim files. Give the folder that holds them with --claims DIR")
    return paths


def load_claims(folder: Path) -> dict[str, Claim]:
    """All claims of a folder by id, in the order of files and entries.

    Raises:
        BenchError: there are no claim files.
        SuiteErrors: everything that is wrong in them, with its place.
    """
    problems: list[SuiteError] = []
    found: dict[str, Claim] = {}
    for path in claim_files(folder):
        _File(path, found, problems).read()
    if problems:
        raise SuiteErrors(sorted(problems, key=lambda error: (str(error.file), error.line or 0, error.column or 0)))
    return found


def _read(path: Path, problems: list[SuiteError]) -> Item | None:
    try:
        root, found = read_yaml(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        problems.append(SuiteError(f"cannot be read ({error})", file=path))
        return None
    except SuiteErrors as error:
        problems.extend(error.errors)
        return None
    problems.extend(found)
    return root


class _File:
    """Reads one claim file into `found`; notes what is wrong in `problems`."""

    keys = ("source", "defaults", "groups")
    group_keys = ("name", "common", "claims")

    def __init__(self, path: Path, found: dict[str, Claim], problems: list[SuiteError]) -> None:
        self.path, self.found, self.problems = path, found, problems

    def read(self) -> None:
        root = _read(self.path, self.problems)
        if root is None:
            return
        if not self._is_mapping(root, "", self.keys):
            return
        source = self._source(root)
        defaults = self._some_fields(root.value.get("defaults"), "defaults")
        groups = root.value.get("groups")
        if groups is None or not isinstance(groups.value, list) or not groups.value:
            self._note((groups or root).place, "groups", "needs a list of groups, each with a list of claims")
            return
        for position, group in enumerate(groups.value):
            key = f"groups[{position}]"
            if not self._is_mapping(group, key, self.group_keys):
                continue
            common = defaults | self._some_fields(group.value.get("common"), f"{key}.common")
            claims = group.value.get("claims")
            if claims is None or not isinstance(claims.value, list) or not claims.value:
                self._note((claims or group).place, f"{key}.claims", "needs a list of claims")
                continue
            for number, entry in enumerate(claims.value):
                self._claim(entry, f"{key}.claims[{number}]", common, source)

    def _note(self, place: Place, key: str, message: str) -> None:
        self.problems.append(place.error(key, message))

    def _is_mapping(self, item: Item, key: str, allowed: Sequence[str]) -> bool:
        if not isinstance(item.value, dict):
            self._note(item.place, key, f"{show(item.plain())} is not allowed. Allowed: a mapping")
            return False
        for name, place in item.key_places.items():
            if name not in allowed:
                self._note(place, f"{key}.{name}" if key else name, unknown(name, allowed))
        return True

    def _source(self, root: Item) -> Source | None:
        item = root.value.get("source")
        if item is None or not isinstance(item.value, dict):
            self._note((item or root).place, "source", f"needs a mapping with {', '.join(_SOURCE_NEEDS)}")
            return None
        known = len(self.problems)
        values = self._values(Source, item, "source")
        for name, allowed in _SOURCE_NEEDS.items():
            if name not in item.value:
                self._note(item.place, f"source.{name}", f"is needed. Allowed: {allowed}")
            elif values.get(name) == "":
                self._note(item.value[name].place, f"source.{name}", f"'' is not allowed. Allowed: {allowed}")
        for name in ("revision", "date"):
            if values.get(name) == _UNKNOWN:
                values[name] = ""
        if values.get("date"):
            self._check_date(values["date"], item.value["date"].place, "source.date")
        return Source(**values) if len(self.problems) == known else None

    def _values(self, model: type[BaseModel], item: Item, key: str, extra: Sequence[str] = ()) -> dict[str, Any]:
        """The checked fields of a mapping; keys in `extra` are left to the caller."""
        found = {}
        for name, child in item.value.items():
            if name in extra:
                continue
            if name not in model.model_fields:
                self._note(item.key_places[name], f"{key}.{name}", unknown(name, [*model.model_fields, *extra]))
                continue
            value = check_value(model, name, child, f"{key}.{name}", self.problems)
            if value is not INVALID:
                found[name] = value
        return found

    def _some_fields(self, item: Item | None, key: str) -> dict[str, Any]:
        """Fields that several claims share."""
        if item is None or item.value is None:
            return {}
        if not isinstance(item.value, dict):
            self._note(item.place, key, f"{show(item.plain())} is not allowed. Allowed: a mapping of fields")
            return {}
        if "value" in item.value:
            self._note(item.key_places["value"], f"{key}.value", "belongs to one claim, not to several")
        return self._values(ClaimFields, item, key)

    def _claim(self, entry: Item, key: str, common: Mapping[str, Any], source: Source | None) -> None:
        if not isinstance(entry.value, dict):
            self._note(entry.place, key, f"{show(entry.plain())} is not allowed. Allowed: a mapping of fields")
            return
        known = len(self.problems)
        own = self._values(ClaimFields, entry, key, extra=("id", "superseded"))
        superseded = self._superseded(entry.value.get("superseded"), f"{key}.superseded")
        name = self._id(entry, key)
        if "value" not in entry.value:
            self._note(entry.place, key, "needs value, the published number")
        if len(self.problems) > known:
            return
        fields = ClaimFields(**{**common, **own})
        for message in _missing(fields):
            self._note(entry.place, key, message)
        if len(self.problems) == known and source is not None and name is not None:
            self.found[name] = Claim(name, fields, source, superseded, entry.place)

    def _id(self, entry: Item, key: str) -> str | None:
        item = entry.value.get("id")
        if item is None or not isinstance(item.value, str) or not _ID.fullmatch(item.value):
            place = (item or entry).place
            self._note(place, f"{key}.id", "needs an id of up to 64 small letters, digits, '-' and '.'")
            return None
        if item.value in self.found:
            first = self.found[item.value].place
            self._note(item.place, f"{key}.id", f"'{item.value}' is there already, in {first.file}:{first.line}")
            return None
        return str(item.value)

    def _superseded(self, item: Item | None, key: str) -> tuple[Superseded, ...]:
        if item is None or item.value is None:
            return ()
        if not isinstance(item.value, list):
            self._note(item.place, key, f"{show(item.plain())} is not allowed. Allowed: a list of earlier values")
            return ()
        found = []
        for position, entry in enumerate(item.value):
            path = f"{key}[{position}]"
            known = len(self.problems)
            if not self._is_mapping(entry, path, tuple(Superseded.model_fields)):
                continue
            values = self._values(Superseded, entry, path)
            missing = [name for name in ("value", "since", "until") if name not in entry.value]
            if missing:
                self._note(entry.place, path, f"needs {', '.join(missing)} too")
            for name in ("since", "until"):
                if name in values:
                    self._check_date(values[name], entry.value[name].place, f"{path}.{name}")
            if len(self.problems) == known and values["since"] > values["until"]:
                self._note(entry.place, path, f"since {values['since']} is after until {values['until']}")
            if len(self.problems) == known:
                found.append(Superseded(**values))
        return tuple(found)

    def _check_date(self, text: str, place: Place, key: str) -> None:
        try:
            date.fromisoformat(text)
        except ValueError:
            self._note(place, key, f"{show(text)} is not allowed. Allowed: a day as 2022-12-31")


def _missing(fields: ClaimFields) -> Iterator[str]:
    """What a claim lacks for what it says of itself."""
    for name in ("quantity", "unit", "method", "dataset"):
        if not getattr(fields, name):
            yield f"needs {name}"
    if fields.metric is not None and fields.metric not in METRICS:
        allowed = "metrics such as segm/AP, bbox/AP, latency_s/total; null"
        yield f"metric '{fields.metric}' is not measured. Allowed: {allowed}"
    if fields.evidence == "none":
        if not fields.why_not and not fields.contradicted:
            yield "needs why_not, as its evidence is none"
        return
    wanted = ["metric", "split", "images", "tolerance_within", "tolerance_sampling", "tolerance_basis"]
    wanted += {"weights": ["weights_file"], "training": ["iterations", "batch_size"]}[fields.evidence]
    lacking = [name for name in wanted if getattr(fields, name) in (None, "")]
    if lacking:
        yield f"needs {', '.join(lacking)}, as its evidence is {fields.evidence}"
    within, sampling = fields.tolerance_within, fields.tolerance_sampling
    if within is not None and sampling is not None and within > sampling:
        yield f"tolerance_within {within} is above tolerance_sampling {sampling}"
    if fields.config != "public" and not fields.assumed:
        yield f"needs assumed, as its config is {fields.config}"


# -- the lock ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mismatch:
    """One place where a file is not as it should be. place: 'FILE:LINE'; message: what is there, what should be."""

    place: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


def lock_text(folder: Path) -> str:
    """What the lock of these claim files says: a line 'FILE KEY = JSON value' for each value in them.

    Raises:
        BenchError, SuiteErrors: as `load_claims`.
    """
    load_claims(folder)
    return _LOCK_HEAD + "".join(f"{name} = {value}\n" for name, (value, _) in _leaves_of(folder).items())


def check_lock(folder: Path) -> list[Mismatch]:
    """Where the claim files depart from their lock; empty if nowhere.

    Raises:
        BenchError: there are no claim files, or one is no YAML.
    """
    path = folder / LOCK_NAME
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return [Mismatch(str(path), "cannot be read. Make it with: diffbench claims --lock")]
    found = _leaves_of(folder)
    locked: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(lines, start=1):
        if line and not line.startswith("#"):
            name, _, value = line.partition(" = ")
            locked[name] = (value, number)
    problems = []
    for name, (value, place) in found.items():
        key = name.partition(" ")[2]
        if name not in locked:
            problems.append(Mismatch(place, f"{key}: {value} is not in {path.name}"))
        elif locked[name][0] != value:
            was, number = locked[name]
            problems.append(Mismatch(place, f"{key}: {value}, but {path.name}:{number} has {was}"))
    for name, (value, number) in locked.items():
        if name not in found:
            problems.append(Mismatch(f"{path}:{number}", f"{name}: {value} is no longer in the claim files"))
    return problems


def _leaves_of(folder: Path) -> dict[str, tuple[str, str]]:
    """'FILE KEY' -> (value as JSON, 'FILE:LINE') of every value in the claim files."""
    problems: list[SuiteError] = []
    found: dict[str, tuple[str, str]] = {}
    for path in claim_files(folder):
        root = _read(path, problems)
        if root is not None:
            for key, item in _leaves(root, ""):
                # A key that is there twice keeps its number, so that none is lost.
                found[f"{path.name} {key}"] = (
                    json.dumps(item.plain(), ensure_ascii=False),
                    f"{path}:{item.place.line}",
                )
    if problems:
        raise SuiteErrors(problems)
    return found


def _leaves(item: Item, key: str) -> Iterator[tuple[str, Item]]:
    if isinstance(item.value, dict):
        for name, child in item.value.items():
            yield from _leaves(child, f"{key}.{name}" if key else name)
    elif isinstance(item.value, list):
        for name, child in zip(_entry_names(item.value), item.value):
            yield from _leaves(child, f"{key}[{name}]")
    else:
        yield key, item


def _entry_names(entries: Iterable[Item]) -> list[str]:
    """A list's entries by their id or name, so that a new one does not rename the others; otherwise by number."""
    names: list[str] = []
    for position, entry in enumerate(entries):
        known = entry.value if isinstance(entry.value, dict) else {}
        item = known.get("id") or known.get("name")
        name = item.value if item is not None and isinstance(item.value, str) else str(position)
        names.append(name if name not in names else f"{name}#{position}")
    return names
