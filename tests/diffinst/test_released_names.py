from __future__ import annotations

import pytest
from helpers import load_fixture, load_json_fixture
from released_tiny_model import released_tiny_model

from diffinst.build import build_model
from diffinst.config import ModelConfig
from diffinst.released_names import from_released_name, to_released_name


def test_every_stored_key_maps_to_a_parameter_of_that_shape() -> None:
    ours = {name: tuple(value.shape) for name, value in released_tiny_model().state_dict().items()}
    mapped = {from_released_name(name): array.shape for name, array in load_fixture("tiny_model_state").items()}
    assert mapped == ours


def test_full_model_maps_both_ways() -> None:
    released = [name for name in load_json_fixture("keys_full_diffinst_coco_r50") if from_released_name(name)]
    assert [to_released_name(from_released_name(name)) for name in released] == released
    assert len(released) == 605 - 12  # without the schedule's buffers


def test_schedule_buffers_are_computed_here() -> None:
    assert from_released_name("betas") is None
    assert from_released_name("sqrt_recipm1_alphas_cumprod") is None
    assert from_released_name("log_one_minus_alphas_cumprod") is None
    assert from_released_name("posterior_mean_coef2") is None


def test_projection_counts_the_layers_before_it() -> None:
    assert to_released_name("mask_branch.project.bias") == "head.mask_head.4.bias"
    assert to_released_name("mask_branch.project.bias", mask_branch_layers=1) == "head.mask_head.1.bias"
    assert from_released_name("head.mask_head.1.bias") == "mask_branch.project.bias"


@pytest.mark.parametrize("name", ["head.nothing.weight", "teacher.head.time_mlp.1.bias", ""])
def test_unknown_released_names_are_refused(name: str) -> None:
    with pytest.raises(KeyError, match="not a name of the released model"):
        from_released_name(name)


def test_unknown_own_names_are_refused() -> None:
    with pytest.raises(KeyError, match="no name in the released model"):
        to_released_name("schedule.betas")


def test_names_stay_unique() -> None:
    config = ModelConfig(backbone="tiny", num_classes=2, hidden_dim=8, num_attention_heads=2, mask_branch_channels=8)
    names = [name for name in build_model(config).state_dict() if not name.startswith("backbone.")]
    assert len({to_released_name(name) for name in names}) == len(names)
