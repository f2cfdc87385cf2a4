"""What one side of a race marks on a GPU; the device and its driver's library are stood in for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import race_side

PCI = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x0A, pci_device_id=0)


@pytest.mark.parametrize(
    ("facts", "throttled"),
    [
        ({"clock_reasons": ["gpu_idle", "hw_thermal_slowdown"]}, True),
        ({"clock_reasons": ["gpu_idle"]}, False),
        ({"unavailable": {"device": "no NVML"}}, None),
    ],
)
def test_a_race_tells_whether_the_gpu_was_held_back(
    facts: dict[str, Any], throttled: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def gpu_now(pci: str) -> dict[str, Any]:
        asked.append(pci)
        return facts

    load = race_side.our_module
    modules = {"gpu": SimpleNamespace(gpu_now=gpu_now)}
    monkeypatch.setattr(race_side, "our_module", lambda name: modules.get(name) or load(name))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: PCI)
    watch = race_side.watch_of("cuda:0")
    watch.before()
    assert watch.after(1.0).throttled is throttled
    assert set(asked) == {"00000000:0a:00.0"}


def test_on_a_cpu_no_gpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: pytest.fail("asked"))
    watch = race_side.watch_of("cpu")
    watch.before()
    watch.after(1.0)
