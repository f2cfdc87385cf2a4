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


def raced(
    generator: np.random.Generator,
    *,
    factor: float = 1.0,
    rounds: int = 5,
    images: int = 20,
    luck: float = 0.02,
    noise: float = 0.05,
    race: str = "one",
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Both sides of a race, a record a round: images cost from 1 to 3 times 10 ms, and each process has its luck."""
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
    for number in range(rounds):
        costs = np.repeat(0.010 * (1 + 2 * generator.random(images)), 2)
        for side, records in enumerate(sides):
            speed = float(np.exp(luck * generator.standard_normal())) * (factor if side else 1.0)
            samples = costs * speed * np.exp(noise * generator.standard_normal(2 * images))
            record = timed_record(ap=None)
            record["axes"] = {"race": "one against another", "round": number}
            record["samples"] = {"latency_s": {"total": samples.tolist()}}
            record["metrics"] = {"latency_s/total": {"value": float(np.median(samples)), "unit": "s"}}
            record["metrics"]["latency_s/total"]["higher_is_better"] = False
            record["measure"] = {"latency": True, "race": {"id": race, "rounds": rounds}}
            records.append(record)
    return sides


def with_marks(record: dict[str, Any], contended: int, throttled: int | None = 0) -> dict[str, Any]:
    """The record with its first so many samples contended, and throttled (None: not told)."""
    record["sample_marks"] = {
        "latency_s": {
            "contended": {"samples": list(range(contended)), "reason": None},
            "throttled": {
                "samples": None if throttled is None else list(range(throttled)),
                "reason": "not told" if throttled is None else None,
            },
        }
    }
    return record
