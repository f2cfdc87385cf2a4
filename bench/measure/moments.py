"""The state of the machine at a moment, and what happened between two: whether a time was taken on a quiet machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from bench.measure.cpu import CpuCounters, cpu_between, cpu_now
from bench.measure.disturbances import Throttle, held_back
from bench.measure.gpu import gpu_now


@dataclass(frozen=True)
class Moment:
    """facts: load_average_1min, frequency_mhz of the CPU, and `gpu` (see `gpu_now`) of the device computed on."""

    facts: dict[str, Any]
    counters: CpuCounters
    at_s: float

    @classmethod
    def now(cls, device: str) -> Moment:
        """Read the state; takes some milliseconds. device: torch device that the process computes on."""
        facts = cpu_now()
        if (pci := _pci_address(device)) is not None:
            facts["gpu"] = gpu_now(pci)
        return cls(facts, CpuCounters.read(), time.monotonic())


def conditions_between(start: Moment, end: Moment) -> dict[str, Any]:
    """`start`, `end` as in `Moment.facts`, and `between`: seconds, and how the CPU was used (see `cpu_between`)."""
    duration_s = end.at_s - start.at_s
    used = {"seconds": round(duration_s, 3), **cpu_between(start.counters, end.counters, duration_s)}
    return {"start": start.facts, "end": end.facts, "between": used}


def throttle_of(device: str) -> Throttle | None:
    """What tells, now, why the clocks of the GPU computed on are held down; None for a CPU."""
    pci = _pci_address(device)
    return None if pci is None else lambda: held_back(gpu_now(pci).get("clock_reasons"))


def _pci_address(device: str) -> str | None:
    """Where the GPU sits: the only name of it that CUDA and its driver's library share whatever variables say."""
    if torch.device(device).type != "cuda":
        return None
    found: Any = torch.cuda.get_device_properties(device)
    return f"{found.pci_domain_id:08x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
