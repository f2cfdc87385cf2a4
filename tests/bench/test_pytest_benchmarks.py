from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.comparability import machine_of
from bench.compare import ExitCode, Outcome, compare
from bench.errors import RecordError
from bench.gates import Gate, Gates
from bench.pytest_benchmarks import read_benchmarks

GATES = Gates({"benchmark_s/*": Gate(relative=0.1, absolute=0.0, noise=0.01)})


def write(path: Path, tests: dict[str, float], **changes: Any) -> Path:
    """A file as pytest-benchmark writes it, cut down to what is read."""
    content = {
        "machine_info": {
            "node": "somebodys-laptop",
            "machine": "x86_64",
            "system": "Linux",
            "python_implementation": "CPython",
            "python_version": "3.11.7",
            "cpu": {"brand_raw": "Example CPU 9000", "count": 2},
        },
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "benchmarks": [
            {
                "fullname": name,
                "options": {"disable_gc": False, "timer": "perf_counter", "min_rounds": 5, "warmup": False},
                "stats": {"median": median, "data": [median * (1 + 0.001 * place) for place in range(-3, 4)]},
            }
            for name, median in tests.items()
        ],
        "datetime": "2026-01-02T03:04:05",
    }
    path.write_text(json.dumps(content | changes))
    return path


def one_test(name: str = "a", options: dict[str, Any] | None = None, **stats: Any) -> str:
    return json.dumps({"benchmarks": [{"fullname": name, "options": options, "stats": stats}]})


def test_tests_become_cells(tmp_path: Path) -> None:
    (record,) = read_benchmarks(write(tmp_path / "a.json", {"tests/a.py::test_x[1]": 0.002}))
    assert record["metrics"] == {
        "benchmark_s/tests/a.py::test_x[1]": {"value": 0.002, "unit": "s", "higher_is_better": False}
    }
    assert len(record["samples"]["benchmark_s"]["tests/a.py::test_x[1]"]) == 7
    assert record["axes"] == {"test": "tests/a.py::test_x[1]"}
    assert machine_of(record).startswith("example-cpu-9000-2c-")
    assert "laptop" not in json.dumps(record)


@pytest.mark.parametrize(
    ("base", "head", "outcome", "code"),
    [
        ({"a": 1.0}, {"a": 1.0}, Outcome.SAME, ExitCode.FINE),
        ({"a": 1.0}, {"a": 1.5}, Outcome.WORSE, ExitCode.REGRESSION),
        ({"a": 1.0, "b": 1.0}, {"a": 1.0}, Outcome.MISSING, ExitCode.MISSING_OR_EXTRA),
        ({"a": 1.0}, {"a": 1.0, "b": 1.0}, Outcome.EXTRA, ExitCode.MISSING_OR_EXTRA),
    ],
)
def test_verdicts(tmp_path: Path, base: dict, head: dict, outcome: Outcome, code: ExitCode) -> None:
    found = compare(
        read_benchmarks(write(tmp_path / "a.json", base)), read_benchmarks(write(tmp_path / "b.json", head)), GATES
    )
    assert outcome in {row.outcome for row in found.rows}
    assert found.exit_code is code


def test_another_machine_or_another_way_of_timing_is_refused(tmp_path: Path) -> None:
    base = read_benchmarks(write(tmp_path / "a.json", {"a": 1.0}))
    other = {"machine": "x86_64", "cpu": {"brand_raw": "Other", "count": 8}}
    head = read_benchmarks(write(tmp_path / "b.json", {"a": 2.0}, machine_info=other))
    assert compare(base, head, GATES).exit_code is ExitCode.NOT_COMPARABLE
    same = read_benchmarks(tmp_path / "a.json")
    same[0]["measure"]["timer"] = "time"
    assert compare(base, same, GATES).rows[0].reason == "measure.timer perf_counter and time"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read .not valid JSON"),
        ("[]", "holds no benchmarks"),
        ('{"benchmarks": []}', "holds no benchmarks"),
        ('{"benchmarks": [{"fullname": "a"}]}', r"benchmarks\[0\]: not as pytest-benchmark writes it"),
        ('{"benchmarks": [{"fullname": "a", "stats": {"median": NaN}}]}', "a time is no finite number"),
        ('{"benchmarks": [3]}', r"benchmarks\[0\]: not as"),
        ("[" * 100_000, "cannot be read .not valid JSON"),
        ('{"benchmarks": [3], "machine_info": [1]}', "machine_info or commit_info: not as pytest-benchmark writes it"),
        ('{"benchmarks": [3], "machine_info": {"cpu": "x"}}', "machine_info or commit_info: not as"),
        ('{"benchmarks": [3], "machine_info": {"python_version": "\\ud800"}}', "half a character in .*ud800"),
        ('{"benchmarks": [3], "commit_info": "x"}', "machine_info or commit_info: not as"),
        (one_test(median=10**400), r"benchmarks\[0\]: not as .*OverflowError"),
        (one_test(median=1.0, data=[10**400]), r"benchmarks\[0\]: not as .*OverflowError"),
        (one_test("a\ud800", median=1.0), r"benchmarks\[0\]: not as .*half a character in .*a.*ud800"),
        (one_test(options={"timer": "\ud800"}, median=1.0), r"benchmarks\[0\]: not as .*half a character"),
    ],
    ids=range(15),
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=message):
        read_benchmarks(path)
    with pytest.raises(RecordError, match="No such file"):
        read_benchmarks(tmp_path / "none.json")
