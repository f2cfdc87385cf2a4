"""Configuration: strict, frozen, unambiguous names."""

from __future__ import annotations

from collections import Counter

import pydantic
import pytest

from diffinst import config as config_module
from diffinst.config import (
    RELEASED,
    SECTIONS,
    Config,
    ModelConfig,
    SamplerConfig,
    Section,
    TrainConfig,
    added,
    frozen_at_random,
    identity,
    section_of,
)


def test_every_field_name_belongs_to_one_section() -> None:
    counts = Counter(field for section in SECTIONS.values() for field in section.model_fields)
    assert [field for field, count in counts.items() if count > 1] == []
    for name, section in SECTIONS.items():
        for field in section.model_fields:
            assert section_of(field) == name
    assert section_of("sampling_step") is None


def test_released_values_are_valid_and_differ_from_the_defaults() -> None:
    released = Config.model_validate(RELEASED)
    for section, values in RELEASED.items():
        for field, value in values.items():
            assert getattr(getattr(released, section), field) == value
            assert getattr(getattr(Config(), section), field) != value, f"{section}.{field} is no departure"


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (TrainConfig, {"learning_rate": "1e-4"}),  # text, as YAML 1.1 reads it
        (TrainConfig, {"learning_rate": float("nan")}),
        (TrainConfig, {"schedule_steps": [20, 10]}),
        (TrainConfig, {"batch_size": True}),
        (SamplerConfig, {"sampling_steps": 0}),
        (SamplerConfig, {"sampling_steps": 1.0}),
        (SamplerConfig, {"sampling_step": 1}),
        (SamplerConfig, {"eta": 1.5}),
        (ModelConfig, {"hidden_dim": 60, "num_attention_heads": 8}),
        (ModelConfig, {"hidden_dim": 9, "num_attention_heads": 3}),
        (ModelConfig, {"num_classes": 0}),
        (ModelConfig, {"backbone": "resnet18"}),
        (Config, {"model": {"num_train_timesteps": 5}, "sampler": {"sampling_steps": 6}}),
        (Config, {"sampler": {"use_ema": True}}),
        (TrainConfig, {"ema_decay": 1.5}),
    ],
)
def test_impossible_values_are_refused(section: type, values: dict) -> None:
    with pytest.raises(pydantic.ValidationError):
        section(**values)


@pytest.mark.parametrize("values", [{"train": {"ema_decay": 0.999}}, {"model": {"weights": "some.safetensors"}}])
def test_averaged_weights_come_from_the_training_or_a_file(values: dict) -> None:
    assert Config(**values, sampler={"use_ema": True}).sampler.use_ema


def test_a_config_is_a_value() -> None:
    config = Config()
    with pytest.raises(pydantic.ValidationError):
        config.sampler.eta = 0.0
    assert Config.model_validate_json(config.model_dump_json()) == config
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_an_added_field_counts_once_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Grown(Section):
        eta: float = 1.0
        later: tuple[int, ...] = added((), strict=False)

    monkeypatch.setitem(config_module.SECTIONS, "sampler", Grown)
    assert identity("sampler", Grown().model_dump(mode="json")) == {"eta": 1.0}
    assert identity("sampler", {"eta": 1.0}) == {"eta": 1.0}  # as recorded before the field existed
    assert identity("sampler", Grown(later=(1,)).model_dump(mode="json")) == {"eta": 1.0, "later": [1]}


def test_stages_frozen_at_random_values_are_said() -> None:
    message = "the first 2 stages of resnet50 are frozen at random values, as backbone_weights is none. Give "
    assert (frozen_at_random(ModelConfig()) or "").startswith(message)
    assert "or 'imagenet', or train all" in (frozen_at_random(ModelConfig(backbone="efficientnet_lite0")) or "")
    fine = ({"freeze_at": 0}, {"backbone_weights": "w"}, {"weights": "w"}, {"backbone": "tiny"}, {"backbone": "swin_b"})
    assert [frozen_at_random(ModelConfig.model_validate(values)) for values in fine] == [None] * len(fine)
