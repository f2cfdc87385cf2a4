"""YAML as values that know their place in the file, so that every mistake can be pointed at.

A suite is data: tags that construct objects, anchors and aliases (which can grow without bound) are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bench.errors import SuiteError, SuiteErrors

_MAX_DEPTH = 20
_MAX_BITS = 1024  # of an integer; Python itself refuses to write far longer ones
_SCALAR_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "timestamp")}
_TAG_PREFIX = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Place:
    """Where something was written: in a file (line and column from 1), or as an argument of the command line."""

    file: Path | None
    line: int | None = None
    column: int | None = None
    argument: str | None = None

    def error(self, key: str, message: str) -> SuiteError:
        """The mistake at this place; an argument of the command line is quoted instead of the key."""
        return SuiteError(message, file=self.file, line=self.line, column=self.column, key=self.argument or key)


@dataclass(frozen=True)
class Item:
    """A value and its place.

    value: None, bool, int, float or str; a list of items; or a dict from key to item.
    key_places: for a mapping, where each key stands. is_plain: for text, written without quotes.
    """

    value: Any
    place: Place
    key_places: dict[str, Place] = field(default_factory=dict)
    is_plain: bool = False

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        return self.value


class _Composer(yaml.SafeLoader):
    """Composes nodes; refuses aliases and deep nesting, which would otherwise cost unbounded memory or the stack."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            message = "aliases (*name) are not allowed; write the value out"
            raise yaml.composer.ComposerError(None, None, message, mark)
        if self.depth >= _MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {_MAX_DEPTH} levels", mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_yaml(text: str, file: Path | None = None, *, argument: str | None = None) -> tuple[Item, list[SuiteError]]:
    """Parse one YAML document.

    Args:
        text: the document.
        file: where it was read from; None for an argument of the command line.
        argument: the argument, quoted in errors in place of file, line and column.
    Returns:
        The document and the mistakes that do not stop the reading: duplicate keys (the first one counts), keys that
        are not text, values of unknown types.
    Raises:
        SuiteErrors: the text is no YAML, or uses aliases.
    """
    start = Place(file, 1, 1) if argument is None else Place(None, argument=argument)
    try:
        loader = _Composer(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        place = _place(error.problem_mark or error.context_mark, start)
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise SuiteErrors([place.error("", f"not valid YAML: {what}")]) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - (text.rfind("\n", 0, error.position) + 1) + 1
        place = Place(file, line, column) if argument is None else start
        raise SuiteErrors(
            [place.error("", f"character {_codepoint(error.character)} is not allowed in YAML")]
        ) from error
    if node is None:
        return Item(None, start), []
    problems: list[SuiteError] = []
    return _item(node, "", loader, start, problems), problems


def _codepoint(character: int | str | bytes) -> str:
    return f"U+{character if isinstance(character, int) else ord(character):04X}"


def _place(mark: yaml.Mark | None, start: Place) -> Place:
    if mark is None or start.argument is not None:
        return start
    return Place(start.file, mark.line + 1, mark.column + 1)


def _item(node: yaml.Node, key: str, loader: _Composer, start: Place, problems: list[SuiteError]) -> Item:
    place = _place(node.start_mark, start)
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG_PREFIX}map":
        values: dict[str, Item] = {}
        key_places: dict[str, Place] = {}
        for name, key_place, value_node in _pairs(node, key, start, problems):
            path = f"{key}.{name}" if key else name
            item = _item(value_node, path, loader, start, problems)
            if name in values:
                first = key_places[name].line
                where = f" (first on line {first})" if first else ""
                problems.append(key_place.error(path, f"duplicate key{where}. Keep one of the two"))
                continue
            values[name] = item
            key_places[name] = key_place
        return Item(values, place, key_places)
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG_PREFIX}seq":
        return Item([_item(child, f"{key}[{i}]", loader, start, problems) for i, child in enumerate(node.value)], place)
    if isinstance(node, yaml.ScalarNode) and node.tag in _SCALAR_TAGS:
        is_plain = node.style is None
        if node.tag == f"{_TAG_PREFIX}timestamp":
            return Item(node.value, place, is_plain=is_plain)
        try:
            value = loader.construct_object(node)
            if isinstance(value, int) and value.bit_length() > _MAX_BITS:
                raise ValueError("too long")
        except ValueError:
            problems.append(place.error(key, f"{_shorten(node.value)} is no number that can be read"))
            value = None
        return Item(value, place, is_plain=is_plain)
    tag = node.tag.replace(_TAG_PREFIX, "!!")
    problems.append(place.error(key, f"tag {tag} is not allowed. Write plain text, numbers, lists and mappings"))
    return Item(None, place)


def _pairs(
    node: yaml.MappingNode, key: str, start: Place, problems: list[SuiteError]
) -> Iterator[tuple[str, Place, yaml.Node]]:
    for key_node, value_node in node.value:
        place = _place(key_node.start_mark, start)
        if isinstance(key_node, yaml.ScalarNode) and key_node.tag in {f"{_TAG_PREFIX}str", f"{_TAG_PREFIX}merge"}:
            yield key_node.value, place, value_node
        else:
            shown = _shorten(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
            problems.append(place.error(key, f"{shown} is not allowed as a key. Keys are text"))


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
