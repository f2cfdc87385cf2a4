"""Who set a value of a cell's configuration: a place in the suite, an argument, a preset or a default."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from bench.suite import Suite, SuiteCell
from bench.yaml_source import Place, read_yaml
from diffinst import config as config_module
from diffinst.config import RELEASED, SECTIONS


def origin_of(suite: Suite, cell: SuiteCell, section: str, name: str) -> str:
    """What gave field `name` of `section` its value, with file and line: 'suites/x.yaml:41:20 (axis)'.

    Args:
        suite, cell: a suite and one of its cells. section: 'model', ..., or 'engine'.
    """
    key = f"{section}.{name}"
    if key in cell.places:
        return f"{place_text(cell.places[key])} (axis)"
    if section == "engine":
        place = cell.places.get("engine") or suite.places.get("engine")
        return "default" if place is None else place_text(place)
    if key == "train.seed" and "seeds" in suite.places and key not in suite.places:
        return f"{place_text(suite.places['seeds'])} (seeds)"
    if key in suite.places:
        return place_text(suite.places[key])
    if section in cell.places:  # a preset as an axis
        return f"{place_text(cell.places[section])} (axis of presets)"
    default = SECTIONS[section].model_fields[name].default
    value = getattr(getattr(cell.config, section), name)
    if name in RELEASED[section] and value == RELEASED[section][name] != default:
        place = suite.places.get("preset")
        return "preset: released" + ("" if place is None else f", {place_text(place)}")
    line = _default_lines().get((SECTIONS[section].__name__, name))
    return f"diffinst/config.py{'' if line is None else f':{line}'} (default)"


def origin_of_measure(suite: Suite, name: str) -> str:
    """What gave field `name` of the suite's `measure` its value."""
    for override in reversed(suite.overrides):
        if override.partition("=")[0].strip() in (name, f"measure.{name}"):
            return f"--set {override}"
    root, _ = read_yaml(suite.source_text, suite.path)
    section = root.value.get("measure") if isinstance(root.value, dict) else None
    fields = section.value if section is not None and isinstance(section.value, dict) else {}
    return place_text(fields[name].place) if name in fields else "default"


def place_text(place: Place) -> str:
    """'suites/x.yaml:41:20', or the argument as it was typed."""
    if place.argument is not None:
        return place.argument
    return ":".join(str(part) for part in (place.file, place.line, place.column) if part is not None)


@cache
def _default_lines() -> dict[tuple[str, str], int]:
    """(class, field) -> line of its default."""
    tree = ast.parse(Path(config_module.__file__).read_bytes())
    return {
        (owner.name, statement.target.id): statement.lineno
        for owner in tree.body
        if isinstance(owner, ast.ClassDef)
        for statement in owner.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }
