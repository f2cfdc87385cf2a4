"""Plain records: the same as `load_record` says, at a glance or the long way, and refused in the same words."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from run_records import make_record

from bench import plain_record
from bench.errors import RecordError
from bench.plain_record import PlainReader, load_plain
from bench.record import Metric, NodeRun, RunRecord, SampleMarks, dump_record, load_record, metric, parse_record

COMMITTED = sorted((Path(__file__).parents[2] / "results").glob("[!.]*/*/*.json"))
ODD = [None, True, 0, -1, 1.5, -0.5, 10**400, math.nan, math.inf, "", "images", "s", [], {}]


def text_of(**changes: Any) -> str:
    return json.dumps(json.loads(dump_record(make_record())) | changes)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_a_plain_record_says_what_the_record_says(path: Path) -> None:
    plain = load_plain(path)
    assert plain.keys() == RunRecord.model_fields.keys()
    assert json.loads(dump_record(parse_record(plain, "plain"))) == json.loads(dump_record(load_record(path)))


def test_records_of_today_are_read_at_a_glance() -> None:
    assert PlainReader().usual(dump_record(make_record()).encode())
    assert {json.loads(path.read_text())["schema_version"] for path in COMMITTED if not is_usual(path)} <= {1}


def is_usual(path: Path) -> bool:
    return PlainReader().usual(path.read_bytes()) is not None


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        (plain_record._Layout, RunRecord),
        (plain_record._NodeRun, NodeRun),
        (plain_record._SampleMarks, SampleMarks),
    ],
)
def test_the_layout_has_the_fields_of_the_model(layout: Any, model: Any) -> None:
    found = {field.encode_name: field.required for field in msgspec.structs.fields(layout)}
    known = {name: field.is_required() for name, field in model.model_fields.items()}
    assert found == known | ({"schema_version": True} if model is RunRecord else {})


def test_parts_that_are_equal_are_read_once(tmp_path: Path) -> None:
    reader, records = PlainReader(), []
    for number in range(2):
        path = tmp_path / f"{number}.json"
        path.write_text(text_of(config={"data": {"dataset": "shapes"}, "train": {"seed": number}}))
        records.append(reader.load(path))
    assert records[0]["config"]["data"] is records[1]["config"]["data"]
    assert [record["config"]["train"] for record in records] == [{"seed": 0}, {"seed": 1}]


def test_a_part_is_looked_at_as_what_it_has_to_be() -> None:
    # The same bytes are an environment's and no node's.
    text = text_of(environment={"cpu": {"model": "box"}}, node_runs={"train": {"model": "box"}})
    assert PlainReader().usual(text.encode()) is None


def test_what_a_file_lacks_is_its_own(tmp_path: Path) -> None:
    path = tmp_path / "short.json"
    content = json.loads(dump_record(make_record()))
    del content["checks"]
    path.write_text(json.dumps(content))
    load_plain(path)["checks"]["evaluators"] = {}
    assert load_plain(path)["checks"] == {}


def places(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place below `value`, and one that is not there in each object; of long lists the first two."""
    entries: Any = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    if isinstance(value, dict):
        yield (*place, "more")
    for key, entry in entries:
        yield (*place, key)
        yield from places(entry, (*place, key))


def changed(content: Any, place: tuple[str | int, ...], value: Any) -> str:
    """The content with a value at a place, as text; without it if the value is '<none>'."""
    found = inner = copy.deepcopy(content)
    for key in place[:-1]:
        inner = inner[key]
    if value == "<none>":
        inner.pop(*place[-1:], *([None] if isinstance(inner, dict) else []))
    else:
        inner[place[-1]] = value
    return json.dumps(found)


def test_a_glance_and_the_long_way_agree_on_every_change(tmp_path: Path) -> None:
    marks = {"contended": {"samples": [0]}, "throttled": {"samples": None, "reason": "no counter"}}
    resamples = {"of": "images", "images": "abc", "num_images": 2, "seed": 0, "count": 1, "values": "AACAPw=="}
    node_run = {"started_at": "now", "duration_s": 1.5, "attempts": 1, "commit": None, "dirty": False}
    text = text_of(
        node_runs={"train": node_run | {"device": "cpu"}},
        sample_marks={"latency_s": marks},
        resamples={"segm/AP": resamples},
        per_class={"segm/AP": {"cat": 0.5}},
        per_class_errors={"segm/AP": {"cat": None}},
        checks={"evaluators": {"difference": 0.0}},
        code={"train": "abc"},
        measure={"device": "cpu"},
        environment={"cpu": {"model": "box"}},
    )
    content, reader, told = json.loads(text), PlainReader(), {True: 0, False: 0}
    assert reader.usual(text.encode())
    for place in places(content):
        for odd in (*ODD, "<none>"):
            path = tmp_path / "odd.json"
            path.write_text(changed(content, place, odd))
            usual = reader.usual(path.read_bytes())
            told[usual is not None] += 1
            if usual is not None:
                found = parse_record(usual, "odd")  # raises where a glance took what the long way refuses
                assert found == load_record(path)
    assert min(told.values()) > 200


def test_a_damaged_file_is_told_in_the_same_words(tmp_path: Path) -> None:
    data, generator, path = dump_record(make_record()).encode(), random.Random(0), tmp_path / "bad.json"
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        damaged[generator.randrange(len(data))] = generator.choice(b'"{}[],:019-.eE\\ \n\xff=')
        path.write_bytes(damaged)
        try:
            expected: Any = json.loads(dump_record(load_record(path)))
        except RecordError as error:
            expected, refused = str(error), refused + 1
        try:
            found: Any = json.loads(dump_record(parse_record(load_plain(path), "plain")))
        except RecordError as error:
            found = str(error)
        assert found == expected
    assert refused > 50


USUAL: list[dict[str, Any]] = [
    {"value": 1, "unit": "", "higher_is_better": None},
    {"value": 0.5, "unit": "s", "higher_is_better": False, "standard_error": 0.1, "error_of": "images"},
    {"value": None, "unit": "s", "higher_is_better": True, "reason": "why"},
]
NAMES = (*Metric.model_fields, "more")


@pytest.mark.parametrize("usual", USUAL)
def test_a_usual_metric_is_one(usual: dict[str, Any]) -> None:
    assert plain_record._is_usual(usual)
    lacking = [{name: value for name, value in usual.items() if name != lost} for lost in usual]
    changed = [entry | {name: odd} for entry in (usual, *lacking) for name in NAMES for odd in ODD]
    found = [entry for entry in (usual, *lacking, *changed, {}) if plain_record._is_usual(entry)]
    assert len(found) > 10
    for entry in found:
        Metric.model_validate(entry, strict=True)


def test_metrics_as_they_are_written_are_usual() -> None:
    error = {"standard_error": 0.01, "error_of": "images"}
    metrics = make_record().metrics | {
        "segm/APs": metric("segm/APs", None, "no instance"),
        "segm/AP75": metric("segm/AP75", 0.5).model_copy(update=error),
        "num_images": metric("num_images", 3),
    }
    written = json.loads(dump_record(make_record().model_copy(update={"metrics": metrics})))["metrics"]
    assert all(map(plain_record._is_usual, written.values()))
    assert not plain_record._is_usual(written["num_images"] | {"reason": None})  # it is looked at closely
