from __future__ import annotations

from typing import Any

import pytest
from report_records import make_record

import bench.report.conditions
from bench.report.conditions import conditions
from bench.report.plots import build_plot
from bench.report.tables import grid_table, long_table, to_markdown


def data_of(*records: dict[str, Any]) -> list[str]:
    return [phrase for phrase in conditions(records, []) if phrase.startswith("data ")]


def on(dataset: str, images: int | None, record: dict[str, Any] | None = None, **data: Any) -> dict[str, Any]:
    record = record or make_record()
    record["config"]["data"] = {"dataset": dataset, **data}
    if images is None:
        record["metrics"].pop("num_images", None)
    else:
        record["metrics"]["num_images"] = {"value": images, "unit": "images", "higher_is_better": None}
    return record


def test_the_number_of_images_is_what_was_scored() -> None:
    assert data_of(on("nuclei", 27)) == ["data nuclei, 27 validation images"]
    # The suite asked for 200; a list of ids left 12.
    shapes = on("shapes", 12, shapes_val_images=200, shapes_image_size=96)
    assert data_of(shapes) == ["data shapes, 12 validation images of 96 px"]


def test_a_failed_run_takes_the_others_word() -> None:
    failed = on("nuclei", None, make_record(2, status="failed", reason="no"))
    assert data_of(failed) == ["data nuclei"]
    assert data_of(failed, on("nuclei", 27)) == ["data nuclei, 27 validation images"]


def test_the_work_grows_with_the_records_and_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each record is asked at most twice for its images; tests/benchmarks has the time of 10,000."""
    asked = []
    monkeypatch.setattr(bench.report.conditions, "_images", lambda record: asked.append(record) or 7.0)
    records = [on("nuclei", 27, make_record(steps)) for steps in range(200)]
    assert data_of(*records) == ["data nuclei, 7 validation images"]
    assert len(asked) <= 2 * len(records)


def test_what_differs_is_listed_and_an_axis_is_no_condition() -> None:
    two = data_of(on("nuclei", 27), on("coco", 5000))
    assert two == ["data nuclei, 27 validation images / data coco, 5000 validation images"]
    assert data_of(on("coco", 9, class_agnostic=True)) == ["data coco, 9 validation images, class-agnostic"]
    records = [
        on("coco", 9, make_record(class_agnostic=value), class_agnostic=value, longest_edge_test=512)
        for value in (False, True)
    ]
    assert data_of(*records) == ["data coco, 9 validation images"]


def test_a_gpu_stands_before_the_cpu() -> None:
    record = make_record()
    assert "Example CPU 9000, 2 cores" in conditions([record], ["segm/AP"])
    record["environment"]["process"] = {"device": "cuda", "device_name": "Example GPU"}
    assert "Example GPU (Example CPU 9000, 2 cores)" in conditions([record], ["segm/AP"])


def test_the_environment_and_how_repeatable_it_is_are_told() -> None:
    record = make_record()
    older = conditions([record], ["segm/AP"])
    assert not any(phrase.startswith("environment") or "repeatable" in phrase for phrase in older)
    levels = {"train": {"determinism": {"level": "bitwise"}}, "predict": {"determinism": {"level": "not bitwise"}}}
    record["environment_id"] = "00112233445566aa"
    record["environment"]["conditions"] = levels | {"latency": {}}
    assert {"environment 00112233445566aa", "not bitwise repeatable"} <= set(conditions([record], ["segm/AP"]))
    levels["predict"]["determinism"]["level"] = "bitwise"
    assert not any("repeatable" in phrase for phrase in conditions([record], ["segm/AP"]))
    levels["train"]["determinism"]["level"] = "unknown"
    assert not any("repeatable" in phrase for phrase in conditions([record], ["segm/AP"]))


def test_how_many_timed_images_were_disturbed_is_a_condition() -> None:
    records = [make_record(), make_record(2)]
    assert not [
        phrase for phrase in conditions(records, ["latency_s/total"]) if "timed images" in phrase
    ]  # nobody looked
    marks = {"contended": {"samples": [0, 2], "reason": None}, "throttled": {"samples": None, "reason": "no GPU"}}
    for record in records:
        record["samples"] = {"latency_s": {"total": [0.1, 0.1, 0.11]}}
        record["sample_marks"] = {"latency_s": marks}
    assert "6 timed images, 4 contended, throttled not told, 0 outliers" in conditions(
        records, ["segm/AP", "latency_s/total"]
    )


def test_scores_stay_the_same_bytes_however_disturbed_the_times_were() -> None:
    def reports(contended: list[int], metric: str) -> tuple[str, str, str]:
        records = [make_record(), make_record(2)]
        for record in records:
            record["samples"] = {"latency_s": {"total": [0.1, 0.1, 0.11]}}
            record["sample_marks"] = {"latency_s": {"contended": {"samples": contended, "reason": None}}}
        grid = grid_table(records, rows="sampling_steps", columns="seed", metric=metric)
        plot = build_plot(records, x="sampling_steps", y=metric)
        return to_markdown(long_table(records, metrics=[metric])), to_markdown(grid), plot.caption

    assert reports([0], "segm/AP") == reports([1, 2], "segm/AP")
    for found, other in zip(reports([0], "latency_s/total"), reports([1, 2], "latency_s/total")):
        assert found != other


def test_records_that_share_sections_are_told_apart_by_the_others() -> None:
    # As they are read: equal parts are one object.
    first = make_record()
    second = {**first, "environment": {**first["environment"], "commit": "fedcba9876543210"}}
    third = {**first, "config": {**first["config"], "train": {**first["config"]["train"], "iterations": 7}}}
    fourth = {**first, "suite": "other"}
    told = " · ".join(conditions([first, first, second, third, fourth], []))
    assert "commit 0123456789 / fedcba9876" in told
    assert "1 500 iterations of batch 8 / 7 iterations of batch 8" in told
    assert "suite quickstart / other" in told
    assert "200 validation images" in told
    fifth = {**first, "metrics": {"num_images": {"value": 7, "unit": "images", "higher_is_better": None}}}
    assert "validation images" not in " · ".join(conditions([first, fifth], []))
