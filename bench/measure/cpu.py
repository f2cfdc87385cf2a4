"""What is known of the processor, and how busy it is: facts that explain a time, read in a millisecond or two."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

_SYSTEM = Path("/sys/devices/system")
_CGROUP = Path("/sys/fs/cgroup")
_MAX_CORES_READ = 8  # of which clocks are read: each is a file, and some kernels take milliseconds for one


def cpu_facts() -> dict[str, Any]:
    """Of the processor, what does not change; None for what this system does not tell.

    Returns:
        model, physical_cores, logical_cores, usable_cores (those this process may run on), quota_cores (how many a
        container may use on average), hyper_threading, numa_nodes, governor, max_frequency_mhz.
    """
    governors = sorted({text for path in _frequency_files("scaling_governor") if (text := _read(path))})
    frequencies = [int(text) for path in _frequency_files("cpuinfo_max_freq") if (text := _read(path)).isdigit()]
    return {
        "model": cpu_model(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": len(_usable()) or psutil.cpu_count(),
        "quota_cores": _quota_cores(),
        "hyper_threading": {"0": False, "1": True}.get(_read(_SYSTEM / "cpu" / "smt" / "active")),
        "numa_nodes": len(list((_SYSTEM / "node").glob("node[0-9]*"))) or None,
        "governor": ", ".join(governors) or None,
        "max_frequency_mhz": max(frequencies) / 1000 if frequencies else None,
    }


@cache
def cpu_model() -> str:
    """The processor's name, as its maker writes it."""
    if sys.platform == "linux":
        text = _read(Path("/proc/cpuinfo"))
        match = re.search(r"^(?:model name|Model|Hardware|cpu model)\s*:\s*(.+)$", text, re.MULTILINE)
        if match:
            return " ".join(match[1].split())
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ("sysctl", "-n", "machdep.cpu.brand_string")
            return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class CpuCounters:
    """Seconds of processor time since some time ago; only differences mean something.

    machine: of all processes, idle, and stolen by other guests of the host. own: of this process and its children.
    throttled: for which a container's quota held this one back; None where there is none.
    """

    busy_s: float
    idle_s: float
    steal_s: float
    own_s: float
    throttled_s: float | None

    @classmethod
    def read(cls) -> CpuCounters:
        """The counters now."""
        times, own = psutil.cpu_times(), os.times()
        steal = float(getattr(times, "steal", 0.0))
        idle = times.idle + float(getattr(times, "iowait", 0.0))
        # Guests' time is part of user time.
        busy = sum(float(getattr(times, name, 0.0)) for name in ("user", "nice", "system", "irq", "softirq"))
        throttled = re.search(r"^throttled_usec (\d+)$", _read(_CGROUP / "cpu.stat"), re.MULTILINE)
        return cls(busy, idle, steal, sum(own[:4]), int(throttled[1]) / 1e6 if throttled else None)


def cpu_between(start: CpuCounters, end: CpuCounters, duration_s: float) -> dict[str, float | None]:
    """How the processor was used between two moments.

    Returns:
        own_cores: processors that this process and its ended children used on average; other_cores: that the rest of
        the machine used (in a container, of the host); steal_fraction: of all time, what other guests of the host
        took, in [0, 1]; throttled_s: for which a container's quota held its processes back.
    """
    busy, idle = max(end.busy_s - start.busy_s, 0.0), max(end.idle_s - start.idle_s, 0.0)
    steal, own = max(end.steal_s - start.steal_s, 0.0), max(end.own_s - start.own_s, 0.0)
    total = busy + idle + steal
    throttled = None
    if start.throttled_s is not None and end.throttled_s is not None:
        throttled = round(end.throttled_s - start.throttled_s, 3)
    return {
        "own_cores": round(own / duration_s, 3) if duration_s > 0 else None,
        # The counters tick in hundredths of a second, so that the difference may come out below nothing.
        "other_cores": round(max(busy - own, 0.0) / duration_s, 3) if duration_s > 0 else None,
        "steal_fraction": round(steal / total, 5) if total > 0 else None,
        "throttled_s": throttled,
    }


def cpu_now() -> dict[str, Any]:
    """What changes from moment to moment: load_average_1min, and frequency_mhz, the mean of some usable cores."""
    frequencies = [int(text) / 1000 for path in _frequency_files("scaling_cur_freq") if (text := _read(path)).isdigit()]
    if not frequencies:
        pattern = re.compile(r"^cpu MHz\s*:\s*([\d.]+)$", re.MULTILINE)
        frequencies = [float(match[1]) for match in pattern.finditer(_read(Path("/proc/cpuinfo")))]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "load_average_1min": None if load is None else round(load, 2),
        "frequency_mhz": round(sum(frequencies) / len(frequencies), 1) if frequencies else None,
    }


def _usable() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _frequency_files(name: str) -> Iterator[Path]:
    for core in _usable()[:_MAX_CORES_READ]:
        yield _SYSTEM / "cpu" / f"cpu{core}" / "cpufreq" / name


def _quota_cores() -> float | None:
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    return round(int(quota) / int(period), 3) if quota.isdigit() and period.isdigit() and int(period) else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
