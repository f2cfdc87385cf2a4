"""The cells of a suite: every combination of its axes, resolved and checked. Loads no torch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from bench.engines import EngineConfig
from bench.metric_names import is_lvis
from bench.suite_axes import Axes, Choice, Notes, engine_key, jsonable
from bench.suite_types import CUSTOM_PATHS, SuiteCell, axes_label, axis_value_text
from bench.yaml_source import Place
from diffinst.config import RELEASED, SECTIONS, Config, Section, section_of

MAX_CELLS = 100_000


class CellBuilder:
    """Makes the cells; what does not go together goes to `notes`.

    Args:
        head: the suite's own keys. sections: the fields that it sets, by section. engine: of cells without an axis of
            engines, and engine_label: its name beside those of the axis.
    """

    def __init__(
        self,
        notes: Notes,
        head: Mapping[str, Any],
        sections: Mapping[str, Mapping[str, Any]],
        axes: Axes,
        engine: EngineConfig,
        engine_label: str,
    ) -> None:
        self.notes, self.head, self.sections, self.axes = notes, head, sections, axes
        self.engine, self.engine_label = engine, engine_label
        self.engines: dict[str, EngineConfig] = {}
        self.built: dict[tuple[str, str], Section | None] = {}

    def cells(self) -> Iterator[SuiteCell]:
        """All cells, in table order."""
        assignments = list(self._assignments())
        names = list(dict.fromkeys(choice.axis for choices in assignments for choice in choices))
        if len(assignments) * len(self._seeds()) > MAX_CELLS:
            what = f"{len(assignments)} combinations and {len(self._seeds())} seeds are too many cells"
            self.notes.note(self.notes.place_of("axes"), "axes", f"{what}. Allowed: at most {MAX_CELLS}")
            return
        taken: dict[str, SuiteCell] = {}
        for choices in assignments:
            has_seed = any(("train", "seed") in choice.fields for choice in choices)
            for seed in [None] if has_seed else self._seeds():
                config = self.config(choices, seed)
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
                    place = choices[0].place if choices else self.notes.place_of("axes")
                    self.notes.note(place, "axes", f"the cell {axes_label(axes)} is there twice. Remove one of the two")
                    continue
                taken[label] = cell
                yield cell
        if not taken and not self.notes.problems:
            self.notes.note(self.notes.place_of("axes"), "axes", "no cell is left. Exclude fewer, or include some")

    def _seeds(self) -> tuple[int, ...]:
        if "seeds" in self.head:
            return tuple(self.head["seeds"])
        return (self.sections["train"].get("seed", 0),)

    def _assignments(self) -> Iterator[list[Choice]]:
        rows = [list(row) for row in zip(*self.axes.zip.values(), strict=False)] if self.axes.zip else [[]]
        count = len(rows)
        for choices in self.axes.product.values():
            count *= len(choices)
        if count > MAX_CELLS:
            message = f"{count} combinations are too many cells. Allowed: at most {MAX_CELLS}"
            self.notes.note(self.notes.place_of("axes"), "axes", message)
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
                self.notes.note(place, "axes.exclude", "matches no cell. Name values that product and zip have")
        yield from self.axes.include

    def _base_value(self, axis: str, config: Config) -> Any:
        """What a cell of `include` shows for an axis that it does not name."""
        section = section_of(axis)
        if section is not None:
            return jsonable(getattr(getattr(config, section), axis))
        if axis == "engine":
            return self.engine_label
        return self.head["preset"] if axis == "preset" else "base"

    def _engine(self, choices: Sequence[Choice]) -> EngineConfig:
        chosen = [choice.engine for choice in choices if choice.engine is not None]
        if not chosen:
            return self.engine
        # One object for all cells of an engine, like their sections.
        return self.engines.setdefault(engine_key(chosen[-1]), EngineConfig(**chosen[-1]))

    def _check_together(self, engine: EngineConfig, config: Config, choices: Sequence[Choice]) -> None:
        """Settings that an engine cannot follow, noted once each."""
        blamed = [choice for choice in choices if choice.axis == "engine"]
        messages = []
        if not engine.is_default and config.model.weights != "none":
            messages.append(f"model.weights is for engine diffinst, not {engine.name}. Use engine_weights")
        for message in messages:
            if ("", message) not in self.built:
                self.built["", message] = None
                self._note_values(message, blamed, self.notes.place_of("engine"), "engine")

    def config(self, choices: Sequence[Choice], seed: int | None = None) -> Config | None:
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
                self._note_values(message, named, self.notes.root.place, "the suite")
            return None

    def _section(
        self, name: str, model: type[Section], values: dict[str, Any], choices: Sequence[Choice]
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
            self._note_values(message, blamed, self.notes.place_of(name), name)
        self.built[known] = part
        return part

    def _note_values(self, message: str, blamed: Sequence[Choice], place: Place, key: str) -> None:
        """Values that do not go together: noted at the first of the axes they come from, otherwise at `place`."""
        if blamed:
            axes = ", ".join(f"{choice.axis}={axis_value_text(choice.shown)}" for choice in blamed)
            self.notes.note(blamed[0].place, f"axes.{blamed[0].axis}", f"{message} (in the cells with {axes})")
        else:
            self.notes.note(place, key, message)


def _places_of(choices: Sequence[Choice]) -> dict[str, Place]:
    """Where axes have what they set."""
    found: dict[str, Place] = {}
    for choice in choices:
        found |= dict.fromkeys(choice.presets, choice.place)
        found |= {f"{section}.{name}": choice.place for section, name in choice.fields}
        if choice.engine is not None:
            found["engine"] = choice.place
    return found


def _has_axis(choices: Sequence[Choice], axis: str) -> bool:
    return any(choice.axis == axis for choice in choices)


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
