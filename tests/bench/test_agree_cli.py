from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_records import make_record
from report_store import GOOD, POOR, finish, predictions

from bench.diffbench import main
from bench.record import dump_record, parse_record
from bench.store import Store
from diffinst.evaluation.predictions import PredictionWriter


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Runs a1 and b1 that found the same, c1 that found less, d1 without predictions, e1 that failed."""
    store = Store(tmp_path / "results")
    folder = store.root / "small" / "box"
    folder.mkdir(parents=True)
    for run, found in (("a1", GOOD), ("b1", GOOD), ("c1", POOR), ("d1", None), ("e1", None)):
        nodes = {} if found is None else {"predict": f"predict-{run}"}
        record = make_record() | {"run_id": run, "label": f"cell {run}", "nodes": nodes}
        if run == "e1":
            record |= {"status": "failed", "reason": "killed", "metrics": {}}
        (folder / f"{run}.json").write_text(dump_record(parse_record(record, run)))
        if found is not None:
            with PredictionWriter(store.folder(f"predict-{run}") / "predictions", shard_size=9) as writer:
                for item in predictions(found):
                    writer.add(item)
            finish(store, f"predict-{run}", ["predictions/predictions-00000.jsonl"])
    return store.root


def _agree(results: Path, *arguments: str) -> int:
    return main(["agree", *arguments, "--results", str(results)])


def test_the_same(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _agree(results, "a1", "b1", "--out", str(tmp_path / "found.json")) == 0
    assert capsys.readouterr().out == (
        "base: cell a1\nhead: cell b1\n"
        "images      3\n"
        "detections  3 and 3, 3 of them twins (same class, box within 1 px)\n"
        "boxes       at most 0 px apart\n"
        "scores      at most 0 apart\n"
        "masks       3 of 3 identical, the others by at most 0 pixels, IoU at least 1.00000\n"
        "the same, within the limits\n"
    )
    kept = json.loads((tmp_path / "found.json").read_text())
    assert (kept["base"]["run_id"], kept["head"]["run_id"], kept["found"]["matched"]) == ("a1", "b1", 3)
    assert kept["reasons"] == []


def test_not_the_same(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _agree(results, "a1", "c1") == 1
    printed = capsys.readouterr().out
    assert "no twin     head: image 5, category 7, score 0.8000\n" in printed
    assert printed.endswith("not the same: 2 of base and 2 of head have no twin\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a1", "f1"], "HEAD f1: no record. Give a record's file, or its run id and --results DIR"),
        (["d1", "a1"], "d1.json: nothing was predicted (`measure: score: false`), so there is nothing to compare"),
        (["a1", "e1"], "e1.json: failed, so there is nothing to compare. Run it again"),
        (["a1", "b1", "--out", "x.md"], "--out x.md: is not allowed. Allowed: a file name that ends in .json"),
    ],
)
def test_mistakes_in_one_line(
    results: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _agree(results, *arguments) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_predictions_that_are_gone(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / ".store" / "predict-b1" / "predictions").rename(results / "moved")
    assert _agree(results, "a1", "b1") == 2
    assert "its predictions are not in" in capsys.readouterr().err
