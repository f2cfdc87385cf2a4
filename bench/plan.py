"""A suite becomes a graph: data set -> training -> predictions -> scores, and a cell per combination of axes and seed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

NodeKind = Literal["dataset", "train", "predict", "score", "latency"]


@dataclass(frozen=True)
class Node:
    """One piece of work whose result is stored under its id and reused when it exists.

    id: kind and the first 16 hex digits of the SHA-256 of the canonical JSON of (kind, spec, input ids), 'train-0f3a...'.
    spec: JSON-able; everything that determines the result, and nothing else (no paths, no host, no worker count).
    options: JSON-able; what may change without changing the result (data root, device, number of workers).
    """

    id: str
    kind: NodeKind
    inputs: tuple[str, ...]
    spec: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Cell:
    """One row of the suite's table: the axis values, the resolved configuration and the nodes that produce its numbers.

    run_id: 16 hex digits from the node ids and the measurement settings; names the record file.
    label: 'sampling_steps=4 num_proposals=100 seed=0', for people and for `--only`.
    """

    run_id: str
    label: str
    axes: dict[str, Any]
    config: dict[str, Any]
    nodes: dict[NodeKind, str]


@dataclass(frozen=True)
class Plan:
    """All cells in table order and all nodes in an order in which each comes after its inputs."""

    suite_name: str
    cells: tuple[Cell, ...]
    nodes: dict[str, Node]
