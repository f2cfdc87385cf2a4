"""What is read of the machine around a node and a sample; a GPU is told by its address."""

from __future__ import annotations

from typing import Any

import pytest

from bench.measure import moments
from bench.measure.moments import Moment, conditions_between, throttle_of


def test_a_moment_of_a_cpu_knows_no_gpu() -> None:
    conditions = conditions_between(Moment.now("cpu"), Moment.now("cpu"))
    assert set(conditions) == {"start", "end", "between"}
    assert "gpu" not in conditions["start"]
    assert conditions["between"]["seconds"] >= 0


def test_only_a_gpu_has_clocks_that_are_asked_for() -> None:
    assert throttle_of("cpu") is None


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"clock_reasons": ["gpu_idle", "sw_power_cap"]}, ["sw_power_cap"]),
        ({"clock_reasons": ["gpu_idle"]}, []),
        ({"unavailable": {"device": "no driver"}}, None),
    ],
)
def test_the_reasons_that_hold_a_kernel_back(
    monkeypatch: pytest.MonkeyPatch, state: dict[str, Any], expected: list[str] | None
) -> None:
    asked = []
    monkeypatch.setattr(moments, "_pci_address", lambda device: f"address of {device}")
    monkeypatch.setattr(moments, "gpu_now", lambda pci: asked.append(pci) or state)
    throttle = throttle_of("cuda:1")
    assert throttle is not None
    assert throttle() == expected
    assert asked == ["address of cuda:1"]
