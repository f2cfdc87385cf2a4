"""What a plan says of itself: states, reasons, times."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from small_plans import SMALL, plan_of

from bench.outlook import describe_plan, duration_text, total_s
from bench.plan import PastNode, Plan, needed_nodes, past_of_record


def test_states_follow_what_is_stored(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, SMALL)
    assert {line.state for line in describe_plan(plan, lambda node_id: False)} == {"run"}
    assert {line.state for line in describe_plan(plan, lambda node_id: True)} == {"cached"}
    cell = plan.cells[0]
    rest = set(plan.nodes) - set(cell.nodes.values())
    # Scores and latencies of all cells are there; the training was deleted: nothing needs it.
    train = cell.nodes["train"]
    lines = {line.node.id: line for line in describe_plan(plan, lambda node_id: node_id != train)}
    assert lines[train].state == "unneeded"
    # One prediction is missing too: it needs the training again.
    lost = {train, cell.nodes["predict"], cell.nodes["score"]}
    lines = {line.node.id: line for line in describe_plan(plan, lambda node_id: node_id not in lost)}
    assert {node_id for node_id, line in lines.items() if line.state == "run"} == lost
    assert lines[cell.nodes["score"]].why == f"waits for {cell.nodes['predict']}"
    assert all(lines[node_id].state == "cached" for node_id in rest)


def test_needed_nodes_against_a_slow_twin(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "axes: {product: {eta: [0, 1], hidden_dim: [64, 128]}}\n")
    random.seed(0)

    def twin(done: set[str]) -> set[str]:
        inputs = {source for node in plan.nodes.values() for source in node.inputs}
        needed = {node_id for node_id in plan.nodes if node_id not in inputs and node_id not in done}
        while True:
            more = {s for node_id in needed for s in plan.nodes[node_id].inputs if s not in done} - needed
            if not more:
                return needed
            needed |= more

    for _ in range(50):
        done = {node_id for node_id in plan.nodes if random.random() < 0.6}
        assert {node.id for node in needed_nodes(plan, done.__contains__)} == twin(done)


def test_why_names_what_changed(tmp_path: Path) -> None:
    old = plan_of(tmp_path, SMALL)
    past = [PastNode(node.kind, node.spec, 10.0) for node in old.nodes.values()]
    new = plan_of(tmp_path, SMALL, "iterations=200", "weight_decay=0")
    lines = {line.node.kind: line for line in describe_plan(new, lambda node_id: node_id in old.nodes, past)}
    assert lines["dataset"].state == "cached"
    assert (
        lines["train"].why
        == "nothing stored; nearest has iterations 100 instead of 200, weight_decay 0.0001 instead of 0"
    )
    assert describe_plan(new, lambda _: False)[0].why == "nothing stored"


def test_times_are_estimated_from_what_is_alike(tmp_path: Path) -> None:
    old = plan_of(tmp_path, SMALL)
    seconds = {"dataset": 1.0, "train": 30.0, "predict": 4.0, "score": 2.0, "latency": 5.0}
    past = [PastNode(node.kind, node.spec, seconds[node.kind], node.inputs) for node in old.nodes.values()]
    new = plan_of(tmp_path, SMALL, "iterations=200", "sampling_steps=1", "num_proposals=[20]")
    lines = {line.node.kind: line.estimate_s for line in describe_plan(new, lambda _: False, past)}
    assert lines["train"] == 60.0  # twice the iterations
    # 4 s for 300 + 1*20, 300 + 1*50, 300 + 4*20, 300 + 4*50; the new one has 320: 4, 3.66, 3.37, 2.56; upper median
    assert lines["predict"] == pytest.approx(4 * 320 / 350)
    assert (lines["dataset"], lines["score"], lines["latency"]) == (1.0, 2.0, 5.0)
    other = plan_of(tmp_path, SMALL, "hidden_dim=128")
    unlike = {line.node.kind: line.estimate_s for line in describe_plan(other, lambda _: False, past)}
    assert unlike["train"] is unlike["predict"] is unlike["latency"] is None
    assert total_s(describe_plan(new, lambda _: False, past)) == (pytest.approx(68 + 4 * 320 / 350), 0)
    assert total_s(describe_plan(other, lambda _: False, past)) == (9.0, 9)


def test_records_tell_times_where_the_store_has_none(tmp_path: Path) -> None:
    old = plan_of(tmp_path, SMALL, "sampling_steps=4", "num_proposals=50").cells[0]
    seconds = {"dataset": 1.0, "train": 30.0, "predict": 4.0, "score": 2.0, "latency": 5.0}
    recorded = past_of_record(old.config, old.measure, dict(old.nodes), seconds)
    new = plan_of(tmp_path, SMALL, "iterations=200", "sampling_steps=4", "num_proposals=50")

    def estimates(plan: Plan, past: list[PastNode]) -> dict[str, float | None]:
        return {line.node.kind: line.estimate_s for line in describe_plan(plan, lambda _: False, past)}

    expected = seconds | {"train": 60.0}
    assert estimates(new, recorded) == expected
    # What the store knows is of here and now; what was resumed tells nothing.
    train = next(node for node in new.nodes.values() if node.kind == "train")
    stored = [PastNode("train", train.spec, None), PastNode("train", train.spec, 70.0)]
    assert estimates(new, recorded + stored) == expected | {"train": 70.0}
    # More images take longer, nobody knows how much; the latency of one image is what it was.
    more = plan_of(tmp_path, SMALL, "shapes_val_images=77", "sampling_steps=4", "num_proposals=50")
    assert estimates(more, recorded) == expected | {"train": 30.0, "predict": None, "score": None}
    # A record holds no result to go on from.
    assert {line.why for line in describe_plan(new, lambda _: False, recorded) if line.node.kind == "dataset"} == {
        "nothing stored"
    }


def test_why_tells_of_earlier_attempts(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, SMALL)
    told = {cell.nodes["predict"]: "failed before: out of memory" for cell in plan.cells[:1]}
    lines = {line.node.id: line.why for line in describe_plan(plan, lambda _: False, unfinished=told.get)}
    assert lines[plan.cells[0].nodes["predict"]] == "failed before: out of memory"
    assert lines[plan.cells[1].nodes["predict"]] == f"waits for {plan.cells[1].nodes['train']}"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (12.4, "12 s"), (89, "89 s"), (100, "2 min"), (5340, "89 min"), (12_000, "3 h 20 min")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
