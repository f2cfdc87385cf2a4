from __future__ import annotations

import copy
from typing import Any

import pytest
from compare_records import timed_record

from bench.comparability import differences, is_race, kind_of, machine_of, remarks

ALL = "score time memory count other"
MEASURED = "score time memory other"
# what is changed, the kinds of metric that it makes unlike, what is said
FORBIDDEN: list[tuple[tuple[Any, ...], str, str]] = [
    (("config", "data", "shapes_image_size", 128), ALL, "data.shapes_image_size 96 and 128"),
    (("config", "data", "class_agnostic", True), ALL, "data.class_agnostic false and true"),
    (("config", "sampler", "sampling_steps", 4), ALL, "sampler.sampling_steps 1 and 4"),
    (("config", "engine", {"name": "torchvision"}), ALL, "engine diffinst and torchvision"),
    (("config", "train", "precision", "bf16"), MEASURED, "precision fp32 and bf16"),
    (("metrics", "num_images", "value", 100), MEASURED, "num_images 200 and 100"),
    (("environment", "process", "device", "cuda"), MEASURED, "device cpu and cuda"),
    (("environment", "machine", "other"), "time memory", "machine example-cpu-2c-0a0a0a and other"),
    (("environment", "process", "threads", {"n": 1}), "time memory", "threads {intra_op: 2, inter_op: 2} and {n: 1}"),
    (("measure", "latency_seconds", 9.0), "time memory", "measure.latency_seconds 3 and 9"),
    (("samples", "latency_s", {"head": [1.0]}), "time memory", "timing scopes [total] and [head]"),
]


def changed(record: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    record = copy.deepcopy(record)
    part: Any = record
    *keys, last, value = path
    for key in keys:
        part = part[key]
    part[last] = value
    return record


def base() -> dict[str, Any]:
    record = timed_record()
    record["config"]["train"]["precision"] = "fp32"
    return record


def test_equal_records_are_comparable() -> None:
    assert set(differences(base(), base()).values()) == {()}
    assert list(remarks(base(), base())) == []


@pytest.mark.parametrize(("change", "kinds", "said"), FORBIDDEN, ids=lambda value: str(value)[:40])
def test_each_difference_is_named(change: tuple[Any, ...], kinds: str, said: str) -> None:
    found = differences(base(), changed(base(), change))
    assert {kind for kind, texts in found.items() if texts} == set(kinds.split())
    assert {text for texts in found.values() for text in texts} == {said}


def test_what_may_differ_is_remarked() -> None:
    other = changed(changed(base(), ("config", "model", "num_stages", 6)), ("environment", "packages", "torch", "3.0"))
    assert set(differences(base(), other).values()) == {()}
    assert list(remarks(base(), other)) == ["model.num_stages 3 and 6", "torch 2.14.1 and 3.0"]


def test_a_score_is_of_the_device_that_predicted() -> None:
    # Predicted on one device and timed on the other later: the record's environment is of the timing.
    on_cpu, on_gpu = (changed(base(), ("node_runs", {"predict": {"device": name}})) for name in ("cpu", "A GPU"))
    timed_later = changed(on_cpu, ("environment", "process", "device", "cuda"))
    assert differences(on_cpu, timed_later)["score"] == ()
    assert differences(on_cpu, timed_later)["time"] == ("device cpu and cuda",)
    assert differences(on_cpu, on_gpu)["score"] == ("device cpu and A GPU",)
    assert differences(on_cpu, on_gpu)["time"] == ()
    # A record that does not say is of its environment's device.
    assert differences(base(), on_gpu)["score"] == ("device cpu and A GPU",)


def test_seeds_are_no_difference() -> None:
    other = changed(changed(base(), ("config", "sampler", "eval_seed", 5)), ("config", "train", "seed", 5))
    assert set(differences(base(), other).values()) == {()}
    assert list(remarks(base(), other)) == []


def test_what_an_older_record_does_not_say_is_no_difference() -> None:
    older = base()
    del older["config"]["sampler"]["num_proposals"], older["environment"]["process"], older["measure"]
    del older["environment"]["machine"]
    assert set(differences(older, base()).values()) == {()}
    assert set(differences({}, base()).values()) == {()}


def test_engines_differ_in_recipes() -> None:
    one, two = (changed(base(), ("config", "engine", {"name": "torchvision", "recipe": name})) for name in "ab")
    assert differences(one, two)["score"] == ("engine.recipe a and b",)


@pytest.mark.parametrize(("change", "kinds", "said"), FORBIDDEN, ids=lambda value: str(value)[:40])
def test_in_a_race_settings_may_differ_and_conditions_may_not(change: tuple[Any, ...], kinds: str, said: str) -> None:
    record = base()
    record["measure"]["race"] = {"id": "one"}
    other = changed(record, change)
    assert is_race(record, other)
    texts = {text for texts in differences(record, other).values() for text in texts}
    is_setting = change[0] == "config"
    assert texts == (set() if is_setting else {said})
    assert (said in remarks(record, other)) is is_setting


def test_records_of_no_race_or_of_two_are_no_race() -> None:
    one = base()
    assert not is_race(one, one)
    one["measure"]["race"] = {"id": "one"}
    assert not is_race(one, base())
    assert not is_race(one, changed(one, ("measure", "race", {"id": "two"})))


def test_kinds_and_machines() -> None:
    names = ("segm/AP", "latency_s/total/p95", "peak_memory_bytes/rss", "flops", "num_images", "benchmark_s/a/b")
    assert [kind_of(name) for name in names] == ["score", "time", "memory", "count", "other", "time"]
    assert machine_of({"machine": "folder"}) == "folder"
    assert machine_of({}) == ""
