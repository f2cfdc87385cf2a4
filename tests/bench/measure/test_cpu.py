"""The processor: what it is, and how busy it was between two moments."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.measure import cpu
from bench.measure.cpu import CpuCounters, cpu_between, cpu_facts, cpu_now


def counters(busy: float, idle: float, steal: float, own: float, throttled: float | None = None) -> CpuCounters:
    return CpuCounters(busy, idle, steal, own, throttled)


def test_use_between_two_moments_by_hand() -> None:
    # 4 cores for 10 s: 12 s of work, 8 of them ours, 26 idle, 2 stolen.
    found = cpu_between(counters(100, 500, 7, 3, 1.0), counters(112, 526, 9, 11, 1.25), 10.0)
    assert found == {"own_cores": 0.8, "other_cores": 0.4, "steal_fraction": 0.05, "throttled_s": 0.25}


def test_counters_that_do_not_move_or_go_back_give_no_nonsense() -> None:
    one = counters(1, 1, 0, 1)
    assert cpu_between(one, one, 0.0) == {
        "own_cores": None,
        "other_cores": None,
        "steal_fraction": None,
        "throttled_s": None,
    }
    # Ticks of 10 ms: our time was counted, the machine's not yet; and a clock that a guest's host set back.
    assert cpu_between(one, counters(0.9, 2, 0, 1.1), 1.0)["other_cores"] == 0.0


def test_our_own_work_is_counted() -> None:
    start = CpuCounters.read()
    while CpuCounters.read().own_s < start.own_s + 0.05:
        sum(range(1000))
    assert CpuCounters.read().busy_s >= start.busy_s


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for core, (now, top) in enumerate([(2_000_000, 3_500_000), (3_000_000, 3_000_000)]):
        folder = tmp_path / "cpu" / f"cpu{core}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_cur_freq").write_text(f"{now}\n")
        (folder / "cpuinfo_max_freq").write_text(f"{top}\n")
        (folder / "scaling_governor").write_text("powersave\n")
    (tmp_path / "cpu" / "smt").mkdir()
    (tmp_path / "cpu" / "smt" / "active").write_text("1\n")
    for node in range(2):
        (tmp_path / "node" / f"node{node}").mkdir(parents=True)
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "cpu.stat").write_text("usage_usec 5\nthrottled_usec 2500000\n")
    monkeypatch.setattr(cpu, "_SYSTEM", tmp_path)
    monkeypatch.setattr(cpu, "_CGROUP", tmp_path)
    monkeypatch.setattr(cpu, "_usable", lambda: [0, 1])
    return tmp_path


def test_facts_are_read_from_the_kernel(machine: Path) -> None:
    found = cpu_facts()
    assert found["governor"] == "powersave"
    assert found["max_frequency_mhz"] == 3500.0
    assert found["hyper_threading"] is True
    assert found["numa_nodes"] == 2
    assert found["quota_cores"] == 1.5
    assert found["usable_cores"] == 2
    assert cpu_now()["frequency_mhz"] == 2500.0
    assert CpuCounters.read().throttled_s == 2.5


def test_what_the_system_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu, "_SYSTEM", tmp_path)
    monkeypatch.setattr(cpu, "_CGROUP", tmp_path)
    found = cpu_facts()
    names = ("governor", "max_frequency_mhz", "hyper_threading", "numa_nodes", "quota_cores")
    assert [found[name] for name in names] == [None] * 5
    assert CpuCounters.read().throttled_s is None
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_facts()["quota_cores"] is None
