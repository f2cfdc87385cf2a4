"""Records as a pandas DataFrame: one tidy row per record, for questions that no table of the suite asks.

pandas is loaded on use: tables and plots do without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.collector import collector_paused
from bench.errors import RecordError, StoreError
from bench.plain_record import PlainReader
from bench.report.cells import Record, axes_of, metric_names, sort_records
from bench.report.latency import TOTAL, marked, quantiles_of
from bench.report.metrics import axis_text, csv_field
from bench.stats.latency import count_outliers

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
_NOTHING: dict[str, Any] = {}


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

    axes = [axes_of(record) for record in records]
    facts = [_facts(record) for record in records]
    measured = [record.get("metrics", {}) for record in records]
    columns = {name: pd.Series([row[name] for row in facts]) for name in HEAD}
    for name in dict.fromkeys(chain.from_iterable(axes)):
        # pandas' own inference would turn whole numbers into fractions where some rows have none.
        columns[name] = pd.Series(pd.array([_axis_cell(values.get(name)) for values in axes]))
    names, timings = metric_names(records), _timings(records)
    for name in names:
        columns[name] = _numbers(metrics.get(name, _NOTHING).get("value") for metrics in measured)
        for end in _ends(name) if name.startswith("latency_s/") else ():
            columns[end] = _numbers(timings.get(end, {}).get(place) for place in range(len(records)))
    for name in _COUNTS.values() if any(name.startswith("latency_s/") for name in names) else ():
        columns[name] = _numbers(timings.get(name, {}).get(place) for place in range(len(records)))
    columns |= {name: pd.Series([row[name] for row in facts]) for name in TAIL}
    columns["duration_s"] = _numbers(row["duration_s"] for row in facts)
    return pd.DataFrame(columns)


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


def _facts(record: Record) -> dict[str, Any]:
    """`HEAD` and `TAIL` of a record."""
    environment = record.get("environment", {})
    return {
        **{name: record.get(name) for name in (*HEAD, *TAIL)},
        "machine": record.get("machine", environment.get("machine")),
        "commit": environment.get("commit"),
        "dirty": environment.get("dirty"),
        "device": environment.get("process", {}).get("device"),
    }


def _numbers(values: Iterable[float | None]) -> pd.Series:
    """Numbers even where all are missing."""
    import pandas as pd

    return pd.Series(list(values), dtype="float64")


def _ends(name: str) -> tuple[str, str]:
    return f"{name}/low", f"{name}/high"


def _timings(records: Sequence[Record]) -> dict[str, dict[int, float | None]]:
    """Column -> place of a record -> the end of a latency's interval, or one of `_COUNTS`, as far as samples tell."""
    wanted = [
        (place, record, name)
        for place, record in enumerate(records)
        for name, entry in record.get("metrics", {}).items()
        if name.startswith("latency_s/") and entry.get("value") is not None
    ]
    columns: dict[str, dict[int, float | None]] = {}
    totals = []
    for (place, record, name), found in zip(wanted, quantiles_of([(record, name) for _, record, name in wanted])):
        if found is None:
            continue
        low, high = _ends(name)
        columns.setdefault(low, {})[place] = found.low
        columns.setdefault(high, {})[place] = found.high
        if name == TOTAL:
            totals.append((place, record, found.count))
    outliers = count_outliers([record["samples"]["latency_s"]["total"] for _, record, _ in totals])
    for (place, record, count), number in zip(totals, outliers):
        facts = {"count": count, "outliers": number} | {
            mark: marked(record, mark) for mark in ("contended", "throttled")
        }
        for fact, value in facts.items():
            columns.setdefault(_COUNTS[fact], {})[place] = value
    return columns


def _axis_cell(value: Any) -> Any:
    return axis_text(value) if isinstance(value, tuple) else value
