from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from report_records import make_grid, make_record

from bench.diffbench import main
from bench.errors import RecordError
from bench.record import parse_record
from bench.report.frames import read_folder, to_csv_text, to_frame
from bench.store import Store


def put(root: Path, suite: str, machine: str, **changes: object) -> None:
    record = make_record(**changes) | {"suite": suite}  # type: ignore[arg-type]
    Store(root).write_record(parse_record(record, "test"), machine)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two suites, one of them on two machines; a failed run whose earlier failure is history."""
    root = tmp_path / "results"
    put(root, "one", "box", steps=4)
    put(root, "one", "box", steps=1)
    put(root, "one", "den", steps=1, ap=0.5)
    put(root, "two", "box", learning_rate=0.5)
    put(root, "two", "box", learning_rate=8.0, status="failed", reason="out of memory")
    put(root, "two", "box", learning_rate=8.0, status="failed", reason="out of memory, again")
    (root / ".store" / "train-1").mkdir(parents=True)
    (root / ".store" / "train-1" / "done.json").write_text("{}")
    (root / "one" / "box" / "report").mkdir()
    return root


def test_one_row_per_record_by_suite_machine_and_axes(results: Path) -> None:
    assert list((results / "two/box/history").glob("*.json"))
    frame = to_frame(read_folder(results))
    rows = frame[["suite", "machine", "sampling_steps", "learning_rate", "status", "segm/AP"]]
    assert rows.astype(object).where(rows.notna(), None).values.tolist() == [
        ["one", "box", 1, None, "ok", 0.25],
        ["one", "box", 4, None, "ok", 0.25],
        ["one", "den", 1, None, "ok", 0.5],
        ["two", "box", 1, 0.5, "ok", 0.25],
        ["two", "box", 1, 8.0, "failed", None],
    ]
    assert frame["reason"].tolist()[-1] == "out of memory, again"
    assert list(frame["device"].unique()) == ["cpu"]


def test_folders_of_a_suite_and_of_a_machine(results: Path) -> None:
    assert len(to_frame(read_folder(results / "one"))) == 3
    frame = to_frame(read_folder(results / "one" / "den"))
    assert frame[["machine", "segm/AP"]].values.tolist() == [["den", 0.5]]
    with pytest.raises(RecordError, match="no records. Give a results folder"):
        read_folder(results / "three")


def test_metrics_are_numbers_and_what_is_missing_is_not_0() -> None:
    frame = to_frame(make_grid())
    assert len(frame) == 9
    metrics = [name for name in frame.columns if "/" in name]
    assert {str(kind) for kind in frame[metrics].dtypes} == {"float64"}
    assert frame["peak_memory_bytes/cuda_allocated"].isna().all()
    assert frame.loc[frame["status"] != "ok", metrics].isna().all(axis=None)
    # By hand: the only cell of 2 steps and 50 proposals.
    cell = frame[(frame["sampling_steps"] == 2) & (frame["num_proposals"] == 50)]
    assert cell["segm/AP"].tolist() == [pytest.approx(0.31 + 0.035 + 0.022 - 0.004)]
    assert frame.groupby("num_proposals")["segm/AP"].count().to_dict() == {20: 2, 50: 3, 100: 1}


def test_latencies_come_with_their_intervals_and_what_disturbed_them() -> None:
    record, untimed = make_record(), make_record(2, latency_s=None)
    record["samples"] = {"latency_s": {"total": [0.003, 0.001, 0.002, 0.009, 0.008, 0.007, 0.006, 0.005, 0.004]}}
    record["sample_marks"] = {"latency_s": {"contended": {"samples": [0, 1], "reason": None}}}
    frame = to_frame([record, untimed])
    names = [name for name in frame.columns if name.startswith("latency_s/")]
    assert names[:3] == ["latency_s/total", "latency_s/total/low", "latency_s/total/high"]
    row = frame[names].iloc[0].to_dict()
    assert (row["latency_s/total/low"], row["latency_s/total/high"]) == (0.002, 0.008)
    counts = [row[f"latency_s/num_{what}"] for what in ("samples", "outliers", "contended")]
    assert counts == [9, 0, 2]
    assert frame[names].iloc[1].isna().all()
    assert frame["latency_s/num_throttled"].isna().all()


def test_axes_keep_their_kind() -> None:
    records = [
        make_record(sampler="released", shortest_edge_test=[96, 128], renewal=True),
        make_record(sampler={"eta": 0.5}, renewal=False),
    ]
    frame = to_frame(records)
    assert frame["sampler"].tolist() == ["released", "{eta: 0.5}"]
    assert frame["shortest_edge_test"].tolist()[0] == "[96, 128]"
    assert frame["renewal"].tolist() == [True, False]
    assert list(to_frame([]).columns[:3]) == ["suite", "machine", "run_id"]


def test_csv_says_what_the_records_say(results: Path) -> None:
    records = read_folder(results)
    lines = list(csv.DictReader(io.StringIO(to_csv_text(to_frame(records)))))
    assert len(lines) == len(records)
    for line, record in zip(lines, records):
        assert line["run_id"] == record["run_id"]
        assert line["sampling_steps"] == str(record["axes"]["sampling_steps"])  # whole, though other columns have gaps
        for name, entry in record["metrics"].items():
            assert line[name] == "" if entry["value"] is None else float(line[name]) == entry["value"]


def test_export_writes_or_prints_the_same(
    results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(results.parent)
    assert main(["export", "results", "--out", "all.csv"]) == 0
    assert capsys.readouterr().out.startswith("wrote all.csv: 5 records, ")
    first = Path("all.csv").read_bytes()
    assert main(["export", "results"]) == 0
    assert capsys.readouterr().out.encode() == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no records"),
        (["results", "--out", "all.parquet"], "--out all.parquet: is not allowed. Allowed: a file name that ends in"),
        (["results", "--out", "no/folder.csv"], "no/folder.csv: cannot be written (No such file or directory)"),
    ],
)
def test_mistakes_are_one_line(
    results: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(results.parent)
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"diffbench: {message}")
    assert error.count("\n") == 1


def test_a_damaged_record_is_named(results: Path) -> None:
    path = next((results / "one" / "den").glob("*.json"))
    path.write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(RecordError, match="schema version 99"):
        read_folder(results)
