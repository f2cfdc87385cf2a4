"""Values against fields: what is stored, what is refused, and what the message says."""

from __future__ import annotations

from typing import Any

import pytest

from bench.errors import SuiteError
from bench.fields import INVALID, allowed_values, check_value, did_you_mean, is_list_field, show, unknown
from bench.yaml_source import read_yaml
from diffinst.config import SECTIONS, DataConfig, ModelConfig, SamplerConfig, TrainConfig


def check(section: type, name: str, text: str) -> tuple[Any, list[SuiteError]]:
    item, problems = read_yaml(text, argument="here")
    return check_value(section, name, item, name, problems), problems


@pytest.mark.parametrize(
    ("section", "name", "text", "stored"),
    [
        (TrainConfig, "learning_rate", "1", 1.0),
        (TrainConfig, "learning_rate", "1.0e-4", 1e-4),
        (TrainConfig, "schedule_steps", "[1, 2]", (1, 2)),
        (TrainConfig, "schedule_steps", "[]", ()),
        (SamplerConfig, "max_detections", "null", None),
        (ModelConfig, "mask", "none", "none"),
    ],
)
def test_values_are_stored_as_the_model_has_them(section: type, name: str, text: str, stored: Any) -> None:
    value, problems = check(section, name, text)
    assert problems == []
    assert value == stored
    assert type(value) is type(stored)


@pytest.mark.parametrize(
    ("section", "name", "text", "message"),
    [
        (
            TrainConfig,
            "learning_rate",
            "1e-4",
            "'1e-4' is not allowed. Allowed: a number above 0. YAML reads 1e-4 as text: write 1.0e-4",
        ),
        (
            TrainConfig,
            "iterations",
            "2e3",
            "'2e3' is not allowed. Allowed: an integer of at least 1. YAML reads 2e3 as text: write 2000",
        ),
        (
            TrainConfig,
            "iterations",
            "'20'",
            "'20' is not allowed. Allowed: an integer of at least 1. Text in quotes is no number: take the quotes away",
        ),
        (TrainConfig, "iterations", "20.0", "20.0 is not allowed. Allowed: an integer of at least 1"),
        (TrainConfig, "iterations", "yes", "true is not allowed. Allowed: an integer of at least 1"),
        (SamplerConfig, "eta", "1.5", "1.5 is not allowed. Allowed: a number from 0 to 1"),
        (SamplerConfig, "eta", ".nan", "nan is not allowed. Allowed: a number from 0 to 1"),
        (SamplerConfig, "renewal", "1", "1 is not allowed. Allowed: true, false"),
        (SamplerConfig, "max_detections", "0", "0 is not allowed. Allowed: an integer of at least 1, or null"),
        (
            ModelConfig,
            "backbone",
            "tinny",
            "'tinny' is not allowed. Allowed: resnet50, resnet101, swin_t, swin_s, swin_b, swin_l, swin_b_384, "
            "swin_l_384, efficientnet_lite0, tiny. Did you mean 'tiny'?",
        ),
        (DataConfig, "dataset", "3", "3 is not allowed. Allowed: text. Put quotes around it"),
        (DataConfig, "crop_size_range", "7", "7 is not allowed. Allowed: a list, each an integer"),
    ],
)
def test_refused_values_say_what_is_allowed(section: type, name: str, text: str, message: str) -> None:
    value, problems = check(section, name, text)
    assert value is INVALID
    assert [problem.message for problem in problems] == [message]


def test_the_place_is_the_entry_of_the_list() -> None:
    item, problems = read_yaml("[1,\n 2,\n x]")
    check_value(TrainConfig, "schedule_steps", item, "schedule_steps", problems)
    assert (problems[0].line, problems[0].column) == (3, 2)


@pytest.mark.parametrize("section", SECTIONS.values())
def test_every_field_can_say_what_it_takes(section: type) -> None:
    for name in section.model_fields:  # type: ignore[attr-defined]
        assert "anything" not in allowed_values(section, name)


def test_unknown_names() -> None:
    assert unknown("etta", ["eta", "renewal"]) == "unknown key. Allowed: eta, renewal. Did you mean 'eta'?"
    assert unknown("zzz", ["eta", "renewal"]) == "unknown key. Allowed: eta, renewal."
    assert unknown("eta", ["seed"], ["sampler.eta"]) == "unknown key. 'eta' belongs into section 'sampler'"
    assert did_you_mean("x", []) == ""


def test_list_fields() -> None:
    assert is_list_field(TrainConfig, "schedule_steps")
    assert not is_list_field(TrainConfig, "iterations")


def test_values_are_shown_as_in_yaml() -> None:
    assert show({"a": [1, None, True, "x"]}) == "{a: [1, null, true, 'x']}"
    assert len(show("x" * 100)) == 60
    assert "\n" not in show("a\nb")
