"""run-suite: a suite file in, records, tables and plots out. Parses, calls, prints, returns an exit code.

Exit codes: 0 all is well; 1 a run failed, or cannot be run for want of a file; 2 something the user can put right,
before any work or in the data; 70 an error that nobody foresaw; 130 interrupted. What runs the plan is loaded only to
run it: `--plan` answers at once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench import unexpected
from bench.errors import RecordError, SuiteError
from bench.fingerprints import fingerprints_for, save_if_possible
from bench.outlook import PlanLine, describe_plan, duration_text, total_s
from bench.plan import PastNode, Plan, build_plan, needed_nodes, past_of_record
from bench.programs import check_programs
from bench.record import load_record
from bench.store import Store, check_inside, past_of_result, write_problem
from bench.suite import Suite, axes_label, load_suite
from bench.suite_warnings import warnings_of
from diffinst.errors import DiffInstError

if TYPE_CHECKING:
    from rich.console import Console

_ROOT_VARIABLE = "DIFFINST_DATASETS"
_ROOTLESS = ("shapes", "custom")  # generated, or found by the suite's own paths
_FILE_WIDTH = 160
_PROGRESS_S = 3.0
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run_suite(
    suite: Annotated[Path, typer.Argument(metavar="SUITE", help="a suite file, such as suites/quickstart.yaml")],
    plan: Annotated[bool, typer.Option("--plan", help="show what would run, what is stored and why, and stop")] = False,
    results: Annotated[Path, typer.Option("--results", metavar="DIR", help="where results live")] = Path("results"),
    data_root: Annotated[
        Path | None,
        typer.Option("--data-root", metavar="DIR", help=f"folder of the data sets; default: ${_ROOT_VARIABLE}"),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="replace a value of the suite, say iterations=100; repeatable"),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="cells whose label matches, say 'sampling_steps=1 num_proposals=*'"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="D", help="cpu, cuda or cuda:N; default: a CUDA GPU if there is one")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="processes that load images for a training or prediction; default: the suite's"
        ),
    ] = None,
) -> None:
    """Train and evaluate what SUITE describes, then print its tables; what is stored already is not computed again."""
    if device is not None and not _DEVICE.fullmatch(device):
        raise SuiteError("is not allowed. Allowed: cpu, cuda, cuda:N", key=f"--device {device}")
    root = _data_root(data_root)
    checked = load_suite(suite, overrides or [])
    store = Store(results)
    contents = fingerprints_for(store.nodes_folder, _reading_progress())
    built = build_plan(checked, only=only, data_root=root, device=device, num_workers=workers, contents=contents)
    save_if_possible(contents)
    check_programs(checked, built, root)
    labels = {cell.label for cell in built.cells}
    warnings = warnings_of(checked, (cell for cell in checked.cells if axes_label(cell.axes) in labels))
    if plan:
        _print_plan(checked, built, describe_plan(built, store.is_done, _past_nodes(store), store.unfinished))
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    if plan:
        return
    try:
        code = _run(checked, built, store, root)
    finally:
        save_if_possible(contents)  # the folder is there now
    raise typer.Exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a mistake of the user is printed as one line, or one line each, and gives 2."""
    try:
        app(args=None if argv is None else list(argv), prog_name="run-suite")
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # typer's code for it, 1, would mean a failed run
            return unexpected.EXIT_CODE
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except SuiteError as error:
        print(error, file=sys.stderr)
        return 2
    except DiffInstError as error:
        print(f"run-suite: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if (problem := write_problem(error)) is None:
            # What took hours is not run again to see where it ended.
            return unexpected.tell("run-suite", error, with_traceback=True)
        print(f"run-suite: {problem}", file=sys.stderr)
        return 2
    return 0


def _reading_progress() -> Callable[[int, int], None]:
    """Lines on standard error while data sets are read for the first time, once that takes long."""
    start = shown = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown > _PROGRESS_S:
            shown = now
            left = duration_text((now - start) / done * (total - done))
            print(f"reading data: {done} of {total} files, {left} left", file=sys.stderr, flush=True)

    return show


def _data_root(given: Path | None) -> Path | None:
    root = given or (Path(os.environ[_ROOT_VARIABLE]) if os.environ.get(_ROOT_VARIABLE) else None)
    if root is not None and not root.is_dir():
        source = "--data-root" if given else _ROOT_VARIABLE
        raise SuiteError("no such folder. Give the one that holds the data sets", key=f"{source} {root}")
    return root


def _check_data_root(suite: Suite, plan: Plan, store: Store) -> None:
    """Refuse to start where a data set has to be found and nobody said where."""
    for node in needed_nodes(plan, store.is_done):
        name = node.options["config"]["data"]["dataset"]
        if name not in _ROOTLESS:
            message = f"no folder is given that holds '{name}'. Give it with --data-root DIR or {_ROOT_VARIABLE}=DIR"
            raise SuiteError(message, file=suite.path, key="data.dataset")


def _run(suite: Suite, plan: Plan, store: Store, data_root: Path | None) -> int:
    if data_root is None:
        _check_data_root(suite, plan, store)
    # Loaded here: showing a plan needs none of it.
    from rich.console import Console

    from bench.execute import run_plan

    private = {}
    if data_root is not None:
        private = {str(data_root.absolute()): "<data-root>", str(data_root): "<data-root>"}
    command = ["run-suite", *(shlex.quote(argument) for argument in sys.argv[1:])]
    outcome = run_plan(plan, store, command=command, private=private)
    if outcome.records and not outcome.interrupted:
        # Into a file or a pipe, tables are as wide as they need: nobody's window limits them.
        width = None if sys.stdout.isatty() else _FILE_WIDTH
        _report(suite, plan, store, outcome.machine, Console(highlight=False, width=width))
    total = len(plan.cells)
    left = total - len(outcome.ok) - len(outcome.failed) - len(outcome.missing)
    counts = [f"{len(outcome.ok)} of {total} runs ok"]
    counts += [f"{len(outcome.failed)} failed"] * bool(outcome.failed)
    counts += [f"{len(outcome.missing)} missing"] * bool(outcome.missing)
    counts += [f"{left} not finished: the same command goes on"] * bool(left)
    print(f"run-suite: {suite.name}: {', '.join(counts)}", flush=True)
    # Last, where it is seen: what the user can put right.
    for reason in dict.fromkeys(failure.reason for failure in outcome.failures.values() if failure.category == "user"):
        print(f"run-suite: {reason}", file=sys.stderr)
    return outcome.exit_code


def _report(suite: Suite, plan: Plan, store: Store, machine: str, console: Console) -> None:
    """Write the suite's tables and plots beside the records, and print the tables."""
    from bench.report.build import FOLDER, build_plots, build_tables, read_records, select, write_plots, write_tables
    from bench.report.terminal import to_terminal

    records = read_records(store.root, suite.name).get(machine)
    if not records:
        return
    selection = select(records, plan.cells)
    tables = build_tables(selection.records, suite.tables)
    folder = store.root / suite.name / machine / FOLDER
    check_inside(store.root, folder)
    paths = write_tables(tables, folder) + write_plots(build_plots(selection.records, suite.plots), folder)
    for table in tables.values():
        console.print(to_terminal(table))
    print(f"records: {folder.parent}")
    for path in paths:
        print(f"wrote    {path}")


def _past_nodes(store: Store) -> list[PastNode]:
    """What was computed before: nodes of this results folder, and records of this machine, which come with a clone.

    What is damaged is no basis for an estimate; nor is the last part of a node that was resumed.
    """
    parts = functools.cache(store.code_parts)
    found = [past_of_result(done, parts(done.code)) for done in store.results()]
    paths = sorted(store.root.glob("[!.]*/*/*.json"))
    if not paths:
        return found
    # Only where there is something to compare with, as it asks several programs.
    from bench.measure.environment import machine_environment

    machine = machine_environment()["machine"]
    for path in paths:
        if path.parent.name == machine:
            with contextlib.suppress(RecordError, KeyError):  # damaged, or of a configuration with other fields
                record = load_record(path)
                durations_s = {kind: run.duration_s for kind, run in record.node_runs.items() if run.attempts == 1}
                found += past_of_record(record.config, record.measure, record.nodes, durations_s)
    return found


def _print_plan(suite: Suite, plan: Plan, lines: Sequence[PlanLine]) -> None:
    rows: list[tuple[str, str, str, str, str]] = [
        (line.state, line.node.id, line.what, _estimate_text(line), line.why) for line in lines
    ]
    missing = [cell for cell in plan.cells if cell.missing is not None]
    rows += [("missing", "-", cell.label, "", str(cell.missing)) for cell in missing]
    headings = ("state", "node", "what", "time", "why")
    if sys.stdout.isatty():
        _print_rich(suite, headings, rows)
    else:
        if suite.description:
            print(f"{suite.name}: {suite.description}")
        widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings) - 1)]
        for row in [headings, *rows]:
            print("  ".join([*(text.ljust(width) for text, width in zip(row, widths)), row[-1]]).rstrip())
    counts = {state: sum(line.state == state for line in lines) for state in ("run", "cached", "unneeded")}
    seconds, unknown = total_s(lines)
    time = f"about {duration_text(seconds)}" if seconds else "unknown time"
    if unknown and seconds:
        time += f", {unknown} of them unknown"
    parts = [f"{counts['run']} to run ({time})" if counts["run"] else "nothing to run", f"{counts['cached']} cached"]
    parts += [f"{counts['unneeded']} not needed"] * bool(counts["unneeded"])
    parts += [f"{_count(len(missing), 'cell')} missing"] * bool(missing)
    print(f"{_count(len(plan.cells), 'cell')}, {_count(len(lines), 'node')}: {', '.join(parts)}")


def _print_rich(suite: Suite, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"run": "yellow", "cached": "green", "unneeded": "dim", "missing": "red"}
    title = f"{suite.name}: {suite.description}" if suite.description else suite.name
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for heading in headings:
        table.add_column(heading, justify="right" if heading == "time" else "left", overflow="fold")
    for state, *rest in rows:
        table.add_row(Text(state, style=colours[state]), *(Text(text) for text in rest))
    Console(highlight=False).print(table)


def _estimate_text(line: PlanLine) -> str:
    if line.state != "run":
        return ""
    return "unknown" if line.estimate_s is None else duration_text(line.estimate_s)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


if __name__ == "__main__":
    sys.exit(main())
