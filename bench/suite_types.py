"""What a valid suite is: its cells, its measurements, tables and plots. Loads no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bench.engines import EngineConfig
from bench.ties import ClaimTie
from bench.yaml_source import Place
from diffinst.config import Config

CUSTOM_PATHS = ("train_annotations", "train_images", "val_annotations", "val_images")
# Fields that never change a result, and so make no axis.
FREE_FIELDS = ("eval_batch_size", "num_workers", "log_every", "checkpoint_every")

PresetName = Literal["fixed", "released"]
SeedList = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)]
NameList = Annotated[tuple[str, ...], Field(strict=False)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Measure(_Part):
    """What is measured in each cell. Latency: at least so many images and seconds; flops: with the parameter count.

    training_step: time and memory of one step of training (losses, gradients, clipping, AdamW) on the first
    `train.batch_size` validation images at the test size, `training_step_count` times after a first one.
    """

    score: bool = True
    latency: bool = True
    latency_images: Annotated[int, Field(ge=1)] = 10
    latency_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 3.0
    memory: bool = True
    flops: bool = True
    training_step: bool = False
    training_step_count: Annotated[int, Field(ge=1)] = 5

    def asked(self) -> dict[str, Any]:
        """As JSON; without what belongs to training steps where they are not measured, as before there were any."""
        values = self.model_dump(mode="json")
        if not self.training_step:
            values = {name: value for name, value in values.items() if not name.startswith("training_step")}
        return values


class TableSpec(_Part):
    """grid: one metric over two axes. long: one row per cell, `metrics` as columns (empty: a default set)."""

    kind: Literal["grid", "long"] = "grid"
    rows: str | None = None
    columns: str | None = None
    metric: str | None = None
    metrics: NameList = ()
    title: str | None = None


class PlotSpec(_Part):
    """x: an axis or a metric; y: a metric; lines: the axis that makes one line per value."""

    x: str
    y: str
    lines: str | None = None
    title: str | None = None


class Head(_Part):
    """The suite's own keys, as far as they are single values; for checking."""

    name: str = ""
    description: str = ""
    preset: PresetName = "fixed"
    seeds: SeedList = (0,)


@dataclass(frozen=True)
class SuiteCell:
    """One combination: axes maps bare axis names, 'seed' last, to JSON-able values; the same names in every cell.

    places: 'section.field', 'engine' or a section -> where the axes have its value.
    """

    axes: dict[str, Any]
    config: Config
    engine: EngineConfig = EngineConfig()
    places: dict[str, Place] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Suite:
    """A valid suite.

    base: the configuration without any axis. cells: in table order, all distinct in their axes.
    source_text: the file as it was read; overrides: the `--set` arguments on top of it.
    axes_place: where the axes stand, for mistakes that show only in the plan.
    places: 'section.field', 'engine', 'preset' or 'seeds' -> where its value was written.
    claims: the published numbers that the cells measure; None where the suite is not about published numbers.
    programs: interpreters and checkouts that `--set` names, and that may be run therefore (`bench.programs`).
    """

    path: Path
    name: str
    description: str
    base: Config
    cells: tuple[SuiteCell, ...]
    measure: Measure
    tables: tuple[TableSpec, ...]
    plots: tuple[PlotSpec, ...]
    source_text: str
    overrides: tuple[str, ...] = ()
    axes_place: Place = field(default=Place(None), compare=False)
    places: dict[str, Place] = field(default_factory=dict, compare=False)
    claims: tuple[ClaimTie, ...] | None = None
    programs: frozenset[str] = frozenset()


def axis_value_text(value: Any) -> str:
    """An axis value in a label: as in YAML, without spaces; text in quotes only where it holds a space."""
    if isinstance(value, str):
        return json.dumps(value) if re.search(r"\s", value) else value
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, separators=(",", ":"))


def axes_label(axes: Mapping[str, Any]) -> str:
    """'sampling_steps=4 num_proposals=100 seed=0'."""
    return " ".join(f"{name}={axis_value_text(value)}" for name, value in axes.items())
