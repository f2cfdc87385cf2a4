"""Tables in a terminal: every entry is there, as far as there is room, and bytes are those that Rich writes."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest
from report_records import make_grid
from rich.console import Console

from bench.report.tables import Column, Entry, Table, grid_table, long_table
from bench.report.terminal import _Shown, to_terminal


def test_terminal_table_shows_every_entry() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(
        to_terminal(grid_table(make_grid(), rows="num_proposals", columns="sampling_steps", metric="segm/AP"))
    )
    text = console.export_text()
    assert all(word in text for word in ("31.0", "✗ failed", "○ skipped", "? missing", "out of memory"))


@pytest.mark.parametrize(("width", "shown"), [(160, "21.4 (19.2–26.7)"), (80, "21.4")])
def test_a_narrow_terminal_shows_medians_without_ranges(width: int, shown: str) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(to_terminal(long_table(make_grid())))
    lines = console.export_text().splitlines()
    # Sampling steps 4, 50 proposals.
    (row,) = [line for line in lines if line.split()[:2] == ["4", "50"]]
    assert shown in row
    assert ("(" in row) == ("(" in shown)
    assert any("Ranges need a wider terminal" in line for line in lines) == (width == 80)


WORDS = [
    "1",
    "12.3",
    "✗ failed",
    "日本語",
    "48.3 ± 3.8 [1–2]",
    "",
    "e\u0301",
    "  room ",
    "two\nlines",
    "a\tb",
    "[bold]x[/]",
]
STATES: list[Any] = ["ok", "ok", "ok", "failed", "skipped", "missing", "unmeasured"]


def any_table(generator: random.Random) -> Table:
    """Entries of all kinds, most of them of one line."""
    words = generator.choice([WORDS[:7], WORDS])
    columns = tuple(
        Column(generator.choice(words), ("c",), generator.choice(["", "ms"]), generator.random() < 0.6)
        for _ in range(generator.randint(1, 6))
    )
    rows = tuple(
        tuple(
            Entry(generator.choice(words), ("c",), generator.choice(STATES), is_best=generator.random() < 0.1)
            for _ in columns
        )
        for _ in range(generator.choice([0, 1, 2, 9]))
    )
    return Table("A title that may be longer than the table", columns, rows, 1, column_axis=generator.choice(["", "x"]))


def printed(what: Any, width: int, settings: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, **settings)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("settings", [{}, {"force_terminal": True}, {"force_terminal": True, "no_color": True}])
def test_rows_are_written_as_rich_writes_them(settings: dict[str, Any]) -> None:
    generator, lines = random.Random(0), 0
    for _ in range(300):
        shown = _Shown(any_table(generator), ranges=True)
        width = shown.width + generator.choice([-1, 0, 3])
        text = printed(shown, width, settings)
        assert text == printed(shown._build(len(shown._rows)), width, settings)
        lines += text.count("\n")
    assert lines > 1000
