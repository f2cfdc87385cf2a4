"""The conditions of a measurement: complete, and silent about whose machine it is."""

from __future__ import annotations

import getpass
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from bench.measure import environment
from bench.measure.environment import machine_environment, machine_slug, process_environment


def facts(model: str = "Some CPU", cores: int = 2, gpus: tuple[str, ...] = ()) -> dict[str, Any]:
    cpu = {"model": model, "usable_cores": cores}
    return {"architecture": "x86_64", "cpu": cpu, "gpus": [{"name": name} for name in gpus]}


@pytest.mark.parametrize(
    ("content", "start"),
    [
        (
            facts("AMD EPYC 9B14 96-Core Processor", 16, ("NVIDIA H100 80GB HBM3",)),
            "amd-epyc-9b14-16c-nvidia-h100-80gb",
        ),
        (facts("Intel(R) Xeon(R) CPU @ 2.20GHz", 4), "intel-xeon-4c-"),
        (facts("AMD Ryzen 7 5800X 8-Core Processor", 8, ("A", "A")), "amd-ryzen-7-5800x-8c-2x-a-"),
        (facts("Apple M2", 8), "apple-m2-8c-"),
        (facts("../../etc", 1), "etc-1c-"),
    ],
)
def test_a_slug_can_be_read_and_is_a_plain_folder_name(content: dict[str, Any], start: str) -> None:
    slug = machine_slug(content)
    assert slug.startswith(start)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug)


def test_machines_that_differ_have_slugs_that_differ() -> None:
    slugs = {machine_slug(item) for item in (facts(), facts(cores=3), facts(gpus=("A",)), facts(gpus=("A", "B")))}
    assert len(slugs) == 4
    assert machine_slug(facts()) == machine_slug(facts())


def test_it_is_complete_and_private() -> None:
    found = machine_environment()
    assert found["packages"]["torch"]
    assert found["packages"]["numpy"]
    assert found["memory_bytes"] > 2**28
    assert re.fullmatch(r"[0-9a-f]{40}", found["commit"] or "0" * 40)
    text = json.dumps(found | {"process": process_environment("cpu")})
    assert str(Path.home()) + "/" not in text
    assert str(environment.SOURCE_ROOT) not in text
    host, user = socket.gethostname(), getpass.getuser()
    assert len(host) < 4 or not re.search(rf"\b{re.escape(host)}\b", text)
    assert user == "root" or not re.search(rf"\b{re.escape(user)}\b", text)


def test_a_source_that_is_no_checkout_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "SOURCE_ROOT", tmp_path)
    found = machine_environment()
    assert found["commit"] is None
    assert found["dirty"] is None


def test_gpus_are_read_from_the_drivers_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_run", lambda *_, **__: "NVIDIA H100, 81559, 570.86\nOdd, [N/A], 570.86")
    assert environment._gpus() == [
        {"name": "NVIDIA H100", "memory_bytes": 81559 * 2**20, "driver": "570.86"},
        {"name": "Odd", "memory_bytes": None, "driver": "570.86"},
    ]


def test_the_process_tells_its_threads_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    found = process_environment("cpu")
    assert found["device"] == "cpu"
    assert found["threads"]["intra_op"] >= 1
    assert found["variables"]["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "cuda" not in found
