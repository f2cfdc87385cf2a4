"""Records to compare: report_records.make_record with raw timings, a machine, and runs that vary as real ones do."""

from __future__ import annotations

from typing import Any

import numpy as np
from report_records import make_record

MACHINE = "example-cpu-2c-0a0a0a"


def timed_record(
    steps: int = 1,
    proposals: int = 20,
    *,
    median_s: float = 0.010,
    spread: float = 0.05,
    num_samples: int = 60,
    generator: np.random.Generator | None = None,
    machine: str = MACHINE,
    seed: int = 0,
    ap: float | None = 0.25,
) -> dict[str, Any]:
    """A record whose timings are log-normal around `median_s`."""
    generator = generator or np.random.default_rng(0)
    samples = (median_s * np.exp(spread * generator.standard_normal(num_samples))).tolist()
    record = make_record(steps, proposals, seed=seed, ap=ap, latency_s=float(np.median(samples)))
    record["samples"] = {"latency_s": {"total": samples}}
    record["measure"] = {"score": True, "latency": True, "latency_images": 10, "latency_seconds": 3.0}
    record["environment"] |= {"machine": machine}
    record["environment"]["process"] |= {"threads": {"intra_op": 2, "inter_op": 2}}
    for name, entry in record["metrics"].items():
        entry["unit"] = "bytes" if name.startswith("peak") else entry["unit"]
    return record


def timed_run(
    generator: np.random.Generator, *, between: float = 0.03, factor: float = 1.0, num_cells: int = 4, **settings: Any
) -> list[dict[str, Any]]:
    """All cells of one run: each cell's time is off by its own luck, `between` on the logarithmic scale."""
    return [
        timed_record(
            steps,
            median_s=0.010 * steps * factor * float(np.exp(between * generator.standard_normal())),
            generator=generator,
            **settings,
        )
        for steps in range(1, num_cells + 1)
    ]
