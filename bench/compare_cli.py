"""diffbench compare and calibrate: read two or more sets of results, judge them, write the verdicts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic_core import from_json

from bench.calibration import NO_NOISE, Noise, calibrate, dump_calibration, load_calibration
from bench.collector import collector_paused
from bench.compare import Comparison, compare
from bench.errors import BenchError, RecordError, StoreError
from bench.gates import DEFAULT_GATES, Gates, load_gates
from bench.plain_record import PlainReader
from bench.pytest_benchmarks import read_benchmarks
from bench.record import parse_plain
from bench.report.cells import Record
from bench.report.comparison import WRITERS, summary, to_markdown
from bench.report.frames import record_files
from bench.store import write_atomic

_SIDE = "a results folder, a suite's or a machine's folder in it, or a JSON file with a record or a list of records"
GatesOption = Annotated[
    Path | None,
    typer.Option("--gates", metavar="FILE.yaml", help="thresholds; docs/gates.md has the format and the default ones"),
]
FormatOption = Annotated[
    Literal["text", "markdown", "json", "junit", "github"],
    typer.Option("--format", help="github: annotations, and Markdown into $GITHUB_STEP_SUMMARY"),
]
BenchmarksOption = Annotated[bool, typer.Option("--benchmarks", help="the files are those of pytest --benchmark-json")]


def compare_command(
    base: Annotated[Path, typer.Argument(metavar="BASE", help=f"{_SIDE}; or a file of race, which has both sides")],
    head: Annotated[
        Path | None, typer.Argument(metavar="HEAD", help="the same, of what is to be judged; none for a file of race")
    ] = None,
    gates_file: GatesOption = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", metavar="FILE", help="noise floors from calibrate; before the gates' own"),
    ] = None,
    output_format: FormatOption = "text",
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="default: printed")] = None,
    benchmarks: BenchmarksOption = False,
) -> None:
    """Judge HEAD against BASE, cell by cell and metric by metric.

    Exit codes: 0 fine, 1 regression, 2 usage, 3 missing or extra cells (or nothing compared), 4 failed cells,
    5 not comparable, 6 inconclusive, 70 unexpected error (DIFFBENCH_TRACEBACK=1 shows its traceback). Of several:
    1 before 4 before 3 before 5 before 6.
    """
    gates, noise = judge_by(gates_file, calibration)
    with collector_paused():
        found = compare(*_read_sides(base, head, benchmarks=benchmarks), gates, noise)
    raise typer.Exit(tell(found, output_format, out))


def judge_by(gates_file: Path | None, calibration: Path | None) -> tuple[Gates, Noise]:
    """The gates of a file or the built-in ones, and the noise floors given or named there.

    Raises:
        SuiteErrors: everything that is wrong in one of the files.
    """
    gates = DEFAULT_GATES if gates_file is None else load_gates(gates_file)
    floors = calibration or gates.calibration
    return gates, NO_NOISE if floors is None else load_calibration(floors)


def tell(found: Comparison, output_format: str, out: Path | None) -> int:
    """Print or write the verdicts, and the job summary where GitHub asks for one; returns the exit code."""
    text = WRITERS[output_format](found)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_atomic(out, text)
        typer.echo(f"wrote {out}: {summary(found)}")
    if output_format == "github" and (job_summary := os.environ.get("GITHUB_STEP_SUMMARY")):
        _append(Path(job_summary), to_markdown(found))
    return int(found.exit_code)


def calibrate_command(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="one for each run; as for compare")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="ends in .yaml, .yml or .json")],
    benchmarks: BenchmarksOption = False,
) -> None:
    """Learn noise floors from several runs of the same suite and code: how much a metric varies by itself."""
    if out.suffix not in (".yaml", ".yml", ".json"):
        raise BenchError(f"--out {out}: is not allowed. Allowed: a file name that ends in .yaml, .yml or .json")
    read = read_benchmarks if benchmarks else read_results
    noise = calibrate([read(path) for path in results], [str(path) for path in results])
    write_atomic(out, dump_calibration(noise, out.suffix))
    count = sum(len(floors) for floors in noise.machines.values())
    machines = f"{len(noise.machines)} machine class{'' if len(noise.machines) == 1 else 'es'}"
    typer.echo(f"wrote {out}: noise floors of {count} metrics on {machines}, from {len(results)} runs")


def _read_sides(base: Path, head: Path | None, *, benchmarks: bool) -> tuple[list[Record], list[Record]]:
    if head is not None:
        if benchmarks:
            return read_benchmarks(base), read_benchmarks(head)
        reader = PlainReader()
        return read_results(base, reader), read_results(head, reader)
    content = _read_json(base) if base.is_file() else None
    if not isinstance(content, dict) or content.get("kind") != "race":
        raise BenchError(f"HEAD is missing, and {base} is no file of diffbench race. Give {_SIDE}")
    sides = []
    for name in ("base", "head"):
        entries = content.get(name)
        if not isinstance(entries, list):
            raise RecordError(f"{base}: {name}: no list of records. Write it with diffbench race --out FILE.json")
        sides.append([_checked(entry, f"{base}: {name}[{number}]", base) for number, entry in enumerate(entries)])
    return sides[0], sides[1]


def read_results(path: Path, reader: PlainReader | None = None) -> list[Record]:
    """The records of a folder or a JSON file, each with the 'path' of its file.

    Args:
        reader: where it has read others, equal parts of all of them are one object.
    Raises:
        RecordError: there are none, or one is unreadable.
    """
    files = record_files(path) if path.is_dir() else [path]
    reader = reader or PlainReader()
    return [record for file in files for record in _records_of(file, reader)]


def _read_json(path: Path) -> Any:
    return _parse(path, _read_bytes(path))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}). Give {_SIDE}") from error


def _parse(path: Path, data: bytes) -> Any:
    try:
        return from_json(data, cache_strings="keys")
    except ValueError as error:
        raise RecordError(f"{path}: not valid JSON ({error}). Give {_SIDE}") from error


def _records_of(path: Path, reader: PlainReader) -> list[Record]:
    data = _read_bytes(path)
    if (usual := reader.usual(data)) is not None:
        return [usual | {"path": str(path)}]
    content = _parse(path, data)
    if not isinstance(content, list):
        return [_checked(content, str(path), path)]
    if not content:
        raise RecordError(f"{path}: an empty list. Give {_SIDE}")
    return [_checked(entry, f"{path}[{number}]", path) for number, entry in enumerate(content)]


def _checked(content: Any, source: str, path: Path) -> Record:
    return parse_plain(content, source) | {"path": str(path)}


def _append(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror}); it is $GITHUB_STEP_SUMMARY") from error
