"""Graphics processors as their driver's library (NVML) describes them: what they are, and their state at a moment.

Needs no torch and starts no CUDA. A query that a device does not support is None, with the driver's words beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

# Bits of the reasons for which clocks are not what they could be (nvml.h, nvmlClocksEventReason*). `gpu_idle` means
# that nothing runs, and the application's and display's settings are wishes; the others hold a running kernel back.
CLOCK_REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}


def clock_reasons(bits: int) -> list[str]:
    """Names of the reasons that are set, lowest bit first; 'bit 0x800' for one that has no name here."""
    found = [1 << place for place in range(bits.bit_length()) if bits >> place & 1]
    return [CLOCK_REASONS.get(bit, f"bit {bit:#x}") for bit in found]


def uuid_digest(uuid: str) -> str:
    """12 hex digits that stand for a device: two records can say that it was the same one, and nothing else."""
    return hashlib.sha256(f"diffinst-bench gpu {uuid}".encode()).hexdigest()[:12]


def gpu_facts() -> tuple[list[dict[str, Any]], str | None]:
    """All GPUs of the machine, and why there are none.

    Returns:
        For each: name, uuid_sha256 (see `uuid_digest`), memory_bytes, driver, cuda_driver, power_limit_w,
        max_sm_clock_mhz, max_memory_clock_mhz, mig (whether it is cut into instances), and `unavailable`: what the
        driver did not tell -> its words, where there is such.
    """
    nvml, reason = _start()
    if nvml is None:
        return [], reason
    missing: dict[str, str] = {}
    count = _ask(nvml, missing, "count", nvml.nvmlDeviceGetCount)
    if not count:
        return [], missing.get("count", "the driver lists none")
    return [_describe(nvml, index) for index in range(count)], None


def gpu_now(pci: str) -> dict[str, Any]:
    """The state of one GPU at this moment.

    Args:
        pci: its address '0000:0A:00.0'; with MIG that of the whole device, whose clocks its instances share.
    Returns:
        sm_clock_mhz, memory_clock_mhz, temperature_c, power_w, clock_reasons (names, see `CLOCK_REASONS`), and
        `unavailable` as in `gpu_facts`; only `unavailable` where the device cannot be asked at all.
    """
    nvml, reason = _start()
    if nvml is None:
        return {"unavailable": {"device": reason}}
    missing: dict[str, str] = {}
    handle = _ask(nvml, missing, "device", lambda: nvml.nvmlDeviceGetHandleByPciBusId(pci))
    if handle is None:
        return {"unavailable": missing}

    def ask(name: str, query: Callable[..., Any], *arguments: Any) -> Any:
        return _ask(nvml, missing, name, lambda: query(handle, *arguments))

    power_mw = ask("power_w", nvml.nvmlDeviceGetPowerUsage)
    bits = ask("clock_reasons", nvml.nvmlDeviceGetCurrentClocksEventReasons)
    if bits is None:  # a driver from before they were renamed
        bits = ask("clock_reasons", nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        if bits is not None:
            del missing["clock_reasons"]
    found = {
        "sm_clock_mhz": ask("sm_clock_mhz", nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": ask("memory_clock_mhz", nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
        "temperature_c": ask("temperature_c", nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        "power_w": None if power_mw is None else power_mw / 1000,
        "clock_reasons": None if bits is None else clock_reasons(bits),
    }
    return found | ({"unavailable": missing} if missing else {})


def _describe(nvml: Any, index: int) -> dict[str, Any]:
    missing: dict[str, str] = {}

    def ask(name: str, query: Callable[..., Any], *arguments: Any) -> Any:
        return None if handle is None else _ask(nvml, missing, name, lambda: query(handle, *arguments))

    handle = _ask(nvml, missing, "device", lambda: nvml.nvmlDeviceGetHandleByIndex(index))
    uuid = ask("uuid_sha256", nvml.nvmlDeviceGetUUID)
    memory = ask("memory_bytes", nvml.nvmlDeviceGetMemoryInfo)
    power_mw = ask("power_limit_w", nvml.nvmlDeviceGetEnforcedPowerLimit)
    cuda = _ask(nvml, missing, "cuda_driver", nvml.nvmlSystemGetCudaDriverVersion)
    mig = ask("mig", nvml.nvmlDeviceGetMigMode)
    found = {
        "name": _text(ask("name", nvml.nvmlDeviceGetName)) or "unknown",
        "uuid_sha256": None if uuid is None else uuid_digest(str(_text(uuid))),
        "memory_bytes": None if memory is None else memory.total,
        "driver": _text(_ask(nvml, missing, "driver", nvml.nvmlSystemGetDriverVersion)),
        "cuda_driver": None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
        "power_limit_w": None if power_mw is None else power_mw / 1000,
        "max_sm_clock_mhz": ask("max_sm_clock_mhz", nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
        "max_memory_clock_mhz": ask("max_memory_clock_mhz", nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_MEM),
        # (now, after a restart); devices that cannot be cut do not support the question.
        "mig": None if mig is None else mig[0] == 1,
    }
    return found | ({"unavailable": missing} if missing else {})


def _start() -> tuple[Any, str | None]:
    """The library, ready to be asked, or why there is none. Starting it again costs nothing: NVML counts."""
    try:
        import pynvml
    except ImportError:
        return None, "the package nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, f"NVML: {error}"
    return pynvml, None


def _ask(nvml: Any, missing: dict[str, str], name: str, query: Callable[[], Any]) -> Any:
    try:
        return query()
    except nvml.NVMLError as error:
        missing[name] = str(error)
        return None


def _text(value: Any) -> str | None:
    """Older versions of the package give bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
