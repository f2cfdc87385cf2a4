"""A suite's report: which records belong to it, its tables and plots as files; the same records give the same bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import RecordError, StoreError
from bench.plan import Cell
from bench.report.cells import (
    Record,
    Records,
    bare,
    latest,
    metric_names,
    sort_records,
    varying_axes,
)
from bench.report.plots import build_plot, render
from bench.report.tables import Table, grid_table, long_table, to_csv, to_latex, to_markdown
from bench.store import Store, write_problem
from diffinst.config import SECTIONS, identity

TABLE_WRITERS = {"md": to_markdown, "csv": to_csv, "tex": to_latex}
PLOT_ENDINGS = ("png", "svg")  # as `render` gives them
FOLDER = "report"  # beside the records it is made of
REPORTS = Path("reports")  # of several suites and machines, in a results folder; no suite can have this name


@dataclass(frozen=True)
class Selection:
    """The records of one machine in table order, and what was left out of them, in words."""

    records: Records
    notes: tuple[str, ...] = ()


def read_records(results: Path, suite: str) -> dict[str, list[Record]]:
    """The current records of a suite by machine, machines in order of name.

    Raises:
        RecordError: there are none, or one is unreadable.
    """
    folder = results / suite
    machines = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    found: dict[str, list[Record]] = {}
    for machine in machines:
        if records := Store(results).plain_records(suite, machine):
            found[machine] = [*records]
    if not found:
        known = sorted(path.name for path in results.iterdir() if path.is_dir()) if results.is_dir() else []
        suites = [name for name in known if not name.startswith(".") and name != REPORTS.name]
        raise RecordError(
            f"{folder}: no records. "
            + (f"Suites with results in {results}: {', '.join(suites)}" if suites else "Run run-suite first")
        )
    return found


def select(records: Sequence[Record], cells: Sequence[Cell] | None) -> Selection:
    """The records of the planned cells in plan order, 'missing' where there is none; without a plan, all records.

    Without a plan, of several records of one cell the latest is kept: the others are of other versions of the suite.
    """
    if cells is None:
        kept, dropped = latest(sort_records(records))
        return Selection(
            Records(kept), (f"{_count(dropped, 'older record')} of the same cells left out",) if dropped else ()
        )
    by_id = {record["run_id"]: record for record in records}
    suite = records[0]["suite"] if records else ""
    chosen = [by_id.get(cell.run_id) or _record_of_missing(cell, records) or _absent(cell, suite) for cell in cells]
    others = len(by_id.keys() - {record["run_id"] for record in chosen})
    notes = [f"{_count(others, 'record')} of other versions or settings of this suite left out"] if others else []
    stale = [record for record, cell in zip(chosen, cells) if is_stale(record, cell)]
    if stale:
        example = stale[0]["run_id"]
        notes.append(
            f"{_count(len(stale), 'record')} of other code than today's: `diffbench explain {example}` says more"
        )
    return Selection(Records(chosen), tuple(notes))


def is_stale(record: Record, cell: Cell) -> bool:
    """Was a record made by other code than its cell would run today? One of version 1 does not say by which."""
    if record.get("status") not in ("ok", "failed"):
        return False
    known = record.get("code") or {}
    return any(known.get(kind) != code for kind, code in cell.code.items() if kind in record.get("nodes", {}))


def build_tables(records: Sequence[Record], specs: Iterable[Any] = ()) -> dict[str, Table]:
    """File stem -> table, one for each entry of a suite's `tables:`; without any, those of `default_tables`."""
    tables: dict[str, Table] = {}
    for spec in _as_dicts(specs) or default_tables(records):
        title = spec.get("title")
        if spec.get("kind", "grid") == "long":
            tables[_unused("cells", tables)] = long_table(records, metrics=spec.get("metrics") or (), title=title)
            continue
        rows, columns, metric = spec["rows"], spec["columns"], spec["metric"]
        stem = _unused(_slug(f"{metric}-by-{bare(rows)}-and-{bare(columns)}"), tables)
        tables[stem] = grid_table(records, rows=rows, columns=columns, metric=metric, title=title)
    return tables


def build_plots(records: Sequence[Record], specs: Iterable[Any] = ()) -> dict[str, dict[str, bytes]]:
    """File stem -> {'png': ..., 'svg': ...}, one for each entry of a suite's `plots:`, by default of `default_plots`.

    Raises:
        RecordError: a plot would have too many panels.
    """
    plots: dict[str, dict[str, bytes]] = {}
    for position, (stem, spec) in enumerate(_named_plots(records, specs)):
        try:
            plot = build_plot(records, x=spec["x"], y=spec["y"], lines=spec.get("lines"), title=spec.get("title"))
        except ValueError as error:
            raise RecordError(f"plots[{position}]: {error}") from error
        plots[stem] = render(plot)
    return plots


def plot_names(records: Sequence[Record], specs: Iterable[Any] = ()) -> list[str]:
    """The files that `write_plots` would write of what `build_plots` makes, without drawing them."""
    return [f"{stem}.{ending}" for stem, _ in _named_plots(records, specs) for ending in PLOT_ENDINGS]


def _named_plots(records: Sequence[Record], specs: Iterable[Any]) -> list[tuple[str, dict[str, Any]]]:
    named: dict[str, dict[str, Any]] = {}
    for spec in _as_dicts(specs) or default_plots(records):
        named[_unused(_slug(f"{spec['y']}-against-{bare(spec['x'])}"), named)] = spec
    return list(named.items())


def default_tables(records: Sequence[Record]) -> list[dict[str, Any]]:
    """A grid of the main metric over two varying axes, if there are two, and all cells in a long table."""
    axes, metric = _axes_of_reports(records), _main_metric(records)
    grids = [{"rows": axes[-1], "columns": axes[0], "metric": metric}] if len(axes) > 1 and metric else []
    return [*grids, {"kind": "long"}]


def default_plots(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The main metric against the first varying axis and against latency, one line per value of the last one."""
    axes, metric = _axes_of_reports(records), _main_metric(records)
    if not axes or not metric:
        return []
    lines = axes[-1] if len(axes) > 1 else None
    plots: list[dict[str, Any]] = [{"x": axes[0], "y": metric, "lines": lines}]
    if "latency_s/total" in metric_names(records):
        plots.append({"x": "latency_s/total", "y": metric, "lines": lines})
    return plots


def write_tables(tables: Mapping[str, Table], folder: Path) -> list[Path]:
    """Write every table as Markdown, CSV and LaTeX into `folder`; a file that says the same already is left alone."""
    files = {
        f"{stem}.{ending}": writer(table) for stem, table in tables.items() for ending, writer in TABLE_WRITERS.items()
    }
    return write_files(files, folder)


def write_plots(plots: Mapping[str, Mapping[str, bytes]], folder: Path) -> list[Path]:
    """Write every plot as PNG and SVG into `folder`; a file that says the same already is left alone."""
    return _write({f"{stem}.{ending}": data for stem, kinds in plots.items() for ending, data in kinds.items()}, folder)


def write_files(files: Mapping[str, str], folder: Path) -> list[Path]:
    """Write texts into `folder`; a file that says the same already is left alone."""
    return _write({name: text.encode() for name, text in files.items()}, folder)


def _write(files: Mapping[str, bytes], folder: Path) -> list[Path]:
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            path = folder / name
            if not path.is_file() or path.read_bytes() != data:
                temporary = path.with_name(f".{name}.tmp")
                temporary.write_bytes(data)
                temporary.replace(path)
            paths.append(path)
    except OSError as error:
        error.filename = error.filename or str(folder)  # a write that fails does not say where
        told = write_problem(error) or f"{folder}: cannot be written: {error.strerror}. Choose another folder"
        raise StoreError(told) from error
    return paths


def _record_of_missing(cell: Cell, records: Sequence[Record]) -> Record | None:
    """The newest record of a cell that cannot be run here, where its run id is not known: it ran somewhere else."""
    if cell.missing is None:
        return None
    same = [record for record in records if record["axes"] == cell.axes and _same_config(record["config"], cell.config)]
    return max(same, key=lambda record: str(record.get("started_at") or ""), default=None)


def _same_config(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a record's configuration, which knows no fields added since, says the same."""
    return old.keys() == new.keys() and all(
        identity(name, old[name]) == identity(name, new[name]) if name in SECTIONS else old[name] == new[name]
        for name in new
    )


def _absent(cell: Cell, suite: str) -> Record:
    return {
        "suite": suite,
        "run_id": cell.run_id,
        "label": cell.label,
        "status": "missing" if cell.missing is None else "skipped",
        "reason": cell.missing,
        "axes": dict(cell.axes),
        "config": cell.config,
        "metrics": {},
    }


def _axes_of_reports(records: Sequence[Record]) -> list[str]:
    """Varying axes, sampling steps first: they are the question of the paper, and run along the x axis."""
    return sorted(varying_axes(records), key=lambda name: name != "sampling_steps")


def _main_metric(records: Sequence[Record]) -> str | None:
    """Mask AP, else box AP, else the first metric of the finished runs that any run has measured."""

    def is_there(name: str) -> bool:
        return any(record.get("metrics", {}).get(name, {}).get("value") is not None for record in records)

    if (score := next(filter(is_there, ("segm/AP", "bbox/AP")), None)) is not None:
        return score
    known = metric_names([record for record in records if record.get("status") == "ok"]) or metric_names(records)
    return next(filter(is_there, known), None)


def _as_dicts(specs: Iterable[Any]) -> list[dict[str, Any]]:
    """Entries of a suite as dictionaries, whether they are that already or pydantic models."""
    return [dict(spec) if isinstance(spec, Mapping) else spec.model_dump(exclude_none=True) for spec in specs]


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")


def _unused(stem: str, taken: Iterable[str]) -> str:
    names, number = set(taken), 1
    while (candidate := stem if number == 1 else f"{stem}-{number}") in names:
        number += 1
    return candidate


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
