"""What describes a peer's process: the same facts in the same shape as `bench.measure.environment` has of ours.

What the peer's version of torch does not tell is None. No host names or paths.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

_PACKAGES = ("torch", "torchvision", "sal-detectron2", "detectron2", "fvcore", "numpy", "pycocotools", "pillow", "timm")
# Variables that change numbers or times and hold no path.
VARIABLES = (
    "OPENBLAS_NUM_THREADS",
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


def process_facts(device: str) -> dict[str, Any]:
    """Of this process, which computes on `device`; as they are when it is called."""
    import torch

    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    facts: dict[str, Any] = {
        "device": device,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": packages,
        "torch": torch.__version__,
        "threads": {"intra_op": torch.get_num_threads(), "inter_op": torch.get_num_interop_threads()},
        "flags": _flags(torch.device(device).type),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device_name": properties.name,
            "device_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    facts["variables"] = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return facts


def _flags(kind: str) -> dict[str, Any]:
    import torch

    flags = {
        "deterministic_algorithms": _told("are_deterministic_algorithms_enabled"),
        "deterministic_warn_only": _told("is_deterministic_algorithms_warn_only_enabled"),
        "float32_matmul_precision": _told("get_float32_matmul_precision"),
        "cpu_capability": _told("backends.cpu.get_cpu_capability"),
        "autocast": _autocast(kind),
        "mkldnn": _told("backends.mkldnn.enabled") if torch.backends.mkldnn.is_available() else None,
    }
    if kind == "cuda":
        flags |= {
            "cudnn_enabled": _told("backends.cudnn.enabled"),
            "cudnn_deterministic": _told("backends.cudnn.deterministic"),
            "cudnn_benchmark": _told("backends.cudnn.benchmark"),
            "cudnn_tf32": _told("backends.cudnn.allow_tf32"),
            "matmul_tf32": _told("backends.cuda.matmul.allow_tf32"),
            "matmul_fp16_reduced_precision": _told("backends.cuda.matmul.allow_fp16_reduced_precision_reduction"),
            "matmul_bf16_reduced_precision": _told("backends.cuda.matmul.allow_bf16_reduced_precision_reduction"),
        }
    return flags


def _told(path: str) -> Any:
    """A setting of torch, or what its function without arguments says; None where this version has neither."""
    import torch

    found: Any = torch
    try:
        for name in path.split("."):
            found = getattr(found, name)
        return found() if callable(found) else found
    except (AttributeError, AssertionError, RuntimeError):  # `matmul` of old versions raises the second
        return None


def _autocast(kind: str) -> bool:
    import torch

    if kind == "cuda":
        return torch.is_autocast_enabled()
    try:
        return torch.is_autocast_enabled(kind)
    except TypeError:  # without a device it is the GPU's, and older versions know no other way to ask
        return torch.is_autocast_cpu_enabled()
