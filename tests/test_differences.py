"""DIFFERENCES.md names every switch of the release, and only tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from diffinst.config import RELEASED, Config, section_of

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "DIFFERENCES.md").read_text()


def _tests_of(path: Path) -> set[str]:
    """'test_x' and 'TestY::test_x' of a test file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        names |= {prefix + member.name for member in members if isinstance(member, ast.FunctionDef)}
    return names


def test_every_switch_of_the_release_has_a_row_with_its_values_and_a_test() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| `")]
    for section, values in RELEASED.items():
        for field, value in values.items():
            (row,) = (line for line in rows if line.startswith(f"| `{section}.{field}`:"))
            default = getattr(getattr(Config(), section), field)
            written = "null" if value is None else value
            assert f": `{written}`, **`{default}`**" in row, f"{section}.{field}"
            assert "tests/diffinst/" in row.rsplit("|", 2)[1], f"{section}.{field} has no pinning test"


def test_every_named_field_exists() -> None:
    named = re.findall(r"`(model|sampler|train|data)\.(\w+)`", TEXT)
    assert len(named) > 10
    assert [f"{section}.{field}" for section, field in named if section_of(field) != section] == []


def test_every_named_test_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::([\w:]+))?`", TEXT)
    assert len(named) > 50
    files = {file for file, _ in named}
    assert [file for file in sorted(files) if not (ROOT / file).is_file()] == []
    tests = {file: _tests_of(ROOT / file) for file in files}
    assert [f"{file}::{test}" for file, test in named if test and test not in tests[file]] == []
    assert TEXT.count("tests/") == len(named), "a test is named in a form that is not checked"
