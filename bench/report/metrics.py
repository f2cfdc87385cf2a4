"""How a metric or an axis is written for people: its label, its unit, its scale and its number of decimals."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MIB = 2**20
_SUBJECT = {"segm": "mask", "bbox": "box"}
_AP = re.compile(r"^(segm|bbox)/(A[PR]\w*)$")
_AXIS_LABELS = {
    "sampling_steps": "sampling steps",
    "num_proposals": "proposals",
    "num_train_proposals": "training proposals",
    "eval_seed": "evaluation seed",
    "snr_scale": "signal scale",
    "dataset": "data set",
    "ota_k": "OTA k",
    "nms_iou_threshold": "NMS IoU threshold",
}
_MEMORY_LABELS = {
    "rss": "peak memory",
    "cuda_allocated": "peak GPU memory",
    "cuda_reserved": "peak GPU memory reserved",
    "training_rss": "peak memory in training",
    "training_cuda_allocated": "peak GPU memory in training",
    "training_cuda_reserved": "peak GPU memory reserved in training",
}


def csv_field(text: str) -> str:
    """Text for a CSV file that no spreadsheet takes for a formula: it gets an apostrophe before; numbers stay.

    Of line breaks there is one kind, which writers put into quotes.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.lstrip("\n")[:1] not in ("=", "+", "-", "@", "\t"):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


@dataclass(frozen=True)
class Style:
    """A number `x` of a record is shown as `x * scale` with `digits` decimals, under `label` and `unit`.

    quantiles: the record also holds `NAME/p5` and `NAME/p95`.
    """

    label: str
    unit: str = ""
    scale: float = 1.0
    digits: int = 3
    quantiles: bool = False

    @property
    def heading(self) -> str:
        """'latency (ms)', or the label alone where there is no unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def format(self, value: float) -> str:
        """`value` in the record's unit -> text in the shown unit; a minus sign never stands before a zero."""
        text = f"{value * self.scale:.{self.digits}f}"
        return text[1:] if text.startswith("-") and float(text) == 0 else text


def style_of(metric: str, unit: str = "") -> Style:
    """The style of a metric name such as 'segm/AP50' or 'latency_s/total'; `unit` is used for unknown names."""
    if match := _AP.match(metric):
        # Records hold fractions; tables and plots show them x100, as papers do. Captions say so.
        return Style(f"{_SUBJECT[match[1]]} {match[2]}", scale=100, digits=1)
    head, _, rest = metric.partition("/")
    if head == "latency_s":
        scope, _, quantile = rest.partition("/")
        label = "latency" if scope == "total" else f"{scope} latency"
        if quantile:
            return Style(f"{label} {quantile}", "ms", 1e3, 1)
        return Style(label, "ms", 1e3, 1, quantiles=True)
    if head == "training_step_s":
        _, _, quantile = rest.partition("/")
        return Style(f"training step {quantile}".rstrip(), "s", 1.0, 2, quantiles=not quantile)
    if head == "peak_memory_bytes":
        return Style(_MEMORY_LABELS.get(rest, f"peak memory {rest}"), "MiB", 1 / _MIB, 0)
    if metric == "num_parameters":
        return Style("params", "M", 1e-6, 2)
    if metric == "flops":
        return Style("GFLOPs", "", 1e-9, 2)
    return Style(metric, unit)


def axis_label(name: str) -> str:
    """'sampler.num_proposals' or 'num_proposals' -> 'proposals'."""
    bare = name.rpartition(".")[2]
    return _AXIS_LABELS.get(bare, bare.replace("_", " "))


def axis_text(value: Any) -> str:
    """An axis value as people write it in a suite: null, true, numbers without needless digits, lists in brackets."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {axis_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(axis_text(item) for item in value) + "]"
    return str(value)
