"""The conditions under which records were measured, as short phrases for captions: numbers never stand without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from bench.engines import DEFAULT_RECIPES
from bench.report.cells import REPEAT_AXES, Record, axis_value, once, varying_axes
from bench.report.latency import describe_samples
from bench.report.metrics import axis_label, axis_text

_MAX_OPTIONS = 3  # of a peer, that are written out; its record has all


def conditions(records: Sequence[Record], metrics: Iterable[str]) -> tuple[str, ...]:
    """Suite, data, model, fixed settings, machine, software; what differs between the records is listed, not hidden.

    Args:
        metrics: names of what is shown. How many timed images were disturbed is told beside times alone: it is another
            number each time, and scores that are the same bytes stay so.
    """
    is_timed = any(name.startswith("latency_s") for name in metrics)
    before, after = _without_times(records)
    return tuple(phrase for phrase in (*before, _samples(records) if is_timed else "", *after) if phrase)


_samples = once(describe_samples)


@once
def _without_times(records: Sequence[Record]) -> tuple[list[str], list[str]]:
    """What is told in any case: before the timed images, and after them."""
    some = _distinct(records)
    counts = _image_counts(some)
    before = [
        _each(some, "suite", lambda record: record.get("suite")),
        _each(some, "", lambda record: _data(record, counts)),
        _each(some, "", _model),
        _each(some, "", _training),
        *_fixed_axes(records),
    ]
    after = [
        _each(some, "", _machine),
        _each(some, "", _software),
        _each(some, "environment", lambda record: record.get("environment_id")),
        _each(records, "", _determinism),
        _each(some, "commit", _commit),
    ]
    return before, after


def _distinct(records: Sequence[Record]) -> list[Record]:
    """The first record of each combination of what is told of one, up to the sampler and the conditions of its run.

    Sections count by identity, which is fast and tells enough: most records of a report share theirs.
    """
    found: dict[tuple[Any, ...], Record] = {}
    for record in records:
        config, environment = record.get("config", {}), record.get("environment", {})
        key = (
            record.get("suite"),
            record.get("environment_id"),
            _images(record),
            *record.get("axes", ()),
            *(part for name, section in config.items() if name != "sampler" for part in (name, id(section))),
            *(part for name, section in environment.items() if name != "conditions" for part in (name, id(section))),
        )
        found.setdefault(key, record)
    return list(found.values())


def _each(records: Sequence[Record], name: str, read: Callable[[Record], Any]) -> str:
    values = list(dict.fromkeys(str(value) for record in records if (value := read(record))))
    if not values:
        return ""
    shown = " / ".join(values[:3]) + (f" / {len(values) - 3} more" if len(values) > 3 else "")
    return f"{name} {shown}".strip()


def _section(record: Record, name: str) -> Mapping[str, Any]:
    section = record.get("config", {}).get(name, {})
    return section if isinstance(section, Mapping) else {}


def _varies(record: Record, name: str) -> bool:
    return any(axis.rpartition(".")[2] == name for axis in record.get("axes", {}))


def _image_counts(records: Sequence[Record]) -> dict[str, set[float]]:
    """The section `data`, as text -> how many images its records scored, as far as they know."""
    found: dict[str, set[float]] = {}
    for record in records:
        counts = found.setdefault(repr(_section(record, "data")), set())
        if count := _images(record):
            counts.add(count)
    return found


def _data(record: Record, image_counts: Mapping[str, set[float]]) -> str | None:
    """The data set and how many images were scored; a record that failed before it knew takes the others' word."""
    section = _section(record, "data")
    if "dataset" not in section or _varies(record, "dataset"):
        return None
    text = f"data {section['dataset']}"
    counts = image_counts[repr(section)]
    if len(counts) == 1:
        text += f", {next(iter(counts)):.0f} validation images"
        if section["dataset"] == "shapes" and "shapes_image_size" in section:
            text += f" of {section['shapes_image_size']} px"
    if section.get("class_agnostic") and not _varies(record, "class_agnostic"):
        text += ", class-agnostic"
    return text


def _images(record: Record) -> float | None:
    value = record.get("metrics", {}).get("num_images", {}).get("value")
    return float(value) if value is not None else None


def _model(record: Record) -> str | None:
    engine = _section(record, "engine")
    if engine:
        return _engine(engine)
    section = _section(record, "model")
    if "backbone" not in section or _varies(record, "backbone"):
        return None
    stages = section.get("num_stages")
    return f"backbone {section['backbone']}" + (f", {stages} stages" if stages else "")


def _engine(engine: Mapping[str, Any]) -> str:
    """A peer, its recipe and its own settings."""
    name, options = engine.get("name"), engine.get("options") or {}
    recipe = engine.get("recipe") or DEFAULT_RECIPES.get(str(name), "")
    text = f"{name} {PurePosixPath(recipe).stem}"
    if len(options) > _MAX_OPTIONS:
        return f"{text} with {len(options)} options of its own"
    return text + "".join(f", {key} {axis_text(value)}" for key, value in options.items())


def _is_trained(record: Record) -> bool:
    files = (_section(record, "model").get("weights"), _section(record, "engine").get("engine_weights"))
    return all(file in (None, "none") for file in files)


def _training(record: Record) -> str | None:
    section = _section(record, "train")
    if not _is_trained(record):
        return "weights from a file"
    if not {"iterations", "batch_size"} <= set(section) or _varies(record, "iterations"):
        return None
    return f"{section['iterations']:,} iterations of batch {section['batch_size']}".replace(",", " ")


def _fixed_axes(records: Sequence[Record]) -> list[str]:
    varying = {*varying_axes(records), *REPEAT_AXES}
    names = dict.fromkeys(axis.rpartition(".")[2] for record in records for axis in record.get("axes", {}))
    fixed = [name for name in names if name not in varying]
    return [f"{axis_label(name)} {axis_text(axis_value(records[0], name))}" for name in fixed]


def _machine(record: Record) -> str | None:
    environment = record.get("environment", {})
    cpu = environment.get("cpu")
    if not isinstance(cpu, Mapping) or not cpu.get("model"):
        return None
    text = f"{cpu['model']}, {cpu.get('usable_cores', '?')} cores"
    device = environment.get("process", {}).get("device_name")
    return f"{device} ({text})" if device else text


def _software(record: Record) -> str | None:
    environment = record.get("environment", {})
    # A peer may have run in an interpreter of its own.
    packages = environment.get("process", {}).get("packages") or environment.get("packages", {})
    version = packages.get("torch")
    return f"torch {version}" if version else None


def _determinism(record: Record) -> str | None:
    """That a run would not give the same bits again, where one of its nodes saw so; else None."""
    nodes = record.get("environment", {}).get("conditions", {})
    levels = {node["determinism"]["level"] for node in nodes.values() if "determinism" in node}
    found = next((level for level in ("not bitwise", "unknown", "bitwise") if level in levels), None)
    # The warning only: a training that is resumed after its last iteration cannot tell that it was repeatable, and a
    # caption must not depend on when a run was interrupted.
    return "not bitwise repeatable" if found == "not bitwise" else None


def _commit(record: Record) -> str | None:
    environment = record.get("environment", {})
    commit = environment.get("commit")
    if not commit:
        return None
    return f"{str(commit)[:10]}{' with uncommitted changes' if environment.get('dirty') else ''}"
