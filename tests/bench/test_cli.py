"""run-suite's command line: exit codes, one line per mistake, a plan without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bench.execute
from bench.cli import main
from bench.plan import Plan
from bench.record import Metric, RunRecord
from bench.store import Store

ROOT = Path(__file__).resolve().parents[2]

SUITE = """
name: small
description: for a test
model: {backbone: tiny}
axes: {product: {sampling_steps: [1, 4]}}
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SUITE)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_plan_says_what_runs_and_creates_nothing(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    code, out, err = run(capsys, suite, "--plan", "--results", results)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "small: for a test"
    assert lines[1].split() == ["state", "node", "what", "time", "why"]
    assert [line.split()[:2][1].split("-")[0] for line in lines[2:-1]] == [
        *("dataset", "train", "predict", "score", "latency"),
        *("predict", "score", "latency"),
    ]
    assert "sampling_steps=4 seed=0" in lines[-2]
    assert lines[-1] == "2 cells, 8 nodes: 8 to run (unknown time), 0 cached"
    assert not results.exists()


def test_a_warning_is_a_line_of_the_cells_that_are_asked_for(suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite.write_text("axes: {product: {backbone: [tiny, resnet50]}}\n")
    code, out, err = run(capsys, suite, "--plan")
    assert code == 0
    assert err.startswith(f"warning: {suite}:1:35: model.freeze_at: the first 2 stages of resnet50 are frozen")
    assert err.count("\n") == 1
    assert "warning" not in out
    assert run(capsys, suite, "--plan", "--only", "tiny")[2] == ""


def test_a_plan_is_the_same_text_again(suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, suite, "--plan", "--results", tmp_path) == run(capsys, suite, "--plan", "--results", tmp_path)


def test_a_plan_loads_nothing_heavy(suite: Path) -> None:
    code = (
        "import sys; from bench.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'matplotlib', 'pandas', 'numpy', 'bench.execute'} & sys.modules.keys(); "
        "print(*sorted(heavy), file=sys.stderr); "
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(suite), "--plan"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_every_mistake_is_a_line_and_the_code_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("sampler: {sampling_step: 4, eta: 2}\naxes: {product: {num_proposal: [1]}}\n")
    code, out, err = run(capsys, path, "--results", tmp_path / "results", "--set", "iterations=none")
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert [line.removeprefix(f"{path}:").split(" ")[0] for line in lines] == ["1:11:", "1:34:", "2:18:", "--set"]
    assert lines[0].endswith("Did you mean 'sampling_steps'?")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "gpu"], "--device gpu: is not allowed. Allowed: cpu, cuda, cuda:N\n"),
        (["--device", "mps"], "--device mps: is not allowed. Allowed: cpu, cuda, cuda:N\n"),
        (["--data-root", "/nowhere"], "--data-root /nowhere: no such folder."),
        (["--only", "sampling_steps=3"], "--only sampling_steps=3: matches no cell."),
        (["--set", "etaa=0"], "--set etaa=0: unknown key."),
    ],
)
def test_wrong_options(suite: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, out, err = run(capsys, suite, "--plan", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--workers", "-1", "x.yaml"], ["x.yaml", "--plann"], ["x.yaml", "y.yaml"]])
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run(capsys, *arguments)[0] == 2


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for option in ("--plan", "--results", "--data-root", "--set", "--only", "--device", "--workers"):
        assert option in out


def test_a_missing_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, tmp_path / "none.yaml")
    assert code == 2
    assert err == f"{tmp_path / 'none.yaml'}: cannot be read (No such file or directory). Give a suite file.\n"


def test_the_data_root_comes_from_the_environment(
    suite: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFINST_DATASETS", "/nowhere")
    code, _, err = run(capsys, suite, "--plan")
    assert (code, err.split(": no such")[0]) == (2, "DIFFINST_DATASETS /nowhere")


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_running_hands_over_the_plan_and_returns_its_code(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    seen: list[Any] = []

    def run_plan(plan: Plan, store: Store, **options: Any) -> SimpleNamespace:
        seen.append((plan, store, options))
        failure = SimpleNamespace(category="user", reason="train: no such data set")
        return SimpleNamespace(
            machine="m",
            ok=["a"] if code != 1 else [],
            failed=["b"] if code == 1 else [],
            missing=[],
            records={},
            failures={"x": failure, "y": failure} if code == 2 else {},
            interrupted=code == 130,
            exit_code=code,
        )

    monkeypatch.setattr(bench.execute, "run_plan", run_plan)
    found, out, err = run(
        capsys, suite, "--results", tmp_path / "r", "--data-root", tmp_path, "--only", "*=4", "--workers", 3
    )
    assert found == code
    plan, store, options = seen[0]
    assert [cell.axes["sampling_steps"] for cell in plan.cells] == [4]
    assert store.root == tmp_path / "r"
    assert options["private"][str(tmp_path)] == "<data-root>"
    assert options["command"][0] == "run-suite"
    assert next(iter(plan.nodes.values())).options["config"]["train"]["num_workers"] == 3
    assert err == ("run-suite: train: no such data set\n" if code == 2 else "")
    assert out == f"run-suite: small: {'0 of 1 runs ok, 1 failed' if code == 1 else '1 of 1 runs ok'}\n"


def test_a_run_ends_with_the_suites_tables_and_where_its_files_are(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_plan(plan: Plan, store: Store, **_: Any) -> SimpleNamespace:
        paths = {}
        for cell in plan.cells:
            steps = cell.axes["sampling_steps"]
            record = RunRecord(
                suite=plan.suite_name,
                run_id=cell.run_id,
                label=cell.label,
                status="ok",
                axes=cell.axes,
                config=cell.config,
                nodes=dict(cell.nodes),
                metrics={"segm/AP": Metric(value=0.1 * steps, unit="fraction", higher_is_better=True)},
                command="run-suite",
                started_at=None,
                finished_at=None,
                duration_s=None,
            )
            store.write_record(record, "box")
            paths[cell.run_id] = store.record_path(record.suite, "box", cell.run_id)
        return SimpleNamespace(
            machine="box",
            ok=list(paths),
            failed=[],
            missing=[],
            records=paths,
            failures={},
            interrupted=False,
            exit_code=0,
        )

    suite.write_text(SUITE + "tables: [{kind: long, metrics: [segm/AP], title: Shown at the end}]\n")
    monkeypatch.setattr(bench.execute, "run_plan", run_plan)
    results = tmp_path / "r"
    code, out, err = run(capsys, suite, "--results", results)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].strip() == "Shown at the end"
    assert "10.0" in out
    assert "40.0" in out
    assert f"records: {results / 'small' / 'box'}" in lines
    wrote = [Path(line.removeprefix("wrote").strip()) for line in lines if line.startswith("wrote")]
    assert {path.suffix for path in wrote} >= {".md", ".csv", ".tex", ".png", ".svg"}
    assert all(path.stat().st_size > 0 for path in wrote)
    assert lines[-1] == "run-suite: small: 2 of 2 runs ok"


def test_an_unexpected_error_is_no_failed_run_and_keeps_its_traceback(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **settings: object) -> None:
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr(bench.execute, "run_plan", fail)
    code, _, err = run(capsys, suite, "--results", tmp_path / "results")
    assert code == 70
    assert err.startswith("Traceback")
    assert err.splitlines()[-1] == (
        "run-suite: unexpected error (exit code 70): ZeroDivisionError: by nought. Please report it"
    )
