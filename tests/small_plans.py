"""Plans of small suites, written into a folder."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from bench.plan import Node, Plan, build_plan
from bench.suite import load_suite

SMALL = """
name: small
model: {backbone: tiny, hidden_dim: 64}
train: {iterations: 100}
axes: {product: {sampling_steps: [1, 4], num_proposals: [20, 50]}}
"""


def plan_of(folder: Path, text: str, *overrides: str, **options: Any) -> Plan:
    path = folder / "s.yaml"
    path.write_text(textwrap.dedent(text))
    return build_plan(load_suite(path, overrides), **options)


def nodes_of(plan: Plan, kind: str) -> list[Node]:
    return [node for node in plan.nodes.values() if node.kind == kind]
