"""A finished table for a terminal: coloured states, and as many details as there is room for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.report.cells import State
from bench.report.tables import Entry, Table, headings

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.segment import Segment
    from rich.table import Table as RichTable


def to_terminal(table: Table) -> TerminalTable:
    """The table for a terminal, states coloured, notes and conditions under it; print it with a rich Console."""
    return TerminalTable(table)


@dataclass(frozen=True)
class TerminalTable:
    """A table that knows the width it is printed at: where there is no room for ranges, it shows the medians alone."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        notes = [*self.table.notes]
        shown = _Shown(self.table, ranges=True)
        if shown.width > options.max_width:
            shown = _Shown(self.table, ranges=False)
            if any(entry.short != entry.text for row in self.table.rows for entry in row):
                notes.append("Ranges need a wider terminal; the files have them.")
        yield shown
        yield Text("\n".join([*notes, " · ".join(self.table.conditions)]).strip() + "\n", style="dim")


class _Shown:
    """The rows of a table for a terminal, with ranges or without."""

    def __init__(self, table: Table, *, ranges: bool) -> None:
        from rich.cells import cell_len

        # In a narrow terminal a heading takes a line per word, so that the numbers decide the width.
        broken = not ranges and not table.column_axis
        self._headings = [heading.replace(" ", "\n") if broken else heading for heading in headings(table)]
        self._table = table
        self._rows = [[entry.text if ranges else entry.short for entry in row] for row in table.rows]
        columns = zip(self._headings, *self._rows)
        self._widths = [max(cell_len(line) for line in (*heading.split("\n"), *texts)) for heading, *texts in columns]
        self.width = sum(self._widths) + 2 * len(self._widths) - 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # Rich fits columns into the width there is, and takes seconds over thousands of rows. Where all of them have
        # room, it is left the first one.
        is_plain = all(text.isprintable() and text == text.strip() for row in self._rows for text in row)
        if self.width > options.max_width or not is_plain:
            yield self._build(len(self._rows))
            return
        yield self._build(1)
        yield from self._lines(console, 1)

    def _style(self, entry: Entry) -> str:
        colours: dict[State, str] = {"failed": "bold red", "skipped": "yellow", "missing": "yellow"}
        return "bold" if entry.is_best else colours.get(entry.state, "")

    def _build(self, num_rows: int) -> RichTable:
        """The first rows, in columns as wide as all of them need."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        # No edge and two spaces between columns: ten of them fit 80 characters.
        look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0)}
        shown = RichTable(title=Text(self._table.title, style="bold"), title_justify="left", **look)
        for heading, column, width in zip(self._headings, self._table.columns, self._widths):
            least = width if num_rows < len(self._rows) else None
            shown.add_column(Text(heading), justify="right" if column.align_right else "left", min_width=least)
        for row, texts in zip(self._table.rows[:num_rows], self._rows):
            shown.add_row(*(Text(text, style=self._style(entry), no_wrap=True) for entry, text in zip(row, texts)))
        return shown

    def _lines(self, console: Console, start: int) -> Iterator[Segment]:
        """The rows from `start`, as Rich writes them where all columns have room."""
        from rich.cells import cell_len
        from rich.segment import Segment

        styles = {name: console.get_style(name) for name in {self._style(e) for row in self._table.rows for e in row}}
        for row, texts in zip(self._table.rows[start:], self._rows[start:]):
            plain = ""
            for entry, text, column, width in zip(row, texts, self._table.columns, self._widths):
                room = " " * (width - cell_len(text))
                padded = room + text if column.align_right else text + room
                if style := self._style(entry):
                    yield Segment(plain)
                    yield Segment(padded, styles[style])
                    plain = "  "
                else:
                    plain += padded + "  "
            yield Segment(plain[:-1] + "\n")
