"""Peak memory of this process: resident memory on the CPU, allocated and reserved memory on a CUDA device."""

from __future__ import annotations

import os
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

    'rss' is meant as that of a process started from nothing, libraries included, as engines in an interpreter of their
    own measure it: pages of libraries that a forked process has not touched, but its parent has, are added; see
    `unmapped_library_bytes`. CUDA peaks are None on another device.
    """
    on_cuda = torch.device(device).type == "cuda"
    return {
        "rss": _peak_resident_bytes() + unmapped_library_bytes(),
        "cuda_allocated": torch.cuda.max_memory_allocated(device) if on_cuda else None,
        "cuda_reserved": torch.cuda.max_memory_reserved(device) if on_cuda else None,
    }


def unmapped_library_bytes() -> int:
    """Memory of mapped files that the process this one was forked from holds, and this one does not.

    A forked process inherits the private memory of its parent, but has to touch the pages of libraries anew to be
    counted for them: about 0.3 GB after importing torch. Pages that this process touched and its parent did not are
    taken for some of the parent's, so the sum is at most too low by those (30 MB of 760 MB for a detection on 384 x 384
    pixels). 0 in a process that was not forked so, and outside Linux.
    """
    parent = os.getppid()
    try:
        # A process that was forked and executes no other program has its parent's command line.
        if _read("self", "cmdline") != _read(parent, "cmdline"):
            return 0
        return max(0, _status_bytes(parent, "RssFile") - _status_bytes("self", "RssFile"))
    except OSError:
        return 0


def _peak_resident_bytes() -> int:
    if sys.platform == "linux" and (peak := _status_bytes("self", "VmHWM")):
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but there


def _status_bytes(process: int | str, name: str) -> int:
    """A size of a process as Linux tells it, 0 where it does not."""
    for line in _read(process, "status").decode().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _read(process: int | str, name: str) -> bytes:
    return Path(f"/proc/{process}/{name}").read_bytes()
