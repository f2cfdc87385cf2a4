"""The axes of a suite file: every value checked against its field, with its place. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.engines import ENGINES, EngineConfig
from bench.errors import SuiteError
from bench.fields import INVALID, check_mapping, check_value, did_you_mean, show, unknown
from bench.suite_types import FREE_FIELDS, Head, axis_value_text
from bench.yaml_source import Item, Place
from diffinst.config import SECTIONS, section_of

AXIS_KINDS = ("product", "zip", "include", "exclude")
FIELD_NAMES = tuple(f"{name}.{field_name}" for name, section in SECTIONS.items() for field_name in section.model_fields)


@dataclass(frozen=True)
class Choice:
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
            return engine_key({name: value for name, value in self.engine.items() if name != "python"})
        fields = {".".join(name): value for name, value in self.fields.items()}
        return json.dumps([self.axis, self.presets, fields], sort_keys=True)

    @property
    def keys(self) -> set[str]:
        """What an entry of `exclude` may call it: its key, and for an engine the bare name too."""
        return {self.key} if self.engine is None else {self.key, engine_key({"name": self.engine["name"]})}


@dataclass
class Axes:
    """The axes of a suite, by kind: axis -> its choices, or the choices of one entry. exclude: with its place.

    was_overridden: `--set` gave an axis other values, so that an exclusion may match no cell.
    """

    product: dict[str, list[Choice]] = field(default_factory=dict)
    zip: dict[str, list[Choice]] = field(default_factory=dict)
    include: list[list[Choice]] = field(default_factory=list)
    exclude: list[tuple[Place, list[Choice]]] = field(default_factory=list)
    was_overridden: bool = False

    def choices(self) -> Iterator[Choice]:
        """What any cell may have; choices of `exclude` are none."""
        for choices in [*self.product.values(), *self.zip.values(), *self.include]:
            yield from choices


class Notes:
    """What is wrong with a suite, collected in `problems`; root: the whole file."""

    def __init__(self, root: Item, problems: list[SuiteError]) -> None:
        self.root, self.problems = root, problems

    def note(self, place: Place, key: str, message: str) -> None:
        """Take down a mistake. key: dotted path of the culprit."""
        self.problems.append(place.error(key, message))

    def place_of(self, key: str) -> Place:
        """Where a key of the suite stands, or the suite."""
        return self.root.key_places.get(key, self.root.place)

    def items(self, item: Item | None, key: str, what: str) -> list[Item]:
        """The entries of what has to be a list (of `what`), where it is given."""
        if item is None or item.value is None:
            return []
        if isinstance(item.value, list):
            return item.value
        self.note(item.place, key, f"{show(item.plain())} is not allowed. Allowed: a list of {what}")
        return []


class AxisReader:
    """Reads axes; what is wrong with them goes to `notes`."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def read(self, item: Item | None, *, has_seeds: bool) -> Axes:
        """All of `axes`. has_seeds: whether the suite gives seeds besides."""
        axes = Axes()
        if item is None or item.value is None:
            return axes
        if not isinstance(item.value, dict):
            self.notes.note(
                item.place,
                "axes",
                f"{show(item.plain())} is not allowed. Allowed: a mapping of {', '.join(AXIS_KINDS)}",
            )
            return axes
        for key, place in item.key_places.items():
            if key not in AXIS_KINDS:
                message = unknown(key, AXIS_KINDS)
                if axis_name(key) is not None:
                    message = f"unknown key. Allowed: {', '.join(AXIS_KINDS)}. Write 'product: {{{key}: [...]}}'"
                self.notes.note(place, f"axes.{key}", message)
        axes.product = self.read_choices(item.value.get("product"), "axes.product")
        axes.zip = self.read_choices(item.value.get("zip"), "axes.zip")
        self._check_axes(axes, item, has_seeds=has_seeds)
        for i, entry in enumerate(self.notes.items(item.value.get("include"), "axes.include", "mappings")):
            axes.include.append(self._read_assignment(entry, f"axes.include[{i}]"))
        for i, entry in enumerate(self.notes.items(item.value.get("exclude"), "axes.exclude", "mappings")):
            key = f"axes.exclude[{i}]"
            choices = self._read_assignment(entry, key, only=[*axes.product, *axes.zip])
            if choices:
                axes.exclude.append((entry.place, choices))
        return axes

    def _check_axes(self, axes: Axes, item: Item, *, has_seeds: bool) -> None:
        for name in axes.product.keys() & axes.zip.keys():
            self.notes.note(axes.zip[name][0].place, f"axes.zip.{name}", "also an axis of product. Keep one of the two")
        lengths = {name: len(choices) for name, choices in axes.zip.items()}
        if len(set(lengths.values())) > 1:
            counts = ", ".join(f"{name} has {count}" for name, count in lengths.items())
            place = item.key_places["zip"]
            self.notes.note(place, "axes.zip", f"the lists differ in length: {counts}. Give each as many values")
        both = {**axes.product, **axes.zip}
        if "seed" in both and has_seeds:
            self.notes.note(both["seed"][0].place, "axes.seed", "given besides seeds. Keep one of the two")

    def read_choices(self, item: Item | None, key: str) -> dict[str, list[Choice]]:
        """Axis -> its choices, of product or zip."""
        if item is None or item.value is None:
            return {}
        if not isinstance(item.value, dict):
            self.notes.note(
                item.place, key, f"{show(item.plain())} is not allowed. Allowed: a mapping from axis to its values"
            )
            return {}
        found: dict[str, list[Choice]] = {}
        for name, values in item.value.items():
            path = f"{key}.{name}"
            axis = self._known_axis(name, item.key_places[name], path)
            if axis is None:
                continue
            if axis in found:
                self.notes.note(item.key_places[name], path, f"duplicate key: '{axis}' is there under another name")
                continue
            entries = self.notes.items(values, path, "values")
            if not entries and (values.value is None or values.value == []):
                self.notes.note(values.place, path, "an axis needs at least one value")
            choices = [self._read_choice(axis, entry, f"{path}[{i}]") for i, entry in enumerate(entries)]
            found[axis] = [choice for choice in choices if choice is not None]
            if key == "axes.zip":
                continue  # rows of a zip may repeat a value
            earlier: set[str] = set()
            for choice in found[axis]:
                if choice.key in earlier:
                    self.notes.note(choice.place, path, f"{show(choice.shown)} is there twice. Keep one of the two")
                earlier.add(choice.key)
        return {name: choices for name, choices in found.items() if choices}

    def _known_axis(self, name: str, place: Place, path: str) -> str | None:
        """The axis's own name ('eta' for 'sampler.eta'), or None for one that is none (noted)."""
        axis = axis_name(name)
        if axis is None:
            near = did_you_mean(name, [*bare_names(), *FIELD_NAMES, *SECTIONS, "engine"])
            allowed = "a field of model, sampler, train or data, one of these sections, preset, or engine"
            if name.startswith("engine."):
                near = " An axis takes whole engines: 'engine: [{name: ..., recipe: ...}]'"
            self.notes.note(place, path, f"unknown field. Allowed: {allowed}.{near}")
        elif axis in FREE_FIELDS:
            self.notes.note(place, path, f"no axis: {axis} never changes a result. Set it in its section")
            return None
        return axis

    def _read_choice(self, axis: str, item: Item, key: str) -> Choice | None:
        if axis == "preset":
            value = check_value(Head, "preset", item, key, self.notes.problems)
            return None if value is INVALID else Choice(axis, value, item.place, presets=dict.fromkeys(SECTIONS, value))
        if axis == "engine":
            engine = self.read_engine(item, key)
            if engine is None:
                return None
            return Choice(axis, engine["name"], item.place, engine=engine, item=item)
        if axis in SECTIONS:
            return self._read_section_choice(axis, item, key)
        section = section_of(axis)
        assert section is not None
        value = check_value(SECTIONS[section], axis, item, key, self.notes.problems)
        if value is INVALID:
            return None
        return Choice(axis, jsonable(value), item.place, fields={(section, axis): value})

    def _read_section_choice(self, section: str, item: Item, key: str) -> Choice | None:
        if not isinstance(item.value, dict):
            value = check_value(Head, "preset", item, key, [])
            if value is INVALID:
                message = f"{show(item.plain())} is not allowed. Allowed: fixed, released, or a mapping of fields"
                self.notes.note(item.place, key, message)
                return None
            return Choice(section, value, item.place, presets={section: value})
        known = len(self.notes.problems)
        found = check_mapping(SECTIONS[section], item, key, self.notes.problems, elsewhere=FIELD_NAMES)
        for name in FREE_FIELDS:
            if name in found:
                self.notes.note(item.key_places[name], f"{key}.{name}", "never changes a result. Set it in its section")
        if len(self.notes.problems) > known:
            return None
        shown = ",".join(f"{name}={axis_value_text(jsonable(value))}" for name, value in found.items())
        return Choice(section, shown, item.place, fields={(section, name): value for name, value in found.items()})

    def read_engine(self, item: Item, key: str) -> dict[str, Any] | None:
        """The valid fields of an engine, its name among them; None where one is refused (noted)."""
        if isinstance(item.value, str):
            name = check_value(EngineConfig, "name", item, key, self.notes.problems)
            return None if name is INVALID else {"name": name}
        if not isinstance(item.value, dict):
            allowed = f"{', '.join(ENGINES)}, or a mapping of {', '.join(EngineConfig.model_fields)}"
            self.notes.note(item.place, key, f"{show(item.plain())} is not allowed. Allowed: {allowed}")
            return None
        known = len(self.notes.problems)
        found = check_mapping(EngineConfig, item, key, self.notes.problems, elsewhere=FIELD_NAMES)
        return {"name": "diffinst", **found} if len(self.notes.problems) == known else None

    def _read_assignment(self, item: Item, key: str, only: list[str] | None = None) -> list[Choice]:
        """One mapping from axis to value, of include or exclude; `only`: the axes that may be named."""
        if not isinstance(item.value, dict) or not item.value:
            self.notes.note(
                item.place, key, f"{show(item.plain())} is not allowed. Allowed: a mapping from axis to value"
            )
            return []
        choices = []
        for name, value in item.value.items():
            path = f"{key}.{name}"
            axis = self._known_axis(name, item.key_places[name], path)
            if axis is None:
                continue
            if only is not None and axis not in only:
                message = f"not an axis of product or zip. Allowed: {', '.join(only) or 'none, there is no axis'}"
                self.notes.note(item.key_places[name], path, f"{message}.{did_you_mean(axis, only)}")
                continue
            choice = self._read_choice(axis, value, path)
            if choice is not None:
                choices.append(choice)
        return choices


def axis_name(name: str) -> str | None:
    """The axis's own name ('eta' for 'sampler.eta'), or None for one that is none."""
    if name in ("preset", "engine") or name in SECTIONS or section_of(name):
        return name
    return name.partition(".")[2] if name in FIELD_NAMES else None


def engine_key(fields: Mapping[str, Any]) -> str:
    """Equal for engines of the same fields."""
    return json.dumps(["engine", fields], sort_keys=True)


def bare_names() -> list[str]:
    """All fields without their section."""
    return [name.partition(".")[2] for name in FIELD_NAMES]


def jsonable(value: Any) -> Any:
    """A field's value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value
