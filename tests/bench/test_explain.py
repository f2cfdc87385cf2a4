"""Why a run is cached or stale: every component named, with the file and line that set it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from run_records import make_record

from bench.diffbench import main
from bench.errors import BenchError
from bench.explain import explain_run, find_cell, to_lines
from bench.origins import origin_of
from bench.plan import Node, Plan, build_plan
from bench.record import RunRecord
from bench.store import NodeResult, Store, write_atomic
from bench.suite import Suite, load_suite

TEXT = """\
name: small
preset: released
model: {backbone: tiny}
train:
  iterations: 100
axes:
  product:
    sampling_steps: [1, 4]
seeds: [0, 1]
"""


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    path = tmp_path / "small.yaml"
    path.write_text(TEXT)
    return load_suite(path, ["num_proposals=30"])


def finish(store: Store, node: Node, plan: Plan) -> None:
    """Store a node as if it had been run."""
    with store.lock():
        folder = store.begin(node)
        store.keep_code(node.code, plan.codes[node.code])
        result = NodeResult(
            id=node.id,
            kind=node.kind,
            spec=node.spec,
            inputs=list(node.inputs),
            started_at="2026-01-01T00:00:00Z",
            finished_at="2026-01-01T00:00:02Z",
            duration_s=2.0,
            attempts=1,
            files={},
            outputs={},
            environment={},
            spec_id=node.spec_id,
            code=node.code,
            content=node.content,
        )
        write_atomic(folder / "done.json", result.model_dump_json())


def test_who_set_a_value(suite: Suite) -> None:
    cell = suite.cells[-1]
    file = suite.path
    assert origin_of(suite, cell, "train", "iterations") == f"{file}:5:15"
    assert origin_of(suite, cell, "model", "backbone") == f"{file}:3:19"
    assert origin_of(suite, cell, "sampler", "sampling_steps") == f"{file}:8:25 (axis)"
    assert origin_of(suite, cell, "sampler", "num_proposals") == "--set num_proposals=30"
    assert origin_of(suite, cell, "train", "seed") == f"{file}:9:1 (seeds)"
    assert origin_of(suite, cell, "train", "matcher") == f"preset: released, {file}:2:1"
    default = origin_of(suite, cell, "train", "batch_size")
    name, _, line = default.removesuffix(" (default)").partition(":")
    assert name == "diffinst/config.py"
    source = (Path(__file__).parents[2] / name).read_text().splitlines()
    assert source[int(line) - 1].strip().startswith("batch_size")


def test_nothing_stored_then_cached_then_stale(suite: Suite, tmp_path: Path) -> None:
    store, plan = Store(tmp_path / "results"), build_plan(suite)
    cell = plan.cells[0]

    def states(of: Plan) -> dict[str, str]:
        return {node.node.kind: node.state for node in explain_run(of, of.cells[0], suite, store).nodes}

    assert set(states(plan).values()) == {"absent"}
    for kind in ("dataset", "train"):
        finish(store, plan.nodes[cell.nodes[kind]], plan)  # type: ignore[index]
    assert states(plan) == {
        **{"dataset": "cached", "train": "cached"},
        **{"predict": "absent", "score": "absent", "latency": "absent"},
    }
    changed = with_other_code(plan, "train", "diffinst.losses:focal_loss")
    assert states(changed)["train"] == "stale"
    text = "\n".join(to_lines(explain_run(changed, changed.cells[0], suite, store)))
    assert "code changed: diffinst.losses.focal_loss" in text


def with_other_code(plan: Plan, kind: str, part: str) -> Plan:
    """The plan as it were if one definition of a node's code had other content."""
    old = next(node for node in plan.nodes.values() if node.kind == kind)
    parts = dict(plan.codes[old.code]) | {part: "other"}
    new = dataclasses.replace(old, id=f"{kind}-other", code="other")
    nodes = {
        new.id if node.id == old.id else node.id: new if node.id == old.id else node for node in plan.nodes.values()
    }
    cells = tuple(
        dataclasses.replace(cell, nodes={name: new.id if node == old.id else node for name, node in cell.nodes.items()})
        for cell in plan.cells
    )
    return dataclasses.replace(plan, nodes=nodes, cells=cells, codes={**plan.codes, "other": parts})


def test_a_run_is_found_by_id_beginning_label_or_file(suite: Suite) -> None:
    plan = build_plan(suite)
    cell = plan.cells[1]
    for name in (cell.run_id, cell.run_id[:8], cell.label, f"results/small/machine/{cell.run_id}.json"):
        assert find_cell(plan, name) is cell
    with pytest.raises(BenchError, match="names no run of the suite. Give one of: "):
        find_cell(plan, "nothing")


def test_the_command(suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    label = "sampling_steps=4 seed=1"
    code = main(["explain", label, "--suite", str(suite.path), "--results", str(tmp_path / "none")])
    out = capsys.readouterr().out
    assert code == 0
    assert out.splitlines()[0].endswith(label)
    assert "record   none in this results folder" in out
    row = next(line for line in out.splitlines() if "sampler.sampling_steps" in line)
    assert row.split()[1:] == ["4", f"{suite.path}:8:25", "(axis)"]
    assert not (tmp_path / "none").exists()


def test_a_run_without_record_or_suite_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "0123456789abcdef", "--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def settings(plan: Plan, suite: Suite, kind: str, tmp_path: Path) -> dict[str, tuple[str, str]]:
    """Name -> value and origin of the settings of the first cell's node of a kind."""
    nodes = explain_run(plan, plan.cells[0], suite, Store(tmp_path / "none")).nodes
    parts = next(node for node in nodes if node.node.kind == kind).components
    return {part.name: (part.value, part.origin) for part in parts}


def test_who_set_what_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(TEXT + "measure: {latency_images: 3, latency_seconds: 1.0}\n")
    suite = load_suite(path, ["measure.latency_seconds=2.0", "flops=false"])
    found = settings(build_plan(suite), suite, "latency", tmp_path)
    assert found["measure.latency_images"] == ("3", f"{path}:10:27")
    assert found["measure.latency_seconds"] == ("2", "--set measure.latency_seconds=2.0")
    assert found["measure.flops"] == ("false", "--set flops=false")
    assert found["measure.memory"] == ("true", "default")
    assert found["device"] == ("auto", "not --device: left to the run")


def test_what_follows_from_other_settings_says_from_which(suite: Suite, tmp_path: Path) -> None:
    plan = build_plan(suite)
    dataset, score = (settings(plan, suite, kind, tmp_path) for kind in ("dataset", "score"))
    assert dataset["splits"][1].startswith("its parameters give both: data.dataset at diffinst/config.py:")
    assert score["iou_types"][1].startswith("follows from model.mask at ")
    for kind in ("dataset", "train", "predict", "score", "latency"):
        for name, (_, origin) in settings(plan, suite, kind, tmp_path).items():
            assert origin or name == "input", (kind, name)


def keep_record(tmp_path: Path, cell_id: str, command: str) -> RunRecord:
    record = make_record(suite="small", run_id=cell_id, command=command, environment_id="0011223344556677")
    Store(tmp_path / "results").write_record(record, "some-cpu")
    return record


def test_the_environment_of_a_record_is_told(suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = build_plan(load_suite(suite.path)).cells[0]
    keep_record(tmp_path, cell.run_id, "run-suite small.yaml")
    code = main(["explain", cell.run_id, "--suite", str(suite.path), "--results", str(tmp_path / "results")])
    assert code == 0
    assert "\n         environment 0011223344556677\n" in capsys.readouterr().out


@pytest.mark.parametrize("whole", [True, False])
def test_a_run_of_other_overrides_says_which(
    suite: Suite, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, whole: bool
) -> None:
    cell = build_plan(load_suite(suite.path, ["iterations=1000", "shortest_edge_train=[96, 128]"])).cells[0]
    command = "run-suite small.yaml --results <results> --set iterations=1000 --set 'shortest_edge_train=[96, 128]'"
    keep_record(tmp_path, cell.run_id, command)
    run = str(tmp_path / f"results/small/some-cpu/{cell.run_id}.json") if whole else cell.run_id[:10]
    arguments = ["explain", run, "--suite", str(suite.path), "--results", str(tmp_path / "results")]
    assert main(arguments) == 2
    assert capsys.readouterr().err.endswith(
        "names no run of the suite as it is here: it was recorded with --set iterations=1000 "
        "--set 'shortest_edge_train=[96, 128]'. Give the same\n"
    )
    assert main([*arguments, "--set", "iterations=1000", "--set", "shortest_edge_train=[96, 128]"]) == 0
