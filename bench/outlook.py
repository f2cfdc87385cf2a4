"""What a plan is going to do: what runs, what is stored, why, and for how long."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.plan import CANONICAL, Cell, Node, PastNode, Plan, needed_nodes
from bench.suite import axis_value_text

_MAX_COMPARED = 200  # earlier nodes looked at to say what changed


@dataclass(frozen=True)
class PlanLine:
    """What `--plan` says of one node.

    state: 'cached': stored already; 'unneeded': not stored, but all that would use it is. what: for people.
    estimate_s: seconds it is likely to take, 0 if it does not run; None where nothing alike ever ran.
    """

    node: Node
    state: Literal["run", "cached", "unneeded"]
    what: str
    why: str
    estimate_s: float | None


def describe_plan(
    plan: Plan,
    is_done: Callable[[str], bool],
    past: Sequence[PastNode] = (),
    unfinished: Callable[[str], str | None] = lambda _: None,
) -> list[PlanLine]:
    """What will run, what is cached, why, and for how long; in an order in which each node follows its inputs.

    Args:
        plan: the graph.
        is_done: whether a node's result is stored.
        past: nodes computed earlier, of this or of other suites.
        unfinished: what became of earlier attempts at a node that is not done, None where there were none.
    """
    labels: dict[str, list[Cell]] = {}
    for cell in plan.cells:
        for node_id in cell.nodes.values():
            labels.setdefault(node_id, []).append(cell)
    runs = {node.id for node in needed_nodes(plan, is_done)}
    times = _times(past)
    asked: dict[str, list[PastNode]] = {}
    for earlier in past:
        if earlier.stored and earlier.spec_id:
            asked.setdefault(earlier.spec_id, []).append(earlier)
    lines = []
    for node in plan.nodes.values():
        what = _what(node, labels.get(node.id, []))
        if node.id not in runs:
            if is_done(node.id):
                lines.append(PlanLine(node, "cached", what, "stored under this id", 0.0))
            else:
                lines.append(PlanLine(node, "unneeded", what, "what would use it is stored", 0.0))
            continue
        waits = [source for source in node.inputs if source in runs]
        changed = _same_asked(node, plan, asked.get(node.spec_id, ()))
        why = unfinished(node.id) or changed or (f"waits for {waits[0]}" if waits else _why(node, past))
        lines.append(PlanLine(node, "run", what, why, _estimate(node, times)))
    return lines


def _what(node: Node, cells: Sequence[Cell]) -> str:
    config = node.options["config"]
    data, train = config["data"], config["train"]
    if node.kind == "dataset":
        if data["dataset"] == "shapes":
            counts = f"{data['shapes_train_images']} + {data['shapes_val_images']} images"
            return f"shapes, {counts} of {data['shapes_image_size']} pixels"
        return f"{data['dataset']}, {', '.join(node.spec['splits'])}"
    engine = node.options.get("engine")
    name = config["model"]["backbone"] if engine is None else f"{engine['name']} {engine['recipe']}"
    if node.kind == "weights":
        file = config["model"]["weights"] if engine is None else engine["engine_weights"]
        return f"{name} with weights {Path(file).name}, for {data['dataset']}"
    if node.kind == "train":
        size = f"{train['iterations']} iterations of {train['batch_size']} images"
        return f"{name} on {data['dataset']}, {size}, seed {train['seed']}"
    if len(cells) == 1:
        return cells[0].label
    return f"{cells[0].label} and {len(cells) - 1} more" if cells else ""


def _same_asked(node: Node, plan: Plan, same: Sequence[PastNode]) -> str | None:
    """What has changed since the same was computed: code, files, or an input's; None where it never was."""
    reasons = [change_reasons(node, earlier, plan.codes.get(node.code, {})) for earlier in same]
    return f"stale: {'; '.join(min(reasons, key=lambda found: len('; '.join(found))))}" if reasons else None


def change_reasons(node: Node, earlier: PastNode, parts: Mapping[str, str]) -> list[str]:
    """Why a node is not what was computed earlier for the same settings, one reason each.

    Args:
        parts: of the node's code.
    """
    reasons = []
    if earlier.code != node.code:
        names = changed_parts(earlier.parts, parts) if earlier.parts else []
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        reasons.append(f"code changed: {shown}" if names else "code changed")
    if earlier.content != node.content:
        what = "images or annotations" if node.kind == "dataset" else "weights"
        reasons.append(f"{what} changed" if node.content else f"{what} cannot be read")
    if earlier.inputs != node.inputs:
        kinds = [source.partition("-")[0] for source in node.inputs if source not in earlier.inputs]
        reasons.append(f"its {' and '.join(kinds) or 'input'} changed")
    return reasons or ["computed under another id"]


def changed_parts(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Definitions of code that differ, are new or gone: 'diffinst.losses.focal_loss'; sorted."""
    names = [name for name in {*old, *new} if old.get(name) != new.get(name)]
    return sorted(name.removesuffix(":").replace(":", ".") for name in names)


def _why(node: Node, past: Sequence[PastNode]) -> str:
    """Nothing is stored; what differs from the nearest of its kind, if that is little."""
    comparable = (
        earlier
        for earlier in past
        if earlier.stored and earlier.kind == node.kind and earlier.spec.get("splits") == node.spec.get("splits")
    )
    changes = [_changes(earlier.spec, node.spec) for earlier in itertools.islice(comparable, _MAX_COMPARED)]
    changes = [change for change in changes if change]
    if not changes:
        return "nothing stored"
    nearest = min(changes, key=len)
    if len(nearest) > 3:
        return f"nothing stored ({len(nearest)} settings differ from the nearest)"
    return f"nothing stored; nearest has {', '.join(nearest)}"


def _changes(old: Any, new: Any, key: str = "") -> list[str]:
    """'iterations 100 instead of 200' for every leaf that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = sorted({*old, *new})
        return [change for name in names for change in _changes(old.get(name), new.get(name), name)]
    return [] if old == new else [f"{key} {axis_value_text(old)} instead of {axis_value_text(new)}"]


def _times(past: Iterable[PastNode]) -> dict[str, list[float]]:
    """Seconds per unit of work, rising, by what is alike; records count only where the store knows nothing."""
    stored: dict[str, list[float]] = {}
    recorded: dict[str, list[float]] = {}
    for earlier in past:
        if earlier.duration_s is not None:
            found = stored if earlier.stored else recorded
            found.setdefault(_likeness(earlier), []).append(earlier.duration_s / _work(earlier.spec))
    return {key: sorted(rates) for key, rates in (recorded | stored).items()}


def _estimate(node: Node, times: Mapping[str, list[float]]) -> float | None:
    """Median over the earlier nodes that are alike, scaled by how much there is to do."""
    rates = times.get(_likeness(node)) if times else None
    return rates[len(rates) // 2] * _work(node.spec) if rates else None


def _work(spec: Mapping[str, Any]) -> float:
    """Grows with a node's time: iterations; for sampling, the boxes of all steps, and what is done once as 300 more."""
    if "train" in spec:
        return float(spec["train"]["iterations"])
    if "sampler" in spec and "measure" not in spec:
        sampler = spec["sampler"]
        return 300.0 + sampler.get("sampling_steps", 0) * sampler.get("num_proposals", 0)
    return 1.0


def _likeness(node: Node | PastNode) -> str:
    """What two nodes share for their times to be compared."""
    spec = node.spec
    if node.kind == "train":
        same = [spec.get(name) for name in ("model", "engine", "data")]
        same += [spec["train"].get(name) for name in ("batch_size", "num_train_proposals")]
    else:
        same = [spec.get(name) for name in ("data", "model", "engine", "dataset", "splits", "measure", "device")]
    if node.kind in ("predict", "score"):  # as many images
        same += [source for source in node.inputs if source.startswith("dataset-")]
    return CANONICAL.encode([node.kind, *same])


def total_s(lines: Iterable[PlanLine]) -> tuple[float, int]:
    """Seconds of the nodes that run and have an estimate, and how many have none."""
    running = [line.estimate_s for line in lines if line.state == "run"]
    return sum(seconds for seconds in running if seconds is not None), running.count(None)


def duration_text(seconds: float) -> str:
    """'12 s', '5 min', '3 h 20 min'."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
