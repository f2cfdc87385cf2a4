"""A comparison as text for a terminal, Markdown, JSON, JUnit XML and GitHub annotations; all text in it is escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from xml.etree import ElementTree

from bench.compare import Comparison, ExitCode, Outcome, Row
from bench.report.metrics import style_of

VERSION = 1
MAX_ROWS = 500  # of a table for people; a job summary holds 1 MiB

_MEANING = {
    ExitCode.FINE: "no regression",
    ExitCode.REGRESSION: "regression",
    ExitCode.MISSING_OR_EXTRA: "cells or metrics are missing or extra",
    ExitCode.FAILED: "runs have failed",
    ExitCode.NOT_COMPARABLE: "not comparable",
    ExitCode.INCONCLUSIVE: "inconclusive",
}
_COLUMNS = ("verdict", "suite", "cell", "metric", "base", "head", "change [95 %]", "seen from", "why")
_UNCHECKED = (Outcome.MISSING, Outcome.EXTRA, Outcome.FAILED, Outcome.NOT_COMPARABLE)


def summary(comparison: Comparison) -> str:
    """'regression (exit code 1): 1 worse, 3 same'."""
    counts = ", ".join(f"{count} {outcome}" for outcome, count in comparison.counts.items() if count)
    code = comparison.exit_code
    return f"{_MEANING[code]} (exit code {code:d}): {counts or 'nothing was compared'}"


def to_text(comparison: Comparison) -> str:
    """What is not the same, in columns; then the notes and the summary."""
    lines = [_one_line(f"note: {note}") for note in comparison.notes]
    rows, left_out = _shown(comparison)
    if rows:
        table = [_COLUMNS, *([_one_line(text) for text in _texts(row)] for row in rows)]
        widths = [max(len(row[column]) for row in table) for column in range(len(_COLUMNS))]
        lines += ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in table]
    if left_out:
        lines.append(left_out)
    return "\n".join([*lines, summary(comparison)]) + "\n"


def to_markdown(comparison: Comparison) -> str:
    """For a job summary: the summary, a table of what is not the same, the notes."""
    parts = [f"### Comparison: {_markdown(summary(comparison))}", ""]
    rows, left_out = _shown(comparison)
    if rows:
        parts += ["| " + " | ".join(_COLUMNS) + " |", "|" + " --- |" * len(_COLUMNS)]
        parts += ["| " + " | ".join(_markdown(text) for text in _texts(row)) + " |" for row in rows]
        parts.append("")
    if left_out:
        parts += [left_out, ""]
    if comparison.notes:
        parts += ["Differs, and may:", "", *(f"- {_markdown(note)}" for note in comparison.notes), ""]
    return "\n".join(parts)


def to_json(comparison: Comparison) -> str:
    """All rows with all their fields, in the records' units."""
    content = {
        "version": VERSION,
        "exit_code": int(comparison.exit_code),
        "summary": summary(comparison),
        "counts": {str(outcome): count for outcome, count in comparison.counts.items()},
        "notes": list(comparison.notes),
        "rows": [asdict(row) for row in comparison.rows],
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def to_junit(comparison: Comparison) -> str:
    """A test case a row: a regression is a failure, what could not be judged an error, noise is skipped.

    A comparison of nothing is an error too: a file without test cases would pass.
    """
    root = ElementTree.Element("testsuites", name="diffbench compare")
    rows = comparison.rows or (Row("diffbench compare", "nothing", "", Outcome.MISSING, reason="nothing was compared"),)
    by_suite: dict[str, list[Row]] = {}
    for row in rows:
        by_suite.setdefault(_xml(row.suite), []).append(row)
    _set_counts(root, rows)
    for suite, found in by_suite.items():
        parent = ElementTree.SubElement(root, "testsuite", name=suite)
        _set_counts(parent, found)
        for row in found:
            name = f"{row.cell} {row.metric}".strip()
            place = f"{suite}.{row.machine}" if row.machine else suite
            case = ElementTree.SubElement(parent, "testcase", classname=_xml(place), name=_xml(name))
            tag = "failure" if row.outcome is Outcome.WORSE else "error" if row.outcome in _UNCHECKED else "skipped"
            if row.outcome not in (Outcome.SAME, Outcome.BETTER):
                element = ElementTree.SubElement(case, tag, message=_xml(_sentence(row)))
                if tag != "skipped":
                    element.set("type", str(row.outcome))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _set_counts(element: ElementTree.Element, rows: Sequence[Row]) -> None:
    counts = {
        "tests": len(rows),
        "failures": sum(row.outcome is Outcome.WORSE for row in rows),
        "errors": sum(row.outcome in _UNCHECKED for row in rows),
        "skipped": sum(row.outcome is Outcome.NOISY for row in rows),
    }
    for attribute, count in counts.items():
        element.set(attribute, str(count))


def to_github(comparison: Comparison) -> str:
    """Workflow commands: an error for each row that fails a job, a warning for what is too noisy, then the summary."""
    lines = list(_annotations(comparison.rows))
    level = {ExitCode.FINE: "notice", ExitCode.INCONCLUSIVE: "warning"}.get(comparison.exit_code, "error")
    return "\n".join([*lines, f"::{level} title=diffbench compare::{_command_text(summary(comparison))}"]) + "\n"


WRITERS: dict[str, Callable[[Comparison], str]] = {
    "text": to_text,
    "markdown": to_markdown,
    "json": to_json,
    "junit": to_junit,
    "github": to_github,
}


def _annotations(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.outcome in (Outcome.SAME, Outcome.BETTER):
            continue
        level = "warning" if row.outcome is Outcome.NOISY else "error"
        file = f"file={_command_property(row.path)}," if row.path else ""
        title = _command_property(f"{row.outcome}: {row.suite} {row.metric}".strip())
        yield f"::{level} {file}title={title}::{_command_text(f'{row.cell}: {_sentence(row)}')}"


def _shown(comparison: Comparison) -> tuple[list[Row], str]:
    """The rows for people, the gravest first, and how many more there are."""
    told = [row for row in comparison.rows if row.outcome is not Outcome.SAME]
    rank = {outcome: place for place, outcome in enumerate(Outcome)}
    told.sort(key=lambda row: rank[row.outcome])
    more = len(told) - MAX_ROWS
    return told[:MAX_ROWS], f"... and {more} more, all of them with --format json" if more > 0 else ""


def _texts(row: Row) -> list[str]:
    values = ["" if value is None else value_text(row, value) for value in (row.base, row.head)]
    seen = "" if row.smallest is None else _change(row, row.smallest).lstrip("+")
    where = row.suite if not row.machine else f"{row.suite} ({row.machine})"
    return [str(row.outcome), where, row.cell, row.metric, *values, interval_text(row), seen, row.reason]


def _sentence(row: Row) -> str:
    """The verdict in one line."""
    parts = [str(row.outcome)]
    if row.base is not None and row.head is not None:
        parts.append(f"{row.metric} {value_text(row, row.base)} -> {value_text(row, row.head)}")
    if row.change is not None:
        parts.append(interval_text(row))
    if row.outcome is Outcome.NOISY and row.smallest is not None:
        parts.append(f"seen from {_change(row, row.smallest).lstrip('+')}")
    return ", ".join([*parts, row.reason] if row.reason else parts)


def value_text(row: Row, value: float) -> str:
    """A value of the row's metric, with its unit, as people read it."""
    if row.metric.startswith("benchmark_s/"):
        return f"{value * 1e3:.4g} ms"
    style = style_of(row.metric, row.unit)
    return f"{style.format(value)} {style.unit}".strip()


def interval_text(row: Row) -> str:
    """The change with its interval: '+12.0 % [+8.0 %, +16.0 %]'; empty where there is none."""
    if row.change is None:
        return ""
    change = _change(row, row.change)
    if row.low is None or row.high is None:
        return change
    return f"{change} [{_change(row, row.low)}, {_change(row, row.high)}]"


def _change(row: Row, change: float) -> str:
    if not row.is_ratio:
        return f"{change * 100:+.2f}"  # points of AP
    return f"{change * 100:+.1f} %" if abs(change) < 100 else f"x{change + 1:.3g}"


def _one_line(text: str) -> str:
    """Without line breaks and control characters, which could draw anything on a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+", " ", text)


def _markdown(text: str) -> str:
    text = re.sub(r"([\\`*|<>\[\]~&#])", r"\\\1", _one_line(text))
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # inside a word it is plain text
    # A mention would send mail; a zero-width joiner keeps the sign from being one.
    return text.replace("@", "@\u200d")


def _xml(text: str) -> str:
    """Characters that XML 1.0 cannot hold, replaced; the writer escapes the rest."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def _command_text(text: str) -> str:
    return _one_line(text).replace("%", "%25")


def _command_property(text: str) -> str:
    return _command_text(text).replace(":", "%3A").replace(",", "%2C")
