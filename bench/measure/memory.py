"""Peak memory of this process: resident memory on the CPU, allocated and reserved memory on a CUDA device."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch


def reset_peak(device: torch.device | str) -> None:
    """Forget earlier peaks of CUDA memory; the resident peak is that of the whole process and cannot be forgotten."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device | str) -> dict[str, int | None]:
    """Peaks in bytes: 'rss' since the process began, 'cuda_allocated' and 'cuda_reserved' since `reset_peak`.

    A process forked from one that had loaded torch counts only the pages that it has touched, so `rss` is about 0.3 GB
    below that of a process started from nothing, for all runs alike. CUDA peaks are None on another device.
    """
    on_cuda = torch.device(device).type == "cuda"
    return {
        "rss": _peak_resident_bytes(),
        "cuda_allocated": torch.cuda.max_memory_allocated(device) if on_cuda else None,
        "cuda_reserved": torch.cuda.max_memory_reserved(device) if on_cuda else None,
    }


def _peak_resident_bytes() -> int:
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but there
