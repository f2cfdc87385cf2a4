"""`diffbench explain`: why a run is cached or stale, and who set each value that determines it."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bench.errors import BenchError, RecordError
from bench.explain import explain_run, find_cell, recorded_overrides, to_lines
from bench.fingerprints import fingerprints_for
from bench.plan import build_plan
from bench.record import load_record
from bench.store import Store
from bench.suite import load_suite


def explain_command(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="a record file, a run id, its beginning, or a cell's label")
    ],
    suite: Annotated[
        Path | None,
        typer.Option("--suite", metavar="SUITE", help="its suite file; default: the one that a record names"),
    ] = None,
    results: Annotated[Path, typer.Option("--results", metavar="DIR", help="the results folder")] = Path("results"),
    data_root: Annotated[Path | None, typer.Option("--data-root", metavar="DIR", help="as for run-suite")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="as for run-suite")] = None,
) -> None:
    """Each component of a run's identity, the file and line that set it, and why its nodes are cached or stale."""
    variable = os.environ.get("DIFFINST_DATASETS")
    root = data_root or (Path(variable) if variable else None)
    checked = load_suite(suite or _suite_of(run, results), overrides or [])
    store = Store(results)
    plan = build_plan(checked, data_root=root, contents=fingerprints_for(store.nodes_folder))
    cell = find_cell(plan, run, _other_overrides(run, results, checked.overrides))
    for line in to_lines(explain_run(plan, cell, checked, store)):
        print(line)


def _suite_of(run: str, results: Path) -> Path:
    """The suite file of a record.

    Raises:
        BenchError: no record, or no such suite here.
    """
    found = _record_files(run, results)
    if not found:
        raise BenchError(f"'{run}': no record of it in {results}. Give its suite with --suite SUITE")
    name = load_record(found[0]).suite
    suite = Path("suites") / f"{name}.yaml"
    if not suite.is_file():
        raise BenchError(f"'{run}': no file {suite}. Give its suite with --suite SUITE")
    return suite


def _record_files(run: str, results: Path) -> list[Path]:
    path = Path(run)
    if path.suffix == ".json":
        return [path]
    # A label may have characters that mean something in a pattern.
    return sorted(results.glob(f"[!.]*/*/{glob.escape(run)}*.json")) if "/" not in run else []


def _other_overrides(run: str, results: Path, given: Sequence[str]) -> tuple[str, ...]:
    """The `--set` arguments of the first record of a run that was made with others than those given; or none."""
    for path in _record_files(run, results):
        try:
            recorded = recorded_overrides(load_record(path))
        except RecordError:
            continue
        if recorded and set(recorded) != set(given):
            return recorded
    return ()
