"""A small plan for the node kinds of `fake_worker`: two trainings, each with two predictions and their scores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bench.plan import Cell, Node, Plan

WORKER = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))


def make_plan(
    *,
    accidents: dict[int, str] | None = None,
    steps: tuple[int, ...] = (3, 5),
    pause_s: float = 0.0,
    dataset: dict[str, Any] | None = None,
) -> Plan:
    """accidents: number of a cell, from 0 -> how its prediction ends."""
    nodes: dict[str, Node] = {}

    def add(kind: Any, number: int, inputs: tuple[str, ...], spec: dict[str, Any]) -> str:
        node = Node(id=f"{kind}-{number:016x}", kind=kind, inputs=inputs, spec=spec)
        nodes[node.id] = node
        return node.id

    cells = []
    data = add("dataset", 0, (), {"value": 1, **(dataset or {})})
    for training, length in enumerate(steps):
        model = add("train", training, (data,), {"steps": length, "pause_s": pause_s})
        for times in (1, 2):
            number = len(cells)
            spec: dict[str, Any] = {"times": times, "pause_s": pause_s}
            if accidents and number in accidents:
                spec["accident"] = accidents[number]
            predictions = add("predict", number, (data, model), spec)
            scores = add("score", number, (predictions,), {})
            cells.append(
                Cell(
                    run_id=f"{number:016x}",
                    label=f"steps={length} times={times}",
                    axes={"steps": length, "times": times},
                    config={"train": {"steps": length}},
                    nodes={"dataset": data, "train": model, "predict": predictions, "score": scores},
                )
            )
    return Plan(suite_name="fake", cells=tuple(cells), nodes=nodes)
