"""Races with sides whose times are made, so that who is timed when and what comes out can be checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_plan import WORKER, make_plan
from rich.console import Console

import bench.race
import bench.race_cli
from bench.compare import Outcome, compare
from bench.diffbench import main
from bench.errors import BenchError, RecordError
from bench.execute import SOURCE_ROOT, run_plan
from bench.gates import Gate, Gates
from bench.race import SIDES, Side, Unlike, dump_race, find_side, race
from bench.record import parse_record
from bench.store import Store

FAKE = (str(Path(__file__).parents[1] / "fake_side.py"),)
QUIET = {"image_s": 0.010, "luck": 0.001, "noise": 0.01}
LATENCY = Gates({"latency_s/total": Gate(relative=0.05, absolute=0.0)})


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with one run's record and the nodes that it needs."""
    root = tmp_path_factory.mktemp("race") / "results"
    with (root.parent / "screen.txt").open("w") as screen:
        outcome = run_plan(make_plan(steps=(1,)), Store(root), console=Console(file=screen), worker_command=WORKER)
    assert outcome.exit_code == 0
    return root


@pytest.fixture
def record(results: Path) -> Path:
    """The record's file; the log of the sides, which lies in the store, is emptied."""
    log = results.resolve() / ".store" / "log.txt"
    log.unlink(missing_ok=True)
    return next((results / "fake").glob("*/0000000000000000.json"))


def write_side(record: Path, name: str, **fake: Any) -> Path:
    """A record beside the given one, of a side with made times."""
    content = json.loads(record.read_text())
    content["config"]["fake"] = {"name": name, "seed": len(name), **QUIET, **fake}
    path = record.with_name(f"{name}.json")
    path.write_text(json.dumps(content))
    return path


def side(record: Path, name: str, **fake: Any) -> Side:
    made = find_side(name, str(write_side(record, name, **fake)), Path())
    write_side(record, name, **fake).unlink()
    return made


def sides(record: Path, **head: Any) -> tuple[Side, Side]:
    return side(record, "base", seed=1), side(record, "head", **{"seed": 2, **head})


def run(pair: tuple[Side, Side], rounds: int = 3, images: int = 10, **settings: Any) -> dict[str, list[Any]]:
    return race(*pair, rounds=rounds, images=images, side_command=FAKE, **settings)


def log_of(record: Path) -> list[str]:
    return (record.resolve().parents[2] / ".store" / "log.txt").read_text().splitlines()


def test_images_are_timed_by_turns_and_each_round_starts_anew(record: Path) -> None:
    told: list[int] = []
    found = run(sides(record), rounds=2, images=2, progress=told.append)
    lines = log_of(record)
    assert [line for line in lines if line.startswith("start")] == [
        "start base",
        "start head",
        "start head",
        "start base",
    ]
    timed = [line.split()[1:] for line in lines if line.startswith("time")]
    warm_up = 2 * bench.race.WARMUP_IMAGES
    first, second = timed[warm_up : warm_up + 8], timed[-8:]
    assert [name[0] + image for name, image in first] == ["b0", "h0", "h0", "b0", "h1", "b1", "b1", "h1"]
    assert [name[0] + image for name, image in second] == ["h0", "b0", "b0", "h0", "b1", "h1", "h1", "b1"]
    assert told == [1, 2, 3, 4]
    assert [len(found[name]) for name in SIDES] == [2, 2]


def test_records_stand_alone_and_tell_both_sides_apart(record: Path) -> None:
    found = run(sides(record, commit="abc"))
    for name in SIDES:
        for number, content in enumerate(found[name]):
            parsed = parse_record(content, name)
            assert (parsed.suite, parsed.status, parsed.axes["round"]) == ("race", "ok", number)
            assert {len(values) for values in parsed.samples["latency_s"].values()} == {20}
            # Image 3 of every ten, of which three were warm-up.
            assert parsed.sample_marks["latency_s"]["contended"].samples == [0, 10]
            assert parsed.sample_marks["latency_s"]["throttled"].samples is None
            assert parsed.metrics["latency_s/total"].value == pytest.approx(0.02, rel=0.1)
    assert [found[name][0]["environment"]["commit"] for name in SIDES] == [None, "abc"]
    assert found["base"][0]["measure"] == found["head"][2]["measure"]
    assert str(record.parent) not in dump_race(found)


def test_a_slowdown_of_a_tenth_is_found_and_none_where_there_is_none(record: Path) -> None:
    same = run(sides(record))
    assert [row.outcome for row in compare(same["base"], same["head"], LATENCY).rows] == [Outcome.SAME]
    slow = run(sides(record, image_s=0.011))
    (row,) = compare(slow["base"], slow["head"], LATENCY).rows
    assert row.outcome is Outcome.WORSE
    assert row.low is not None
    assert row.high is not None
    assert row.low < 0.10 < row.high
    (row,) = compare(slow["head"], slow["base"], LATENCY).rows
    assert row.outcome is Outcome.BETTER


def test_luck_of_processes_is_not_taken_for_a_difference(record: Path) -> None:
    """One round with 2000 samples would be certain; three rounds whose processes differ by 5 % are not."""
    found = run(sides(record, luck=0.05, image_s=0.0105))
    (row,) = compare(found["base"], found["head"], Gates({"latency_s/total": Gate(relative=0.0, absolute=0.0)})).rows
    assert row.outcome is Outcome.NOISY


def test_scopes_that_one_side_does_not_time_are_left_out(record: Path) -> None:
    found = run(sides(record, scopes=["masks", "total"]))
    assert [list(found[name][0]["metrics"]) for name in SIDES] == [["latency_s/total"]] * 2


@pytest.mark.parametrize(
    ("images", "said"),
    [([11, 99, 13], "id of image 1 is 12 and 99"), ([11, 12], "id of image 2 is 13 and none")],
)
def test_other_images_are_refused_by_name(record: Path, images: list[int], said: str) -> None:
    with pytest.raises(Unlike, match=f"base and head see different images: {said}"):
        run(sides(record, images=images))


@pytest.mark.parametrize(
    ("accident", "reason"),
    [
        ("crash", "its process ended with exit code 1 (a bad thing)"),
        ("kill", "its process was killed by signal 9"),
        ("error", "RuntimeError: no kernel"),
    ],
)
def test_a_side_that_fails_is_a_failed_run(record: Path, accident: str, reason: str) -> None:
    found = run(sides(record, accident=accident))
    assert [len(found[name]) for name in SIDES] == [1, 1]
    (row,) = compare(found["base"], found["head"], LATENCY).rows
    assert (row.outcome, row.reason) == (
        Outcome.FAILED,
        f"base skipped: the other side failed; head failed: {reason}",
    )


def test_a_mistake_is_one_line(record: Path) -> None:
    with pytest.raises(BenchError, match="^head: dataset 'coco': not found. Give --data-root$"):
        run(sides(record, accident="mistake"))
    pair = sides(record)
    with pytest.raises(BenchError, match="^head: python 'no-such-python' cannot be started"):
        run((pair[0], Side("head", pair[1].record, pair[1].store, python="no-such-python")))


def test_sides_are_found_by_file_or_run_id(record: Path, results: Path) -> None:
    assert find_side("base", "0000000000000000", results).record.run_id == "0" * 16
    assert find_side("base", str(record), Path("elsewhere")).store.root == results.resolve()
    with pytest.raises(RecordError, match="HEAD 00: 2 records, of which one is to be named by its path"):
        find_side("head", "00", results)
    for text in ("ff", "../fake", "no.json"):
        with pytest.raises(RecordError, match="no record. Give a record's file, or its run id and --results DIR"):
            find_side("head", text, results)


def test_what_cannot_be_timed_is_told_before_anything_starts(record: Path, tmp_path: Path) -> None:
    content = json.loads(record.read_text())
    copy = tmp_path / "suite" / "box" / "a.json"
    copy.parent.mkdir(parents=True)

    def refused(changes: dict[str, Any], message: str) -> None:
        copy.write_text(json.dumps(content | changes))
        with pytest.raises(BenchError, match=message):
            find_side("head", str(copy), Path())

    refused({}, "head: train-0000000000000000 is not in .*/.store, or not whole. Its weights are needed")
    refused({"status": "failed", "reason": "killed"}, "failed, so it has nothing to time. Run it again")
    engine = {"name": "detectron2", "python": "python"}
    refused({"config": {"engine": engine}}, "engine detectron2 cannot be raced")
    nodes = {"model": {"weights": "<data-root>/weights/a.safetensors"}}
    refused({"config": nodes, "nodes": {}}, "head: model.weights: '<data-root>/weights/a.safetensors' does not exist")


def test_files_are_found_below_the_data_root(record: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    content = json.loads(record.read_text()) | {"nodes": {}}
    for text in ("a.safetensors", "<data-root>/a.safetensors"):
        content["config"] = {"model": {"weights": text}}
        made = Side("head", parse_record(content, "test"), Store(tmp_path), data_root=tmp_path)
        assert bench.race._job(made)["node"]["options"]["config"]["model"]["weights"] == str(tmp_path / "a.safetensors")


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls `diffbench race` on a base and a head of made times."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench.race_cli, "race", lambda *pair, **settings: race(*pair, **settings, side_command=FAKE))

    def call(*arguments: str, **head: Any) -> int:
        paths = [write_side(record, "base", seed=1), write_side(record, "head", **{"seed": 2, **head})]
        try:
            return main(["race", *map(str, paths), "--rounds", "3", "--images", "10", *arguments])
        finally:
            for path in paths:
                path.unlink()

    return call


def test_the_command_judges_and_keeps_the_timings(command: Any, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert command("--out", "race.json", image_s=0.013) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["scope", "base", "head", "change", "[95", "%]"]
    assert [line.split()[0] for line in out[1:5]] == ["head", "total", "base:", "head:"]
    assert out[3] == "base: 60 timed images, 6 contended, throttled not told, 0 outliers"
    assert out[-1] == "regression (exit code 1): 1 worse"
    # The file is judged again by itself, by the same gates or by others.
    assert main(["compare", "race.json"]) == 1
    (tmp_path / "gates.yaml").write_text("gates: {latency_s/total: {relative: 0.5, absolute: 0}}\n")
    assert main(["compare", "race.json", "--gates", "gates.yaml"]) == 0
    assert command("--gates", "gates.yaml", image_s=0.013) == 0


@pytest.mark.parametrize(
    ("head", "code", "said"),
    [
        ({}, 0, "no regression"),
        ({"accident": "crash"}, 4, "runs have failed"),
        ({"images": [1, 2, 3]}, 5, "not comparable: base and head see different images"),
        ({"threads": 2}, 5, "not comparable (exit code 5)"),
        ({"luck": 0.2}, 6, "inconclusive"),
        ({"accident": "mistake"}, 2, "not found. Give --data-root"),
    ],
)
def test_each_exit_code(
    command: Any, capsys: pytest.CaptureFixture, head: dict[str, Any], code: int, said: str
) -> None:
    assert command(**head) == code
    printed = capsys.readouterr()
    assert said in printed.out + printed.err


def test_mistakes_in_arguments(command: Any, capsys: pytest.CaptureFixture) -> None:
    assert command("--out", "race.txt") == 2
    assert command("--head-source", ".") == 2
    assert command("--rounds", "2") == 2
    assert "no folder of this project. Give a checkout of it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "HEAD is missing, and race.json is no file of diffbench race"),
        ('{"kind": "race", "base": []}', "race.json: head: no list of records. Write it with diffbench race"),
        ('{"kind": "race", "base": [1], "head": []}', "race.json: base[0]: not a run record"),
        ("{", "race.json: not valid JSON"),
    ],
)
def test_other_files_are_no_race(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "race.json").write_text(text)
    assert main(["compare", "race.json"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_race(tmp_path: Path) -> None:
    """A minute model against itself with more proposals, the second with the code of a copy of this checkout."""
    suite = tmp_path / "minute.yaml"
    suite.write_text(
        """
name: minute
data:
  {dataset: shapes, shapes_train_images: 4, shapes_val_images: 3, shapes_image_size: 64, shortest_edge_train: [64],
   longest_edge_train: 64, shortest_edge_test: 64, longest_edge_test: 64, crop_probability: 0.0}
model:
  {backbone: tiny, freeze_at: 0, hidden_dim: 16, num_stages: 1, num_attention_heads: 2, dim_feedforward: 16,
   dim_dynamic: 4, mask_branch_channels: 8, mask_branch_layers: 1}
train: {iterations: 2, batch_size: 2, num_train_proposals: 10, warmup_iterations: 1, schedule_steps: []}
axes: {product: {num_proposals: [5, 500]}}
measure: {score: false, latency_images: 2, latency_seconds: 0.0, flops: false}
"""
    )
    copy = tmp_path / "checkout"
    copy.mkdir()
    for package in ("bench", "diffinst"):
        (copy / package).symlink_to(SOURCE_ROOT / package)

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    done = call("bench.cli", str(suite), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    ids = {}
    for path in (tmp_path / "results").glob("minute/*/*.json"):
        ids[json.loads(path.read_text())["axes"]["num_proposals"]] = path.stem
    arguments = ("--rounds", "3", "--images", "10", "--device", "cpu", "--out", "race.json")
    done = call("bench.diffbench", "race", ids[5], ids[500], *arguments, "--head-source", str(copy))
    # Rounds that other work on the cores disturbed may say too little; then it says that.
    disturbed = done.returncode == 6 and ", 0 contended" not in done.stdout
    assert done.returncode == 1 or disturbed, done.stdout + done.stderr
    assert "note: sampler.num_proposals 5 and 500" in done.stdout
    content = json.loads((tmp_path / "race.json").read_text())
    assert [len(content[name]) for name in SIDES] == [3, 3]
    assert set(content["head"][0]["samples"]["latency_s"]) == {"preprocess", "backbone", "head", "masks", "total"}
