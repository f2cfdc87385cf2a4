"""The conditions of a measurement: source, packages, machine, threads and flags. No host names, user names or paths.

`machine_environment` loads no torch, so that the parent process can call it; `process_environment` describes the
process that measures, from within it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from typing import Any

import psutil

from bench.measure.cpu import cpu_facts
from bench.measure.gpu import gpu_facts
from bench.measure.packages import lock_digest, needed_packages, packages_lock
from bench.measure.source import SOURCE_ROOT, Source, source_state

__all__ = ["SOURCE_ROOT", "environment_id", "machine_environment", "machine_slug", "process_environment"]

# Set for child processes unless the user has set it: keeps numpy from starting threads at import, as a process that
# forks must have one only. OMP_WAIT_POLICY=PASSIVE and THP_MEM_ALLOC_ENABLE=1, which help large operators on a busy
# CPU, are left to the user (and recorded): for these suites' models, on 2 idle cores, they make a training step 1.1 to
# 1.8 times and a detection 1.8 to 3.3 times slower.
WORKER_VARIABLES = {"OPENBLAS_NUM_THREADS": "1"}

# Variables that change numbers or times and hold no path; `bench.peers.environment` has the same.
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


def machine_environment(source: Source | None = None) -> dict[str, Any]:
    """Facts that hold for every process of this machine and installation.

    Args:
        source: what `source_state` found, if it was asked already.
    Returns:
        machine (a readable slug, the records' folder), commit and dirty (None where the source is no git checkout),
        diff where it is dirty (see `Source.facts`), packages {name: version}, packages_lock (of all that is installed:
        sha256, distributions), python, os, architecture, cpu, memory_bytes, gpus, and gpus_reason where there are none.
    """
    lock = packages_lock()
    gpus, reason = gpu_facts()
    facts = {
        **(source or source_state()).facts(),
        "packages": needed_packages(),
        "packages_lock": {"sha256": lock_digest(lock), "distributions": len(lock.splitlines())},
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "os": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu": cpu_facts(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        **({"gpus_reason": reason} if reason else {}),
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

    from bench.measure.determinism import determinism_flags

    threads = {"intra_op": torch.get_num_threads(), "inter_op": torch.get_num_interop_threads()}
    facts: dict[str, Any] = {
        "device": device,
        "torch": torch.__version__,
        "threads": threads,
        "flags": determinism_flags(device),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device_name": properties.name,
            "device_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    facts["variables"] = {name: os.environ[name] for name in RECORDED_VARIABLES if name in os.environ}
    return facts


# What can change a number or a time, of the machine and of the process. Not the commit, which has an identity of its
# own; not what changes by itself: loads, clocks, temperatures; not which of two equal devices it was.
_IDENTIFYING = ("machine", "packages_lock", "python", "os", "architecture", "memory_bytes")
_IDENTIFYING_CPU = (
    "model",
    "physical_cores",
    "usable_cores",
    "quota_cores",
    "hyper_threading",
    "numa_nodes",
    "governor",
)
_IDENTIFYING_GPU = ("name", "memory_bytes", "driver", "cuda_driver", "power_limit_w", "mig")
_IDENTIFYING_PROCESS = (
    "device",
    "device_name",
    "device_memory_bytes",
    "engine",
    "python",
    "packages",
    "torch",
    "cuda",
    "cudnn",
    "threads",
    "flags",
    "variables",
)


def environment_id(environment: Mapping[str, Any]) -> str:
    """16 hex digits that are equal where nothing differs that can change a number or a time; the code stands apart.

    Args:
        environment: as in a record: `machine_environment` with `process`. What is missing counts as missing.
    """
    content = {
        **_chosen(environment, _IDENTIFYING),
        "cpu": _chosen(environment.get("cpu") or {}, _IDENTIFYING_CPU),
        "gpus": [_chosen(gpu, _IDENTIFYING_GPU) for gpu in environment.get("gpus") or []],
        "process": _chosen(environment.get("process") or {}, _IDENTIFYING_PROCESS),
    }
    # Which files hold what, and how many there are, is no condition.
    content["packages_lock"] = (environment.get("packages_lock") or {}).get("sha256")
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _chosen(facts: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: facts[name] for name in names if facts.get(name) is not None}
