"""Configuration files of the DiffusionInst and DiffusionDet repositories (detectron2's YAML) -> a suite.

Every key is a field of ours, a constant that both sides share, or without effect on results; anything else is refused
by name, file and line. Texts that stand for Python values, "(210000, 250000)", are read as literals, never evaluated.
Loads no torch.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from bench.errors import SuiteError, SuiteErrors
from bench.fields import INVALID, check_value, did_you_mean, show
from bench.upstream_keys import (
    ARCHITECTURES,
    DATA_SETS,
    FIELDS,
    FIXED,
    FIXED_RESNET,
    FIXED_SWIN,
    NO_EFFECT,
    RESNETS,
    SCHEDULES,
    SPECIAL,
    SWINS,
    all_keys,
)
from bench.yaml_source import Item, Place, read_yaml
from diffinst.config import RELEASED, SECTIONS, Config

_BASE = "_BASE_"
_MAX_LITERAL = 10_000
_NMS_IOU = 0.5
_CROP_PROBABILITY = 0.5


@dataclass(frozen=True)
class Entry:
    """A value and where it was written."""

    value: Any
    place: Place


@dataclass
class Upstream:
    """A configuration that is understood.

    files: that it was read from, itself last. architecture: DiffusionInst or DiffusionDet.
    fields: 'section.field' -> value and the keys that gave it. seed: None where the release draws one.
    weights: MODEL.WEIGHTS. notes: keys without effect, and why.
    """

    files: list[Path]
    architecture: str = ""
    fields: dict[str, tuple[Any, str]] = field(default_factory=dict)
    seed: int | None = None
    weights: str = ""
    notes: list[str] = field(default_factory=list)

    def config(self) -> Config:
        """As a suite with `preset: released` has it."""
        sections: dict[str, dict[str, Any]] = {name: dict(RELEASED.get(name, {})) for name in SECTIONS}
        for name, (value, _) in self.fields.items():
            section, _, key = name.partition(".")
            sections[section][key] = value
        sections["train"]["seed"] = self.seed or 0
        return Config.model_validate(sections)


def read_upstream(path: Path) -> Upstream:
    """Read a configuration file and those that it is based on.

    Raises:
        SuiteErrors: every key that is not understood, with its file and line.
    """
    problems: list[SuiteError] = []
    files: list[Path] = []
    entries = _load(path, Place(None, argument=str(path)), (), files, problems)
    return convert(entries, files, problems)


def _load(
    path: Path, asked: Place, above: tuple[Path, ...], files: list[Path], problems: list[SuiteError]
) -> dict[str, Entry]:
    """Flat keys of a file over those of its bases."""
    if path.resolve() in above:
        raise SuiteErrors([asked.error(_BASE, f"{path} is based on itself. Remove one of the two")])
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SuiteErrors([asked.error("", f"{path} is no UTF-8 text")]) from error
    except OSError as error:
        what = "is a folder" if path.is_dir() else f"cannot be read ({error.strerror})"
        key = _BASE if asked.file else ""
        raise SuiteErrors([asked.error(key, f"{path}: {what}" if key else f"{what}. Give a YAML file")]) from error
    root, found = read_yaml(text, path)
    problems.extend(found)
    if root.value is None:
        root = Item({}, root.place)
    if not isinstance(root.value, dict):
        raise SuiteErrors(
            [root.place.error("", f"{show(root.plain())} is no configuration. Allowed: a mapping of keys")]
        )
    base = root.value.pop(_BASE, None)
    entries: dict[str, Entry] = {}
    for item in [] if base is None else base.value if isinstance(base.value, list) else [base]:
        if not isinstance(item.value, str) or "://" in item.value:
            message = f"{show(item.plain())} is not allowed. Allowed: the path of a YAML file, relative to this one"
            raise SuiteErrors([item.place.error(_BASE, message)])
        target = path.parent / Path(item.value).expanduser()
        entries |= _load(target, item.place, (*above, path.resolve()), files, problems)
    _flatten(root, "", entries)
    files.append(path)
    return entries


def _flatten(item: Item, prefix: str, entries: dict[str, Entry]) -> None:
    for name, child in item.value.items():
        key = f"{prefix}{name}"
        if isinstance(child.value, dict):
            _flatten(child, f"{key}.", entries)
        elif child.value is not None or key in SPECIAL:
            entries[key] = Entry(literal(child.plain()), item.key_places.get(name, child.place))


def literal(value: Any) -> Any:
    """A text that is a Python literal as its value, as detectron2 takes it; anything else as it is."""
    if not isinstance(value, str) or len(value) > _MAX_LITERAL:
        return value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a text need not be good Python
            return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return value


def convert(entries: Mapping[str, Entry], files: list[Path], problems: list[SuiteError] | None = None) -> Upstream:
    """Flat keys with their values -> fields of ours.

    Raises:
        SuiteErrors: everything that is not understood, in the order of the files.
    """
    return _Converter(entries, files, problems or []).run()


def _item(value: Any, place: Place) -> Item:
    if isinstance(value, (list, tuple)):
        return Item([_item(entry, place) for entry in value], place)
    return Item(value, place)


def _plain(value: Any) -> Any:
    """Tuples as lists, for comparing."""
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


class _Converter:
    def __init__(self, entries: Mapping[str, Entry], files: list[Path], problems: list[SuiteError]) -> None:
        self.entries, self.problems = entries, problems
        self.found = Upstream(files)
        self.arch = ""
        self.start = Place(files[-1] if files else None, 1, 1)

    def run(self) -> Upstream:
        arch = self.value("MODEL.META_ARCHITECTURE")
        if arch not in ARCHITECTURES:
            self.refuse("MODEL.META_ARCHITECTURE", f"Allowed: {', '.join(ARCHITECTURES)}")
            raise SuiteErrors(self.problems)
        self.arch = self.found.architecture = arch
        self.set("model.mask", ARCHITECTURES[arch], "MODEL.META_ARCHITECTURE")
        self._check_names()
        self._backbone()
        self._data()
        self._losses()
        self._training()
        self._sampling()
        for key, (_, names) in FIELDS.items():
            for name in names:
                self.set(name, self.value(key), key)
        fixed = FIXED | (FIXED_SWIN if self._is_swin() else FIXED_RESNET)
        for key, (_, allowed, why) in fixed.items():
            if _plain(self.value(key)) != _plain(allowed):
                self.refuse(key, f"Allowed: {show(allowed)}: {why}")
        for key, why in NO_EFFECT.items():
            if self._name(key) in self.entries:
                value = self.entries[self._name(key)].value
                self.found.notes.append(f"{self._name(key)}: {show(value)} ({why.replace('{arch}', self.arch)})")
        seed, weights = self.value("SEED"), self.value("MODEL.WEIGHTS")
        if type(seed) is not int:
            self.refuse("SEED", "Allowed: an integer")
        elif seed >= 0:
            self.found.seed = seed
        self.found.weights = weights if isinstance(weights, str) else ""
        if not isinstance(weights, str) and weights is not None:
            self.refuse("MODEL.WEIGHTS", "Allowed: text")
        if not self.problems:
            self._check_whole()
        if self.problems:
            raise SuiteErrors(self.problems)
        return self.found

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _name(self, key: str) -> str:
        return key.replace("{arch}", self.arch)

    def value(self, key: str) -> Any:
        """What a file sets, or what holds if none does."""
        entry = self.entries.get(self._name(key))
        if entry is not None:
            return entry.value
        for table in (SPECIAL, FIELDS, FIXED, FIXED_SWIN if self._is_swin() else FIXED_RESNET):
            if key in table:
                default = table[key]
                return default if table is SPECIAL else default[0]
        raise KeyError(key)

    def _is_swin(self) -> bool:
        entry = self.entries.get("MODEL.BACKBONE.NAME")
        return entry is not None and "swin" in str(entry.value)

    def place(self, key: str) -> Place:
        entry = self.entries.get(self._name(key))
        return entry.place if entry else self.start

    def refuse(self, key: str, why: str) -> None:
        name = self._name(key)
        unset = "" if name in self.entries else ", which holds as no file sets it,"
        message = f"{show(_plain(self.value(key)))}{unset} is not allowed. {why}"
        self.problems.append(self.place(key).error(name, message))

    def set(self, target: str, value: Any, *keys: str) -> None:
        """Give a field of ours its value, checked."""
        section, _, name = target.partition(".")
        key = self._name(keys[0])
        item = _item(value, self.place(keys[0]))
        checked = check_value(SECTIONS[section], name, item, key, self.problems)
        if checked is not INVALID:
            self.found.fields[target] = (checked, " and ".join(self._name(each) for each in keys))

    def is_true(self, key: str) -> bool:
        value = self.value(key)
        if not isinstance(value, bool):
            self.refuse(key, "Allowed: True, False")
        return value is True

    def _check_names(self) -> None:
        known = all_keys(self.arch)
        for key, entry in self.entries.items():
            if key not in known:
                other = next((name for name in ARCHITECTURES if key.startswith(f"MODEL.{name}.")), None)
                if other and other != self.arch:
                    message = f"of {other}, but MODEL.META_ARCHITECTURE is {self.arch}. Leave it out"
                else:
                    message = f"unknown key.{did_you_mean(key, known)} Leave it out if no result depends on it"
                self.problems.append(entry.place.error(key, message))

    # -- keys that belong together ------------------------------------------------------------------------------------

    def _backbone(self) -> None:
        builder = self.value("MODEL.BACKBONE.NAME")
        if builder == "build_resnet_fpn_backbone":
            names: Mapping[Any, str] = RESNETS
            key = "MODEL.RESNETS.DEPTH"
        elif builder == "build_swintransformer_fpn_backbone":
            names, key = SWINS, "MODEL.SWIN.SIZE"
        else:
            allowed = "build_resnet_fpn_backbone, build_swintransformer_fpn_backbone"
            self.refuse("MODEL.BACKBONE.NAME", f"Allowed: {allowed}")
            return
        size = self.value(key)
        if not isinstance(size, (int, str)) or size not in names:
            self.refuse(key, f"Allowed: {', '.join(str(name) for name in names)}")
        else:
            self.set("model.backbone", names[size], key)
        # A Swin is trained whole, whatever this says.
        self.set("model.freeze_at", self.value("MODEL.BACKBONE.FREEZE_AT"), "MODEL.BACKBONE.FREEZE_AT")
        if self.value("MODEL.FPN.OUT_CHANNELS") != self.value("MODEL.{arch}.HIDDEN_DIM"):
            self.refuse("MODEL.FPN.OUT_CHANNELS", "It must equal the head's HIDDEN_DIM")

    def _data(self) -> None:
        splits = []
        for key in ("DATASETS.TRAIN", "DATASETS.TEST"):
            names = self.value(key)
            names = [names] if isinstance(names, str) else _plain(names)
            if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
                self.refuse(key, "Allowed: one data set")
                return
            splits.append(names[0])
        pairs = "; ".join(" with ".join(pair) for pair in DATA_SETS)
        if (splits[0], splits[1]) not in DATA_SETS:
            known = splits[0] in {train for train, _ in DATA_SETS}
            self.refuse(
                "DATASETS.TEST" if known else "DATASETS.TRAIN",
                f"Allowed: {pairs}. For others, set data.dataset: custom in the suite",
            )
            return
        dataset, num_classes = DATA_SETS[splits[0], splits[1]]
        self.set("data.dataset", dataset, "DATASETS.TRAIN", "DATASETS.TEST")
        if self.value("MODEL.{arch}.NUM_CLASSES") != num_classes:
            self.refuse("MODEL.{arch}.NUM_CLASSES", f"{splits[0]} has {num_classes} classes")
        sampler, threshold = self.value("DATALOADER.SAMPLER_TRAIN"), self.value("DATALOADER.REPEAT_THRESHOLD")
        if sampler == "RepeatFactorTrainingSampler":
            self.set("train.repeat_threshold", threshold, "DATALOADER.REPEAT_THRESHOLD", "DATALOADER.SAMPLER_TRAIN")
        elif sampler == "TrainingSampler":
            self.set("train.repeat_threshold", None, "DATALOADER.SAMPLER_TRAIN")
        else:
            self.refuse("DATALOADER.SAMPLER_TRAIN", "Allowed: TrainingSampler, RepeatFactorTrainingSampler")
        is_cropped = self.is_true("INPUT.CROP.ENABLED")
        self.set("data.crop_probability", _CROP_PROBABILITY if is_cropped else 0.0, "INPUT.CROP.ENABLED")
        if self.value("INPUT.CROP.TYPE") == "absolute_range":
            self.set("data.crop_size_range", self.value("INPUT.CROP.SIZE"), "INPUT.CROP.SIZE", "INPUT.CROP.TYPE")
        elif is_cropped:
            self.refuse("INPUT.CROP.TYPE", "Allowed: absolute_range")

    def _losses(self) -> None:
        focal, federated = self.is_true("MODEL.{arch}.USE_FOCAL"), self.is_true("MODEL.{arch}.USE_FED_LOSS")
        if not focal and not federated:
            self.refuse("MODEL.{arch}.USE_FOCAL", "The release has no loss for it; set USE_FOCAL or USE_FED_LOSS True")
        self.set("train.class_loss", "focal" if focal else "bce", "MODEL.{arch}.USE_FOCAL")
        self.set("train.federated_loss", federated, "MODEL.{arch}.USE_FED_LOSS")

    def _training(self) -> None:
        scheduler = self.value("SOLVER.LR_SCHEDULER_NAME")
        if not isinstance(scheduler, str) or scheduler not in SCHEDULES:
            self.refuse("SOLVER.LR_SCHEDULER_NAME", f"Allowed: {', '.join(SCHEDULES)}")
        else:
            self.set("train.schedule", SCHEDULES[scheduler], "SOLVER.LR_SCHEDULER_NAME")
        norm: Any = None
        if self.is_true("SOLVER.CLIP_GRADIENTS.ENABLED"):
            norm = self.value("SOLVER.CLIP_GRADIENTS.CLIP_VALUE")
            if self.value("SOLVER.CLIP_GRADIENTS.CLIP_TYPE") != "full_model":
                self.refuse("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "Allowed: full_model")
            # The full model's norm is always of order 2 in the release.
        self.set("train.clip_gradient_norm", norm, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "SOLVER.CLIP_GRADIENTS.ENABLED")
        if self.value("SOLVER.CLIP_GRADIENTS.NORM_TYPE") != 2:
            self.refuse("SOLVER.CLIP_GRADIENTS.NORM_TYPE", "Allowed: 2.0: gradients are measured so")
        has_average = self.is_true("MODEL_EMA.ENABLED")
        decay = self.value("MODEL_EMA.DECAY") if has_average else None
        self.set("train.ema_decay", decay, "MODEL_EMA.DECAY", "MODEL_EMA.ENABLED")
        self.set("sampler.use_ema", has_average, "MODEL_EMA.ENABLED")

    def _sampling(self) -> None:
        suppressed = self.is_true("MODEL.{arch}.USE_NMS")
        self.set("sampler.nms_iou_threshold", _NMS_IOU if suppressed else None, "MODEL.{arch}.USE_NMS")
        self.set("sampler.tta", self.is_true("TEST.AUG.ENABLED"), "TEST.AUG.ENABLED")
        self.set("sampler.tta_shortest_edges", self.value("TEST.AUG.MIN_SIZES"), "TEST.AUG.MIN_SIZES")
        self.set("sampler.tta_longest_edge", self.value("TEST.AUG.MAX_SIZE"), "TEST.AUG.MAX_SIZE")
        self.set("sampler.tta_flip", self.value("TEST.AUG.FLIP"), "TEST.AUG.FLIP")
        ranges = _plain(self.value("TEST.AUG.SCALE_RANGES")) if self.is_true("TEST.AUG.SCALE_FILTER") else []
        if not isinstance(ranges, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in ranges):
            self.refuse("TEST.AUG.SCALE_RANGES", "Allowed: pairs of numbers, ([96, 10000], [0, 256])")
            return
        keys = ("TEST.AUG.SCALE_RANGES", "TEST.AUG.SCALE_FILTER")
        self.set("sampler.tta_min_box_sizes", [low for low, _ in ranges], *keys)
        self.set("sampler.tta_max_box_sizes", [high for _, high in ranges], *keys)

    def _check_whole(self) -> None:
        """What the fields must be together."""
        try:
            self.found.config()
        except ValidationError as error:
            message = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
            self.problems.append(self.start.error("", message))


# -- the suite --------------------------------------------------------------------------------------------------------


def to_suite(upstream: Upstream, name: str) -> str:
    """The text of a suite with one cell, each field with the key that it comes from.

    Fields whose value is that of `preset: released` are left out where no file sets their key.
    """
    kind = "segm" if upstream.architecture == "DiffusionInst" else "bbox"
    default = released_defaults()
    lines = [
        f"# Out of {', based on '.join(path.name for path in reversed(upstream.files))} ({upstream.architecture})."
    ]
    lines += [f"# Without effect here: {note}" for note in upstream.notes]
    if upstream.weights:
        lines.append(f"# MODEL.WEIGHTS is {' '.join(upstream.weights.split())}. Convert that file with")
        lines.append(
            "# diffinst import-weights, then set model.backbone_weights (if it is a backbone) or model.weights"
        )
        lines.append("# (if it is a whole model) to what that wrote.")
    lines += [
        f"name: {suite_name(name)}",
        f"description: {upstream.architecture} as {name} has it.",
        "preset: released",
    ]
    for section in SECTIONS:
        entries = []
        for target, (value, keys) in upstream.fields.items():
            owner, _, key = target.partition(".")
            if owner == section and value != default[section][key]:
                entries.append(f"  {key}: {_yaml(value)}  # {keys}")
        if entries:
            lines += ["", f"{section}:", *entries]
    lines += ["", f"seeds: [{upstream.seed or 0}]" + ("  # SEED" if upstream.seed is not None else "")]
    columns = ", ".join(f"{kind}/{name}" for name in ("AP", "AP50", "AP75"))
    lines += ["", "tables:", f"  - {{kind: long, metrics: [{columns}, latency_s/total, num_parameters]}}"]
    return "\n".join(lines) + "\n"


def released_defaults() -> dict[str, dict[str, Any]]:
    """Every field's value under `preset: released`."""
    config = Config.model_validate({name: RELEASED.get(name, {}) for name in SECTIONS})
    return {name: dict(getattr(config, name)) for name in SECTIONS}


def suite_name(text: str) -> str:
    """A name that a suite may have."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", text).lstrip("_.-")[:64]
    return name if name and name != "reports" else "imported"


def _yaml(value: Any) -> str:
    plain = _plain(value)
    return yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
