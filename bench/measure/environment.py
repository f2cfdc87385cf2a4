"""The conditions of a measurement: source, packages, machine, threads and flags. No host names, user names or paths.

`machine_environment` loads no torch, so that the parent process can call it; `process_environment` describes the
process that measures, from within it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import psutil

SOURCE_ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = "diffinst-bench"

# Set for child processes unless the user has set it: keeps numpy from starting threads at import, as a process that
# forks must have one only. OMP_WAIT_POLICY=PASSIVE and THP_MEM_ALLOC_ENABLE=1, which help large operators on a busy
# CPU, are left to the user (and recorded): for these suites' models, on 2 idle cores, they make a training step 1.1 to
# 1.8 times and a detection 1.8 to 3.3 times slower.
WORKER_VARIABLES = {"OPENBLAS_NUM_THREADS": "1"}

# Variables that change numbers or times and hold no path.
RECORDED_VARIABLES = (
    *WORKER_VARIABLES,
    "OMP_WAIT_POLICY",
    "THP_MEM_ALLOC_ENABLE",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def machine_environment() -> dict[str, Any]:
    """Facts that hold for every process of this machine and installation.

    Returns:
        machine (a readable slug, the records' folder), commit and dirty (None where the source is no git checkout),
        packages {name: version}, python, os, architecture, cpu, memory_bytes, gpus.
    """
    commit, dirty = _source_state()
    facts = {
        "commit": commit,
        "dirty": dirty,
        "packages": _packages(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "os": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu": {
            "model": _cpu_model(),
            "physical_cores": psutil.cpu_count(logical=False),
            "logical_cores": psutil.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count(),
        },
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
    }
    return {"machine": machine_slug(facts), **facts}


def machine_slug(facts: dict[str, Any]) -> str:
    """'amd-epyc-9b14-16c-nvidia-h100-80gb-hbm3-1f0c3a': CPU, usable cores, GPUs, and a hash with the architecture.

    Args:
        facts: `architecture`, `cpu` and `gpus` as in `machine_environment`. The same for machines of the same build.
    """
    cpu, gpus = facts["cpu"], [gpu["name"] for gpu in facts["gpus"]]
    identity = repr((facts["architecture"], cpu["model"], cpu["usable_cores"], gpus))
    digest = hashlib.sha256(identity.encode()).hexdigest()[:6]
    noise = r"\((?:r|tm)\)|@.*|\b(?:cpu|processor|\d+-core|with .*)(?=\s|$)"
    words = [re.sub(noise, " ", cpu["model"].lower()), f"{cpu['usable_cores']}c"]
    if gpus:
        words.append(f"{len(gpus)}x-{gpus[0]}" if len(gpus) > 1 else gpus[0])
    slug = re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")
    return f"{slug[:72].strip('-')}-{digest}"


def process_environment(device: str = "cpu") -> dict[str, Any]:
    """Facts of this process: torch, threads, determinism flags, device and variables. Loads torch; may start CUDA.

    Args:
        device: torch device that the process computes on.
    """
    import torch

    threads = {"intra_op": torch.get_num_threads(), "inter_op": torch.get_num_interop_threads()}
    flags = {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    facts: dict[str, Any] = {"device": device, "torch": torch.__version__, "threads": threads, "flags": flags}
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        flags |= {
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
            "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
        }
        facts |= {
            "device_name": properties.name,
            "device_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    facts["variables"] = {name: os.environ[name] for name in RECORDED_VARIABLES if name in os.environ}
    return facts


def _run(*command: str, timeout_s: float = 20) -> str | None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=True,
            stdin=subprocess.DEVNULL,
            # Looking must not write: `git status` would otherwise refresh the index under somebody's feet.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _source_state() -> tuple[str | None, bool | None]:
    git = ("git", "-C", str(SOURCE_ROOT))
    top = _run(*git, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != SOURCE_ROOT:
        return None, None  # installed from a wheel, or inside somebody else's repository
    commit = _run(*git, "rev-parse", "HEAD")
    # Results are being written while we look; only what can change a number counts.
    changes = _run(*git, "status", "--porcelain", "--", "diffinst", "bench", "suites", "pyproject.toml")
    return commit, None if changes is None else bool(changes)


def _installed() -> dict[str, importlib.metadata.Distribution]:
    return {_canonical(found.name): found for found in importlib.metadata.distributions() if found.name}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def _packages() -> dict[str, str]:
    """Installed packages that ours needs, directly or not, with their versions."""
    installed = _installed()
    found: dict[str, str] = {}
    waiting = [DISTRIBUTION]
    while waiting:
        name = _canonical(waiting.pop())
        distribution = installed.get(name)
        if distribution is None or name in found:
            continue
        found[name] = distribution.version
        for requirement in distribution.requires or []:
            match = re.match(r"[A-Za-z0-9._-]+", requirement)
            # Extras of others say nothing about us; our own count where they are installed.
            if match and ("extra ==" not in requirement or name == DISTRIBUTION):
                waiting.append(match[0])
    return dict(sorted(found.items()))


def _cpu_model() -> str:
    if sys.platform == "linux":
        try:
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = ""
        match = re.search(r"^(?:model name|Model|Hardware|cpu model)\s*:\s*(.+)$", text, re.MULTILINE)
        if match:
            return " ".join(match[1].split())
    if sys.platform == "darwin":
        return _run("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    text = _run("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
    gpus = []
    for line in (text or "").splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3:
            memory = int(parts[1]) * 2**20 if parts[1].isdigit() else None
            gpus.append({"name": parts[0], "memory_bytes": memory, "driver": parts[2]})
    return gpus
