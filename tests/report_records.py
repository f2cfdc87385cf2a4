"""Records as `run-suite` writes them, made up: enough to fill every table and plot."""

from __future__ import annotations

from typing import Any

from bench.record import pack_resamples

MIB = 2**20


def make_record(
    steps: int = 1,
    proposals: int = 20,
    *,
    seed: int = 0,
    status: str = "ok",
    reason: str | None = None,
    ap: float | None = 0.25,
    latency_s: float | None = 0.010,
    **axes: Any,
) -> dict[str, Any]:
    """One record; `ap` or `latency_s` None is 'not measured', further keywords become further axes."""
    metrics: dict[str, dict[str, Any]] = {}

    def put(name: str, value: float | None, unit: str, higher: bool) -> None:
        metrics[name] = {"value": value, "unit": unit, "higher_is_better": higher}
        if value is None:
            metrics[name]["reason"] = "no GPU" if "cuda" in name else "not asked for"

    if status == "ok":
        for name, factor in (("segm/AP", 1.0), ("segm/AP50", 1.6), ("segm/AP75", 0.9), ("bbox/AP", 1.1)):
            put(name, None if ap is None else ap * factor, "fraction", True)
        for suffix, factor in (("", 1.0), ("/p5", 0.9), ("/p95", 1.25)):
            put(f"latency_s/total{suffix}", None if latency_s is None else latency_s * factor, "s", False)
        put("peak_memory_bytes/rss", 612 * MIB, "byte", False)
        put("peak_memory_bytes/cuda_allocated", None, "byte", False)
        put("num_parameters", 1_234_567, "parameters", False)
        put("num_images", 200, "images", True)
        put("flops", 2.5e9, "FLOP", False)
    values = {"sampling_steps": steps, "num_proposals": proposals, **axes, "seed": seed}
    return {
        "schema_version": 2,
        "suite": "quickstart",
        "run_id": f"run-{steps}-{proposals}-{seed}-" + "-".join(str(value) for value in axes.values()),
        "label": " ".join(f"{name}={value}" for name, value in values.items()),
        "status": status,
        "reason": reason,
        "axes": values,
        "config": {
            "model": {"backbone": "tiny", "num_stages": 3},
            "sampler": {"sampling_steps": steps, "num_proposals": proposals, "eval_seed": 0},
            "train": {"seed": seed, "iterations": 1500, "batch_size": 8},
            "data": {"dataset": "shapes", "shapes_val_images": 200, "shapes_image_size": 96, "class_agnostic": False},
        },
        "nodes": {},
        "metrics": metrics,
        "samples": {},
        "per_class": {},
        "environment": {
            "commit": "0123456789abcdef",
            "dirty": False,
            "cpu": {"model": "Example CPU 9000", "usable_cores": 2},
            "gpus": [],
            "packages": {"torch": "2.14.1"},
            "process": {"device": "cpu"},
        },
        "command": "run-suite suites/quickstart.yaml",
        "started_at": "2026-01-02T03:04:05Z",
        "finished_at": "2026-01-02T03:05:05Z",
        "duration_s": 60.0,
        "log": "",
    }


def with_error(record: dict[str, Any], error: float, drawn: Any = (), *, images: str = "a") -> dict[str, Any]:
    """The record with a standard error of mask AP over images, and mask AP of resampled images."""
    record["metrics"]["segm/AP"] |= {"standard_error": error, "error_of": "images"}
    if len(drawn):
        values = pack_resamples([float(value) for value in drawn])
        record["resamples"] = {
            "segm/AP": {"images": images, "num_images": 200, "seed": 0, "count": len(drawn), "values": values}
        }
    return record


def make_grid() -> list[dict[str, Any]]:
    """Steps {1, 2, 4} x proposals {20, 50, 100}: one failed, one skipped, one missing, the rest measured."""
    records = []
    for i, steps in enumerate((1, 2, 4)):
        for j, proposals in enumerate((20, 50, 100)):
            cell: dict[str, Any] = {
                "ap": 0.31 + 0.035 * j + 0.022 * i - 0.004 * i * j,
                "latency_s": 0.004 + 0.0031 * steps * (1 + 0.4 * j),
            }
            if (steps, proposals) == (4, 100):
                cell |= {"status": "failed", "reason": "out of memory: the process was killed\ntrace"}
            if (steps, proposals) == (2, 100):
                cell |= {"status": "skipped", "reason": "its training failed"}
            if (steps, proposals) == (4, 20):
                cell |= {"status": "missing", "reason": None}
            records.append(make_record(steps, proposals, **cell))
    return records
