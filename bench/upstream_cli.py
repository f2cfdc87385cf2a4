"""diffbench import-config and export-config: configuration files of the released code, in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.errors import BenchError
from bench.upstream import read_upstream, to_suite
from bench.upstream_export import only_cell, to_upstream

ForceOption = Annotated[bool, typer.Option("--force", help="replace the file if it is there")]


def import_config_command(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="a configuration of DiffusionInst or DiffusionDet")],
    out: Annotated[Path, typer.Option("--out", metavar="SUITE.yaml", help="where the suite goes")],
    force: ForceOption = False,
) -> None:
    """Turn a configuration file of the released code, with those it is based on, into a suite."""
    _check_new(out, force=force)
    upstream = read_upstream(file)
    _write(out, to_suite(upstream, file.stem))
    typer.echo(
        f"wrote {out}: {upstream.architecture}, {len(upstream.fields)} fields; not used: {len(upstream.notes)} keys"
    )


def export_config_command(
    suite: Annotated[Path, typer.Argument(metavar="SUITE.yaml", help="a suite")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.yaml", help="where the configuration goes")],
    cell: Annotated[
        str | None, typer.Option("--cell", help="its axes, e.g. sampling_steps=4, if there are several")
    ] = None,
    weights: Annotated[str, typer.Option("--weights", help="MODEL.WEIGHTS")] = "",
    force: ForceOption = False,
) -> None:
    """Turn one cell of a suite into a configuration file of the released code."""
    from bench.suite import load_suite

    _check_new(out, force=force)
    loaded = load_suite(suite)
    labels = {
        ",".join(f"{name}={value}" for name, value in entry.axes.items()) or loaded.name: entry.config
        for entry in loaded.cells
    }
    _write(out, to_upstream(only_cell(labels, cell), weights=weights))
    typer.echo(f"wrote {out}")


def _check_new(out: Path, *, force: bool) -> None:
    if out.suffix not in {".yaml", ".yml"}:
        raise BenchError(f"--out {out}: is not allowed. Allowed: a file name that ends in .yaml or .yml")
    if out.exists() and (not force or out.is_dir()):
        raise BenchError(f"--out {out}: is there already. Choose another name, or replace it with --force")


def _write(out: Path, text: str) -> None:
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"--out {out}: cannot be written ({error.strerror})") from error
