"""The names of data sets and of what is measured on them. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The names of diffinst.data.catalog, which the harness must not import; a test holds the two together.
DATASETS = ("shapes", "coco", "coco_mini", "nuclei", "lvis", "lvis_v05", "lvis_tiny", "custom")
LVIS_DATASETS = ("lvis", "lvis_v05", "lvis_tiny")
LVIS_DETECTIONS = 300  # an image: what LVIS scores, where COCO scores 100

_AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
COCO_AP_NAMES = ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_LVIS_AP_NAMES = ("APr", "APc", "APf")
_LVIS_COUNT = "num_instances/rare"
_SCOPES = ("total", "preprocess", "backbone", "head", "masks")
_KINDS = ("segm", "bbox")
# Metric -> the setting of `measure` that must be on for it. Which of them a data set has: `metrics_of`.
METRICS: dict[str, str] = {
    **{f"{kind}/{name}": "score" for kind in _KINDS for name in (*_AP_NAMES, *COCO_AP_NAMES, *_LVIS_AP_NAMES)},
    **{f"latency_s/{scope}{part}": "latency" for scope in _SCOPES for part in ("", "/p5", "/p95")},
    **{f"peak_memory_bytes/{name}": "memory" for name in ("rss", "cuda_allocated", "cuda_reserved")},
    **{f"training_step_s/total{part}": "training_step" for part in ("", "/p5", "/p95")},
    **{f"peak_memory_bytes/training_{name}": "training_step" for name in ("rss", "cuda_allocated", "cuda_reserved")},
    "num_images": "score",
    "num_instances": "score",
    _LVIS_COUNT: "score",
    "num_parameters": "flops",
    "flops": "flops",
}


def is_lvis(data: Mapping[str, Any]) -> bool:
    """Whether the fields of a data section mean LVIS annotations, which are scored in a way of their own."""
    return data.get("dataset") in LVIS_DATASETS or data.get("annotation_format") == "lvis"


def metrics_of(data: Mapping[str, Any]) -> dict[str, str]:
    """The entries of `METRICS` that exist on a data set: recall is COCO's, what goes by frequency is LVIS's."""
    absent = COCO_AP_NAMES if is_lvis(data) else _LVIS_AP_NAMES
    missing = {f"{kind}/{name}" for kind in _KINDS for name in absent} | (set() if is_lvis(data) else {_LVIS_COUNT})
    return {name: setting for name, setting in METRICS.items() if name not in missing}
