"""diffbench race: two stored runs timed by turns, judged by the gates of compare."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.calibration import NO_NOISE
from bench.compare import MIN_ROUNDS, ExitCode, compare
from bench.compare_cli import FormatOption, GatesOption, judge_by, tell
from bench.errors import BenchError
from bench.gates import Gate, Gates
from bench.measure.environment import SOURCE_ROOT
from bench.race import Side, Unlike, dump_race, find_side, race
from bench.report.comparison import interval_text, value_text
from bench.report.latency import describe_samples
from bench.store import write_atomic

_SIDE = "a record's file, or its run id in --results"
_EVERY_SCOPE = Gates({"latency_s/*": Gate(relative=0.0, absolute=0.0)})


def race_command(
    base: Annotated[str, typer.Argument(metavar="BASE", help=_SIDE)],
    head: Annotated[str, typer.Argument(metavar="HEAD", help="the same, of what is to be judged; may be BASE itself")],
    results: Annotated[Path, typer.Option("--results", metavar="DIR", help="where run ids are looked for")] = Path(
        "results"
    ),
    images: Annotated[int, typer.Option(min=10, help="images timed in a round, twice a side")] = 20,
    rounds: Annotated[int, typer.Option(min=MIN_ROUNDS, help="times that both sides are started anew")] = 5,
    base_python: Annotated[
        str, typer.Option(metavar="PYTHON", help="interpreter of BASE; default: this one", show_default=False)
    ] = sys.executable,
    head_python: Annotated[
        str, typer.Option(metavar="PYTHON", help="interpreter of HEAD; default: this one", show_default=False)
    ] = sys.executable,
    base_source: Annotated[
        Path, typer.Option(metavar="DIR", help="checkout whose code BASE runs; default: this one", show_default=False)
    ] = SOURCE_ROOT,
    head_source: Annotated[
        Path, typer.Option(metavar="DIR", help="checkout whose code HEAD runs; default: this one", show_default=False)
    ] = SOURCE_ROOT,
    data_root: Annotated[
        Path | None, typer.Option(metavar="DIR", envvar="DIFFINST_DATASETS", help="folder of the data sets")
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="D", help="cpu, cuda, cuda:N; default: a GPU if any")] = None,
    gates_file: GatesOption = None,
    output_format: FormatOption = "text",
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.json", help="keep the timings, for diffbench compare FILE.json"),
    ] = None,
) -> None:
    """Time two runs by turns, image by image, in the order base, head, head, base, each in a process of its own.

    Their weights have to be in the results folders still. Exit codes: as for compare.
    """
    if out is not None and out.suffix != ".json":
        raise BenchError(f"--out {out}: is not allowed. Allowed: a file name that ends in .json")
    gates, _ = judge_by(gates_file, None)
    shared = {"data_root": data_root, "device": device}
    sides = [
        _side(name, text, results, python=python, source=source, **shared)
        for name, text, python, source in (
            ("base", base, base_python, base_source),
            ("head", head, head_python, head_source),
        )
    ]
    command = ["diffbench", *(shlex.quote(argument) for argument in sys.argv[1:])]
    total = rounds * images

    def progress(done: int) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{done} of {total} images" + ("\n" if done == total else ""))

    try:
        records = race(sides[0], sides[1], rounds=rounds, images=images, command=command, progress=progress)
    except Unlike as error:
        typer.echo(f"diffbench: not comparable: {error}", err=True)
        raise typer.Exit(int(ExitCode.NOT_COMPARABLE)) from error
    if out is not None:
        write_atomic(out, dump_race(records))
        typer.echo(f"wrote {out}", err=True)
    found = compare(records["base"], records["head"], gates, NO_NOISE)
    if output_format == "text":
        typer.echo(scopes_text(records), nl=False)
    raise typer.Exit(tell(found, output_format, None))


def scopes_text(records: dict[str, list[dict[str, Any]]]) -> str:
    """A line a scope: the medians of both sides and the median of the ratios with its interval; then the samples."""
    rows = [row for row in compare(records["base"], records["head"], _EVERY_SCOPE).rows if row.base is not None]
    table: list[tuple[str, ...]] = [("scope", "base", "head", "change [95 %]")]
    for row in rows:
        values = ["" if value is None else value_text(row, value) for value in (row.base, row.head)]
        table.append((row.metric.partition("/")[2], *values, interval_text(row)))
    widths = [max(len(line[column]) for line in table) for column in range(4)] if rows else []
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in table if rows]
    lines += [f"{name}: {said}" for name in records if (said := describe_samples(records[name]))]
    return "\n".join(lines) + "\n"


def _side(name: str, text: str, results: Path, *, source: Path, **settings: Any) -> Side:
    if not (source / "bench").is_dir():
        raise BenchError(f"--{name}-source {source}: no folder of this project. Give a checkout of it")
    return find_side(name, text, results, source=source, **settings)
