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
from bench.measure.environment import environment_id, machine_environment, machine_slug, process_environment
from bench.measure.packages import lock_digest, packages_lock
from bench.measure.source import Source, source_state


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


def test_a_source_that_is_no_checkout_has_no_commit(tmp_path: Path) -> None:
    found = machine_environment(source_state(tmp_path))
    assert found["commit"] is None
    assert found["dirty"] is None
    assert "diff" not in found


def test_a_dirty_source_names_its_patch() -> None:
    found = machine_environment(Source("0" * 40, dirty=True, patch=b"--- a\n"))
    assert found["diff"]["bytes"] == 6
    assert re.fullmatch(r"[0-9a-f]{64}", found["diff"]["sha256"])


def test_gpus_or_why_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpu_facts", lambda: ([{"name": "NVIDIA H100"}], None))
    found = machine_environment()
    assert found["gpus"] == [{"name": "NVIDIA H100"}]
    assert "nvidia-h100" in found["machine"]
    assert "gpus_reason" not in found
    monkeypatch.setattr(environment, "gpu_facts", lambda: ([], "no such library"))
    assert machine_environment()["gpus_reason"] == "no such library"


def test_the_lock_is_named_by_its_digest() -> None:
    lock = machine_environment()["packages_lock"]
    assert lock["sha256"] == lock_digest(packages_lock())
    assert lock["distributions"] == packages_lock().count("\n") > 20


def full() -> dict[str, Any]:
    """An environment of every field that is read."""
    gpu = {"name": "H100", "memory_bytes": 1, "driver": "570", "cuda_driver": "12.8", "power_limit_w": 700.0}
    return {
        "machine": "some-cpu",
        "commit": "0" * 40,
        "dirty": True,
        "diff": {"sha256": "1", "bytes": 1},
        "packages": {"torch": "2"},
        "packages_lock": {"sha256": "2", "distributions": 90, "file": "provenance/2.lock.txt"},
        "python": "CPython 3.11",
        "os": "Linux 6",
        "architecture": "x86_64",
        "cpu": {"model": "Some CPU", "usable_cores": 2, "governor": "powersave", "max_frequency_mhz": 3000.0},
        "memory_bytes": 4,
        "gpus": [{**gpu, "uuid_sha256": "aa", "mig": False}],
        "process": {
            "device": "cuda",
            "device_name": "H100",
            "torch": "2",
            "cudnn": 90100,
            "cuda": "12.8",
            "threads": {"intra_op": 2},
            "flags": {"cudnn_tf32": True},
            "variables": {"OMP_NUM_THREADS": "2"},
        },
        "conditions": {"train": {"start": {"load_average_1min": 1.0}}},
    }


def changed(path: str, value: Any) -> dict[str, Any]:
    content = full()
    *folders, name = path.split(".")
    part: Any = content
    for folder in folders:
        part = part[int(folder) if folder.isdigit() else folder]
    part[name] = value
    return content


@pytest.mark.parametrize(
    "path",
    [
        "packages_lock.sha256",
        "python",
        "os",
        "cpu.model",
        "cpu.usable_cores",
        "cpu.governor",
        "gpus.0.name",
        "gpus.0.driver",
        "gpus.0.power_limit_w",
        "process.device",
        "process.torch",
        "process.cudnn",
        "process.threads.intra_op",
        "process.flags.cudnn_tf32",
        "process.variables.OMP_NUM_THREADS",
    ],
)
def test_what_can_change_a_number_or_a_time_changes_the_id(path: str) -> None:
    assert environment_id(changed(path, "another")) != environment_id(full())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("commit", "1" * 40),
        ("dirty", False),
        ("diff", None),
        ("packages_lock.file", None),
        ("gpus.0.uuid_sha256", "bb"),
        ("conditions", {}),
        ("conditions.train.start.load_average_1min", 9.0),
    ],
)
def test_what_cannot_does_not(path: str, value: Any) -> None:
    assert environment_id(changed(path, value)) == environment_id(full())


def test_the_id_survives_the_record_and_is_there_for_older_ones() -> None:
    found = environment_id(full())
    assert re.fullmatch(r"[0-9a-f]{16}", found)
    assert environment_id(json.loads(json.dumps(full()))) == found
    assert environment_id(dict(reversed(list(full().items())))) == found
    assert environment_id({}) != found  # of version 1, without most of it


def test_the_process_tells_its_threads_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    found = process_environment("cpu")
    assert found["device"] == "cpu"
    assert found["threads"]["intra_op"] >= 1
    assert found["variables"]["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "cuda" not in found


def test_facts_of_a_process_fit_into_one_event() -> None:
    # `bench.server` sends them in one write that no other can come between (4000 bytes).
    assert len(json.dumps(process_environment("cpu"))) < 2000
