"""Records: complete or refused, readable for years, and silent about the machine's owner."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from pydantic import ValidationError
from run_records import make_record

from bench import record as record_module
from bench.errors import RecordError
from bench.plain_record import load_plain
from bench.record import (
    Metric,
    Resamples,
    SampleMarks,
    dump_json,
    dump_record,
    load_record,
    metric,
    pack_resamples,
    parse_record,
    scrub,
    unpack_resamples,
)


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    record = make_record()
    path = tmp_path / "00ff.json"
    path.write_text(dump_record(record))
    assert load_record(path) == record
    assert '"total": [0.5, 1.25e-07]' in path.read_text()
    assert json.loads(path.read_text())["metrics"]["segm/AP"] == {
        "value": 0.25,
        "unit": "fraction",
        "higher_is_better": True,
    }


def test_yesterdays_record_still_loads() -> None:
    # As written by the first version; never change this text, add an upgrade instead.
    text = """{"schema_version": 1, "suite": "s", "run_id": "a", "label": "", "status": "failed", "reason": "why",
    "axes": {}, "config": {}, "nodes": {}, "command": "run-suite s.yaml", "started_at": null, "finished_at": null,
    "duration_s": null, "log": "last words"}"""
    record = parse_record(json.loads(text), "old.json")
    assert (record.status, record.reason, record.log) == ("failed", "why", "last words")
    assert (record.schema_version, record.resamples, record.code, record.environment_id) == (2, {}, {}, None)


def test_nodes_of_before_devices_were_noted_load_and_are_written_as_they_were() -> None:
    run = {"started_at": "2026-01-01T00:00:00Z", "duration_s": 1.5, "attempts": 1, "commit": None, "dirty": None}
    content = json.loads(dump_record(make_record())) | {"node_runs": {"predict": run}}
    record = parse_record(content, "old.json")
    assert (record.node_runs["predict"].device, record.node_runs["predict"].environment_id) == (None, None)
    assert json.loads(dump_record(record)) == content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not a run record"),
        ('{"schema_version": 3}', "schema version 3, but this program reads up to 2"),
        ('{"schema_version": 1}', "suite: Field required"),
    ],
)
def test_what_is_no_record_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=message) as caught:
        load_record(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot be read"):
        load_record(tmp_path / "none.json")


def test_older_schemas_are_upgraded(monkeypatch: pytest.MonkeyPatch) -> None:
    content = make_record().model_dump()
    content["schema_version"] = 0
    content["name"] = content.pop("suite")

    def upgrade(old: dict[str, Any]) -> dict[str, Any]:
        new = dict(old, schema_version=1, suite=old["name"])
        del new["name"]
        return new

    monkeypatch.setitem(record_module.UPGRADES, 0, upgrade)
    assert parse_record(content, "old").suite == "steps"


def test_nothing_measured_is_null_with_a_reason_never_without() -> None:
    assert metric("latency_s/total/p95", None, "no GPU") == Metric(
        value=None, unit="s", higher_is_better=False, reason="no GPU"
    )
    assert metric("flops", 3, "not used").reason is None
    for value, reason in ((None, None), (1.0, "but why"), (float("nan"), None)):
        with pytest.raises(ValidationError):
            Metric(value=value, unit="s", higher_is_better=None, reason=reason)


@pytest.mark.parametrize("changes", [{"status": "failed"}, {"reason": "odd"}, {"status": "maybe"}, {"extra": 1}])
def test_contradictions_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        make_record(**changes)


def test_same_result_looks_at_results_only() -> None:
    record = make_record()
    assert record.same_result(make_record(command="run-suite --only x", duration_s=2.0))
    assert not record.same_result(make_record(metrics={"segm/AP": metric("segm/AP", 0.5)}))


def test_scrub_by_hand() -> None:
    replacements = {"/home/ann": "~", "/home/ann/coco": "<data-root>", "ann-laptop": "<host>"}
    assert scrub("open /home/ann/coco/a.jpg", replacements) == "open <data-root>/a.jpg"
    assert scrub("/home/ann/x.py:3", replacements) == "~/x.py:3"
    assert scrub("/home/anna/x.py", replacements) == "<path>/x.py"
    assert scrub(["on ann-laptop.", {"/opt/a/b": 'File "/usr/lib/c.py", line 1'}], replacements) == [
        "on <host>.",
        {"<path>/b": 'File "<path>/c.py", line 1'},
    ]
    kept = ["segm/AP", "latency_s/total", "https://example.org/a/b", "1/2", "a / b", "suites/x.yaml", 3, None, True]
    assert scrub(kept, replacements) == kept


words = st.text(alphabet="abc/._- ", max_size=12)


@given(words, words)
def test_scrub_leaves_no_private_path(before: str, after: str) -> None:
    text = f"{before} /home/ann/secret {after}"
    assert "/home/ann" not in scrub(text, {"/home/ann": "~"})
    assert scrub(scrub(text, {}), {}) == scrub(text, {})


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_dumped_json_is_the_same_json(content: Any) -> None:
    assert json.loads(dump_json(content)) == content


def test_dump_refuses_nan() -> None:
    with pytest.raises(ValueError):
        dump_json({"a": float("nan")})


def test_marks_of_samples_say_which_or_why_not() -> None:
    assert SampleMarks(samples=[0, 3]).reason is None
    assert SampleMarks(samples=None, reason="nobody looked").samples is None
    for wrong in ({"samples": None}, {"samples": [0], "reason": "why"}, {"samples": [-1]}):
        with pytest.raises(ValidationError):
            SampleMarks.model_validate(wrong)


def test_resamples_come_back_as_float32() -> None:
    text = pack_resamples([0.5, 0.25, float("nan")])
    assert text == "AAAAPwAAgD4AAMB/"  # 0x3f000000, 0x3e800000, 0x7fc00000, lowest byte first
    values = unpack_resamples(text)
    assert values[:2] == [0.5, 0.25]
    assert math.isnan(values[2])


@pytest.mark.parametrize(
    ("count", "values", "message"),
    [
        (1, "AAAAPwAAgD4=", "8 bytes instead of 4 for each of 1 draws"),
        *(
            (1, text, "values are not base64")
            for text in ("AAA!", "AAAAA=A=", "=AAAAA==", "AAAAAA=", "AAAA\n===", "AAAé")
        ),
    ],
)
def test_damaged_resamples_are_refused(count: int, values: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Resamples(images="0f", num_images=2, seed=0, count=count, values=values)


def test_an_error_says_of_what_and_belongs_to_a_value() -> None:
    entry = {"value": 0.5, "unit": "fraction", "higher_is_better": True}
    assert Metric(**entry, standard_error=0.01, error_of="images").standard_error == 0.01
    with pytest.raises(ValidationError, match="says of what"):
        Metric(**entry, standard_error=0.01)
    with pytest.raises(ValidationError, match="no standard error"):
        Metric(**(entry | {"value": None, "reason": "why"}), standard_error=0.01, error_of="images")
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        Metric(**entry, standard_error=-0.01, error_of="images")


COMMITTED = sorted((Path(__file__).parents[2] / "results").glob("[!.]*/*/*.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_every_committed_record_loads(path: Path) -> None:
    content = json.loads(path.read_text())
    record = load_record(path)
    assert record.schema_version == record_module.SCHEMA_VERSION
    assert (record.suite, record.run_id) == (path.parts[-3], path.stem)
    assert record.metrics.keys() == content["metrics"].keys()
    assert {name: found.value for name, found in record.metrics.items()} == {
        name: found["value"] for name, found in content["metrics"].items()
    }


@pytest.mark.parametrize("load", [load_record, load_plain])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"duration_s": "5"}, "duration_s: Input should be a valid number"),
        ({"metrics": {"flops": {"value": "5", "unit": "FLOP", "higher_is_better": False}}}, r"metrics\.flops\.value"),
    ],
)
def test_a_number_in_quotes_is_no_number(tmp_path: Path, load: Any, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(json.loads(dump_record(make_record())) | changes))
    with pytest.raises(RecordError, match=rf"odd\.json: {message}"):
        load(path)


@pytest.mark.parametrize("load", [load_record, load_plain])
def test_a_whole_record_of_the_first_version_loads(load: Any) -> None:
    # Kept apart from the results, whose records are made anew one day.
    path = Path(__file__).parents[1] / "golden" / "record_v1.json"
    old = json.loads(path.read_text())
    assert old["schema_version"] == 1
    found = load(path)
    found = found if isinstance(found, dict) else json.loads(dump_record(found))
    assert found["schema_version"] == record_module.SCHEMA_VERSION
    assert {name: entry["value"] for name, entry in found["metrics"].items()} == {
        name: entry["value"] for name, entry in old["metrics"].items()
    }
    assert (found["axes"], found["config"], found["nodes"]) == (old["axes"], old["config"], old["nodes"])


@pytest.mark.parametrize("version", [3, 99, 10**30])
def test_a_newer_version_is_refused_by_name(tmp_path: Path, version: int) -> None:
    path = tmp_path / "new.json"
    path.write_text(json.dumps(make_record().model_dump(mode="json") | {"schema_version": version, "novelty": 1}))
    with pytest.raises(RecordError, match=rf"new\.json: schema version {version}, but this program reads up to 2"):
        load_record(path)
