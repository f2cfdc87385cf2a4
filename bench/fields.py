"""One value against one field of a pydantic model: the value as the model stores it, or a sentence that helps.

The allowed values are printed from the model itself, so that a message cannot drift away from the check.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from bench.errors import SuiteError
from bench.yaml_source import Item, Place


class Invalid:
    """Stands for a value that was refused (its mistake is already noted)."""


INVALID = Invalid()


@cache
def _adapter(model: type[BaseModel], name: str) -> TypeAdapter[Any]:
    info: FieldInfo = model.model_fields[name]
    annotation: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
    return TypeAdapter(annotation, config=ConfigDict(strict=True))


@cache
def allowed_values(model: type[BaseModel], name: str) -> str:
    """What a field takes, in words: "an integer of at least 1, or null"."""
    return _in_words(_adapter(model, name).json_schema())


def is_list_field(model: type[BaseModel], name: str) -> bool:
    """Whether one value of the field is itself a list."""
    schema = _adapter(model, name).json_schema()
    return any(option.get("type") == "array" for option in [schema, *schema.get("anyOf", [])])


def check_value(model: type[BaseModel], name: str, item: Item, key: str, problems: list[SuiteError]) -> Any:
    """The value of a field as the model stores it (tuples for lists, floats for whole numbers of a float field).

    Args:
        model, name: the field.
        item: the value and its place.
        key: how the value is called in an error.
        problems: gets one entry if the value is refused.
    Returns:
        The checked value, or INVALID.
    """
    value = item.plain()
    try:
        return _adapter(model, name).validate_python(value)
    except ValidationError as error:
        place = _place_inside(item, error.errors()[0]["loc"])
        message = f"{show(value)} is not allowed. Allowed: {allowed_values(model, name)}"
        problems.append(place.error(key, message + _hint(model, name, item)))
        return INVALID


def check_mapping(
    model: type[BaseModel], item: Item, key: str, problems: list[SuiteError], *, elsewhere: Iterable[str] = ()
) -> dict[str, Any]:
    """The valid fields of a mapping; unknown and refused ones are noted.

    Args:
        elsewhere: dotted names of fields that other sections have, to tell where a misplaced key belongs.
    """
    if item.value is None:
        return {}  # a section whose lines are all commented out
    if not isinstance(item.value, dict):
        problems.append(item.place.error(key, f"{show(item.plain())} is not allowed. Allowed: a mapping of fields"))
        return {}
    found = {}
    for name, child in item.value.items():
        path = f"{key}.{name}" if key else name
        if name not in model.model_fields:
            problems.append(item.key_places[name].error(path, unknown(name, model.model_fields, elsewhere)))
            continue
        value = check_value(model, name, child, path, problems)
        if not isinstance(value, Invalid):
            found[name] = value
    return found


def unknown(name: str, allowed: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """The message for a name that is not one of `allowed`, with the nearest right one."""
    names = list(allowed)
    for dotted in elsewhere:
        if dotted.rpartition(".")[2] == name and name not in names:
            return f"unknown key. '{name}' belongs into section '{dotted.partition('.')[0]}'"
    return f"unknown key. Allowed: {', '.join(names)}.{did_you_mean(name, names) or did_you_mean(name, elsewhere)}"


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the nearest name, or nothing if none is near."""
    near = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def show(value: Any) -> str:
    """A value as a person would write it in YAML, short."""
    if isinstance(value, str):
        text = f"'{value}'"
    elif value is None:
        text = "null"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, dict):
        text = "{" + ", ".join(f"{key}: {show(entry)}" for key, entry in value.items()) + "}"
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(show(entry) for entry in value) + "]"
    else:
        text = str(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _place_inside(item: Item, location: tuple[int | str, ...]) -> Place:
    """Where the culprit stands: inside lists as far as the location of pydantic's error leads."""
    for step in location:
        if isinstance(item.value, list) and isinstance(step, int) and step < len(item.value):
            item = item.value[step]
    return item.place


def _hint(model: type[BaseModel], name: str, item: Item) -> str:
    schema = _adapter(model, name).json_schema()
    options = [schema, *schema.get("anyOf", [])]
    scalars = item.value if isinstance(item.value, list) else [item]
    for scalar in scalars:
        text = scalar.value
        if isinstance(text, str) and any(_takes_numbers(option) for option in options):
            return _number_hint(scalar, whole=not any(_takes_numbers(option, "number") for option in options))
    choices = [choice for option in options for choice in _choices(option)]
    if isinstance(item.value, str):
        near = did_you_mean(item.value, choices)
        return f".{near}" if near else ""
    if isinstance(item.value, bool) and {"on", "off", "yes", "no"} & set(choices):
        return ". YAML reads on, off, yes and no as true and false: put quotes around it"
    if not isinstance(item.value, (str, list, dict)) and any(option.get("type") == "string" for option in options):
        return ". Put quotes around it"
    return ""


def _takes_numbers(schema: dict[str, Any], *kinds: str) -> bool:
    return schema.get("type") in (kinds or ("integer", "number")) or (
        schema.get("type") == "array" and _takes_numbers(schema.get("items", {}), *kinds)
    )


def _number_hint(item: Item, *, whole: bool) -> str:
    try:
        number = float(item.value)
    except ValueError:
        return ""
    if not item.is_plain:
        return ". Text in quotes is no number: take the quotes away"
    mantissa, _, exponent = item.value.lower().partition("e")
    if not exponent or number in (float("inf"), float("-inf")) or number != number:
        return ""
    if whole:
        return f". YAML reads {item.value} as text: write {number:.0f}" if number.is_integer() and number < 1e15 else ""
    mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
    sign = exponent if exponent[0] in "+-" else f"+{exponent}"
    return f". YAML reads {item.value} as text: write {mantissa}e{sign}"


def _choices(schema: dict[str, Any]) -> list[str]:
    return [choice for choice in schema.get("enum", [schema["const"]] if "const" in schema else []) if choice]


def _in_words(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return ", or ".join(_in_words(option) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(str(choice) for choice in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    kind = schema.get("type")
    if kind == "null":
        return "null"
    if kind == "boolean":
        return "true, false"
    if kind == "string":
        return "text"
    if kind in {"integer", "number"}:
        return ("an integer" if kind == "integer" else "a number") + _range_in_words(schema)
    if kind == "object":
        return "a mapping from names to plain values or lists of them"
    if kind == "array":
        return f"a list, each {_in_words(schema.get('items', {}))}"
    return "anything"


def _range_in_words(schema: dict[str, Any]) -> str:
    low, high, above = schema.get("minimum"), schema.get("maximum"), schema.get("exclusiveMinimum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    if low is not None:
        return f" of at least {low:g}"
    return f" above {above:g}" if above is not None else ""
