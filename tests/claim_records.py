"""Records of suites that are tied to claims, made up."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

from bench.record import RunRecord, metric
from bench.store import Store
from bench.suite import Suite, SuiteCell


def record_of(
    suite: Suite, cell: SuiteCell, value: float, *, metric_name: str = "segm/AP", **changes: Any
) -> RunRecord:
    """A record of one cell, with what the claim of COCO's validation split wants; `changes` by dotted field name."""
    config: dict[str, Any] = {name: part.model_dump(mode="json") for name, part in cell.config}
    if not cell.engine.is_default:
        config["engine"] = cell.engine.model_dump(mode="json")
    images = changes.pop("images", 5000)
    started_at = changes.pop("started_at", "2026-01-02T03:04:05Z")
    for name, new in changes.items():
        section, _, field = name.partition("__")
        config[section][field] = new
    seeds = f"{config['sampler']['eval_seed']}-{config['train']['seed']}"
    metrics = {metric_name: metric(metric_name, value), "num_images": metric("num_images", images)}
    return RunRecord(
        suite=suite.name,
        run_id=hashlib.sha256(f"{sorted(cell.axes.items())}{seeds}".encode()).hexdigest()[:16],
        label=str(cell.axes),
        status="ok",
        axes=cell.axes,
        config=copy.deepcopy(config),
        nodes={},
        metrics=metrics,
        environment={"machine": "box"},
        command=f"run-suite {suite.path.name} --data-root <data-root>",
        started_at=started_at,
        finished_at=started_at,
        duration_s=1.0,
    )


def write_records(results: Path, records: list[RunRecord], machine: str = "box") -> None:
    """As run-suite stores them."""
    for record in records:
        Store(results).write_record(record, machine)
