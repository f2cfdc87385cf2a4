"""Why a run is what it is: each component of its identity, who set it, and why it is stored or stale. Loads no torch.

A run's nodes have ids of four components: settings, inputs, code and files. For each node this says what they are, and
against what is stored under other ids for the same settings, which of them changed. The environment is no part of an
id: each record tells its own.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench.errors import BenchError, RecordError
from bench.origins import origin_of, origin_of_measure
from bench.outlook import change_reasons
from bench.plan import Cell, Node, PastNode, Plan
from bench.record import RunRecord, load_record
from bench.store import NodeResult, Store, past_of_result
from bench.suite import Suite, SuiteCell, axis_value_text
from diffinst.config import SECTIONS


@dataclass(frozen=True)
class Component:
    """One part of a node's identity. origin: who set it, with file and line; '' where the value says it."""

    name: str
    value: str
    origin: str = ""


@dataclass(frozen=True)
class NodeExplanation:
    """state: 'cached', 'stale' (stored under another id for the same settings) or 'absent'. why: one line."""

    node: Node
    state: str
    why: str
    components: tuple[Component, ...]


@dataclass(frozen=True)
class Explanation:
    """cell: of the plan. records: what is recorded for it here, newest first. nodes: in the order in which they run."""

    cell: Cell
    records: tuple[tuple[Path, RunRecord], ...]
    nodes: tuple[NodeExplanation, ...]


def find_cell(plan: Plan, run: str, recorded_with: Sequence[str] = ()) -> Cell:
    """The cell that `run` names: a run id or the beginning of one, a record file, or a label.

    Args:
        recorded_with: the `--set` arguments that a record of it was made with and that the plan lacks, for the message.
    Raises:
        BenchError: none or several.
    """
    name = Path(run).stem if run.endswith(".json") else run
    found = [cell for cell in plan.cells if name == cell.label or (len(name) >= 4 and cell.run_id.startswith(name))]
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{cell.run_id} ({cell.label})" for cell in (found or plan.cells)[:4])
    more = "" if len(found or plan.cells) <= 4 else ", ..."
    what = f"names {len(found)} runs" if found else "names no run of the suite"
    if recorded_with and not found:
        same = " ".join(f"--set {shlex.quote(text)}" for text in recorded_with)
        raise BenchError(f"'{run}' {what} as it is here: it was recorded with {same}. Give the same")
    raise BenchError(f"'{run}' {what}. Give one of: {known}{more}")


def recorded_overrides(record: RunRecord) -> tuple[str, ...]:
    """The `--set` arguments of the command that made a record."""
    try:
        words = shlex.split(record.command)
    except ValueError:  # nobody's shell wrote it
        return ()
    found = [following for word, following in zip(words, words[1:]) if word == "--set"]
    return tuple(found + [word.removeprefix("--set=") for word in words if word.startswith("--set=")])


def explain_run(plan: Plan, cell: Cell, suite: Suite, store: Store) -> Explanation:
    """Everything there is to say about a run of `plan`."""
    chosen = next(other for other in suite.cells if other.axes == cell.axes)
    past = _stored_nodes(store)
    ordered = [node for node in plan.nodes.values() if node.id in set(cell.nodes.values())]
    nodes = tuple(_explain_node(plan, node, suite, chosen, store, past) for node in ordered)
    return Explanation(cell, tuple(_records(store, suite.name, cell.run_id)), nodes)


def _explain_node(
    plan: Plan, node: Node, suite: Suite, cell: SuiteCell, store: Store, past: Sequence[tuple[NodeResult, PastNode]]
) -> NodeExplanation:
    done = store.result(node.id)
    same = [
        (result, earlier)
        for result, earlier in past
        if earlier.spec_id == node.spec_id and node.spec_id and result.id != node.id
    ]
    parts = plan.codes.get(node.code, {})
    if done is not None:
        state, why = "cached", f"computed {done.finished_at} in {done.duration_s:.1f} s, start {done.attempts}"
    elif same:
        result, earlier = max(same, key=lambda pair: pair[0].finished_at)
        reasons = "; ".join(change_reasons(node, earlier, parts))
        state, why = "stale", f"{result.id} of {result.finished_at} had the same settings: {reasons}"
    else:
        state, why = "absent", store.unfinished(node.id) or "nothing stored for these settings"
    components = [
        Component("code", node.code, f"{len(parts)} definitions"),
        Component("files", node.content or "-", _files_text(node)),
        *(Component("input", source) for source in node.inputs),
        *_settings(node.spec, suite, cell),
    ]
    return NodeExplanation(node, state, why, tuple(components))


def _files_text(node: Node) -> str:
    if node.content:
        return "annotations and images" if node.kind == "dataset" else "weights of an installed package"
    if node.kind == "dataset" and node.spec.get("dataset") == "shapes":
        return "generated: settings and code determine it"
    return "not found here, or none" if node.kind == "dataset" else "none but its inputs"


def _settings(spec: Mapping[str, Any], suite: Suite, cell: SuiteCell) -> Iterator[Component]:
    for name, value in sorted(spec.items()):
        section = name if name in SECTIONS or name == "engine" else "data" if name in _data_fields() else None
        if isinstance(value, Mapping) and section is not None:
            for inner, content in sorted(value.items()):
                is_field = section == "engine" or inner in SECTIONS[section].model_fields
                origin = origin_of(suite, cell, section, inner) if is_field else ""
                yield Component(f"{section}.{inner}", axis_value_text(content), origin)
        elif section == "data":
            yield Component(f"data.{name}", axis_value_text(value), origin_of(suite, cell, "data", name))
        elif name == "measure" and isinstance(value, Mapping):
            for inner, content in sorted(value.items()):
                yield Component(f"measure.{inner}", axis_value_text(content), origin_of_measure(suite, inner))
        else:
            yield Component(name, axis_value_text(value), _derived_origin(name, spec, suite, cell))


def _derived_origin(name: str, spec: Mapping[str, Any], suite: Suite, cell: SuiteCell) -> str:
    """Where a setting comes from that is no field of the suite."""

    def follows(section: str, *fields: str) -> str:
        return ", ".join(f"{section}.{field} at {origin_of(suite, cell, section, field)}" for field in fields)

    splits = spec.get("splits", [])
    if name == "splits":
        why = "its parameters give both" if len(splits) == 2 else "a split is a node of its own"
        return f"{why}: {follows('data', 'dataset')}"
    if name == "iou_types":
        return f"follows from {follows('model', 'mask')}"
    if name == "protocol":
        return f"follows from {follows('data', 'dataset', 'annotation_format')}"
    if name in ("image_ids", "annotations") and len(splits) == 1:
        field = f"{splits[0]}_{name}"
        return f"content of {follows('data', field)}"
    return "not --device: left to the run" if name == "device" else ""


def _data_fields() -> Mapping[str, Any]:
    return SECTIONS["data"].model_fields


def _stored_nodes(store: Store) -> list[tuple[NodeResult, PastNode]]:
    parts = cache(store.code_parts)
    return [(done, past_of_result(done, parts(done.code))) for done in store.results()]


def _records(store: Store, suite: str, run_id: str) -> Iterator[tuple[Path, RunRecord]]:
    found = []
    for path in sorted((store.root / suite).glob(f"*/{run_id}.json")):
        try:
            found.append((path, load_record(path)))
        except RecordError:
            continue
    yield from sorted(found, key=lambda pair: pair[1].started_at or "", reverse=True)


def to_lines(explanation: Explanation) -> list[str]:
    """The explanation as plain text, aligned."""
    cell = explanation.cell
    lines = [f"run      {cell.run_id}  {cell.label}"]
    current: dict[str, Node] = {node.node.kind: node.node for node in explanation.nodes}
    for path, record in explanation.records:
        commits = {run.commit[:12] if run.commit else "unknown" for run in record.node_runs.values()}
        lines.append(f"record   {path}: {record.status}, {record.finished_at}, commit {', '.join(sorted(commits))}")
        lines.append(f"         environment {record.environment_id or 'not told: older than its ids'}")
        lines.append(f"         {_record_state(record, current)}")
    if not explanation.records:
        lines.append("record   none in this results folder")
    for node in explanation.nodes:
        lines += ["", f"{node.state:<8} {node.node.id}", f"         {node.why}"]
        width = max(len(component.name) for component in node.components)
        value_width = min(max(len(component.value) for component in node.components), 44)
        for component in node.components:
            text = f"         {component.name:<{width}}  {component.value:<{value_width}}  {component.origin}"
            lines.append(text.rstrip())
    return lines


def _record_state(record: RunRecord, current: Mapping[str, Node]) -> str:
    """Is the record of the present code and files?"""
    if not record.code:
        return "stale or not: it is older than digests of code in records"
    changed = [
        kind for kind, node in current.items() if record.code.get(kind, node.code) != node.code and kind in record.nodes
    ]
    if changed:
        return f"stale: the code of {', '.join(changed)} has changed since"
    return "of the present code"
