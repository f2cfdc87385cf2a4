"""Records as a pandas DataFrame: one tidy row per record, for questions that no table of the suite asks.

pandas is loaded on use: tables and plots do without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import RecordError, StoreError
from bench.plain_record import PlainReader
from bench.record import collector_paused
from bench.report.cells import Record, axes_of, metric_names, sort_records
from bench.report.latency import TOTAL, quantiles_of, timing_of
from bench.report.metrics import axis_text, csv_field

if TYPE_CHECKING:
    import pandas as pd

# What stands before and after the axes and the metrics of a row.
HEAD = ("suite", "machine", "run_id", "status", "reason")
TAIL = ("started_at", "duration_s", "commit", "dirty", "device", "command")
# What is said of the timed images, and its column.
_COUNTS = {
    "count": "latency_s/num_samples",
    "outliers": "latency_s/num_outliers",
    "contended": "latency_s/num_contended",
    "throttled": "latency_s/num_throttled",
}


def record_files(folder: Path) -> list[Path]:
    """The current records (no history) below a results folder, a suite's folder in it, or a machine's in that.

    Raises:
        RecordError: there are none.
    """
    for pattern in ("*.json", "[!.]*/*.json", "[!.]*/[!.]*/*.json"):
        paths = [path for path in folder.glob(pattern) if path.parent.name != "history"]
        if paths:
            return sorted(paths)
    raise RecordError(f"{folder}: no records. Give a results folder, or a suite's or a machine's folder in it")


def read_folder(folder: Path) -> list[Record]:
    """All current records below `folder`, by suite, machine and axes; see `record_files`.

    Raises:
        RecordError: there are none, or one is unreadable.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    reader = PlainReader()
    machine_of = cache(lambda place: place.resolve().name)
    with collector_paused():
        for path in record_files(folder):
            record = reader.load(path)
            groups.setdefault((record["suite"], machine_of(path.parent)), []).append(record)
    return [
        {**record, "machine": machine}
        for (_, machine), found in sorted(groups.items())
        for record in sort_records(found)
    ]


def to_frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row per record: what it is, a column per axis, a column per metric, when and on what it ran.

    Metrics are in the record's own units (AP as a fraction, seconds, bytes), under their own names ('segm/AP'); one
    that was not measured, or that the run failed to measure, is NaN, never 0. An axis that a record does not have is
    None; lists and mappings are text. Beside each latency stand the ends of its 95 % interval ('latency_s/total/low',
    '/high', within one run), and how many images were timed, and were outliers, contended and throttled among them.

    Args:
        records: JSON objects of RunRecord, with 'machine' beside its fields if it is to stand in the frame.
    """
    import pandas as pd

    axes = list(dict.fromkeys(name for record in records for name in axes_of(record)))
    metrics = metric_names(records)
    timed = [name for name in metrics if name.startswith("latency_s/")]
    columns = [column for name in metrics for column in (name, *(_ends(name) if name in timed else ()))]
    columns += _COUNTS.values() if timed else ()
    rows = [_row(record, axes, metrics) | more for record, more in zip(records, _timings(records, timed))]
    frame = pd.DataFrame(rows, columns=[*HEAD, *axes, *columns, *TAIL])
    for name in axes:  # pandas' own inference would turn whole numbers into fractions where some rows have none
        frame[name] = pd.array([row[name] for row in rows])
    # Numbers even where all are missing.
    return frame.astype(dict.fromkeys([*columns, "duration_s"], "float64"))


def to_csv_text(frame: pd.DataFrame) -> str:
    """The frame as CSV, the same records giving the same text; what is missing is an empty field."""
    from pandas.api.types import is_numeric_dtype

    safe = frame.rename(columns=csv_field)
    for name in safe.columns:
        if not is_numeric_dtype(safe[name]):
            safe[name] = [csv_field(value) if isinstance(value, str) else value for value in safe[name]]
    return safe.to_csv(index=False, lineterminator="\n")


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write the frame as CSV in UTF-8.

    Raises:
        StoreError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(to_csv_text(frame).encode())
        temporary.replace(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror}). Choose another file with --out") from error


def _row(record: Record, axes: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    environment = record.get("environment", {})
    values, measured = axes_of(record), record.get("metrics", {})
    facts = {
        "machine": record.get("machine", environment.get("machine")),
        "commit": environment.get("commit"),
        "dirty": environment.get("dirty"),
        "device": environment.get("process", {}).get("device"),
    }
    return {
        **{name: record.get(name) for name in (*HEAD, *TAIL)},
        **facts,
        **{name: _axis_cell(values.get(name)) for name in axes},
        **{name: measured.get(name, {}).get("value") for name in metrics},
    }


def _ends(name: str) -> tuple[str, str]:
    return f"{name}/low", f"{name}/high"


def _timings(records: Sequence[Record], names: Sequence[str]) -> list[dict[str, Any]]:
    """Of each record the ends of the intervals of latencies, and `_COUNTS`, as far as the samples tell them."""
    wanted = [
        (place, record, name)
        for place, record in enumerate(records)
        for name in names
        if record.get("metrics", {}).get(name, {}).get("value") is not None
    ]
    rows: list[dict[str, Any]] = [{} for _ in records]
    quantiles = quantiles_of([(record, name) for _, record, name in wanted])
    for (place, record, name), found in zip(wanted, quantiles):
        if found is None:
            continue
        rows[place] |= zip(_ends(name), (found.low, found.high))
        if name == TOTAL:
            timing = timing_of(record, name, found)
            rows[place] |= {column: getattr(timing, field) for field, column in _COUNTS.items()}
    return rows


def _axis_cell(value: Any) -> Any:
    return axis_text(value) if isinstance(value, tuple) else value
