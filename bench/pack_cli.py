"""diffbench pack and verify-pack: one archive of a suite's results, and the check of one."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from bench.errors import BenchError, RecordError
from bench.report.build import read_records, select


def pack_command(
    suite: Annotated[
        str, typer.Argument(metavar="SUITE", help="a suite file, or a folder of results such as results/quickstart")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="X.zip", help="where the archive goes; none is overwritten")],
    results: Annotated[Path, typer.Option("--results", help="the results folder, for a suite file")] = Path("results"),
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="as for run-suite")] = None,
    data_root: Annotated[Path | None, typer.Option("--data-root", metavar="DIR", help="as for run-suite")] = None,
    machine: Annotated[str | None, typer.Option("--machine", help="only this machine's records")] = None,
    claims: Annotated[Path, typer.Option("--claims", metavar="DIR", help="the folder of the claim files")] = Path(
        "suites/claims"
    ),
    annotations: Annotated[
        bool, typer.Option("--annotations/--no-annotations", help="pack the ground truth of the scored images")
    ] = True,
    partial: Annotated[bool, typer.Option("--partial", help="pack records without stored predictions, too")] = False,
) -> None:
    """Pack plan, records, predictions, ground truth, claims and report of a suite into one archive."""
    from bench.fingerprints import fingerprints_for, save_if_possible
    from bench.pack import pack
    from bench.plan import build_plan
    from bench.store import Store
    from bench.suite import load_suite

    if out.suffix != ".zip":
        raise BenchError(f"--out {out}: is not allowed. Allowed: a file name that ends in .zip")
    if out.exists():
        raise BenchError(f"--out {out}: is there already. Remove it, or give another name")
    path = Path(suite)
    loaded = plan = None
    if path.suffix in {".yaml", ".yml"}:
        loaded = load_suite(path, overrides or [])
        # With the content of files, without which no node has the id that its records name.
        shown = _shown()
        contents = fingerprints_for(
            Store(results).nodes_folder, lambda done, total: shown(f"reading data sets: file {done} of {total}")
        )
        plan = build_plan(loaded, data_root=data_root, contents=contents)
        save_if_possible(contents)
        name = loaded.name
    elif overrides:
        raise BenchError(f"--set needs a suite file; '{suite}' is none. Leave it out")
    elif path.is_dir():
        name, results = path.resolve().name, path.resolve().parent
    else:
        name = suite
    found = read_records(results, name)
    if machine is not None:
        if machine not in found:
            raise BenchError(f"--machine {machine}: no records. Allowed: {', '.join(found)}")
        found = {machine: found[machine]}
    cells = None if plan is None else plan.cells
    selections = {key: select(records, cells) for key, records in found.items()}
    selections = {
        key: chosen
        for key, chosen in selections.items()
        if any(record["status"] not in ("missing", "skipped") for record in chosen.records)
    }
    if not selections:
        raise RecordError(f"{suite}: none of the records in {results / name} belongs to this suite as it stands now")
    done = pack(
        selections,
        results,
        out,
        suite=loaded,
        plan=plan,
        overrides=overrides or (),
        data_root=data_root,
        claims=claims,
        with_annotations=annotations,
        partial=partial,
        progress=_shown(),
    )
    for note in done.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"wrote {out}: {done.num_records} records, {done.num_files} files, {out.stat().st_size} bytes")
    typer.echo(f"sha256 {done.sha256}  (of its manifest; check with: diffbench verify-pack {out} --sha256 ...)")


def verify_pack_command(
    archive: Annotated[Path, typer.Argument(metavar="X.zip", help="an archive of diffbench pack")],
    sha256: Annotated[str | None, typer.Option("--sha256", metavar="HEX", help="what pack printed")] = None,
    data_root: Annotated[
        Path | None, typer.Option("--data-root", metavar="DIR", help="where annotations are that were left out")
    ] = None,
    rescore: Annotated[bool, typer.Option("--rescore/--no-rescore", help="score every cell again")] = True,
) -> None:
    """Check every byte of an archive, score its cells again without a model, and make its tables again.

    Exit codes: 0 fine, 1 something differs (each named), 2 usage.
    """
    from bench.verify_pack import verify_pack

    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise BenchError(f"--sha256 {sha256}: is not allowed. Allowed: the 64 hex digits that pack printed")
    found = verify_pack(archive, sha256=sha256, data_root=data_root, rescore=rescore, progress=_shown())
    for note in found.notes:
        typer.echo(f"note: {note}")
    for finding in found.findings:
        typer.echo(finding)
    if found.findings:
        typer.echo(f"diffbench: {len(found.findings)} of what {archive} says is not so", err=True)
        raise typer.Exit(1)
    cells = "cell" if found.scored == 1 else "cells"
    scored = f"{found.scored} {cells} scored again to the same numbers" if rescore else "no cell scored again"
    typer.echo(f"{archive}: {found.files} files as packed, {scored}, {found.tables} tables as the records give them")


def _shown() -> Callable[[str], None]:
    """Progress on one line of a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda _: None
    return lambda text: typer.echo(f"\r\033[K{text}\r", nl=False, err=True)
