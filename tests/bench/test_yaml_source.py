"""Values that know their place; what a suite must not contain."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import example, given

from bench.errors import SuiteErrors
from bench.yaml_source import read_yaml

FILE = Path("s.yaml")


def test_values_keys_and_list_entries_know_their_place() -> None:
    #       column 1 3   7
    item, problems = read_yaml("a: 1\nb:\n  c: [x, 2.5]\n", FILE)
    assert problems == []
    assert item.plain() == {"a": 1, "b": {"c": ["x", 2.5]}}
    inner = item.value["b"]
    assert (inner.key_places["c"].line, inner.key_places["c"].column) == (3, 3)
    entry = inner.value["c"].value[1]
    assert (entry.place.file, entry.place.line, entry.place.column) == (FILE, 3, 10)


def test_an_argument_is_quoted_instead_of_a_place() -> None:
    item, _ = read_yaml("[1, x]", argument="--set a=[1, x]")
    error = item.value[1].place.error("a", "wrong")
    assert str(error) == "--set a=[1, x]: wrong"
    assert error.line is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", "s.yaml:3:1: a: duplicate key (first on line 1). Keep one of the two"),
        ("a:\n  on: 1\n", "s.yaml:2:3: a: on is not allowed as a key. Keys are text"),
        ("? [x]\n: 1\n", "s.yaml:1:3: a list or mapping is not allowed as a key. Keys are text"),
        (
            "a: !!python/name:os.abort\n",
            "s.yaml:1:4: a: tag !!python/name:os.abort is not allowed. Write plain text, numbers, lists and mappings",
        ),
        ("a: " + "9" * 5000, f"s.yaml:1:4: a: {'9' * 37}... is no number that can be read"),
    ],
)
def test_mistakes_that_do_not_stop_the_reading(text: str, expected: str) -> None:
    item, problems = read_yaml(text, FILE)
    assert [str(problem) for problem in problems] == [expected]
    assert isinstance(item.value, dict)


def test_the_first_of_two_equal_keys_counts() -> None:
    assert read_yaml("a: 1\na: 3\n", FILE)[0].plain() == {"a": 1}


@pytest.mark.parametrize(
    ("text", "place", "part"),
    [
        ("a: [1, 2\nb: 3\n", "s.yaml:2:2", "not valid YAML"),
        ("a: &x [1]\nb: *x\n", "s.yaml:2:4", "aliases (*name) are not allowed"),
        ("a: &x [*x]\n", "s.yaml:1:8", "aliases (*name) are not allowed"),
        ("[" * 50 + "]" * 50, "s.yaml:1:21", "nested deeper than 20 levels"),
        ("a: 1\n---\nb: 2\n", "s.yaml:2:1", "not valid YAML"),
        ("a: 1\nb: \x07\n", "s.yaml:2:4", "character U+0007 is not allowed in YAML"),
    ],
)
def test_text_that_cannot_be_read_is_refused_with_its_place(text: str, place: str, part: str) -> None:
    with pytest.raises(SuiteErrors) as caught:
        read_yaml(text, FILE)
    assert str(caught.value).startswith(place)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_document_is_null() -> None:
    assert read_yaml("# nothing\n", FILE)[0].value is None


@given(st.text(st.characters(codec="utf-8"), max_size=60))
@example("a: 2024-01-01")
@example("a: 1:99")
@example("=: =")
def test_any_text_is_read_or_refused_never_a_crash(text: str) -> None:
    try:
        item, _ = read_yaml(text, FILE)
    except SuiteErrors:
        return
    item.plain()


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.text(st.characters(codec="ascii"), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-d]{3}", fullmatch=True), inner),
    max_leaves=8,
)


@given(NESTED)
def test_what_yaml_writes_is_read_back(value: object) -> None:
    assert read_yaml(yaml.safe_dump(value), FILE)[0].plain() == value
