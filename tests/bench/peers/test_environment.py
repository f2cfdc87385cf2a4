"""A peer's process is described as ours is, so that the two can be set side by side."""

from __future__ import annotations

import pytest
import torch

from bench.measure.environment import RECORDED_VARIABLES, environment_id, process_environment
from bench.peers.environment import VARIABLES, process_facts

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_facts_in_the_same_shape_as_ours(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    found, ours = process_facts(device), process_environment(device)
    assert {name: found[name] for name in ours} == ours
    assert found.keys() - ours.keys() == {"python", "packages"}
    assert VARIABLES == RECORDED_VARIABLES


def test_flags_of_the_process_are_those_it_has_now(monkeypatch: pytest.MonkeyPatch) -> None:
    before = process_facts("cpu")
    monkeypatch.setattr("torch.get_float32_matmul_precision", lambda: "high")
    after = process_facts("cpu")
    assert after["flags"] == before["flags"] | {"float32_matmul_precision": "high"}
    assert environment_id({"process": after}) != environment_id({"process": before})


def test_what_an_older_torch_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.get_float32_matmul_precision")
    monkeypatch.delattr("torch.backends.cpu.get_cpu_capability")
    flags = process_facts("cpu")["flags"]
    assert (flags["float32_matmul_precision"], flags["cpu_capability"]) == (None, None)
