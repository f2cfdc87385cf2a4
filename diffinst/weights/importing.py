"""Released weights -> a file of this project. Every name is accounted for: mapped, a known constant, or an error.

A whole model becomes a checkpoint with a complete configuration: `diffinst evaluate` and `predict` take it, and suites
as `model.weights`. A backbone alone becomes a file for `model.backbone_weights`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from diffinst.build import build_model
from diffinst.checkpoint import SOURCE_KEY, replacing, save_checkpoint
from diffinst.config import Config, ModelConfig
from diffinst.errors import CheckpointError
from diffinst.released_names import from_pretrained_name, from_released_name, to_released_name
from diffinst.weights.constants import differing_constants, is_criterion
from diffinst.weights.files import EMA, MODEL, open_released, sha256_of
from diffinst.weights.settings import assumed_settings, backbone_shapes, nearest_backbone, read_settings

Kind = Literal["DiffusionInst", "DiffusionDet", "backbone"]
_HEAD = "head.head_series."
_ALONE = "backbone.bottom_up."
_SHOWN = 3  # names given in an error
_DATA_SETS = {80: "coco", 1203: "lvis", 1230: "lvis_v05"}  # by their number of classes
_EMA_DECAY = 0.999  # of an average whose decay is not known, the release's
_LVIS_DETECTIONS = 300  # per image, which LVIS counts


@dataclass(frozen=True)
class Imported:
    """Released weights under our names.

    weights: float32 and integers, on the CPU; names of `DiffusionInst.state_dict()`, or of `Backbone.state_dict()`.
    ema: the moving average of the weights, of the same names; empty where the file has none.
    settings: fields of ModelConfig read off the shapes; 'backbone' only where it is one of ours.
    assumed: fields of ModelConfig that no shape tells, with the released values.
    filled: weights that classifiers do not have, at their initial values.
    left_out: names in the file of constants, and of parts that have no use here.
    source: where all this comes from, as JSON.
    """

    kind: Kind
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    settings: dict[str, Any]
    assumed: dict[str, Any]
    filled: tuple[str, ...]
    left_out: tuple[str, ...]
    source: dict[str, Any]


def _some(names: Iterable[str]) -> str:
    listed = [name[:80] for name in names]
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def read_released(path: Path) -> Imported:
    """Weights of the released code under our names. Sizes are free: the backbone may be none of ours.

    Raises:
        CheckpointError: the file cannot be read safely (see `diffinst.weights.files.open_released`), has names that
            are known neither of DiffusionInst and DiffusionDet nor of published classifiers, or lacks some.
    """
    file = open_released(path)
    state = file.tensors(MODEL) if MODEL in file.states else file.tensors(EMA)
    if all(name.startswith(_ALONE) for name in state):
        state = {name.removeprefix(_ALONE): value for name, value in state.items()}
    source: dict[str, Any] = {"file": path.name, "sha256": sha256_of(path)}
    if not any(name.startswith(_HEAD) for name in state):
        return _backbone(path, state, source)
    weights, left_out = _whole(path, state)
    try:
        settings = read_settings(weights)
    except KeyError as error:
        raise CheckpointError(f"{path}: lacks {_released(error.args[0])}. Give the file of a whole model.") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path}: {_released(error.args[0])} has an impossible shape. Give an unaltered file."
        ) from error
    if "betas" in state:
        settings["num_train_timesteps"] = len(state["betas"])
    ema = _whole(path, file.tensors(EMA))[0] if {MODEL, EMA} <= set(file.states) else {}
    kind: Kind = "DiffusionInst" if settings["mask"] == "dynamic" else "DiffusionDet"
    source |= {"kind": kind, "states": list(file.states), "settings": settings, "assumed": assumed_settings(settings)}
    return Imported(kind, weights, ema, settings, assumed_settings(settings), (), tuple(left_out), source)


def _whole(path: Path, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a whole model under our names, and the names of constants that are left out."""
    weights: dict[str, Tensor] = {}
    left_out, unknown = [], []
    for name, value in state.items():
        # Counters of batch norms are stored by some versions for frozen ones, too.
        if is_criterion(name) or (name.startswith("backbone.") and name.endswith(".num_batches_tracked")):
            left_out.append(name)
            continue
        try:
            ours = from_released_name(name)
        except KeyError:
            unknown.append(name)
            continue
        if ours is None:
            left_out.append(name)
        elif ours in weights:
            raise CheckpointError(f"{path}: {name} means the same as another name in it. Give an unaltered file.")
        else:
            weights[ours] = value
    if unknown:
        raise CheckpointError(
            f"{path}: {len(unknown)} names are none of DiffusionInst's or DiffusionDet's: {_some(unknown)}. Give "
            "weights of one of these, with a ResNet or Swin backbone."
        )
    if differing := differing_constants(state):
        raise CheckpointError(
            f"{path}: made for another noise schedule or other windows than here: {_some(differing)} differ. Only "
            "the released cosine schedule and Swin are known."
        )
    return weights, left_out


def _backbone(path: Path, state: Mapping[str, Tensor], source: dict[str, Any]) -> Imported:
    weights: dict[str, Tensor] = {}
    left_out, unknown = [], []
    for name, value in state.items():
        try:
            ours = from_pretrained_name(name)
        except KeyError:
            unknown.append(name)
            continue
        if ours is None:
            left_out.append(name)
        else:
            weights[ours] = value
    if unknown:
        raise CheckpointError(
            f"{path}: {len(unknown)} of {len(state)} names are known neither of DiffusionInst and DiffusionDet nor of "
            f"published classifiers: {_some(unknown)}. Allowed are those models, detectron2's R-50.pkl and R-101.pkl "
            "in the torchvision variant, and the authors' Swin files."
        )
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    # The LayerNorms of Swin's four maps are in no classifier.
    norms = {name for name in backbone_shapes("swin_t") if name.startswith("norms.")}
    backbone, differing = nearest_backbone(shapes, optional=frozenset(norms))
    if differing:
        raise CheckpointError(
            f"{path}: no backbone of this program. Nearest is {backbone}, but {_some(differing)} differ. Allowed are "
            "ResNet-50 and -101, Swin-T, -S, -B and -L."
        )
    if differing := differing_constants(state):
        raise CheckpointError(f"{path}: made for other windows than Swin's: {_some(differing)} differ.")
    missing = {name: shape for name, shape in backbone_shapes(backbone).items() if name not in weights}
    for name, shape in missing.items():
        weights[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    source |= {"kind": "backbone", "settings": {"backbone": backbone}, "filled": list(missing)}
    return Imported("backbone", weights, {}, {"backbone": backbone}, {}, tuple(missing), tuple(left_out), source)


def _released(name: str) -> str:
    try:
        return to_released_name(name)
    except KeyError:
        return name


def check_complete(path: Path, imported: Imported, config: Config) -> None:
    """Compare a whole model's weights with the model that `config` makes.

    Raises:
        CheckpointError: names are missing or too many, or shapes differ; names as in the file.
    """
    try:
        with torch.device("meta"):  # shapes alone: no memory, whatever sizes the file claims
            model = build_model(config.model)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: its weights have impossible shapes. Give an unaltered file.") from error
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for what, weights in (("", imported.weights), ("its moving average ", imported.ema)):
        if not weights and what:
            continue
        found = {name: tuple(value.shape) for name, value in weights.items()}
        problems = [f"lacks {_released(name)}" for name in expected if name not in found]
        problems += [f"has {_released(name)}, which has no place" for name in found if name not in expected]
        problems += [
            f"has {_released(name)} of shape {shape} instead of {expected[name]}"
            for name, shape in found.items()
            if name in expected and expected[name] != shape
        ]
        if problems:
            more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise CheckpointError(
                f"{path}: {what}{'; '.join(problems[:_SHOWN])}{more}. The sizes were read off the other weights; "
                "give an unaltered file, or the sizes with --set."
            )


def import_weights(
    path: Path,
    out: Path,
    base: Config,
    *,
    given: Iterable[str] = (),
    class_names: tuple[str, ...] = (),
    category_ids: tuple[int, ...] = (),
) -> Imported:
    """Convert a weights file.

    Args:
        out: a .safetensors file; replaced if it is there.
        base: the configuration of what weights do not tell. For a whole model its model section is replaced by what
            was read off the shapes, and a data set is chosen that has as many classes.
        given: fields that are taken from `base` all the same.
        class_names: K names, empty if unknown. category_ids: of the data set, as many as names, or empty if unknown.
    Raises:
        CheckpointError: see `read_released` and `check_complete`; `class_names` are not K; `out` cannot be written.
    """
    imported = read_released(path)
    if imported.kind == "backbone":
        _save_backbone(out, imported)
        return imported
    settings = base.model.model_dump() | imported.settings | imported.assumed
    given = set(given)
    settings |= {name: getattr(base.model, name) for name in given & set(ModelConfig.model_fields)}
    if "backbone" not in imported.settings:
        raise CheckpointError(
            f"{path}: its backbone is none of this program's. Allowed are ResNet-50 and -101, Swin-T, -S, -B and -L in "
            "their published sizes."
        )
    if class_names and len(class_names) != settings["num_classes"]:
        raise CheckpointError(
            f"{path}: has {settings['num_classes']} classes, but {len(class_names)} names are given. Give one for each."
        )
    try:
        config = _with_data_set(base.model_copy(update={"model": ModelConfig(**settings)}), given)
    except pydantic.ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"{path}: {message}. Give the right value with --set.") from error
    if imported.ema and config.train.ema_decay is None:
        train = config.train.model_copy(update={"ema_decay": _EMA_DECAY})
        config = config.model_copy(update={"train": train})
    check_complete(path, imported, config)
    save_checkpoint(
        out,
        model=imported.weights,
        config=config,
        iteration=0,
        class_names=class_names,
        category_ids=category_ids,
        ema=imported.ema or None,
        source=imported.source,
    )
    return imported


def _with_data_set(config: Config, given: set[str]) -> Config:
    """`config` with the published data set that has as many classes, and as many detections as its scores count."""
    name = _DATA_SETS.get(config.model.num_classes or 0)
    if name is None or "dataset" in given:
        return config
    sampler = config.sampler
    if name.startswith("lvis") and sampler.max_detections is not None and "max_detections" not in given:
        sampler = sampler.model_copy(update={"max_detections": _LVIS_DETECTIONS})
    return config.model_copy(update={"data": config.data.model_copy(update={"dataset": name}), "sampler": sampler})


def _save_backbone(out: Path, imported: Imported) -> None:
    tensors = {name: value.contiguous() for name, value in imported.weights.items()}
    try:
        with replacing(out) as temporary:
            save_file(tensors, temporary, metadata={SOURCE_KEY: json.dumps(imported.source)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: cannot be written ({error}). Check free space and permissions.") from error
