"""Nothing that a suite or a record says becomes a formula, a command or markup in a table."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given
from report_records import make_record
from run_records import make_record as run_record

from bench.record import dump_record
from bench.report.frames import read_folder, to_csv_text, to_frame
from bench.report.metrics import csv_field
from bench.report.tables import Table, long_table, to_csv, to_latex, to_markdown

HOSTILE = [
    '=HYPERLINK("http://x")',
    "+1+1",
    "-2+3+cmd|' /C calc'!A0",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "\\input{/etc/passwd}",
    "\\write18{id}",
    "$x$ % & # _ { } ~ ^",
    "]\\\\[3cm]",
    "<script>alert(1)</script>",
    "[x](javascript:1)",
    "a|b\n| c |",
    "{{7*7}} ${7*7}",
]


def table_of(text: str) -> Table:
    records = [make_record(data=text), make_record(data="plain"), make_record(data="z", status="failed", reason=text)]
    return long_table(records, title=text)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("-1.5", "-1.5"),
        ("+2e3", "+2e3"),
        ("-", "'-"),
        ("=1", "'=1"),
        ("a=1", "a=1"),
        ("", ""),
        ("-inf", "-inf"),
    ],
)
def test_fields_by_hand(text: str, field: str) -> None:
    assert csv_field(text) == field


def assert_no_formula(text: str) -> None:
    for row in csv.reader(io.StringIO(text, newline="")):
        for field in row:
            if field[:1] in ("=", "+", "-", "@", "\t", "\r"):
                float(field)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_formula_in_csv(text: str, tmp_path: Path) -> None:
    assert_no_formula(to_csv(table_of(text)))
    folder = tmp_path / "steps" / "box"
    folder.mkdir(parents=True)
    record = run_record(axes={text: text, "seed": -1}, status="failed", reason=text, metrics={}, command=text)
    (folder / "00ff.json").write_text(dump_record(record))
    exported = to_csv_text(to_frame(read_folder(tmp_path)))
    assert_no_formula(exported)
    assert "-1" in exported


def assert_harmless_latex(text: str) -> None:
    """Only commands of ours, and no special character that is not part of one."""
    body = text.split("\n", 1)[1]  # the first line is our comment
    commands = set(re.findall(r"\\([A-Za-z]+)", body))
    ours = "begin end centering small caption toprule midrule bottomrule par smallskip parbox linewidth footnotesize"
    ours += " textit textsubscript textbackslash textasciitilde textasciicircum textless textgreater textbar char pm"
    ours += " times cdot circ downarrow rightarrow multicolumn cmidrule tabular"
    assert commands <= set(ours.split())
    assert not re.search(r"(?<!\\)[%#]", body)
    assert body.count("{") - body.count("\\{") == body.count("}") - body.count("\\}")


@pytest.mark.parametrize("text", HOSTILE)
def test_no_command_in_latex(text: str) -> None:
    assert_harmless_latex(to_latex(table_of(text)))


@given(text=st.text(alphabet="\\{}$%#&_^~<>|[]*\"'`-=+@ab1 \n", max_size=20))
def test_no_text_breaks_latex_or_csv(text: str) -> None:
    table = table_of(text)
    assert_no_formula(to_csv(table))
    assert_harmless_latex(to_latex(table))


@pytest.mark.parametrize("text", HOSTILE)
def test_no_markup_in_markdown(text: str) -> None:
    shown = to_markdown(table_of(text))
    assert not re.search(r"(?<!\\)<", shown)
    assert not re.search(r"(?<!\\)\[", shown)
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
