"""diffbench report: the HTML page of a suite, out of records, plan and store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.errors import BenchError, RecordError, StoreError, SuiteError
from bench.report.build import FOLDER, REPORTS, read_records, select
from bench.report.state import CellState, cell_states
from bench.store import Store, check_inside, write_atomic

if TYPE_CHECKING:
    from bench.outlook import PlanLine
    from bench.plan import Plan
    from bench.report.tables import Table
    from bench.suite import Suite

PAGE_NAME = "index.html"
_ROOT_VARIABLE = "DIFFINST_DATASETS"
_MAX_PICTURES = 50


def report_command(
    suite: Annotated[
        str, typer.Argument(metavar="SUITE", help="a suite file, or a folder of results such as results/quickstart")
    ],
    results: Annotated[Path, typer.Option("--results", help="the results folder, for a suite file")] = Path("results"),
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="as for run-suite")] = None,
    only: Annotated[str | None, typer.Option("--only", metavar="PATTERN", help="as for run-suite")] = None,
    data_root: Annotated[
        Path | None, typer.Option("--data-root", metavar="DIR", help=f"as for run-suite; default: ${_ROOT_VARIABLE}")
    ] = None,
    machine: Annotated[str | None, typer.Option("--machine", help="only this machine's records")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.html", help=f"default: {FOLDER}/{PAGE_NAME} beside the records"),
    ] = None,
    gallery: Annotated[
        int, typer.Option("--gallery", metavar="N", min=0, max=_MAX_PICTURES, help="images of each kind in the gallery")
    ] = 4,
    no_gallery: Annotated[
        bool, typer.Option("--no-gallery", help="no pictures: for a page of photographs that goes elsewhere")
    ] = False,
    claims: Annotated[Path, typer.Option("--claims", metavar="DIR", help="the folder of the claim files")] = Path(
        "suites/claims"
    ),
) -> None:
    """Write a suite's page: one HTML file that opens from disk and loads nothing.

    What is not in records comes from the store in the results folder and from the data set, where they are here.
    """
    # Loaded here: no other command needs the template engine.
    from bench.report.evidence import EvidenceReader
    from bench.report.html.page import ReportInput, build_page

    root = _data_root(data_root)
    loaded, plan, name, folder = _find(suite, results, overrides or [], only, root)
    found = read_records(folder, name)
    if machine is not None:
        if machine not in found:
            raise BenchError(f"--machine {machine}: no records. Allowed: {', '.join(found)}")
        found = {machine: found[machine]}
    if out is not None and out.suffix not in (".html", ".htm"):
        raise BenchError(f"--out {out}: is not allowed. Allowed: a file name that ends in .html")
    store = Store(folder)
    configs = _configs(plan)
    tables, note = _claims(loaded, claims, folder)
    cells = None if plan is None else plan.cells
    selections = {machine: select(every, cells) for machine, every in found.items()}
    every_state = {
        machine: cell_states(selection.records, found[machine], cells) for machine, selection in selections.items()
    }
    # A page of missing cells alone must not take the place of an earlier one that shows results.
    shown = {
        machine: states
        for machine, states in every_state.items()
        if any(state.state in ("ok", "failed", "stale") for state in states)
    }
    if not shown:
        raise RecordError(
            f"{suite}: none of the records in {folder / name} belongs to this suite as it stands now, with these "
            "settings. Run run-suite again, or give that folder for all of them"
        )
    if out is not None and len(shown) > 1:
        raise BenchError(f"--out: one file, but there are records of {', '.join(shown)}. Choose one with --machine")
    for name_of_machine, states in shown.items():
        selection = selections[name_of_machine]
        page = build_page(
            ReportInput(
                suite=name,
                machine=name_of_machine,
                states=states,
                description=loaded.description if loaded is not None else "",
                notes=selection.notes,
                tables=list(loaded.tables) if loaded is not None else [],
                plots=_as_dicts(loaded.plots) if loaded is not None else [],
                plan=_plan_lines(plan, store),
                claims=tables,
                claims_note=note,
                reader=EvidenceReader(store, root, configs),
                pictures=0 if no_gallery else gallery,
            )
        )
        path = out or folder / name / name_of_machine / FOLDER / PAGE_NAME
        if out is None:
            check_inside(folder, path.parent)
        _write(path, page.text)
        typer.echo(f"wrote {path}: {_summary(states)}, {len(page.text.encode()) / 1e6:.1f} MB")
        if page.num_pictures and not page.is_generated:
            typer.echo(
                f"note: it holds {page.num_pictures} pictures of the data set; leave them out with --no-gallery "
                "before it goes where they may not go"
            )


def _find(
    suite: str, results: Path, overrides: list[str], only: str | None, data_root: Path | None
) -> tuple[Suite | None, Plan | None, str, Path]:
    """The suite and its plan, where a file is given; the name and the results folder in any case."""
    path = Path(suite)
    if path.suffix in {".yaml", ".yml"}:
        from bench.fingerprints import fingerprints_for
        from bench.plan import build_plan
        from bench.suite import load_suite

        loaded = load_suite(path, overrides)
        contents = fingerprints_for(Store(results).nodes_folder)
        return loaded, build_plan(loaded, only=only, data_root=data_root, contents=contents), loaded.name, results
    if overrides or only:
        raise BenchError(f"--set and --only need a suite file; '{suite}' is none. Leave them out")
    if path.is_dir():
        return None, None, path.resolve().name, path.resolve().parent
    return None, None, suite, results


def _data_root(given: Path | None) -> Path | None:
    root = given or (Path(os.environ[_ROOT_VARIABLE]) if os.environ.get(_ROOT_VARIABLE) else None)
    if root is not None and not root.is_dir():
        source = "--data-root" if given else _ROOT_VARIABLE
        raise SuiteError("no such folder. Give the one that holds the data sets", key=f"{source} {root}")
    return root


def _configs(plan: Plan | None) -> dict[str, dict[str, Any]]:
    """Run id -> the data section with paths as they are here."""
    if plan is None:
        return {}
    nodes = {cell.run_id: [plan.nodes[node] for node in cell.nodes.values()] for cell in plan.cells}
    return {run_id: found[0].options["config"]["data"] for run_id, found in nodes.items() if found}


def _plan_lines(plan: Plan | None, store: Store) -> list[PlanLine] | None:
    if plan is None:
        return None
    from bench.outlook import describe_plan

    return describe_plan(plan, store.is_done, unfinished=store.unfinished)


def _claims(suite: Suite | None, folder: Path, results: Path) -> tuple[list[Table] | None, str]:
    """The paper's tables with ours beside them; or why there are none."""
    if suite is None:
        return None, "Published numbers are tied to suite files, and none was given."
    if suite.claims is None:
        return None, "No published number is tied to this suite."
    from bench.claims import load_claims
    from bench.ledger import check_ties, find_records
    from bench.report.paper import cells_table, layout_table, paper_tables

    known = load_claims(folder)
    check_ties(suite, known)
    made = paper_tables(suite, known, find_records(results, suite.name))
    place = results / REPORTS / "paper"
    return [*(layout_table(table, place) for table in made), cells_table(made, place)], ""


def _as_dicts(specs: Any) -> list[dict[str, Any]]:
    return [spec.model_dump(exclude_none=True) for spec in specs]


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"{path.parent}: cannot be written ({error.strerror}). Choose another file with --out"
        ) from error
    write_atomic(path, text)


def _summary(states: list[CellState]) -> str:
    counts: dict[str, int] = {}
    for state in states:
        counts[state.state] = counts.get(state.state, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in counts.items())
