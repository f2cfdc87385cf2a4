"""What a person sees of a running suite: a line per training and run, and a live bar when it is a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

_PLAIN_INTERVAL_S = 30.0  # between two lines about one node where there is no live bar


class Display:
    """Shows `total` nodes being run. Use as a context manager; safe to use when nothing is to run."""

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._started = 0
        self._label = ""
        self._last_plain_s = 0.0
        self._live: tuple[Progress, TaskID, TaskID] | None = None
        if console.is_terminal and total:
            wide = console.width >= 110
            # A long label gives way: the bar and the times stay whole in a narrow window.
            room = Column(max_width=max(20, console.width - (72 if wide else 54)), no_wrap=True, overflow="ellipsis")
            bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False, table_column=room),
                BarColumn(bar_width=24 if wide else 6),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=console,
                transient=True,
            )
            overall = bars.add_task("suite", total=total, text="")
            self._live = (bars, overall, bars.add_task("", total=None, visible=False, text=""))

    def __enter__(self) -> Display:
        if self._live:
            self._live[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live[0].stop()

    def line(self, text: str, style: str | None = None) -> None:
        """Print one line above the bar; lines are never wrapped, so they can be searched."""
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def node_started(self, kind: str, label: str) -> None:
        self._started += 1
        self._label = f"{kind:<8} {label}"
        self._last_plain_s = self._console.get_time()
        if self._live:
            bars, _, current = self._live
            bars.reset(current, total=None, visible=True, description=self._label, text="starting")
        elif kind == "train":
            self.line(f"[{self._started}/{self._total}] {self._label}: begun")

    def node_progress(self, done: int, total: int, text: str) -> None:
        if self._live:
            bars, _, current = self._live
            bars.update(current, completed=done, total=total, text=text)
        elif self._console.get_time() - self._last_plain_s >= _PLAIN_INTERVAL_S:
            self._last_plain_s = self._console.get_time()
            self.line(f"[{self._started}/{self._total}] {self._label}: {done}/{total} {text}".rstrip())

    def node_dropped(self) -> None:
        """A node is not run, because one that it builds on has failed; why is said per run."""
        self._started += 1
        self._advance()

    def node_finished(self, result: str, *, failed: bool = False, quiet: bool = False) -> None:
        """quiet: no line, as the line of the run that the node is for says it all."""
        self._advance()
        if not quiet:
            self.line(f"[{self._started}/{self._total}] {self._label}: {result}", "bold red" if failed else None)

    def _advance(self) -> None:
        if self._live:
            bars, overall, current = self._live
            bars.advance(overall)
            bars.update(current, visible=False)
