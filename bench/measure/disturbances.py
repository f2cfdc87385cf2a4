"""What disturbed a timed sample: other work on its cores (contended), or a clock or a quota held down (throttled).

Everything is read right before and right after a sample, never within it. Sources, all of Linux:

- `/proc/self/task/*/schedstat`: how long each thread was ready to run and waited for a core. Of all threads the one
  that waited longest counts: what the sample lost is at least that.
- `/proc/stat`: time that the hypervisor took from the usable cores, on average over them.
- `cpu.stat` of the control group: time that its CPU quota held it back; and the processor's own count of times at
  which it slowed down because of heat, where it has one.
- for a GPU, a function that names the reasons which hold its clocks down now.

Memory bandwidth, shared caches and other processes on a GPU are not seen. Where nothing tells, a mark is None with the
reason, never False. Loads the standard library alone, and is read by its path from other checkouts (`bench.race_side`).

A marked sample stays in the data and counts in every statistic: leaving out what was disturbed would favour short
images, which are disturbed less often. How many are marked is said beside the numbers, and `bench.compare` judges no
time of two sides that were disturbed unlike (`UNLIKE_SHARES` there).
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# Of a sample's time; a sample that lost less would be told from an undisturbed one by no gate.
DISTURBED_SHARE = 0.05
MARKS = ("contended", "throttled")
_FRESH_S = 2e-4  # a look at the counters takes a quarter of it

# Reasons for a GPU's clock, as NVML names them, that hold no running kernel back: nothing runs, or somebody chose it.
_HARMLESS = ("gpu_idle", "applications_clocks_setting", "display_clock_setting", "sync_boost")

# The reasons which hold a GPU's clocks down now; empty if none does, None where it cannot be told.
Throttle = Callable[[], Sequence[str] | None]


@dataclass(frozen=True)
class Probe:
    """Counters that only rise; None where the system does not tell.

    waited_s: thread id -> seconds ready to run without a core. stolen_s: taken by the hypervisor, mean over the usable
    cores. held_back_s: by the control group's quota. heat_events: of the processor.
    """

    waited_s: dict[int, float] | None = None
    stolen_s: float | None = None
    held_back_s: float | None = None
    heat_events: int | None = None


@dataclass(frozen=True)
class Disturbance:
    """Of one sample; None where it cannot be told."""

    contended: bool | None
    throttled: bool | None


class Watch:
    """Marks samples that were disturbed: `before()` and `after()` around each, then `marks()`.

    Args:
        device: torch device that the samples are taken on.
        throttle: for a GPU, see `Throttle`.
        probe: reads the counters.
        clock: in seconds.
    """

    def __init__(
        self,
        device: str,
        *,
        throttle: Throttle | None = None,
        probe: Callable[[], Probe] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._on_cpu = device.partition(":")[0] == "cpu"
        self._throttle = None if self._on_cpu else throttle
        self._probe = probe or read_probe
        self._clock = clock
        self._looked_at_s = -math.inf
        self._last = Probe()
        self._last_reasons: Sequence[str] | None = None
        self._found: list[Disturbance] = []

    def before(self) -> None:
        """A sample is about to begin. Right after another one, what was seen at its end will do."""
        if self._clock() - self._looked_at_s > _FRESH_S:
            self._look()

    def after(self, elapsed_s: float) -> Disturbance:
        """The sample has ended and took `elapsed_s`."""
        start, reasons = self._last, self._last_reasons
        self._look()
        end = self._last
        limit = DISTURBED_SHARE * elapsed_s
        contended = _any(_waited(start, end, limit), _rose(start.stolen_s, end.stolen_s, limit))
        if self._on_cpu:
            held_back = _rose(start.held_back_s, end.held_back_s, limit)
            throttled = _any(held_back, _rose(start.heat_events, end.heat_events, 0))
        else:
            known = reasons is not None and self._last_reasons is not None
            throttled = bool(reasons) or bool(self._last_reasons) if known else None
        self._found.append(Disturbance(contended, throttled))
        return self._found[-1]

    def _look(self) -> None:
        self._last_reasons = None if self._throttle is None else self._throttle()
        self._last = self._probe()
        self._looked_at_s = self._clock()

    def marks(self) -> dict[str, dict[str, Any]]:
        """'contended' and 'throttled' -> 'samples', the numbers of the marked ones from 0, or None and a 'reason'."""
        return mark_samples(self._found, on_cpu=self._on_cpu)


def held_back(clock_reasons: Sequence[str] | None) -> list[str] | None:
    """Of the names of NVML's clock reasons, those that slow a running kernel; for `Throttle`."""
    return None if clock_reasons is None else [name for name in clock_reasons if name not in _HARMLESS]


def mark_samples(found: Sequence[Disturbance], *, on_cpu: bool) -> dict[str, dict[str, Any]]:
    """See `Watch.marks`."""
    reasons = {
        "contended": "this system does not tell how long a thread waits for a core",
        "throttled": "neither a CPU quota nor the processor's heat is told by this system"
        if on_cpu
        else "nothing tells whether the GPU's clocks are held down",
    }
    marks: dict[str, dict[str, Any]] = {}
    for name in MARKS:
        values = [getattr(one, name) for one in found]
        if None in values:
            marks[name] = {"samples": None, "reason": reasons[name]}
        else:
            marks[name] = {"samples": [number for number, value in enumerate(values) if value], "reason": None}
    return marks


def read_probe() -> Probe:
    """The counters of this process as they stand."""
    if sys.platform != "linux":
        return Probe()
    return Probe(_read_waits(), _read_stolen(), _read_held_back(), _read_heat())


def _any(*parts: bool | None) -> bool | None:
    """True if one is, None if nothing is known."""
    known = [part for part in parts if part is not None]
    return any(known) if known else None


def _waited(start: Probe, end: Probe, limit_s: float) -> bool | None:
    if start.waited_s is None or end.waited_s is None:
        return None
    # A thread that began meanwhile has waited since then only; one that ended can no longer be asked.
    return max((waited - start.waited_s.get(thread, 0.0) for thread, waited in end.waited_s.items())) > limit_s


def _rose(start: float | None, end: float | None, limit: float) -> bool | None:
    return None if start is None or end is None else end - start > limit


def _read_waits() -> dict[int, float] | None:
    waits: dict[int, float] = {}
    ran = 0
    try:
        for entry in os.scandir("/proc/self/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                with open(f"{entry.path}/schedstat", "rb", buffering=0) as file:  # noqa: PTH123 - a third of the time
                    run_ns, wait_ns, _ = file.read().split()
                waits[int(entry.name)] = int(wait_ns) / 1e9
                ran += int(run_ns)
    except (OSError, ValueError):
        return None
    return waits if ran else None  # a kernel that does not count says 0


def _read_stolen() -> float | None:
    usable = os.sched_getaffinity(0)
    ticks = []
    try:
        with Path("/proc/stat").open("rb") as file:
            for line in file:
                name, *fields = line.split()
                if not name.startswith(b"cpu"):
                    break
                if name[3:].isdigit() and int(name[3:]) in usable:
                    ticks.append(int(fields[7]))
    except (OSError, ValueError, IndexError):
        return None
    return sum(ticks) / len(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None


@cache
def _quota_file() -> Path | None:
    """The `cpu.stat` of our control group, or of the container's root."""
    folders = [Path("/sys/fs/cgroup")]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            if line.startswith("0::"):
                folders.insert(0, folders[-1] / line[3:].lstrip("/"))
    return next((folder / "cpu.stat" for folder in folders if (folder / "cpu.stat").is_file()), None)


def _read_held_back() -> float | None:
    path = _quota_file()
    if path is None:
        return None
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_bytes().splitlines():
            if line.startswith(b"throttled_usec "):
                return int(line.split()[1]) / 1e6
    return None  # no quota is set


@cache
def _heat_file() -> Path | None:
    """The count of the first usable core's processor."""
    core = min(os.sched_getaffinity(0))
    path = Path(f"/sys/devices/system/cpu/cpu{core}/thermal_throttle/package_throttle_count")
    return path if path.is_file() else None


def _read_heat() -> int | None:
    path = _heat_file()
    with contextlib.suppress(OSError, ValueError):
        return None if path is None else int(path.read_bytes())
    return None
