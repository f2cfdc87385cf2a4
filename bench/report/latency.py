"""What a record says of its timings beside their median: intervals, outliers, and samples that were disturbed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from bench.report.cells import Record
from bench.stats.latency import Quantile, count_outliers, quantiles

TOTAL = "latency_s/total"
_match = lru_cache(maxsize=1024)(re.compile(r"^(latency_s|training_step_s|benchmark_s)/(.*?)(?:/p(\d\d?))?$").match)


def quantile_of(record: Record, metric: str = TOTAL) -> Quantile | None:
    """The value of 'latency_s/total' or 'latency_s/total/p95' with its interval alone, which large tables ask for."""
    return quantiles_of([(record, metric)])[0]


def quantiles_of(wanted: Sequence[tuple[Record, str]]) -> list[Quantile | None]:
    """`quantile_of` of many, in a fraction of the time; None where there are no samples."""
    found: list[Quantile | None] = [None] * len(wanted)
    rows = {}
    for place, (record, metric) in enumerate(wanted):
        match = _match(metric)
        samples = match and record.get("samples", {}).get(match[1], {}).get(match[2])
        if match and samples:
            rows[place] = samples, int(match[3] or 50) / 100
    for place, entry in zip(rows, quantiles([*rows.values()])):
        found[place] = entry
    return found


def marked(record: Record, mark: str, name: str = "latency_s") -> int | None:
    """How many timed images bear a mark; None where it cannot be told, or nobody looked."""
    entry: Any = record.get("sample_marks", {}).get(name, {}).get(mark)
    samples = entry.get("samples") if isinstance(entry, Mapping) else None
    return None if samples is None else len(samples)


def disturbed_share(records: Iterable[Record], name: str = "latency_s") -> float | None:
    """The part of all timed images that was contended or throttled; None where no record can tell."""
    count, disturbed = 0, 0
    for record in records:
        marks = record.get("sample_marks", {}).get(name, {})
        known = [entry["samples"] for entry in marks.values() if entry["samples"] is not None]
        length = max((len(values) for values in record.get("samples", {}).get(name, {}).values()), default=0)
        if known and length:
            count += length
            disturbed += len(set().union(*known))
    return disturbed / count if count else None


def describe_samples(records: Iterable[Record]) -> str:
    """'120 timed images, 12 contended, throttled not told, 3 outliers'; empty where nobody looked."""
    looked = [record for record in records if record.get("sample_marks", {}).get("latency_s")]
    samples = [record["samples"]["latency_s"]["total"] for record in looked]
    if not samples:
        return ""
    parts = [f"{sum(map(len, samples))} timed images"]
    for mark in ("contended", "throttled"):
        known = [count for record in looked if (count := marked(record, mark)) is not None]
        parts.append(f"{sum(known)} {mark}" if len(known) == len(looked) else f"{mark} not told")
    outliers = sum(count_outliers(samples))
    return ", ".join([*parts, f"{outliers} outlier{'' if outliers == 1 else 's'}"])
