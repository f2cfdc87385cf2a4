"""The DiffusionInst and DiffusionDet repositories as they are, from a local checkout: their code, our images and noise.

The suite says the test size and the numbers of classes, proposals and steps; how large the model is comes from their
YAML file and the suite's `options`, which win. All else about sampling is fixed in their code, whatever the suite
has: `preset: released` makes ours do the same. Their code sets no limit to detections; `max_detections` cuts what it
gives. Nothing of the checkout is changed, and what stands in for a missing package is named in the result.
"""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from bench.peers.detectron import build_model, merge_file, merge_options
from bench.peers.inference import Detector
from bench.peers.noise import injected, noise_for
from bench.peers.protocol import Job, PeerError
from bench.peers.weights import load_into

# Package in the checkout -> name of its section under MODEL, and of the function that adds it.
PACKAGES = {
    "diffusioninst": ("DiffusionInst", "add_diffusioninst_config"),
    "diffusiondet": ("DiffusionDet", "add_diffusiondet_config"),
}


def find_package(checkout: str | None) -> tuple[Path, str]:
    """(checkout, package name).

    Raises:
        PeerError: no checkout is given, or it holds neither package.
    """
    if not checkout:
        raise PeerError("engine original needs `checkout:`, the path of a clone of DiffusionInst or DiffusionDet")
    folder = Path(checkout)
    for name in PACKAGES:
        if (folder / name / "__init__.py").is_file():
            return folder, name
    raise PeerError(f"{folder}: has neither {' nor '.join(f'{name}/' for name in PACKAGES)}. Give a clone's top folder")


def stand_in_for_timm() -> list[str]:
    """Make `timm.models.layers` importable where it is not; returns what was done, for the record.

    Their Swin file needs three small things of it at import, the other backbones nothing.
    """
    try:
        importlib.import_module("timm.models.layers")
        return []
    except ImportError:
        pass
    import torch
    from torch import nn

    class DropPath(nn.Module):
        """Stochastic depth; does nothing in evaluation, and for training it does not stand in."""

        def __init__(self, drop_prob: float = 0.0) -> None:
            super().__init__()
            self.drop_prob = drop_prob

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    layers = types.ModuleType("timm.models.layers")
    contents = {
        "DropPath": DropPath,
        "to_2tuple": lambda value: value if isinstance(value, tuple) else (value, value),
        "trunc_normal_": nn.init.trunc_normal_,
    }
    for name, value in contents.items():
        setattr(layers, name, value)
    sys.modules["timm.models.layers"] = layers
    for name in ("timm", "timm.models"):
        sys.modules.setdefault(name, types.ModuleType(name))
    return ["timm.models.layers: DropPath, to_2tuple and trunc_normal_ of this runner"]


def import_package(folder: Path, name: str) -> tuple[types.ModuleType, list[str]]:
    """Their package, and what stands in for missing ones."""
    shims = stand_in_for_timm()
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name), shims
    # Whatever a module of a clone may raise when it is imported.
    except (ImportError, NameError, AttributeError, SyntaxError) as error:
        raise PeerError(
            f"{folder / name}: cannot be imported ({error}). Install what its README asks for, or take the released "
            "version"
        ) from error


def build_config(job: Job) -> Any:
    """Their YAML file with the suite's classes, proposals, steps and sizes, then the suite's options."""
    from detectron2.config import get_cfg

    folder, name = find_package(job.engine.get("checkout"))
    section, add_config = PACKAGES[name]
    package, _ = import_package(folder, name)
    cfg = get_cfg()
    getattr(package, add_config)(cfg)
    # Older versions have no moving average, nor files that mention it.
    with contextlib.suppress(ImportError, AttributeError):
        importlib.import_module(f"{name}.util.model_ema").add_model_ema_configs(cfg)
    recipe = job.engine.get("recipe") or ""
    path = folder / recipe
    if not recipe or not path.is_file():
        known = ", ".join(sorted(f"configs/{file.name}" for file in (folder / "configs").glob("*.yaml"))) or "none"
        raise PeerError(f"{path}: no such configuration. In this checkout there are: {known}")
    merge_file(cfg, str(path))
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = job.device
    settings = cfg.MODEL[section]
    settings.NUM_CLASSES = len(job.category_ids)
    settings.NUM_PROPOSALS = job.sampler.get("num_proposals", settings.NUM_PROPOSALS)
    if job.kind == "training_step":
        settings.NUM_PROPOSALS = job.train.get("num_train_proposals", settings.NUM_PROPOSALS)
    settings.SAMPLE_STEP = job.sampler.get("sampling_steps", settings.SAMPLE_STEP)
    cfg.INPUT.MIN_SIZE_TEST = job.data.get("shortest_edge_test", cfg.INPUT.MIN_SIZE_TEST)
    cfg.INPUT.MAX_SIZE_TEST = job.data.get("longest_edge_test", cfg.INPUT.MAX_SIZE_TEST)
    merge_options(cfg, job.options)
    return cfg


def detector(job: Job) -> Detector:
    """Their model with the given weights; predictions run with the harness's noise."""
    cfg = build_config(job)
    _, name = find_package(job.engine.get("checkout"))
    settings = cfg.MODEL[PACKAGES[name][0]]
    model = build_model(cfg, int(job.train.get("seed", 0)))
    path = job.weights_path
    if path is not None:
        # The noise schedule is computed, so files need not hold it.
        computed = {key for key, _ in model.named_buffers(recurse=False)} | {
            key for key, _ in model.named_buffers() if key.startswith("criterion.")
        }
        load_into(model, path, complete=True, ignored=frozenset(computed))
    return Detector(
        model=model.eval(),
        image_format=cfg.INPUT.FORMAT,
        shortest_edge=cfg.INPUT.MIN_SIZE_TEST,
        longest_edge=cfg.INPUT.MAX_SIZE_TEST,
        max_detections=job.sampler.get("max_detections"),
        around=noise_giver(int(job.sampler.get("eval_seed", 0)), settings.NUM_PROPOSALS, settings.SAMPLE_STEP),
    )


def noise_giver(eval_seed: int, num_proposals: int, steps: int) -> Callable[[int], AbstractContextManager[None]]:
    """image id -> context in which their code draws the harness's noise."""
    import torch

    def around(image_id: int) -> AbstractContextManager[None]:
        return injected(
            torch,
            lambda step, purpose: noise_for(eval_seed, image_id, step, purpose, (num_proposals, 4)),
            num_proposals=num_proposals,
            steps=steps,
        )

    return around


def describe(job: Job) -> dict[str, Any]:
    """Which code ran: the checkout's package and commit (None where it is no git clone), and what was stood in for."""
    folder, name = find_package(job.engine.get("checkout"))
    return {"checkout": {"package": name, "commit": find_commit(folder)}, "stand_ins": stand_in_names()}


def find_commit(folder: Path) -> str | None:
    """The commit of a clone; None for another folder, one inside the work tree of something else included."""
    command = ["git", "-C", str(folder), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    top, commit = done.stdout.splitlines()
    return commit if Path(top).resolve() == folder.resolve() else None


def stand_in_names() -> list[str]:
    """What `stand_in_for_timm` put in the place of a package, if it did."""
    layers = sys.modules.get("timm.models.layers")
    return [] if layers is None or getattr(layers, "__file__", None) else ["timm.models.layers"]
