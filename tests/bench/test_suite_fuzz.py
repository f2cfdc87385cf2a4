"""Any suite file is a suite or one report of mistakes: nothing else is raised, nothing is run, and soon."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.errors import SuiteError
from bench.suite import Suite, load_suite

VALID: dict[str, Any] = {
    "name": "fuzzed",
    "description": "for people",
    "preset": "fixed",
    "data": {"dataset": "shapes", "shapes_train_images": 4},
    "model": {"backbone": "tiny", "num_stages": 1},
    "train": {"iterations": 2, "learning_rate": 1.0e-3, "schedule_steps": [1]},
    "sampler": {"num_proposals": 5},
    "engine": "diffinst",
    "axes": {
        "product": {"sampling_steps": [1, 2], "num_proposals": [5, 6]},
        "zip": {"eta": [0.0, 1.0]},
        "exclude": [{"sampling_steps": 1, "num_proposals": 5}],
        "include": [{"sampling_steps": 3}],
    },
    "seeds": [0, 1],
    "measure": {"score": True, "latency": True, "latency_images": 2},
    "tables": [{"rows": "num_proposals", "columns": "sampling_steps", "metric": "segm/AP"}],
    "plots": [{"x": "sampling_steps", "y": "segm/AP"}],
}
SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["../x", "/etc/passwd", "on", "1e3", "{{7*7}}", "\\input{x}", "=1+1", "<b>", "~", "nan", "", "a" * 300]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        found += paths_of(entry, (*path, key))
    return found


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    items = dict(value.items() if isinstance(value, dict) else enumerate(value))
    items[path[0]] = replaced(items[path[0]], path[1:], new)
    return items if isinstance(value, dict) else list(items.values())


def load(folder: Path, content: bytes | str) -> Suite | SuiteError:
    """The suite, or the mistakes; every other exception goes through."""
    path = folder / "fuzzed.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    began = time.process_time()
    try:
        found: Suite | SuiteError = load_suite(path)
    except SuiteError as error:
        found = error
    assert time.process_time() - began < 20  # of this process: a busy machine makes it no longer
    assert isinstance(found, Suite) or str(found).strip()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("suites")


def test_the_start_of_the_mutations_is_valid(folder: Path) -> None:
    assert isinstance(load(folder, yaml.safe_dump(VALID)), Suite)


@settings(max_examples=150)
@given(data=st.data())
def test_a_mutated_suite(folder: Path, data: st.DataObject) -> None:
    content: Any = VALID
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(paths_of(content)))
        content = replaced(content, path, data.draw(VALUES))
        if not paths_of(content):
            break
    load(folder, yaml.safe_dump(content, allow_unicode=True))


@settings(max_examples=100)
@given(content=VALUES)
def test_any_document(folder: Path, content: Any) -> None:
    load(folder, yaml.safe_dump(content, allow_unicode=True))


@settings(max_examples=150)
@given(content=st.binary(max_size=200))
def test_any_bytes(folder: Path, content: bytes) -> None:
    load(folder, content)


@settings(max_examples=100)
@given(data=st.data())
def test_a_suite_with_damaged_text(folder: Path, data: st.DataObject) -> None:
    text = yaml.safe_dump(VALID)
    place = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(place, min(place + 10, len(text))))
    new = data.draw(st.text(alphabet="{}[]:,&*!|>-?%@`'\"#\n\t \x00\ufeffaä1", max_size=6))
    load(folder, text[:place] + new + text[end:])


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    "content",
    [
        BOMB,
        "a: &a [*a]",
        "[" * 5000,
        "{a: " * 3000,
        "- " * 3000 + "x",
        "? " * 3000,
        "name: " + "9" * 10_000,
        "seeds: [" + "9" * 5000 + "]",
        "train: {iterations: 0x" + "f" * 5000 + "}",
        "train: {iterations: .nan, learning_rate: .inf}",
        "train: {learning_rate: 1.0e+999}",
        "train: {iterations: 1_" + "0_" * 4000 + "0}",
        "axes: {product: {" + ", ".join(f"f{n}: [1, 2]" for n in range(500)) + "}}",
        "axes: {product: {sampling_steps: ["
        + ", ".join(map(str, range(1, 3000)))
        + "], eval_seed: ["
        + ", ".join(map(str, range(3000)))
        + "]}}",
        "!!python/object/apply:os.system ['touch pwned']",
        "name: !!python/name:os.system",
        "name: !!binary aGVsbG8=",
        "<<: {name: x}",
        "a: 1\n--- \nb: 2",
        "\x00\x01\x02",
        b"\xff\xfe\x00a",
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        "seeds: 190:20:30:40:50",
        "name: [2001-13-45]",
        "%YAML 9.9\n---\na: 1",
        "%TAG ! tag:x,2000:\n---\nname: !y z",
    ],
)
def test_hostile_documents_are_refused(folder: Path, content: str | bytes) -> None:
    assert isinstance(load(folder, content), SuiteError)
    assert not Path("pwned").exists()


def test_no_file_is_read_without_end(folder: Path) -> None:
    for content in ("a: [" + "x, " * 2**20, "ä" * 2**20):
        assert "is larger than 1 MiB, which no suite needs" in str(load(folder, content))
    with pytest.raises(SuiteError, match="is larger than 1 MiB"):
        load_suite(Path("/dev/zero"))


@pytest.mark.parametrize(
    "name", ["..", "../x", "/tmp/x", "a/b", ".hidden", "a\\b", "a\nb", "", "a\x00b", "reports", "-x", "ä"]
)
def test_a_name_that_leads_elsewhere(folder: Path, name: str) -> None:
    found = load(folder, yaml.safe_dump(VALID | {"name": name}, allow_unicode=True))
    assert isinstance(found, SuiteError)
    assert "name: " in str(found)
