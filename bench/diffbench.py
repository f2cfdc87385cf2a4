"""diffbench: tables, plots, data frames and verdicts out of stored records. Needs neither the model nor the data.

Exit codes: 0 all is well; 1 `verify` found something that is not as it should be; 2 something the user can put right;
70 an error that nobody foresaw, or output that nobody took. Those of compare and race are in `bench.compare`, those of
agree in `bench.agree_cli`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bench import unexpected
from bench.agree_cli import agree_command
from bench.collector import collector_paused
from bench.compare_cli import calibrate_command, compare_command
from bench.errors import BenchError, RecordError, SuiteError
from bench.explain_cli import explain_command
from bench.pack_cli import pack_command, verify_pack_command
from bench.race_cli import race_command
from bench.report.build import (
    FOLDER,
    REPORTS,
    TABLE_WRITERS,
    Selection,
    build_plots,
    build_tables,
    read_records,
    select,
    write_files,
    write_plots,
    write_tables,
)
from bench.report_cli import report_command
from bench.store import check_inside
from bench.upstream_cli import export_config_command, import_config_command
from diffinst.errors import DiffInstError

if TYPE_CHECKING:
    from bench.suite import Suite

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reports out of the records that run-suite wrote: the same records give the same bytes.",
)
app.command("compare")(compare_command)
app.command("calibrate")(calibrate_command)
app.command("explain")(explain_command)
app.command("pack")(pack_command)
app.command("verify-pack")(verify_pack_command)
app.command("race")(race_command)
app.command("agree")(agree_command)
app.command("report")(report_command)
app.command("import-config")(import_config_command)
app.command("export-config")(export_config_command)

SuiteArgument = Annotated[
    str, typer.Argument(metavar="SUITE", help="a suite file, or a folder of results such as results/quickstart")
]
ResultsOption = Annotated[Path, typer.Option("--results", help="the results folder, for a suite file")]
ResultsFolder = Annotated[Path, typer.Option("--results", metavar="DIR", help="the results folder")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="as for run-suite")]
OnlyOption = Annotated[str | None, typer.Option("--only", metavar="PATTERN", help="as for run-suite")]
DataRootOption = Annotated[Path | None, typer.Option("--data-root", metavar="DIR", help="as for run-suite")]
MachineOption = Annotated[str | None, typer.Option("--machine", help="only this machine's records")]
OutOption = Annotated[
    Path | None, typer.Option("--out", help=f"where the files go; default: {FOLDER}/ beside the records")
]
PrintOption = Annotated[
    Literal["terminal", "md", "csv", "tex"] | None,
    typer.Option("--print", help="print this format, exactly as the files have it, and write nothing"),
]
ClaimsOption = Annotated[Path, typer.Option("--claims", metavar="DIR", help="the folder of the claim files")]
SuitesOption = Annotated[Path, typer.Option("--suites", metavar="DIR", help="the folder of the suites")]
CLAIMS, SUITES = Path("suites/claims"), Path("suites")


@app.command()
@collector_paused()
def table(
    suite: SuiteArgument,
    results: ResultsOption = Path("results"),
    overrides: SetOption = None,
    only: OnlyOption = None,
    data_root: DataRootOption = None,
    machine: MachineOption = None,
    out: OutOption = None,
    print_format: PrintOption = None,
    claims: ClaimsOption = CLAIMS,
) -> None:
    """Write a suite's tables as Markdown, CSV and LaTeX, and show them; with `claims:` in it, the paper's tables."""
    from rich.console import Console

    from bench.report.terminal import to_terminal

    if Path(suite).suffix in {".yaml", ".yml"} and not (overrides or only or machine):
        from bench.suite import load_suite

        loaded = load_suite(Path(suite))
        if loaded.claims is not None:
            _paper(loaded, results, claims, out, print_format)
            return
    report = _Report(suite, results, machine, overrides or [], only, data_root)
    for name, selection in report.selections.items():
        tables = build_tables(selection.records, report.tables)
        if print_format in TABLE_WRITERS:
            sys.stdout.write("\n".join(TABLE_WRITERS[print_format](built) for built in tables.values()))
            continue
        _show(name, selection)
        console = Console(highlight=False)
        for built in tables.values():
            console.print(to_terminal(built))
        if print_format is None:
            _list(write_tables(tables, report.folder(name, out)))


@app.command()
@collector_paused()
def plot(
    suite: SuiteArgument,
    results: ResultsOption = Path("results"),
    overrides: SetOption = None,
    only: OnlyOption = None,
    data_root: DataRootOption = None,
    machine: MachineOption = None,
    out: OutOption = None,
) -> None:
    """Draw a suite's plots as PNG and SVG."""
    report = _Report(suite, results, machine, overrides or [], only, data_root)
    for name, selection in report.selections.items():
        _show(name, selection)
        plots = build_plots(selection.records, report.plots)
        if not plots:
            typer.echo("note: nothing to plot: no axis has several values, or nothing was measured")
        _list(write_plots(plots, report.folder(name, out)))


@app.command()
@collector_paused()
def export(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="a results folder, or a suite's or a machine's folder in it")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.csv", help="where the rows go; default: printed")
    ] = None,
) -> None:
    """Write all records below FOLDER as one CSV: a row each, a column per axis and metric, in the records' units."""
    from bench.report.frames import read_folder, to_csv_text, to_frame, write_csv

    if out is not None and out.suffix != ".csv":
        raise BenchError(f"--out {out}: is not allowed. Allowed: a file name that ends in .csv")
    frame = to_frame(read_folder(folder))
    if out is None:
        sys.stdout.write(to_csv_text(frame))
        return
    write_csv(frame, out)
    typer.echo(f"wrote {out}: {len(frame)} records, {len(frame.columns)} columns")


@app.command(name="claims")
def claims_command(
    suite: Annotated[
        str | None, typer.Option("--suite", metavar="NAME", help="only the claims that this paper suite is tied to")
    ] = None,
    print_format: Annotated[
        Literal["markdown", "csv"], typer.Option("--format", help="how the ledger is printed")
    ] = "markdown",
    write: Annotated[bool, typer.Option("--write", help=f"write it into RESULTS/{REPORTS} instead")] = False,
    lock: Annotated[bool, typer.Option("--lock", help="accept the claim files as they are, after a review")] = False,
    results: ResultsFolder = Path("results"),
    claims: ClaimsOption = CLAIMS,
    suites: SuitesOption = SUITES,
) -> None:
    """Print every published number with its source, what was measured, and whether it holds."""
    from bench.claims import load_claims
    from bench.ledger import load_paper_suites, make_ledger
    from bench.report.paper import write_ledger

    if lock:
        _lock(claims)
        return
    found = load_paper_suites(suites / "paper")
    names = [entry.name for entry in found]
    if suite is not None and suite not in names:
        raise BenchError(f"--suite {suite}: no paper suite. Allowed: {', '.join(names)}")
    rows = make_ledger(load_claims(claims), found, results)
    if suite is not None:
        tied = {tie.claim for entry in found if entry.name == suite for tie in entry.claims or ()}
        rows = [row for row in rows if row.claim.id.partition("@")[0] in tied]
    if write:
        if suite is not None:
            raise BenchError("--write: with all claims only. Leave --suite out")
        _list(write_files(write_ledger(rows, results / REPORTS), results / REPORTS))
        return
    sys.stdout.write(write_ledger(rows, results / REPORTS)["claims.csv" if print_format == "csv" else "claims.md"])


@app.command()
def verify(
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="[PATH]...", help="files or folders; default: everything generated")
    ] = None,
    results: ResultsFolder = Path("results"),
    claims: ClaimsOption = CLAIMS,
    suites: SuitesOption = SUITES,
) -> None:
    """Make every generated table again out of records and claim files, and the claims' lock; say where they differ."""
    from bench.verify import verify as compare

    outcome = compare(paths or [], results=results, claims=claims, suites=suites)
    for mismatch in outcome.mismatches:
        typer.echo(str(mismatch))
    files = "file" if outcome.checked == 1 else "files"
    if outcome.mismatches:
        count = len(outcome.mismatches)
        typer.echo(f"diffbench: {count} mismatch{'es' if count > 1 else ''} in {outcome.checked} {files}", err=True)
        raise typer.Exit(1)
    typer.echo(f"{outcome.checked} {files} as their sources say")


def _lock(claims: Path) -> None:
    from bench.claims import LOCK_NAME, check_lock, lock_text

    text = lock_text(claims)
    changes = check_lock(claims) if (claims / LOCK_NAME).exists() else []
    for change in changes:
        typer.echo(str(change))
    write_files({LOCK_NAME: text}, claims)
    typer.echo(f"wrote {claims / LOCK_NAME}: {len(changes)} differences from before")


def _paper(suite: Suite, results: Path, claims: Path, out: Path | None, print_format: str | None) -> None:
    """Write and show the paper's tables with ours beside them."""
    from rich.console import Console

    from bench.claims import load_claims
    from bench.ledger import check_ties, find_records
    from bench.report.paper import layout_table, paper_tables, write_paper
    from bench.report.terminal import to_terminal

    known = load_claims(claims)
    check_ties(suite, known)
    folder = out or results / REPORTS / "paper"
    tables = paper_tables(suite, known, find_records(results, suite.name))
    files = write_paper(suite, tables, folder)
    if print_format in TABLE_WRITERS:
        sys.stdout.write(files[f"{suite.name}.{print_format}"])
        return
    console = Console(highlight=False)
    for built in tables:
        console.print(to_terminal(layout_table(built, folder)))
    if print_format is None:
        _list(write_files(files, folder))


class _Report:
    """The records that a command is about, by machine, and the tables and plots that its suite asks for."""

    def __init__(
        self,
        suite: str,
        results: Path,
        machine: str | None,
        overrides: list[str],
        only: str | None,
        data_root: Path | None,
    ) -> None:
        path = Path(suite)
        cells = None
        self.tables: list[object] = []
        self.plots: list[object] = []
        if path.suffix in {".yaml", ".yml"}:
            from bench.plan import build_plan
            from bench.suite import load_suite

            loaded = load_suite(path, overrides)
            cells = build_plan(loaded, only=only, data_root=data_root).cells
            self.name, self.results = loaded.name, results
            self.tables, self.plots = list(loaded.tables), list(loaded.plots)
        elif overrides or only:
            raise BenchError(f"--set and --only need a suite file; '{suite}' is none. Leave them out")
        elif path.is_dir():
            self.name, self.results = path.resolve().name, path.resolve().parent
        else:
            self.name, self.results = suite, results
        found = read_records(self.results, self.name)
        if machine is not None:
            if machine not in found:
                raise BenchError(f"--machine {machine}: no records. Allowed: {', '.join(found)}")
            found = {machine: found[machine]}
        self.several = len(found) > 1
        selections = {name: select(records, cells) for name, records in found.items()}
        # A report of missing cells alone must not take the place of an earlier one that shows results.
        self.selections = {
            name: chosen
            for name, chosen in selections.items()
            if any(record["status"] not in ("missing", "skipped") for record in chosen.records)
        }
        if not self.selections:
            raise RecordError(
                f"{suite}: none of the records in {self.results / self.name} belongs to this suite as it stands now, "
                f"with these settings. Run run-suite again, or give that folder for all of them"
            )

    def folder(self, machine: str, out: Path | None) -> Path:
        """Beside the records, or under `out` (in a folder per machine where there are several)."""
        if out is None:
            folder = self.results / self.name / machine / FOLDER
            check_inside(self.results, folder)
            return folder
        return out / machine if self.several else out


def _show(machine: str, selection: Selection) -> None:
    typer.echo(f"machine {machine}")
    for note in selection.notes:
        typer.echo(f"note: {note}")


def _list(paths: list[Path]) -> None:
    for path in paths:
        typer.echo(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a mistake of the user is printed as one line, or one line each, and gives 2."""
    try:
        app(args=None if argv is None else list(argv), prog_name="diffbench")
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # typer's code for it, 1, would mean a regression
            return unexpected.EXIT_CODE
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except SuiteError as error:
        typer.echo(str(error), err=True)
        return 2
    except DiffInstError as error:
        typer.echo(f"diffbench: {error}", err=True)
        return 2
    except Exception as error:
        return unexpected.tell("diffbench", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
