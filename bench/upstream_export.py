"""A suite's cell -> a configuration file of the DiffusionInst or DiffusionDet repository. Loads no torch.

What is written is read back: a configuration that the released code cannot have is refused, field by field.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bench.errors import BenchError, SuiteErrors
from bench.fields import show
from bench.suite import FREE_FIELDS
from bench.upstream import Entry, convert
from bench.upstream_keys import (
    ARCHITECTURES,
    DATA_SETS,
    FIELDS,
    FIXED,
    FIXED_RESNET,
    FIXED_SWIN,
    RESNETS,
    SCHEDULES,
    SWINS,
)
from bench.yaml_source import Place
from diffinst.config import SECTIONS, Config

_SHOWN = 5
# Of the same network, the name of the weights that the releases start from; the last of SWINS otherwise.
_SWIN_SIZES = {ours: size for size, ours in SWINS.items()}
# Fields that follow from the data set, name files of this project, or never change a result there.
_LOCAL = {
    "model.num_classes",
    "model.weights",
    "model.backbone_weights",
    "model.box_pooling",
    "model.mask_head_kernel",
    "train.num_workers",
}


def to_upstream(config: Config, *, weights: str = "") -> str:
    """The text of a configuration file, complete in itself.

    Args:
        config: of one cell.
        weights: MODEL.WEIGHTS; empty for none.
    Raises:
        BenchError: fields that the released code cannot have, by name.
    """
    flat = _flat(config, weights)
    entries = {key: Entry(value, Place(None)) for key, value in flat.items()}
    try:
        found = convert(entries, [Path("exported")]).config()
    except SuiteErrors as error:
        first = error.errors[0]
        raise BenchError(f"the released code has no such configuration: {first.key}: {first.message}") from error
    differing = [
        f"{section}.{name} is {show(getattr(getattr(config, section), name))}, there {show(value)}"
        for section in SECTIONS
        for name, value in dict(getattr(found, section)).items()
        if name not in FREE_FIELDS
        and f"{section}.{name}" not in _LOCAL
        and getattr(getattr(config, section), name) != value
        and not _has_no_effect(config, f"{section}.{name}")
    ]
    if differing:
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise BenchError(
            f"the released code has no such configuration: {'; '.join(differing[:_SHOWN])}{more}. Most of it is what "
            "'preset: released' sets"
        )
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=10**6)
    return text


def _has_no_effect(config: Config, name: str) -> bool:
    """Of this configuration: mask sizes of a model without masks, crop sizes without crops, and the like."""
    return (
        (name.startswith("model.mask_") and config.model.mask == "none")
        or (name.startswith("train.mask_") and config.model.mask == "none")
        or (name.startswith("data.crop_") and config.data.crop_probability == 0)
        or (name.startswith("train.federated_") and not config.train.federated_loss and name != "train.federated_loss")
        or (name.startswith("sampler.tta_") and not config.sampler.tta)
        or (name.startswith("data.shapes_") and config.data.dataset != "shapes")
    )


def _flat(config: Config, weights: str) -> dict[str, Any]:
    model, sampler, train, data = config.model, config.sampler, config.train, config.data
    arch = next(name for name, mask in ARCHITECTURES.items() if mask == model.mask)
    is_swin = model.backbone in _SWIN_SIZES
    depth = next((depth for depth, name in RESNETS.items() if name == model.backbone), None)
    if not is_swin and depth is None:
        allowed = ", ".join([*RESNETS.values(), *_SWIN_SIZES])
        raise BenchError(f"model.backbone: the released code has no {model.backbone}. Allowed: {allowed}")
    splits = next((pair for pair, (name, _) in DATA_SETS.items() if name == data.dataset), None)
    if splits is None:
        allowed = ", ".join(name for name, _ in DATA_SETS.values())
        raise BenchError(f"data.dataset: the released code has no {data.dataset}. Allowed: {allowed}")
    flat: dict[str, Any] = {"MODEL.META_ARCHITECTURE": arch, "MODEL.MASK_ON": model.mask == "dynamic"}
    flat["MODEL.WEIGHTS"] = weights
    flat["MODEL.BACKBONE.NAME"] = f"build_{'swintransformer' if is_swin else 'resnet'}_fpn_backbone"
    flat["MODEL.BACKBONE.FREEZE_AT"] = model.freeze_at
    if is_swin:
        flat["MODEL.SWIN.SIZE"] = _SWIN_SIZES[model.backbone]
    else:
        flat["MODEL.RESNETS.DEPTH"] = depth
    for table in (FIXED, FIXED_SWIN if is_swin else FIXED_RESNET):
        flat |= {key: allowed for key, (default, allowed, _) in table.items() if default != allowed}
    flat["MODEL.FPN.OUT_CHANNELS"] = model.hidden_dim
    for key, (_, names) in FIELDS.items():
        section, _, name = names[0].partition(".")
        flat[key] = getattr(getattr(config, section), name)
    head = "MODEL.{arch}."
    flat[f"{head}NUM_CLASSES"] = DATA_SETS[splits][1]
    flat["MODEL.ROI_HEADS.NUM_CLASSES"] = DATA_SETS[splits][1]
    flat[f"{head}USE_FOCAL"] = train.class_loss == "focal"
    flat[f"{head}USE_FED_LOSS"] = train.federated_loss
    flat[f"{head}USE_NMS"] = sampler.nms_iou_threshold is not None
    if train.ema_decay is not None:
        flat |= {"MODEL_EMA.ENABLED": True, "MODEL_EMA.DECAY": train.ema_decay}
    flat |= {"DATASETS.TRAIN": (splits[0],), "DATASETS.TEST": (splits[1],)}
    if train.repeat_threshold is not None:
        flat["DATALOADER.SAMPLER_TRAIN"] = "RepeatFactorTrainingSampler"
        flat["DATALOADER.REPEAT_THRESHOLD"] = train.repeat_threshold
    flat["SOLVER.LR_SCHEDULER_NAME"] = {ours: theirs for theirs, ours in SCHEDULES.items()}[train.schedule]
    if train.clip_gradient_norm is not None:
        flat |= {"SOLVER.CLIP_GRADIENTS.ENABLED": True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model"}
        flat |= {"SOLVER.CLIP_GRADIENTS.CLIP_VALUE": train.clip_gradient_norm}
    flat |= {"INPUT.CROP.ENABLED": data.crop_probability > 0, "INPUT.CROP.TYPE": "absolute_range"}
    flat["INPUT.CROP.SIZE"] = data.crop_size_range
    flat["TEST.AUG.ENABLED"] = sampler.tta
    flat["TEST.AUG.MIN_SIZES"] = sampler.tta_shortest_edges
    flat["TEST.AUG.MAX_SIZE"] = sampler.tta_longest_edge
    flat["TEST.AUG.FLIP"] = sampler.tta_flip
    ranges = tuple([low, high] for low, high in zip(sampler.tta_min_box_sizes, sampler.tta_max_box_sizes))
    flat["TEST.AUG.SCALE_FILTER"] = bool(ranges)
    if ranges:
        flat["TEST.AUG.SCALE_RANGES"] = ranges
    flat["SEED"] = train.seed
    return {key.replace("{arch}", arch): value for key, value in flat.items()} | {"VERSION": 2}


class _Dumper(yaml.SafeDumper):
    """Tuples as the text that detectron2 reads as a tuple; lists in one line."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the signature of a dumper
        return True


def _tuple_as_text(dumper: yaml.SafeDumper, value: tuple[Any, ...]) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", str(value))


def _list_in_line(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)


_Dumper.add_representer(tuple, _tuple_as_text)
_Dumper.add_representer(list, _list_in_line)


def only_cell(labels: Mapping[str, Config], asked: str | None) -> Config:
    """The one cell of a suite, or the one asked for.

    Raises:
        BenchError: there are several, or none of that name.
    """
    if asked is not None and asked not in labels:
        raise BenchError(f"--cell {asked}: no such cell. Allowed: {', '.join(labels)}")
    if asked is None and len(labels) > 1:
        raise BenchError(f"the suite has {len(labels)} cells. Choose one with --cell: {', '.join(labels)}")
    return labels[asked] if asked is not None else next(iter(labels.values()))
