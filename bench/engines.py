"""What a suite can measure: our model, or a peer that stands beside it in the same table. Loads no torch.

    engine: torchvision                                   # a bare name stands for {name: ...}
    engine: {name: detectron2, python: .tox/detectron2/bin/python, recipe: COCO-InstanceSegmentation/...yaml}
    axes: {product: {engine: [diffinst, torchvision, {name: original, python: ..., checkout: ..., recipe: ...}]}}

`diffinst` and `torchvision` run in the worker's interpreter; `detectron2` and `original` in one of their own, as a
child process (`bench.external`). All get the same images, batches per iteration and sizes, and are scored by the same
code. What an engine does not look at cannot tell its runs apart; `USED` says what it does look at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from bench.fields import did_you_mean
from diffinst.config import Section

EngineName = Literal["diffinst", "torchvision", "detectron2", "original"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)
EXTERNAL: tuple[EngineName, ...] = ("detectron2", "original")

# Names of `bench.torchvision_engine.RECIPES`, which loads torch; a test holds the two together.
TORCHVISION_RECIPES = ("maskrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn", "maskrcnn_tiny_fpn")
DEFAULT_RECIPES: dict[str, str] = {
    "torchvision": TORCHVISION_RECIPES[0],
    "detectron2": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml",
}

Scalar = bool | int | Annotated[float, Field(allow_inf_nan=False)] | str | None
OptionValue = Scalar | list[Scalar | list[Scalar]]

# Fields besides the name that an engine takes, and those of them that it needs.
_TAKES: dict[str, tuple[str, ...]] = {
    "diffinst": (),
    "torchvision": ("recipe", "engine_weights"),
    "detectron2": ("python", "recipe", "engine_weights", "options"),
    "original": ("python", "checkout", "recipe", "engine_weights", "options"),
}
_NEEDS: dict[str, tuple[str, ...]] = {
    "detectron2": ("python",),
    "original": ("python", "checkout", "recipe", "engine_weights"),
}
_WAYS = {
    "python": "the path of an interpreter that has detectron2 (`tox -e detectron2` makes .tox/detectron2/bin/python)",
    "checkout": "the folder of a local clone of DiffusionInst or DiffusionDet",
    "recipe": "a configuration file inside the checkout",
    "engine_weights": "a file of its weights, as it is not trained here",
}


class EngineConfig(Section):
    """The section `engine`. Null and 'none' stand for what the engine has by itself, see `DEFAULT_RECIPES`."""

    name: EngineName = "diffinst"
    python: str | None = Field(default=None, description="interpreter of detectron2 and original")
    checkout: str | None = Field(default=None, description="local clone of the original repository")
    recipe: str | None = Field(default=None, description="name or path of the engine's own configuration")
    engine_weights: str = Field(
        default="none", description="a file with the whole model's weights: nothing is trained; or 'none'"
    )
    options: dict[str, OptionValue] = Field(default={}, description="the engine's own settings over its recipe")

    @model_validator(mode="after")
    def _check(self) -> EngineConfig:
        given = [name for name, field in EngineConfig.model_fields.items() if getattr(self, name) != field.default]
        if problem := engine_problem(self.name, given, self.recipe):
            raise ValueError(": ".join(problem))
        return self

    @property
    def is_default(self) -> bool:
        """Whether it is our own model, of which results were recorded before there were others."""
        return self.name == "diffinst"

    @property
    def is_external(self) -> bool:
        """Whether it runs in an interpreter of its own."""
        return self.name in EXTERNAL

    @property
    def has_weights(self) -> bool:
        """Whether a file has the weights, so that nothing is trained."""
        return self.engine_weights != "none"

    def resolved(self) -> dict[str, Any]:
        """JSON-able, with the default recipe written out."""
        values = self.model_dump(mode="json")
        return values | {"recipe": self.recipe or DEFAULT_RECIPES.get(self.name)}


def engine_problem(name: str, given: list[str], recipe: str | None) -> tuple[str, str] | None:
    """What is wrong with a section of valid fields: (the field, the message), or None.

    Args:
        name: of the engine. given: the fields that are set.
    """
    for field in given:
        if field != "name" and field not in _TAKES[name]:
            takers = [other for other in ENGINES if field in _TAKES[other]]
            hint = " (model.weights is the file of its weights)" if field == "engine_weights" else ""
            return field, f"not for engine {name}{hint}. Allowed for: {', '.join(takers)}"
    for field in _NEEDS.get(name, ()):
        if field not in given:
            way = ", or --set engine.python=PATH" if field == "python" else ""
            return "name", f"engine {name} needs {field}: {_WAYS[field]}{way}"
    if name == "torchvision" and recipe is not None and recipe not in TORCHVISION_RECIPES:
        allowed = ", ".join(TORCHVISION_RECIPES)
        return "recipe", f"'{recipe}' is not allowed. Allowed: {allowed}.{did_you_mean(recipe, TORCHVISION_RECIPES)}"
    return None


_OPTIMISATION = (
    "seed",
    "iterations",
    "batch_size",
    "learning_rate",
    "weight_decay",
    "clip_gradient_norm",
    "warmup_iterations",
    "warmup_factor",
    "schedule",
    "schedule_steps",
    "schedule_gamma",
)

# Engine -> section -> the fields that it looks at. All look at all of `data`; `model.mask` says what is scored. The
# other fields are about diffusion, or have a counterpart in the engine's recipe and options. A job of an engine in
# another interpreter holds these fields and no others, so none can matter unseen.
USED: dict[str, dict[str, tuple[str, ...]]] = {
    "torchvision": {
        "train": (*_OPTIMISATION, "precision", "repeat_threshold"),
        "sampler": ("max_detections", "mask_threshold"),
    },
    "detectron2": {
        "train": _OPTIMISATION,
        "sampler": ("max_detections", "score_threshold"),
    },
    # Of `sampler` it refuses what its code cannot follow, so all of it counts.
    "original": {"train": ("seed",)},
}

# Engine -> fields of `train` that one training step on its own looks at besides; engines that are not here take none.
# Learning rate, decay and clipping of another engine are its recipe's.
USED_BY_STEP: dict[str, tuple[str, ...]] = {
    "original": ("batch_size", "num_train_proposals"),
}
STEP_ENGINES = ("diffinst", *USED_BY_STEP)


def step_fields(name: str, train: Mapping[str, Any]) -> dict[str, Any]:
    """Of the section `train`, what tells one step of training from another; all of it for our own engine."""
    if name not in USED_BY_STEP:
        return dict(train)
    return used_fields(name, "train", train) | {field: train[field] for field in USED_BY_STEP[name]}


def used_fields(name: str, section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a section's values, those that the engine looks at; all of them for our own."""
    if name not in USED or section not in USED[name]:
        return dict(values)
    return {field: values[field] for field in USED[name][section] if field in values}


def engine_identity(engine: Mapping[str, Any], digests: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What of an engine tells results apart; where it is installed does not.

    Args:
        engine: the section, as JSON. digests: field -> digest of the content of what it names.
    """
    found = {"name": engine["name"], "recipe": engine["recipe"] or DEFAULT_RECIPES.get(engine["name"])}
    if engine["options"]:
        found["options"] = engine["options"]
    if engine["engine_weights"] != "none":
        found["engine_weights"] = engine["engine_weights"]
    return found | dict(digests or {})


def engine_labels(engines: list[EngineConfig]) -> list[str]:
    """A short name for each: the engine's, and where several share it, what tells those apart.

    'detectron2', or 'detectron2:mask_rcnn_R_50_FPN_1x' beside 'detectron2:mask_rcnn_R_50_FPN_3x'.
    """
    labels = []
    for engine in engines:
        same = [other for other in engines if other.name == engine.name]
        parts: list[str] = []
        for field in ("checkout", "recipe", "engine_weights"):
            if len({other.resolved()[field] for other in same}) > 1:
                value = engine.resolved()[field]
                parts.append("none" if value is None else PurePosixPath(value).stem)
        names = {name for other in same for name in other.options}
        for name in sorted(names):
            if len({repr(other.options.get(name)) for other in same}) > 1 and name in engine.options:
                parts.append(f"{name.rpartition('.')[2]}={engine.options[name]}".replace(" ", ""))
        labels.append(":".join([engine.name, *parts]))
    return labels


def code_digest(folder: Path) -> str:
    """The first 16 hex digits of a SHA-256 over the code and configurations below a folder, by path and content.

    Hidden folders are left out, and so is what runs write: only code and configurations count.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.suffix not in _CODE or any(part.startswith(".") or part == "output" for part in parts):
            continue
        if path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{'/'.join(parts)}\0{content}\n".encode())
    return digest.hexdigest()[:16]


_CODE = {".py", ".yaml", ".yml", ".cpp", ".cu", ".h"}
