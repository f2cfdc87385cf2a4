"""What is shown, on a terminal and elsewhere."""

from __future__ import annotations

import io

from rich.console import Console

from bench.display import Display


def show(*, is_terminal: bool, seconds: list[float]) -> str:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=150, get_time=lambda: seconds[0])
    with Display(console, 3) as display:
        display.node_started("train", "seed=0")
        seconds[0] += 10
        display.node_progress(1, 5, "loss 3.0")
        seconds[0] += 25
        display.node_progress(2, 5, "loss 2.0")
        display.node_finished("35.0 s")
        display.node_dropped()
        display.node_started("score", "[bold]x[/bold] seed=0")
        display.node_finished("failed: no", failed=True)
        display.line("ok      seed=0")
    return console.file.getvalue()


def test_plain_lines_are_few_and_complete() -> None:
    assert show(is_terminal=False, seconds=[0.0]).splitlines() == [
        "[1/3] train    seed=0: begun",
        "[1/3] train    seed=0: 2/5 loss 2.0",
        "[1/3] train    seed=0: 35.0 s",
        "[3/3] score    [bold]x[/bold] seed=0: failed: no",
        "ok      seed=0",
    ]


def test_a_terminal_gets_the_same_results_and_a_bar() -> None:
    text = show(is_terminal=True, seconds=[0.0])
    for part in ("[1/3] train    seed=0: 35.0 s", "[3/3] score    [bold]x[/bold] seed=0: failed: no", "ok      seed=0"):
        assert part in text
    assert "suite" in text


def test_nothing_to_run_shows_nothing() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with Display(console, 0):
        pass
    assert console.file.getvalue() == ""
