"""A record to vary."""

from __future__ import annotations

from typing import Any

from bench.record import RunRecord, metric


def make_record(**changes: Any) -> RunRecord:
    content: dict[str, Any] = {
        "suite": "steps",
        "run_id": "00ff",
        "label": "sampling_steps=1 seed=0",
        "status": "ok",
        "axes": {"sampling_steps": 1, "seed": 0},
        "config": {"sampler": {"sampling_steps": 1}},
        "nodes": {"train": "train-1"},
        "metrics": {"segm/AP": metric("segm/AP", 0.25)},
        "samples": {"latency_s": {"total": [0.5, 1.25e-07]}},
        "environment": {"machine": "some-cpu"},
        "command": "run-suite steps.yaml",
        "started_at": "2026-01-02T03:04:05Z",
        "finished_at": "2026-01-02T03:04:06Z",
        "duration_s": 1.0,
    }
    return RunRecord.model_validate(content | changes)
