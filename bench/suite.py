"""A suite file, checked whole before any work starts: each mistake with its place and what is allowed.

    name: steps                     # letters, digits, '_', '-'; by default the file's name
    description: one line for people
    preset: fixed                   # or released: the bottom layer of all sections (diffinst.config.RELEASED)
    data: {dataset: shapes}         # fields of DataConfig; likewise model, train, sampler
    engine: diffinst                # or a peer, see bench.engines
    axes:
      product: {sampling_steps: [1, 4], num_proposals: [100, 300]}    # every combination, the first axis slowest
      zip: {backbone: [tiny, resnet50], learning_rate: [3.0e-4, 2.5e-5]}   # row by row; combined with the product
      exclude: [{sampling_steps: 4, num_proposals: 300}]              # cells of product and zip that are left out
      include: [{sampling_steps: 8}]                                  # cells besides; unnamed axes keep the base value
    seeds: [0, 1]                   # training seeds; by default train.seed
    measure: {score: true, latency: true, latency_images: 10, latency_seconds: 3.0, memory: true, flops: true}
    tables: [{rows: num_proposals, columns: sampling_steps, metric: segm/AP}, {kind: long, metrics: [segm/AP, flops]}]
    plots: [{x: sampling_steps, y: segm/AP, lines: num_proposals}]
    claims: [{claim: ID, cell: {sampling_steps: 1}}]                # published numbers of cells, see bench.ties

An axis is a field, bare or with its section (`sampler.eta`); or a whole section, whose values are `fixed`, `released`
or a mapping of fields (`sampler: [released, {renewal: false}]`); or `preset`; or `engine`, whose values are whole
engines, each a name or a mapping. Layers, later ones win: preset, the file's section, `--set`, a section's axis, a
field's axis. Loads no torch.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bench.engines import ENGINES, EXTERNAL, EngineConfig, engine_labels, engine_problem
from bench.errors import SuiteError, SuiteErrors
from bench.fields import (
    INVALID,
    check_mapping,
    check_value,
    did_you_mean,
    is_list_field,
    show,
    unknown,
)
from bench.ties import ClaimTie, read_ties
from bench.yaml_source import Item, Place, read_yaml
from diffinst.config import RELEASED, SECTIONS, Config, Section, section_of

# The names of diffinst.data.catalog, which the harness must not import; a test holds the two together.
DATASETS = ("shapes", "coco", "coco_mini", "nuclei", "lvis", "lvis_v05", "lvis_tiny", "custom")
LVIS_DATASETS = ("lvis", "lvis_v05", "lvis_tiny")
LVIS_DETECTIONS = 300  # an image: what LVIS scores, where COCO scores 100
CUSTOM_PATHS = ("train_annotations", "train_images", "val_annotations", "val_images")
# Fields that never change a result, and so make no axis.
FREE_FIELDS = ("eval_batch_size", "num_workers", "log_every", "checkpoint_every")
MAX_CELLS = 100_000
MAX_BYTES = 2**20  # YAML is read at some 100 kB a second

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_RESERVED_NAMES = ("reports",)
_AXIS_KINDS = ("product", "zip", "include", "exclude")
_FIELD_NAMES = tuple(
    f"{name}.{field_name}" for name, section in SECTIONS.items() for field_name in section.model_fields
)

_AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_COCO_AP_NAMES = ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_LVIS_AP_NAMES = ("APr", "APc", "APf")
_LVIS_COUNT = "num_instances/rare"
_SCOPES = ("total", "preprocess", "backbone", "head", "masks")
_KINDS = ("segm", "bbox")
# Metric -> the setting of `measure` that must be on for it. Which of them a data set has: `metrics_of`.
METRICS: dict[str, str] = {
    **{f"{kind}/{name}": "score" for kind in _KINDS for name in (*_AP_NAMES, *_COCO_AP_NAMES, *_LVIS_AP_NAMES)},
    **{f"latency_s/{scope}{part}": "latency" for scope in _SCOPES for part in ("", "/p5", "/p95")},
    **{f"peak_memory_bytes/{name}": "memory" for name in ("rss", "cuda_allocated", "cuda_reserved")},
    "num_images": "score",
    "num_instances": "score",
    _LVIS_COUNT: "score",
    "num_parameters": "flops",
    "flops": "flops",
}

PresetName = Literal["fixed", "released"]
SeedList = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)]
NameList = Annotated[tuple[str, ...], Field(strict=False)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Measure(_Part):
    """What is measured in each cell. Latency: at least so many images and seconds; flops: with the parameter count."""

    score: bool = True
    latency: bool = True
    latency_images: Annotated[int, Field(ge=1)] = 10
    latency_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 3.0
    memory: bool = True
    flops: bool = True


class TableSpec(_Part):
    """grid: one metric over two axes. long: one row per cell, `metrics` as columns (empty: a default set)."""

    kind: Literal["grid", "long"] = "grid"
    rows: str | None = None
    columns: str | None = None
    metric: str | None = None
    metrics: NameList = ()
    title: str | None = None


class PlotSpec(_Part):
    """x: an axis or a metric; y: a metric; lines: the axis that makes one line per value."""

    x: str
    y: str
    lines: str | None = None
    title: str | None = None


class _Head(_Part):
    """The suite's own keys, as far as they are single values; for checking."""

    name: str = ""
    description: str = ""
    preset: PresetName = "fixed"
    seeds: SeedList = (0,)


_KEYS = ("name", "description", "preset", *SECTIONS, "engine", "axes", "seeds", "measure", "tables", "plots", "claims")


@dataclass(frozen=True)
class SuiteCell:
    """One combination: axes maps bare axis names, 'seed' last, to JSON-able values; the same names in every cell.

    places: 'section.field', 'engine' or a section -> where the axes have its value.
    """

    axes: dict[str, Any]
    config: Config
    engine: EngineConfig = EngineConfig()
    places: dict[str, Place] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Suite:
    """A valid suite.

    base: the configuration without any axis. cells: in table order, all distinct in their axes.
    source_text: the file as it was read; overrides: the `--set` arguments on top of it.
    axes_place: where the axes stand, for mistakes that show only in the plan.
    places: 'section.field', 'engine', 'preset' or 'seeds' -> where its value was written.
    claims: the published numbers that the cells measure; None where the suite is not about published numbers.
    programs: interpreters and checkouts that `--set` names, and that may be run therefore (`bench.programs`).
    """

    path: Path
    name: str
    description: str
    base: Config
    cells: tuple[SuiteCell, ...]
    measure: Measure
    tables: tuple[TableSpec, ...]
    plots: tuple[PlotSpec, ...]
    source_text: str
    overrides: tuple[str, ...] = ()
    axes_place: Place = field(default=Place(None), compare=False)
    places: dict[str, Place] = field(default_factory=dict, compare=False)
    claims: tuple[ClaimTie, ...] | None = None
    programs: frozenset[str] = frozenset()


def load_suite(path: Path, overrides: Sequence[str] = ()) -> Suite:
    """Read and check a suite.

    Args:
        path: the YAML file.
        overrides: 'KEY=VALUE' with VALUE in YAML. KEY is a field ('iterations', 'train.iterations'), 'preset', 'seeds',
            or one of `measure` ('latency_seconds', 'measure.latency_seconds'). A field that is an axis of the product
            gets VALUE, or the list of values, as the values of that axis.
    Raises:
        SuiteErrors: everything that is wrong, in the order of the file.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            message = f"is larger than {MAX_BYTES >> 20} MiB, which no suite needs. Give a suite file.{_nearby(path)}"
            raise SuiteErrors([SuiteError(message, file=path)])
        text = content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        message = f"byte {error.object[error.start]:#04x} is not UTF-8 text. Save the file as UTF-8"
        raise SuiteErrors([SuiteError(message, file=path, line=line, column=column)]) from error
    except OSError as error:
        message = "is a folder" if path.is_dir() else f"cannot be read ({error.strerror})"
        raise SuiteErrors([SuiteError(f"{message}. Give a suite file.{_nearby(path)}", file=path)]) from error
    root, problems = read_yaml(text, path)
    return _Reader(path, text, root, problems, overrides).suite()


def _nearby(path: Path) -> str:
    """The suites that are there, when one is not."""
    folder = path if path.is_dir() else path.parent
    found = folder.glob("*.y*ml") if folder.is_dir() else []
    names = sorted(str(file) for file in found if file.is_file())
    shown = ", ".join(names[:8]) + ", ..." * (len(names) > 8)
    return f" There: {shown}.{did_you_mean(str(path), names)}" if names else ""


@dataclass(frozen=True)
class _Choice:
    """One value of an axis.

    shown: JSON-able, for tables and labels. presets: section -> preset name. fields: (section, field) -> checked value.
    engine: for that axis, the engine's checked fields; item: as it was written.
    """

    axis: str
    shown: Any
    place: Place
    presets: dict[str, str] = field(default_factory=dict)
    fields: dict[tuple[str, str], Any] = field(default_factory=dict)
    engine: dict[str, Any] | None = None
    item: Item | None = None

    @property
    def key(self) -> str:
        """Equal for choices that mean the same."""
        if self.engine is not None:
            return _engine_key({name: value for name, value in self.engine.items() if name != "python"})
        fields = {".".join(name): value for name, value in self.fields.items()}
        return json.dumps([self.axis, self.presets, fields], sort_keys=True)

    @property
    def keys(self) -> set[str]:
        """What an entry of `exclude` may call it: its key, and for an engine the bare name too."""
        return {self.key} if self.engine is None else {self.key, _engine_key({"name": self.engine["name"]})}


@dataclass
class _Axes:
    product: dict[str, list[_Choice]] = field(default_factory=dict)
    zip: dict[str, list[_Choice]] = field(default_factory=dict)
    include: list[list[_Choice]] = field(default_factory=list)
    exclude: list[tuple[Place, list[_Choice]]] = field(default_factory=list)
    was_overridden: bool = False


class _Reader:
    """Reads one suite; collects mistakes in `problems` and raises them together."""

    def __init__(self, path: Path, text: str, root: Item, problems: list[SuiteError], overrides: Sequence[str]) -> None:
        self.path, self.text, self.root, self.problems, self.overrides = path, text, root, problems, tuple(overrides)
        self.head: dict[str, Any] = {}
        self.sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        self.measure_fields: dict[str, Any] = {}
        self.engine_fields: dict[str, Any] = {}
        self.engine_item = Item(None, root.place)
        self.engine_python: str | None = None  # of --set: for all engines that take one
        self.programs: set[str] = set()
        self.engine = EngineConfig()
        self.engine_label: str = self.engine.name
        self.engines: dict[str, EngineConfig] = {}
        self.axes = _Axes()
        self.places: dict[str, Place] = {}  # dotted field name -> where its value was written
        self.built: dict[tuple[str, str], Section | None] = {}

    def suite(self) -> Suite:
        if not isinstance(self.root.value, dict) or not self.root.value:
            self._note(self.root.place, "", f"not a suite. Allowed: a mapping with the keys {', '.join(_KEYS)}")
            raise SuiteErrors(self.problems)
        for key, place in self.root.key_places.items():
            if key not in _KEYS:
                self._note(place, key, unknown(key, _KEYS, [*_FIELD_NAMES, *(f"axes.{kind}" for kind in _AXIS_KINDS)]))
        self._read_head()
        self._read_sections()
        self._read_axes()
        self._apply_overrides()
        self._finish_engines()
        self._check_dataset_names()
        measure = Measure(**self.measure_fields)
        if not (measure.score or measure.latency or measure.memory or measure.flops):
            self._note(
                self._place_of("measure"), "measure", "nothing is measured. Set score, latency, memory or flops true"
            )
        tables, plots = self._read_reports(measure)
        # Cells are built from valid parts only: a broken part would give mistakes that are none.
        cells = list(self._cells()) if not self.problems else []
        axes, must_fit = [cell.axes for cell in cells], bool(cells) and not self.overrides
        claims = read_ties(self.root.value.get("claims"), axes, self.problems, must_fit=must_fit)
        if self.problems or not cells:
            raise SuiteErrors(sorted(self.problems, key=lambda error: (error.line or 10**9, error.column or 0)))
        return Suite(
            path=self.path,
            name=self.head["name"],
            description=self.head["description"],
            base=self._config([]) or cells[0].config,  # a base may be possible only with its axes
            cells=tuple(cells),
            measure=measure,
            tables=tables,
            plots=plots,
            source_text=self.text,
            overrides=self.overrides,
            axes_place=self._place_of("axes"),
            places=self._named_places(),
            claims=claims,
            programs=frozenset(self.programs),
        )

    def _named_places(self) -> dict[str, Place]:
        head = {name: self._place_of(name) for name in ("preset", "seeds", "engine") if name in self.root.key_places}
        engine = {} if self.engine_item.value is None else {"engine": self.engine_item.place}
        return head | engine | self.places

    # -- small helpers ------------------------------------------------------------------------------------------------

    def _note(self, place: Place, key: str, message: str) -> None:
        self.problems.append(place.error(key, message))

    def _place_of(self, key: str) -> Place:
        return self.root.key_places.get(key, self.root.place)

    def _list(self, item: Item | None, key: str, what: str) -> list[Item]:
        if item is None or item.value is None:
            return []
        if isinstance(item.value, list):
            return item.value
        self._note(item.place, key, f"{show(item.plain())} is not allowed. Allowed: a list of {what}")
        return []

    # -- head and sections --------------------------------------------------------------------------------------------

    def _read_head(self) -> None:
        for key in _Head.model_fields:
            if key in self.root.value:
                self._set_head(key, self.root.value[key])
        self.head.setdefault("name", self.path.stem)
        self.head.setdefault("description", "")
        self.head.setdefault("preset", "fixed")
        name = self.head["name"]
        if not _NAME.fullmatch(name) or name in _RESERVED_NAMES:
            allowed = "up to 64 letters, digits, '_', '-' and '.', the first a letter or digit"
            message = f"{show(name)} is not allowed. Allowed: {allowed}; not {', '.join(_RESERVED_NAMES)}"
            self._note(self._place_of("name"), "name", message)

    def _set_head(self, key: str, item: Item) -> None:
        value = check_value(_Head, key, item, key, self.problems)
        if value is INVALID:
            return
        if key == "seeds" and len(set(value)) < len(value):
            self._note(item.place, key, f"{show(value)} has a seed twice. Keep one of each")
        self.head[key] = value

    def _read_sections(self) -> None:
        for name, model in SECTIONS.items():
            item = self.root.value.get(name)
            if item is None:
                continue
            self.sections[name] = check_mapping(model, item, name, self.problems, elsewhere=_FIELD_NAMES)
            if isinstance(item.value, dict):
                self.places.update({f"{name}.{key}": child.place for key, child in item.value.items()})
        if "engine" in self.root.value:
            self.engine_item = self.root.value["engine"]
            self.engine_fields = self._read_engine(self.engine_item, "engine") or {}
        measure = self.root.value.get("measure")
        if measure is not None:
            self.measure_fields = check_mapping(Measure, measure, "measure", self.problems)
        if "seed" in self.sections["train"] and "seeds" in self.head:
            self._note(self.places["train.seed"], "train.seed", "given besides seeds. Keep one of the two")

    def _check_dataset_names(self) -> None:
        found = [(self.sections["data"].get("dataset"), self.places.get("data.dataset", self._place_of("data")))]
        for choice in self._all_choices():
            found.append((choice.fields.get(("data", "dataset")), choice.place))
        for name, place in found:
            if name is not None and name not in DATASETS:
                message = f"{show(name)} is not allowed. Allowed: {', '.join(DATASETS)}{_sentence(name, DATASETS)}"
                self._note(place, "data.dataset", message)

    # -- axes ---------------------------------------------------------------------------------------------------------

    def _read_axes(self) -> None:
        item = self.root.value.get("axes")
        if item is None or item.value is None:
            return
        if not isinstance(item.value, dict):
            self._note(
                item.place,
                "axes",
                f"{show(item.plain())} is not allowed. Allowed: a mapping of {', '.join(_AXIS_KINDS)}",
            )
            return
        for key, place in item.key_places.items():
            if key not in _AXIS_KINDS:
                message = unknown(key, _AXIS_KINDS)
                if self._axis(key) is not None:
                    message = f"unknown key. Allowed: {', '.join(_AXIS_KINDS)}. Write 'product: {{{key}: [...]}}'"
                self._note(place, f"axes.{key}", message)
        self.axes.product = self._read_choices(item.value.get("product"), "axes.product")
        self.axes.zip = self._read_choices(item.value.get("zip"), "axes.zip")
        self._check_axes(item)
        for i, entry in enumerate(self._list(item.value.get("include"), "axes.include", "mappings")):
            self.axes.include.append(self._read_assignment(entry, f"axes.include[{i}]"))
        for i, entry in enumerate(self._list(item.value.get("exclude"), "axes.exclude", "mappings")):
            key = f"axes.exclude[{i}]"
            choices = self._read_assignment(entry, key, only=[*self.axes.product, *self.axes.zip])
            if choices:
                self.axes.exclude.append((entry.place, choices))

    def _check_axes(self, item: Item) -> None:
        for name in self.axes.product.keys() & self.axes.zip.keys():
            self._note(self.axes.zip[name][0].place, f"axes.zip.{name}", "also an axis of product. Keep one of the two")
        lengths = {name: len(choices) for name, choices in self.axes.zip.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{name} has {count}" for name, count in lengths.items())
            place = item.key_places["zip"]
            self._note(place, "axes.zip", f"the lists differ in length: {counts}. Give each as many values")
        axes = {**self.axes.product, **self.axes.zip}
        if "seed" in axes and "seeds" in self.head:
            self._note(axes["seed"][0].place, "axes.seed", "given besides seeds. Keep one of the two")

    def _read_choices(self, item: Item | None, key: str) -> dict[str, list[_Choice]]:
        if item is None or item.value is None:
            return {}
        if not isinstance(item.value, dict):
            self._note(
                item.place, key, f"{show(item.plain())} is not allowed. Allowed: a mapping from axis to its values"
            )
            return {}
        found: dict[str, list[_Choice]] = {}
        for name, values in item.value.items():
            path = f"{key}.{name}"
            axis = self._known_axis(name, item.key_places[name], path)
            if axis is None:
                continue
            if axis in found:
                self._note(item.key_places[name], path, f"duplicate key: '{axis}' is there under another name")
                continue
            entries = self._list(values, path, "values")
            if not entries and (values.value is None or values.value == []):
                self._note(values.place, path, "an axis needs at least one value")
            choices = [self._read_choice(axis, entry, f"{path}[{i}]") for i, entry in enumerate(entries)]
            found[axis] = [choice for choice in choices if choice is not None]
            if key == "axes.zip":
                continue  # rows of a zip may repeat a value
            earlier: set[str] = set()
            for choice in found[axis]:
                if choice.key in earlier:
                    self._note(choice.place, path, f"{show(choice.shown)} is there twice. Keep one of the two")
                earlier.add(choice.key)
        return {name: choices for name, choices in found.items() if choices}

    def _known_axis(self, name: str, place: Place, path: str) -> str | None:
        """The axis's own name ('eta' for 'sampler.eta'), or None for one that is none (noted)."""
        axis = self._axis(name)
        if axis is None:
            near = did_you_mean(name, [*_bare_names(), *_FIELD_NAMES, *SECTIONS, "engine"])
            allowed = "a field of model, sampler, train or data, one of these sections, preset, or engine"
            if name.startswith("engine."):
                near = " An axis takes whole engines: 'engine: [{name: ..., recipe: ...}]'"
            self._note(place, path, f"unknown field. Allowed: {allowed}.{near}")
        elif axis in FREE_FIELDS:
            self._note(place, path, f"no axis: {axis} never changes a result. Set it in its section")
            return None
        return axis

    def _axis(self, name: str) -> str | None:
        if name in ("preset", "engine") or name in SECTIONS or section_of(name):
            return name
        return name.partition(".")[2] if name in _FIELD_NAMES else None

    def _read_choice(self, axis: str, item: Item, key: str) -> _Choice | None:
        if axis == "preset":
            value = check_value(_Head, "preset", item, key, self.problems)
            return (
                None if value is INVALID else _Choice(axis, value, item.place, presets=dict.fromkeys(SECTIONS, value))
            )
        if axis == "engine":
            engine = self._read_engine(item, key)
            if engine is None:
                return None
            return _Choice(axis, engine["name"], item.place, engine=engine, item=item)
        if axis in SECTIONS:
            return self._read_section_choice(axis, item, key)
        section = section_of(axis)
        assert section is not None
        value = check_value(SECTIONS[section], axis, item, key, self.problems)
        if value is INVALID:
            return None
        return _Choice(axis, _jsonable(value), item.place, fields={(section, axis): value})

    def _read_section_choice(self, section: str, item: Item, key: str) -> _Choice | None:
        if not isinstance(item.value, dict):
            value = check_value(_Head, "preset", item, key, [])
            if value is INVALID:
                message = f"{show(item.plain())} is not allowed. Allowed: fixed, released, or a mapping of fields"
                self._note(item.place, key, message)
                return None
            return _Choice(section, value, item.place, presets={section: value})
        known = len(self.problems)
        found = check_mapping(SECTIONS[section], item, key, self.problems, elsewhere=_FIELD_NAMES)
        for name in FREE_FIELDS:
            if name in found:
                self._note(item.key_places[name], f"{key}.{name}", "never changes a result. Set it in its section")
        if len(self.problems) > known:
            return None
        shown = ",".join(f"{name}={axis_value_text(_jsonable(value))}" for name, value in found.items())
        return _Choice(section, shown, item.place, fields={(section, name): value for name, value in found.items()})

    def _read_engine(self, item: Item, key: str) -> dict[str, Any] | None:
        """The valid fields of an engine, its name among them; None where one is refused (noted)."""
        if isinstance(item.value, str):
            name = check_value(EngineConfig, "name", item, key, self.problems)
            return None if name is INVALID else {"name": name}
        if not isinstance(item.value, dict):
            allowed = f"{', '.join(ENGINES)}, or a mapping of {', '.join(EngineConfig.model_fields)}"
            self._note(item.place, key, f"{show(item.plain())} is not allowed. Allowed: {allowed}")
            return None
        known = len(self.problems)
        found = check_mapping(EngineConfig, item, key, self.problems, elsewhere=_FIELD_NAMES)
        return {"name": "diffinst", **found} if len(self.problems) == known else None

    def _finish_engines(self) -> None:
        """Build the engines, when it is known which interpreter they are given, and name those of the axis."""
        python = self.engine_python or self.engine_fields.get("python")
        choices = [choice for choice in self._all_choices() if choice.axis == "engine"]
        if choices and "python" in self.engine_fields and self.engine_fields["name"] not in EXTERNAL:
            del self.engine_fields["python"]  # meant for the engines of the axis
        fields = [self.engine_fields, *(choice.engine for choice in choices if choice.engine is not None)]
        for values in fields:
            if python is not None and values.get("name") in EXTERNAL:
                values["python"] = self.engine_python or values.get("python", python)
        if self.engine_python is not None and not any(values.get("name") in EXTERNAL for values in fields):
            place = Place(None, argument=f"--set engine.python={self.engine_python}")
            self._note(place, "", f"no engine of this suite takes it. Allowed for: {', '.join(EXTERNAL)}")
        base = self._build_engine(self.engine_fields, self.engine_item, "engine")
        self.engine = base or EngineConfig()
        built = {id(choice): self._build_engine(choice.engine or {}, choice.item, "axes.engine") for choice in choices}
        engines = [self.engine, *(engine for engine in built.values() if engine is not None)]
        labels = dict(zip(map(id, engines), engine_labels(engines)))
        self.engine_label = labels[id(self.engine)]

        def named(choice: _Choice) -> _Choice:
            engine = built.get(id(choice))
            return choice if engine is None else replace(choice, shown=labels[id(engine)])

        for axes in (self.axes.product, self.axes.zip):
            axes.update({name: [named(choice) for choice in values] for name, values in axes.items()})
        self.axes.include = [[named(choice) for choice in values] for values in self.axes.include]

    def _build_engine(self, fields: dict[str, Any], item: Item | None, key: str) -> EngineConfig | None:
        given = [name for name, value in fields.items() if value != EngineConfig.model_fields[name].default]
        problem = engine_problem(fields.get("name", "diffinst"), given, fields.get("recipe"))
        if problem is None:
            return EngineConfig(**fields)
        assert item is not None
        inside = item.value.get(problem[0]) if isinstance(item.value, dict) else None
        key = f"{key}.{problem[0]}" if inside and problem[0] != "name" else key
        self._note((inside or item).place, key, problem[1])
        return None

    def _read_assignment(self, item: Item, key: str, only: list[str] | None = None) -> list[_Choice]:
        """One mapping from axis to value, of include or exclude; `only`: the axes that may be named."""
        if not isinstance(item.value, dict) or not item.value:
            self._note(item.place, key, f"{show(item.plain())} is not allowed. Allowed: a mapping from axis to value")
            return []
        choices = []
        for name, value in item.value.items():
            path = f"{key}.{name}"
            axis = self._known_axis(name, item.key_places[name], path)
            if axis is None:
                continue
            if only is not None and axis not in only:
                message = f"not an axis of product or zip. Allowed: {', '.join(only) or 'none, there is no axis'}"
                self._note(item.key_places[name], path, f"{message}.{did_you_mean(axis, only)}")
                continue
            choice = self._read_choice(axis, value, path)
            if choice is not None:
                choices.append(choice)
        return choices

    def _all_choices(self) -> Iterator[_Choice]:
        for choices in [*self.axes.product.values(), *self.axes.zip.values(), *self.axes.include]:
            yield from choices

    # -- overrides ----------------------------------------------------------------------------------------------------

    def _apply_overrides(self) -> None:
        for text in self.overrides:
            argument = f"--set {text}"
            key, equals, value = text.partition("=")
            key = key.strip()
            place = Place(None, argument=argument)
            if not equals or not key:
                self._note(place, "", "needs the form KEY=VALUE, for instance --set iterations=100")
                continue
            try:
                item, problems = read_yaml(value, argument=argument)
            except SuiteErrors as error:
                self.problems.extend(error.errors)
                continue
            self.problems.extend(problems)
            self._apply_override(key, item, place)

    def _apply_override(self, key: str, item: Item, place: Place) -> None:
        first, _, rest = key.partition(".")
        if key in Measure.model_fields:
            first, rest = "measure", key
        if key in _Head.model_fields and key != "name":
            self._set_head(key, item)
        elif first == "engine":
            self._override_engine(rest, item, place)
        elif first == "measure" and rest:
            nested = Item({rest: item}, place, {rest: place})
            self.measure_fields |= check_mapping(Measure, nested, "measure", self.problems)
        elif self._axis(key) is None or key in SECTIONS:
            names = [*_bare_names(), *_FIELD_NAMES, *Measure.model_fields]
            allowed = "a field of model, sampler, train or data, preset, seeds, description, or a field of measure"
            self._note(place, key, f"unknown key. Allowed: {allowed}.{did_you_mean(key, [*names, 'preset', 'seeds'])}")
        else:
            self._override_field(self._axis(key) or key, item, place)

    def _override_engine(self, name: str, item: Item, place: Place) -> None:
        """`engine=...` or `engine.NAME=...`; the interpreter may be given for the engines of an axis as well."""
        if name and name not in EngineConfig.model_fields:
            self._note(place, "", unknown(name, EngineConfig.model_fields))
            return
        if not name and "engine" in self.axes.product:
            values = item if isinstance(item.value, list) else Item([item], place)
            found = self._read_choices(Item({"engine": values}, place, {"engine": place}), "axes")
            self._allow(choice.engine for choice in found.get("engine", []))
            self.axes.product.update(found)
            self.axes.was_overridden = True
            return
        varied = next((choice for choice in self._all_choices() if choice.axis == "engine"), None)
        if varied is not None and name != "python":
            where = f"{varied.place.file}:{varied.place.line}"
            self._note(place, "", f"engine is varied at {where}. Choose cells with --only, or change the suite")
        elif not name:
            self.engine_item, self.engine_fields = item, self._read_engine(item, "engine") or {}
            self._allow([self.engine_fields])
        else:
            value = check_value(EngineConfig, name, item, f"engine.{name}", self.problems)
            self._allow([{} if value is INVALID else {name: value}])
            if name == "python":
                self.engine_python = None if value is INVALID else value
            elif value is not INVALID:
                self.engine_fields = {"name": "diffinst", **self.engine_fields, name: value}
                self.engine_item = Item(None, place)

    def _allow(self, engines: Iterable[Mapping[str, Any] | None]) -> None:
        """Programs that the user names in person."""
        for fields in engines:
            self.programs |= {fields[name] for name in ("python", "checkout") if fields and fields.get(name)}

    def _override_field(self, name: str, item: Item, place: Place) -> None:
        section = section_of(name)
        assert section is not None
        if name in self.axes.product:
            is_many = isinstance(item.value, list)
            if is_many and is_list_field(SECTIONS[section], name):
                is_many = bool(item.value) and isinstance(item.value[0].value, list)
            values = item if is_many else Item([item], place)
            choices = self._read_choices(Item({name: values}, place, {name: place}), "axes.product")
            self.axes.product.update(choices)
            self.axes.was_overridden = True
            return
        for choice in self._all_choices():
            if (section, name) in choice.fields:
                where = f"{choice.place.file}:{choice.place.line}"
                self._note(place, "", f"{name} is varied at {where}. Choose cells with --only, or change the suite")
                return
        value = check_value(SECTIONS[section], name, item, name, self.problems)
        if value is INVALID:
            return
        if name == "seed":
            self.head["seeds"] = (value,)
        self.sections[section][name] = value
        self.places[f"{section}.{name}"] = place

    # -- cells --------------------------------------------------------------------------------------------------------

    def _cells(self) -> Iterator[SuiteCell]:
        assignments = list(self._assignments())
        names = list(dict.fromkeys(choice.axis for choices in assignments for choice in choices))
        if len(assignments) * len(self._seeds()) > MAX_CELLS:
            what = f"{len(assignments)} combinations and {len(self._seeds())} seeds are too many cells"
            self._note(self._place_of("axes"), "axes", f"{what}. Allowed: at most {MAX_CELLS}")
            return
        taken: dict[str, SuiteCell] = {}
        for choices in assignments:
            has_seed = any(("train", "seed") in choice.fields for choice in choices)
            for seed in [None] if has_seed else self._seeds():
                config = self._config(choices, seed)
                if config is None:
                    continue
                shown = {choice.axis: choice.shown for choice in choices}
                axes = {name: shown[name] if name in shown else self._base_value(name, config) for name in names}
                axes.pop("seed", None)
                axes["seed"] = config.train.seed
                engine = self._engine(choices)
                self._check_together(engine, config, choices)
                cell = SuiteCell(axes, config, engine, _places_of(choices))
                label = json.dumps(axes)
                if label in taken:
                    place = choices[0].place if choices else self._place_of("axes")
                    self._note(place, "axes", f"the cell {axes_label(axes)} is there twice. Remove one of the two")
                    continue
                taken[label] = cell
                yield cell
        if not taken and not self.problems:
            self._note(self._place_of("axes"), "axes", "no cell is left. Exclude fewer, or include some")

    def _seeds(self) -> tuple[int, ...]:
        if "seeds" in self.head:
            return tuple(self.head["seeds"])
        return (self.sections["train"].get("seed", 0),)

    def _assignments(self) -> Iterator[list[_Choice]]:
        rows = [list(row) for row in zip(*self.axes.zip.values(), strict=False)] if self.axes.zip else [[]]
        count = len(rows)
        for choices in self.axes.product.values():
            count *= len(choices)
        if count > MAX_CELLS:
            message = f"{count} combinations are too many cells. Allowed: at most {MAX_CELLS}"
            self._note(self._place_of("axes"), "axes", message)
            return
        has_axes = bool(self.axes.product or self.axes.zip)
        excludes = [{choice.key for choice in choices} for _, choices in self.axes.exclude]
        used = [False] * len(excludes)
        if has_axes or not self.axes.include:
            for combination, row in itertools.product(itertools.product(*self.axes.product.values()), rows):
                choices = [*combination, *row]
                excluded = False
                present = {key for choice in choices for key in choice.keys} if self.axes.exclude else set()
                for i, wanted in enumerate(excludes):
                    if wanted <= present:
                        used[i] = excluded = True
                if not excluded:
                    yield choices
        for (place, _), was_used in zip(self.axes.exclude, used):
            if not was_used and not self.axes.was_overridden:
                self._note(place, "axes.exclude", "matches no cell. Name values that product and zip have")
        yield from self.axes.include

    def _base_value(self, axis: str, config: Config) -> Any:
        """What a cell of `include` shows for an axis that it does not name."""
        section = section_of(axis)
        if section is not None:
            return _jsonable(getattr(getattr(config, section), axis))
        if axis == "engine":
            return self.engine_label
        return self.head["preset"] if axis == "preset" else "base"

    def _engine(self, choices: Sequence[_Choice]) -> EngineConfig:
        chosen = [choice.engine for choice in choices if choice.engine is not None]
        if not chosen:
            return self.engine
        # One object for all cells of an engine, like their sections.
        return self.engines.setdefault(_engine_key(chosen[-1]), EngineConfig(**chosen[-1]))

    def _check_together(self, engine: EngineConfig, config: Config, choices: Sequence[_Choice]) -> None:
        """Settings that an engine cannot follow, noted once each."""
        blamed = [choice for choice in choices if choice.axis == "engine"]
        messages = []
        if not engine.is_default and config.model.weights != "none":
            messages.append(f"model.weights is for engine diffinst, not {engine.name}. Use engine_weights")
        for message in messages:
            if ("", message) not in self.built:
                self.built["", message] = None
                self._note_values(message, blamed, self._place_of("engine"), "engine")

    def _config(self, choices: Sequence[_Choice], seed: int | None = None) -> Config | None:
        """The resolved configuration of a cell, or None if its values do not go together (noted once)."""
        presets = dict.fromkeys(SECTIONS, self.head["preset"])
        fields: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        # Single fields win over a section's axis, whichever comes first in the file.
        for choice in sorted(choices, key=lambda choice: len(choice.presets) == 0 and choice.axis not in SECTIONS):
            if choice.axis == "preset":
                presets |= {name: preset for name, preset in choice.presets.items() if not _has_axis(choices, name)}
            else:
                presets |= choice.presets
            for (section, name), value in choice.fields.items():
                fields[section][name] = value
        if seed is not None:
            fields["train"]["seed"] = seed
        parts = {}
        for name, model in SECTIONS.items():
            preset = RELEASED[name] if presets[name] == "released" else {}
            values = {**preset, **self.sections[name], **fields[name]}
            part = self._section(name, model, values, choices)
            if part is None:
                return None
            parts[name] = part
        try:
            return Config(**parts)  # type: ignore[arg-type]
        except ValidationError as error:  # sections that do not go together
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            if ("", message) not in self.built:
                self.built["", message] = None
                named = [choice for choice in choices if any(name in message for _, name in choice.fields)]
                self._note_values(message, named, self.root.place, "the suite")
            return None

    def _section(
        self, name: str, model: type[Section], values: dict[str, Any], choices: Sequence[_Choice]
    ) -> Section | None:
        # Cells share most sections: each distinct one is built, and found wrong, once.
        known = (name, json.dumps(values, sort_keys=True, default=str))
        if known in self.built:
            return self.built[known]
        part: Section | None = None
        try:
            part = model(**values)
            message = _data_problem(part.model_dump()) if name == "data" else None
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
        if message:
            part = None
            blamed = [choice for choice in choices if any(section == name for section, _ in choice.fields)]
            self._note_values(message, blamed, self._place_of(name), name)
        self.built[known] = part
        return part

    def _note_values(self, message: str, blamed: Sequence[_Choice], place: Place, key: str) -> None:
        """Values that do not go together: noted at the first of the axes they come from, otherwise at `place`."""
        if blamed:
            axes = ", ".join(f"{choice.axis}={axis_value_text(choice.shown)}" for choice in blamed)
            self._note(blamed[0].place, f"axes.{blamed[0].axis}", f"{message} (in the cells with {axes})")
        else:
            self._note(place, key, message)

    # -- tables and plots ---------------------------------------------------------------------------------------------

    def _read_reports(self, measure: Measure) -> tuple[tuple[TableSpec, ...], tuple[PlotSpec, ...]]:
        axes = list(dict.fromkeys([*(choice.axis for choice in self._all_choices()), "seed"]))
        tables = []
        for i, item in enumerate(self._list(self.root.value.get("tables"), "tables", "tables")):
            key = f"tables[{i}]"
            found = self._complete(TableSpec, item, key, _required_of_table(item))
            if found is None:
                continue
            table = TableSpec(**found)
            unused = ["rows", "columns", "metric"] if table.kind == "long" else ["metrics"]
            for name in unused:
                if name in found:
                    self._note(
                        item.key_places[name], f"{key}.{name}", f"unused in a table of kind {table.kind}. Remove it"
                    )
            self._check_names(item, key, {"rows": axes, "columns": axes}, measure)
            if table.kind == "grid" and table.rows == table.columns:
                self._note(item.value["columns"].place, f"{key}.columns", "the same axis as rows. Choose another one")
            tables.append(table)
        plots = []
        for i, item in enumerate(self._list(self.root.value.get("plots"), "plots", "plots")):
            key = f"plots[{i}]"
            found = self._complete(PlotSpec, item, key, ("x", "y"))
            if found is None:
                continue
            self._check_names(item, key, {"x": [*axes, *METRICS], "lines": axes}, measure)
            plots.append(PlotSpec(**found))
        return tuple(tables), tuple(plots)

    def _known_metrics(self) -> set[str]:
        """What is measured on any of the suite's data sets."""
        base, choices = self.sections["data"], [choice.fields for choice in self._all_choices()]
        datasets = {base.get("dataset", "shapes"), *(fields.get(("data", "dataset")) for fields in choices)}
        formats = {base.get("annotation_format"), *(fields.get(("data", "annotation_format")) for fields in choices)}
        return {
            name
            for dataset in datasets - {None}
            for form in formats
            for name in metrics_of({"dataset": dataset, "annotation_format": form})
        }

    def _complete(self, model: type[BaseModel], item: Item, key: str, required: Sequence[str]) -> dict[str, Any] | None:
        known = len(self.problems)
        if item.value is None:
            self._note(item.place, key, f"null is not allowed. Allowed: a mapping with {', '.join(model.model_fields)}")
            return None
        found = check_mapping(model, item, key, self.problems)
        if isinstance(item.value, dict):
            missing = [name for name in required if name not in item.value]
            if missing:
                self._note(item.place, key, f"needs {', '.join(missing)} too")
        return found if len(self.problems) == known else None

    def _check_names(self, item: Item, key: str, axes: Mapping[str, list[str]], measure: Measure) -> None:
        """Whether the names in a table or plot are axes and metrics of this suite."""
        for name, child in item.value.items():
            if name in {"kind", "title"}:
                continue
            allowed = list(axes.get(name, METRICS))
            for entry in child.value if isinstance(child.value, list) else [child]:
                value = entry.value
                bare = value.rpartition(".")[2] if value in _FIELD_NAMES else value
                path = f"{key}.{name}"
                if value is None:
                    continue
                if bare not in allowed:
                    shown = [n for n in allowed if n not in METRICS] + ["a metric"] * (name == "x")
                    what = (
                        ", ".join(shown)
                        if name in axes
                        else "metrics such as segm/AP, bbox/AP50, latency_s/total, flops"
                    )
                    hint = _is_field_hint(value) or did_you_mean(value, allowed)
                    self._note(entry.place, path, f"{show(value)} is not allowed. Allowed: {what}.{hint}")
                elif value in METRICS and not getattr(measure, METRICS[value]):
                    setting = METRICS[value]
                    self._note(
                        entry.place, path, f"{value} is not measured. Set measure.{setting} true, or take it out"
                    )
                elif value in METRICS and value not in self._known_metrics():
                    others = "COCO" if value.rpartition("/")[2] in _COCO_AP_NAMES else "LVIS"
                    self._note(
                        entry.place, path, f"{value} is measured on {others} annotations only. Take it out of the suite"
                    )


def is_lvis(data: Mapping[str, Any]) -> bool:
    """Whether the fields of a data section mean LVIS annotations, which are scored in a way of their own."""
    return data.get("dataset") in LVIS_DATASETS or data.get("annotation_format") == "lvis"


def metrics_of(data: Mapping[str, Any]) -> dict[str, str]:
    """The entries of `METRICS` that exist on a data set: recall is COCO's, what goes by frequency is LVIS's."""
    absent = _COCO_AP_NAMES if is_lvis(data) else _LVIS_AP_NAMES
    missing = {f"{kind}/{name}" for kind in _KINDS for name in absent} | (set() if is_lvis(data) else {_LVIS_COUNT})
    return {name: setting for name, setting in METRICS.items() if name not in missing}


def axis_value_text(value: Any) -> str:
    """An axis value in a label: as in YAML, without spaces; text in quotes only where it holds a space."""
    if isinstance(value, str):
        return json.dumps(value) if re.search(r"\s", value) else value
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, separators=(",", ":"))


def axes_label(axes: Mapping[str, Any]) -> str:
    """'sampling_steps=4 num_proposals=100 seed=0'."""
    return " ".join(f"{name}={axis_value_text(value)}" for name, value in axes.items())


def _engine_key(fields: Mapping[str, Any]) -> str:
    return json.dumps(["engine", fields], sort_keys=True)


def _bare_names() -> list[str]:
    return [name.partition(".")[2] for name in _FIELD_NAMES]


def _places_of(choices: Sequence[_Choice]) -> dict[str, Place]:
    """Where axes have what they set."""
    found: dict[str, Place] = {}
    for choice in choices:
        found |= dict.fromkeys(choice.presets, choice.place)
        found |= {f"{section}.{name}": choice.place for section, name in choice.fields}
        if choice.engine is not None:
            found["engine"] = choice.place
    return found


def _has_axis(choices: Sequence[_Choice], axis: str) -> bool:
    return any(choice.axis == axis for choice in choices)


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _sentence(name: str, allowed: Sequence[str]) -> str:
    hint = did_you_mean(name, allowed)
    return f".{hint}" if hint else ""


def _is_field_hint(name: str) -> str:
    return " It is a field, but no axis of this suite" if section_of(name) or name in _FIELD_NAMES else ""


def _required_of_table(item: Item) -> tuple[str, ...]:
    if not isinstance(item.value, dict):
        return ()
    kind = item.value.get("kind")
    return () if kind is not None and kind.value == "long" else ("rows", "columns", "metric")


def _data_problem(data: Mapping[str, Any]) -> str | None:
    given = [name for name in CUSTOM_PATHS if data[name] is not None]
    if data["dataset"] == "custom" and len(given) < len(CUSTOM_PATHS):
        missing = [name for name in CUSTOM_PATHS if name not in given]
        return f"dataset custom needs {', '.join(missing)} too"
    if data["dataset"] != "custom" and given:
        return f"{', '.join(given)}: only with dataset: custom, but the dataset is {data['dataset']}"
    if data["dataset"] != "custom" and data["annotation_format"] != "coco":
        return f"annotation_format: only with dataset: custom, but the dataset is {data['dataset']}"
    if data["class_agnostic"] and is_lvis(data):
        return "class_agnostic: not on LVIS, whose images are annotated for some of the classes only"
    return None
