"""Why two records must not be compared: what differs between the conditions of their measurements, in words.

Numbers of different conditions are no better and no worse than each other. What is meant to be compared (code, weights,
training, the network) may differ; what a number is taken of and how may not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from bench.report.cells import REPEAT_AXES, Record
from bench.report.metrics import axis_text

Kind = Literal["score", "time", "memory", "count", "other"]

_KINDS: dict[str, Kind] = {
    "segm": "score",
    "bbox": "score",
    "latency_s": "time",
    "training_step_s": "time",
    "benchmark_s": "time",
    "peak_memory_bytes": "memory",
    "num_parameters": "count",
    "flops": "count",
}
# Which images are seen and how they are labelled, whatever their size.
IMAGES_AND_LABELS = (
    "dataset",
    "val_annotations",
    "val_images",
    "val_image_ids",
    "class_agnostic",
    "annotation_format",
    "skip_invalid",
    "shapes_val_images",
    "shapes_image_size",
    "shapes_seed",
)
_DATA = (*IMAGES_AND_LABELS, "shortest_edge_test", "longest_edge_test")
_ENGINE = ("name", "recipe", "options")
# What of `measure` says how a number is taken; whether others are taken beside it does not matter.
_NOT_PROTOCOL = ("score", "latency", "memory", "flops", "training_step", "device")


def kind_of(metric: str) -> Kind:
    """What sort of number a metric is, by the first part of its name."""
    return _KINDS.get(metric.partition("/")[0], "other")


def machine_of(record: Record) -> str:
    """The class of machine a record was measured on; '' where it does not say."""
    return str(record.get("environment", {}).get("machine") or record.get("machine") or "")


def differences(base: Record, head: Record) -> dict[Kind, tuple[str, ...]]:
    """For each kind of metric, what forbids to compare it: 'data.longest_edge_test 96 and 128'; mostly nothing.

    The two sides of a race (`bench.race`) saw the same images by turns, and are settings that are meant to be compared.
    """
    settings = () if is_race(base, head) else (*_sampler(base, head), *_precision(base, head))
    inputs = () if is_race(base, head) else (*_engine(base, head), *_data(base, head))
    conditions = (*_images(base, head), *settings)
    devices, of_scores = tuple(_device(base, head)), tuple(_device(base, head, "predict"))
    timing = (*_protocol(base, head), *_machine(base, head))
    return {
        "score": (*inputs, *conditions, *of_scores),
        "time": (*inputs, *conditions, *devices, *timing),
        "memory": (*inputs, *conditions, *devices, *timing),
        # Operations depend on the size of the images and on the sampler's settings, parameters on neither.
        "count": (*inputs, *(() if is_race(base, head) else _sampler(base, head))),
        "other": (*inputs, *conditions, *of_scores),
    }


def is_race(base: Record, head: Record) -> bool:
    """Whether the two were timed by turns in one race."""
    races = [_mapping(record, "measure").get("race") for record in (base, head)]
    return races[0] is not None and races[0] == races[1]


def remarks(base: Record, head: Record) -> Iterator[str]:
    """What differs and may: settings of the network and the training, versions, the commit."""
    for section in ("model", "train"):
        yield from _section(base, head, section, skip=REPEAT_AXES)
    if is_race(base, head):
        yield from (*_engine(base, head), *_data(base, head), *_sampler(base, head), *_precision(base, head))
        yield from _differ("commit", *(record.get("environment", {}).get("commit") for record in (base, head)))
    old, new = base.get("environment", {}), head.get("environment", {})
    for name in ("torch", "torchvision", "numpy"):
        yield from _differ(name, old.get("packages", {}).get(name), new.get("packages", {}).get(name))
    yield from _differ("python", old.get("python"), new.get("python"))


def _differ(name: str, old: Any, new: Any) -> Iterator[str]:
    """What one side does not say counts as no difference: older records have fewer fields."""
    if old is not None and new is not None and old != new:
        yield f"{name} {axis_text(old)} and {axis_text(new)}"


def _mapping(record: Record, *path: str) -> Mapping[str, Any]:
    found: Any = record
    for name in path:
        found = found.get(name) if isinstance(found, dict | Mapping) else None  # a dict is told in a tenth of the time
    return found if isinstance(found, dict | Mapping) else {}


def _section(base: Record, head: Record, section: str, *, skip: tuple[str, ...] = ()) -> Iterator[str]:
    old, new = _mapping(base, "config", section), _mapping(head, "config", section)
    if old == new:
        return
    for name in old:
        if name in new and name not in skip and old[name] != new[name]:
            yield f"{section}.{name} {axis_text(old[name])} and {axis_text(new[name])}"


def _engine(base: Record, head: Record) -> Iterator[str]:
    old, new = _mapping(base, "config", "engine"), _mapping(head, "config", "engine")
    if old == new:
        return
    yield from _differ("engine", old.get("name", "diffinst"), new.get("name", "diffinst"))
    if old and new:
        for name in _ENGINE[1:]:
            yield from _differ(f"engine.{name}", old.get(name) or "none", new.get(name) or "none")


def _data(base: Record, head: Record) -> Iterator[str]:
    old, new = _mapping(base, "config", "data"), _mapping(head, "config", "data")
    if old == new:
        return
    for name in _DATA:
        if name in old and name in new and old[name] != new[name]:
            yield f"data.{name} {axis_text(old[name])} and {axis_text(new[name])}"


def _images(base: Record, head: Record) -> Iterator[str]:
    for name in ("num_images", "num_instances"):
        old, new = (_mapping(record, "metrics", name).get("value") for record in (base, head))
        yield from _differ(name, old, new)


def _sampler(base: Record, head: Record) -> Iterator[str]:
    return _section(base, head, "sampler", skip=REPEAT_AXES)


def _device(base: Record, head: Record, node: str = "") -> Iterator[str]:
    """Devices of the processes that the environments describe, or of a kind of node, where the record tells it."""
    found = []
    for record in (base, head):
        process = _mapping(record, "environment", "process")
        of_node = _mapping(record, "node_runs", node).get("device")
        found.append(of_node or process.get("device_name") or process.get("device"))
    yield from _differ("device", *found)


def _precision(base: Record, head: Record) -> Iterator[str]:
    old, new = (_mapping(record, "config", "train").get("precision") for record in (base, head))
    yield from _differ("precision", old, new)
    flags = [_mapping(record, "environment", "process", "flags") for record in (base, head)]
    if flags[0] != flags[1]:
        for name in ("float32_matmul_precision", "cudnn_tf32", "matmul_tf32"):
            yield from _differ(name, flags[0].get(name), flags[1].get(name))


def _protocol(base: Record, head: Record) -> Iterator[str]:
    old, new = _mapping(base, "measure"), _mapping(head, "measure")
    for name in {**old, **new}:
        if name not in _NOT_PROTOCOL:
            yield from _differ(f"measure.{name}", old.get(name), new.get(name))
    scopes = [set(_mapping(record, "samples", "latency_s")) for record in (base, head)]
    if all(scopes) and scopes[0] != scopes[1]:
        yield f"timing scopes {axis_text(sorted(scopes[0]))} and {axis_text(sorted(scopes[1]))}"


def _machine(base: Record, head: Record) -> Iterator[str]:
    yield from _differ("machine", machine_of(base) or None, machine_of(head) or None)
    old, new = (_mapping(record, "environment", "process") for record in (base, head))
    for name in ("threads", "variables"):
        yield from _differ(name, old.get(name), new.get(name))
    for name in ("deterministic_algorithms", "cudnn_deterministic", "cudnn_benchmark"):
        yield from _differ(name, _mapping(old, "flags").get(name), _mapping(new, "flags").get(name))
