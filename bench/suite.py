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

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.collector import collector_paused
from bench.engines import EXTERNAL, STEP_ENGINES, EngineConfig, engine_labels, engine_problem
from bench.errors import SuiteError, SuiteErrors
from bench.fields import INVALID, check_mapping, check_value, did_you_mean, is_list_field, show, unknown
from bench.metric_names import DATASETS, LVIS_DATASETS, LVIS_DETECTIONS, METRICS, is_lvis, metrics_of
from bench.suite_axes import AXIS_KINDS, FIELD_NAMES, Axes, AxisReader, Choice, Notes, axis_name, bare_names
from bench.suite_cells import MAX_CELLS, CellBuilder
from bench.suite_reports import ReportReader
from bench.suite_types import (
    CUSTOM_PATHS,
    FREE_FIELDS,
    Head,
    Measure,
    PlotSpec,
    Suite,
    SuiteCell,
    TableSpec,
    axes_label,
    axis_value_text,
)
from bench.ties import read_ties
from bench.yaml_source import Item, Place, read_yaml
from diffinst.config import SECTIONS, section_of

__all__ = [
    "CUSTOM_PATHS",
    "DATASETS",
    "FREE_FIELDS",
    "LVIS_DATASETS",
    "LVIS_DETECTIONS",
    "MAX_BYTES",
    "MAX_CELLS",
    "METRICS",
    "Measure",
    "PlotSpec",
    "Suite",
    "SuiteCell",
    "TableSpec",
    "axes_label",
    "axis_value_text",
    "is_lvis",
    "load_suite",
    "metrics_of",
]

MAX_BYTES = 2**20  # YAML is read at some 100 kB a second

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_RESERVED_NAMES = ("reports",)
_KEYS = ("name", "description", "preset", *SECTIONS, "engine", "axes", "seeds", "measure", "tables", "plots", "claims")


@collector_paused()
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
        self.notes = Notes(root, problems)
        self.axis_reader = AxisReader(self.notes)
        self.axes = Axes()
        self.places: dict[str, Place] = {}  # dotted field name -> where its value was written

    def suite(self) -> Suite:
        if not isinstance(self.root.value, dict) or not self.root.value:
            self.notes.note(self.root.place, "", f"not a suite. Allowed: a mapping with the keys {', '.join(_KEYS)}")
            raise SuiteErrors(self.problems)
        for key, place in self.root.key_places.items():
            if key not in _KEYS:
                self.notes.note(
                    place, key, unknown(key, _KEYS, [*FIELD_NAMES, *(f"axes.{kind}" for kind in AXIS_KINDS)])
                )
        self._read_head()
        self._read_sections()
        self.axes = self.axis_reader.read(self.root.value.get("axes"), has_seeds="seeds" in self.head)
        self._apply_overrides()
        self._finish_engines()
        self._check_dataset_names()
        measure = Measure(**self.measure_fields)
        if not (measure.score or measure.latency or measure.memory or measure.flops or measure.training_step):
            self.notes.note(
                self.notes.place_of("measure"),
                "measure",
                "nothing is measured. Set score, latency, memory, flops or training_step true",
            )
        tables, plots = ReportReader(self.notes, self.axes, self.sections).read(measure)
        # Cells are built from valid parts only: a broken part would give mistakes that are none.
        builder = CellBuilder(self.notes, self.head, self.sections, self.axes, self.engine, self.engine_label)
        cells = list(builder.cells()) if not self.problems else []
        others = sorted({cell.engine.name for cell in cells} - set(STEP_ENGINES))
        if measure.training_step and others:
            self.notes.note(
                self.notes.place_of("measure"),
                "measure.training_step",
                f"is not for engine {others[0]}. Allowed for: {', '.join(STEP_ENGINES)}. Take one of the two out",
            )
        axes, must_fit = [cell.axes for cell in cells], bool(cells) and not self.overrides
        claims = read_ties(self.root.value.get("claims"), axes, self.problems, must_fit=must_fit)
        if self.problems or not cells:
            raise SuiteErrors(sorted(self.problems, key=lambda error: (error.line or 10**9, error.column or 0)))
        return Suite(
            path=self.path,
            name=self.head["name"],
            description=self.head["description"],
            base=builder.config([]) or cells[0].config,  # a base may be possible only with its axes
            cells=tuple(cells),
            measure=measure,
            tables=tables,
            plots=plots,
            source_text=self.text,
            overrides=self.overrides,
            axes_place=self.notes.place_of("axes"),
            places=self._named_places(),
            claims=claims,
            programs=frozenset(self.programs),
        )

    def _named_places(self) -> dict[str, Place]:
        head = {
            name: self.notes.place_of(name) for name in ("preset", "seeds", "engine") if name in self.root.key_places
        }
        engine = {} if self.engine_item.value is None else {"engine": self.engine_item.place}
        return head | engine | self.places

    # -- head and sections ---------------------------------------------------------------------------------------------

    def _read_head(self) -> None:
        for key in Head.model_fields:
            if key in self.root.value:
                self._set_head(key, self.root.value[key])
        self.head.setdefault("name", self.path.stem)
        self.head.setdefault("description", "")
        self.head.setdefault("preset", "fixed")
        name = self.head["name"]
        if not _NAME.fullmatch(name) or name in _RESERVED_NAMES:
            allowed = "up to 64 letters, digits, '_', '-' and '.', the first a letter or digit"
            message = f"{show(name)} is not allowed. Allowed: {allowed}; not {', '.join(_RESERVED_NAMES)}"
            self.notes.note(self.notes.place_of("name"), "name", message)

    def _set_head(self, key: str, item: Item) -> None:
        value = check_value(Head, key, item, key, self.problems)
        if value is INVALID:
            return
        if key == "seeds" and len(set(value)) < len(value):
            self.notes.note(item.place, key, f"{show(value)} has a seed twice. Keep one of each")
        self.head[key] = value

    def _read_sections(self) -> None:
        for name, model in SECTIONS.items():
            item = self.root.value.get(name)
            if item is None:
                continue
            self.sections[name] = check_mapping(model, item, name, self.problems, elsewhere=FIELD_NAMES)
            if isinstance(item.value, dict):
                self.places.update({f"{name}.{key}": child.place for key, child in item.value.items()})
        if "engine" in self.root.value:
            self.engine_item = self.root.value["engine"]
            self.engine_fields = self.axis_reader.read_engine(self.engine_item, "engine") or {}
        measure = self.root.value.get("measure")
        if measure is not None:
            self.measure_fields = check_mapping(Measure, measure, "measure", self.problems)
        if "seed" in self.sections["train"] and "seeds" in self.head:
            self.notes.note(self.places["train.seed"], "train.seed", "given besides seeds. Keep one of the two")

    def _check_dataset_names(self) -> None:
        found = [(self.sections["data"].get("dataset"), self.places.get("data.dataset", self.notes.place_of("data")))]
        for choice in self.axes.choices():
            found.append((choice.fields.get(("data", "dataset")), choice.place))
        for name, place in found:
            if name is not None and name not in DATASETS:
                message = f"{show(name)} is not allowed. Allowed: {', '.join(DATASETS)}{_sentence(name, DATASETS)}"
                self.notes.note(place, "data.dataset", message)

    # -- engines -------------------------------------------------------------------------------------------------------

    def _finish_engines(self) -> None:
        """Build the engines, when it is known which interpreter they are given, and name those of the axis."""
        python = self.engine_python or self.engine_fields.get("python")
        choices = [choice for choice in self.axes.choices() if choice.axis == "engine"]
        if choices and "python" in self.engine_fields and self.engine_fields["name"] not in EXTERNAL:
            del self.engine_fields["python"]  # meant for the engines of the axis
        fields = [self.engine_fields, *(choice.engine for choice in choices if choice.engine is not None)]
        for values in fields:
            if python is not None and values.get("name") in EXTERNAL:
                values["python"] = self.engine_python or values.get("python", python)
        if self.engine_python is not None and not any(values.get("name") in EXTERNAL for values in fields):
            place = Place(None, argument=f"--set engine.python={self.engine_python}")
            self.notes.note(place, "", f"no engine of this suite takes it. Allowed for: {', '.join(EXTERNAL)}")
        base = self._build_engine(self.engine_fields, self.engine_item, "engine")
        self.engine = base or EngineConfig()
        built = {id(choice): self._build_engine(choice.engine or {}, choice.item, "axes.engine") for choice in choices}
        engines = [self.engine, *(engine for engine in built.values() if engine is not None)]
        labels = dict(zip(map(id, engines), engine_labels(engines)))
        self.engine_label = labels[id(self.engine)]

        def named(choice: Choice) -> Choice:
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
        self.notes.note((inside or item).place, key, problem[1])
        return None

    # -- overrides -----------------------------------------------------------------------------------------------------

    def _apply_overrides(self) -> None:
        for text in self.overrides:
            argument = f"--set {text}"
            key, equals, value = text.partition("=")
            key = key.strip()
            place = Place(None, argument=argument)
            if not equals or not key:
                self.notes.note(place, "", "needs the form KEY=VALUE, for instance --set iterations=100")
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
        if key in Head.model_fields and key != "name":
            self._set_head(key, item)
        elif first == "engine":
            self._override_engine(rest, item, place)
        elif first == "measure" and rest:
            nested = Item({rest: item}, place, {rest: place})
            self.measure_fields |= check_mapping(Measure, nested, "measure", self.problems)
        elif axis_name(key) is None or key in SECTIONS:
            names = [*bare_names(), *FIELD_NAMES, *Measure.model_fields]
            allowed = "a field of model, sampler, train or data, preset, seeds, description, or a field of measure"
            self.notes.note(
                place, key, f"unknown key. Allowed: {allowed}.{did_you_mean(key, [*names, 'preset', 'seeds'])}"
            )
        else:
            self._override_field(axis_name(key) or key, item, place)

    def _override_engine(self, name: str, item: Item, place: Place) -> None:
        """`engine=...` or `engine.NAME=...`; the interpreter may be given for the engines of an axis as well."""
        if name and name not in EngineConfig.model_fields:
            self.notes.note(place, "", unknown(name, EngineConfig.model_fields))
            return
        if not name and "engine" in self.axes.product:
            values = item if isinstance(item.value, list) else Item([item], place)
            found = self.axis_reader.read_choices(Item({"engine": values}, place, {"engine": place}), "axes")
            self._allow(choice.engine for choice in found.get("engine", []))
            self.axes.product.update(found)
            self.axes.was_overridden = True
            return
        varied = next((choice for choice in self.axes.choices() if choice.axis == "engine"), None)
        if varied is not None and name != "python":
            where = f"{varied.place.file}:{varied.place.line}"
            self.notes.note(place, "", f"engine is varied at {where}. Choose cells with --only, or change the suite")
        elif not name:
            self.engine_item, self.engine_fields = item, self.axis_reader.read_engine(item, "engine") or {}
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
            choices = self.axis_reader.read_choices(Item({name: values}, place, {name: place}), "axes.product")
            self.axes.product.update(choices)
            self.axes.was_overridden = True
            return
        for choice in self.axes.choices():
            if (section, name) in choice.fields:
                where = f"{choice.place.file}:{choice.place.line}"
                self.notes.note(
                    place, "", f"{name} is varied at {where}. Choose cells with --only, or change the suite"
                )
                return
        value = check_value(SECTIONS[section], name, item, name, self.problems)
        if value is INVALID:
            return
        if name == "seed":
            self.head["seeds"] = (value,)
        self.sections[section][name] = value
        self.places[f"{section}.{name}"] = place


def _sentence(name: str, allowed: Sequence[str]) -> str:
    hint = did_you_mean(name, allowed)
    return f".{hint}" if hint else ""
