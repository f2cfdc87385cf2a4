"""Results of pytest-benchmark as records, so that they go through the same gates as a suite's.

Its own comparison passes when a test is missing from the base; here each test is a cell, and a cell of one side only is
missing or extra.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.errors import RecordError
from bench.report.cells import Record

SUITE = "benchmarks"
# How a test was timed; the rest of its options is about output.
_PROTOCOL = ("disable_gc", "timer", "min_rounds", "min_time", "max_time", "warmup")


def read_benchmarks(path: Path) -> list[Record]:
    """The tests of a file that `pytest --benchmark-json FILE` wrote.

    Raises:
        RecordError: it is unreadable or no such file, or holds no test.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not valid JSON: {error}"
        raise RecordError(f"{path}: cannot be read ({reason}). Write it with pytest --benchmark-json FILE") from error
    entries = content.get("benchmarks") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise RecordError(f"{path}: holds no benchmarks. Write it with pytest --benchmark-json FILE")
    with _as_written(f"{path}: machine_info or commit_info"):
        environment = _environment(content)
    records = []
    for number, entry in enumerate(entries):
        with _as_written(f"{path}: benchmarks[{number}]"):
            records.append(_record(entry, environment, str(path), content.get("datetime")))
    return records


@contextlib.contextmanager
def _as_written(place: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        message = f"{place}: not as pytest-benchmark writes it ({error!r}). Write it again with --benchmark-json FILE"
        raise RecordError(message) from error


def _check_text(value: Any) -> None:
    """JSON can spell halves of characters, '\\ud800', which no file or terminal takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character in {value!r:.200}") from error


def _record(entry: dict[str, Any], environment: dict[str, Any], path: str, when: Any) -> Record:
    name, stats, options = str(entry["fullname"]), entry["stats"], entry.get("options") or {}
    median = float(stats["median"])
    samples = [float(value) for value in stats.get("data") or []]
    if not all(math.isfinite(value) for value in (median, *samples)):
        raise ValueError("a time is no finite number")
    measure = {key: options[key] for key in _PROTOCOL if key in options}
    _check_text([name, measure])
    return {
        "suite": SUITE,
        "run_id": name,
        "label": name,
        "status": "ok",
        "reason": None,
        "axes": {"test": name},
        "config": {},
        "measure": measure,
        "metrics": {f"benchmark_s/{name}": {"value": median, "unit": "s", "higher_is_better": False}},
        "samples": {"benchmark_s": {name: samples}} if samples else {},
        "environment": environment,
        "started_at": str(when or ""),
        "path": path,
    }


def _environment(content: dict[str, Any]) -> dict[str, Any]:
    """The class of machine, without its name in the network."""
    machine, commit = content.get("machine_info") or {}, content.get("commit_info") or {}
    cpu = machine.get("cpu") or {}
    model, count = str(cpu.get("brand_raw") or machine.get("processor") or ""), cpu.get("count")
    identity = repr((model, count, machine.get("machine"), machine.get("system")))
    slug = re.sub(r"[^a-z0-9]+", "-", f"{model} {count}c".lower()).strip("-")
    found = {
        "machine": f"{slug[:72]}-{hashlib.sha256(identity.encode()).hexdigest()[:6]}",
        "python": " ".join(str(machine[key]) for key in ("python_implementation", "python_version") if key in machine),
        "commit": commit.get("id"),
        "dirty": commit.get("dirty"),
    }
    _check_text(found)
    return found
