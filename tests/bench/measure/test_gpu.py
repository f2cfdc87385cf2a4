"""GPUs through a library of the test's own making: every answer, every refusal, and none at all."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from bench.measure.gpu import clock_reasons, gpu_facts, gpu_now, uuid_digest

UUID = "GPU-01234567-89ab-cdef-0123-456789abcdef"
PCI = "00000000:0a:00.0"


class FakeError(Exception):
    pass


class FakeNvml:
    """NVML with one H100; `refused`: names of queries that it does not support."""

    NVMLError = FakeError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, *refused: str, count: int = 1, bits: int = 0x4 | 0x20, mig: int = 0) -> None:
        self._answers: dict[str, Any] = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: count,
            "nvmlDeviceGetHandleByIndex": lambda index: f"handle {index}",
            "nvmlDeviceGetHandleByPciBusId": lambda pci: {PCI: "handle 0"}[pci],
            "nvmlDeviceGetName": lambda handle: "NVIDIA H100 80GB HBM3",
            "nvmlDeviceGetUUID": lambda handle: UUID,
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=85520809984),
            "nvmlDeviceGetEnforcedPowerLimit": lambda handle: 700000,
            "nvmlDeviceGetMigMode": lambda handle: [mig, mig],
            "nvmlDeviceGetMaxClockInfo": lambda handle, kind: {1: 1980, 2: 2619}[kind],
            "nvmlDeviceGetClockInfo": lambda handle, kind: {1: 1755, 2: 2619}[kind],
            "nvmlDeviceGetTemperature": lambda handle, sensor: 61,
            "nvmlDeviceGetPowerUsage": lambda handle: 312345,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: bits,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: bits,
            "nvmlSystemGetDriverVersion": lambda: b"570.86.15",
            "nvmlSystemGetCudaDriverVersion": lambda: 12080,
        }
        self._refused = refused

    def __getattr__(self, name: str) -> Any:
        if name not in self._answers:
            raise AttributeError(name)
        answer = self._answers[name]

        def ask(*arguments: Any) -> Any:
            if name in self._refused:
                raise FakeError("Not Supported")
            return answer(*arguments)

        return ask


def use(monkeypatch: pytest.MonkeyPatch, nvml: Any) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


def test_a_device_is_described_without_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeNvml())
    found, reason = gpu_facts()
    assert reason is None
    assert found == [
        {
            "name": "NVIDIA H100 80GB HBM3",
            "uuid_sha256": uuid_digest(UUID),
            "memory_bytes": 85520809984,
            "driver": "570.86.15",
            "cuda_driver": "12.8",
            "power_limit_w": 700.0,
            "max_sm_clock_mhz": 1980,
            "max_memory_clock_mhz": 2619,
            "mig": False,
        }
    ]
    assert not any(part in json.dumps(found) for part in UUID.split("-")[1:])


def test_a_uuid_becomes_twelve_digits_that_differ_for_others() -> None:
    assert len(uuid_digest(UUID)) == 12
    assert uuid_digest(UUID) == uuid_digest(UUID)
    assert uuid_digest(UUID) != uuid_digest(UUID.replace("0", "1"))


def test_the_moment_has_clocks_and_reasons_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeNvml())
    assert gpu_now(PCI) == {
        "sm_clock_mhz": 1755,
        "memory_clock_mhz": 2619,
        "temperature_c": 61,
        "power_w": 312.345,
        "clock_reasons": ["sw_power_cap", "sw_thermal_slowdown"],
    }


@pytest.mark.parametrize(
    ("bits", "names"),
    [
        (0, []),
        (1, ["gpu_idle"]),
        (0x8 | 0x40, ["hw_slowdown", "hw_thermal_slowdown"]),
        (0x80 | 1 << 20, ["hw_power_brake_slowdown", "bit 0x100000"]),
    ],
)
def test_bits_are_decoded(bits: int, names: list[str]) -> None:
    assert clock_reasons(bits) == names


def test_the_bits_are_those_of_the_package() -> None:
    nvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    for place in range(9):
        (name,) = clock_reasons(1 << place)
        camel = "".join(part.capitalize() for part in name.split("_"))
        assert getattr(nvml, f"nvmlClocksEventReason{camel}") == 1 << place
    for name in FakeNvml()._answers:
        assert callable(getattr(nvml, name))


def test_a_device_cut_into_instances_says_so_and_what_it_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeNvml("nvmlDeviceGetClockInfo", "nvmlDeviceGetPowerUsage", mig=1))
    assert gpu_facts()[0][0]["mig"] is True
    found = gpu_now(PCI)
    assert found["sm_clock_mhz"] is None
    assert found["power_w"] is None
    assert found["temperature_c"] == 61
    assert found["unavailable"] == dict.fromkeys(("power_w", "sm_clock_mhz", "memory_clock_mhz"), "Not Supported")


@pytest.mark.parametrize("name", [name for name in FakeNvml()._answers if name.startswith("nvmlDevice")])
def test_no_refusal_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    use(monkeypatch, FakeNvml(name))
    found, reason = gpu_facts()
    assert found or reason == "Not Supported"
    assert isinstance(gpu_now(PCI), dict)


def test_an_older_driver_has_the_reasons_under_their_older_name(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeNvml("nvmlDeviceGetCurrentClocksEventReasons"))
    found = gpu_now(PCI)
    assert found["clock_reasons"] == ["sw_power_cap", "sw_thermal_slowdown"]
    assert "unavailable" not in found


@pytest.mark.parametrize(
    ("nvml", "reason"),
    [
        (None, "the package nvidia-ml-py is not installed"),
        (FakeNvml("nvmlInit"), "NVML: Not Supported"),
        (FakeNvml(count=0), "the driver lists none"),
        (FakeNvml("nvmlDeviceGetCount"), "Not Supported"),
    ],
)
def test_no_gpu_is_an_empty_list_with_a_reason(monkeypatch: pytest.MonkeyPatch, nvml: Any, reason: str) -> None:
    use(monkeypatch, nvml)  # None makes the import fail
    assert gpu_facts() == ([], reason)


def test_a_moment_without_the_library_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, None)
    assert gpu_now(PCI) == {"unavailable": {"device": "the package nvidia-ml-py is not installed"}}
