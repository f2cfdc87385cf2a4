from __future__ import annotations

import pytest
import torch
from helpers import load_json_fixture
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diffinst.config import TrainConfig
from diffinst.engine.optim import (
    build_optimizer,
    clip_gradients,
    load_optimizer_tensors,
    lr_at,
    optimizer_tensors,
    set_learning_rate,
)


@pytest.mark.parametrize("name", ["configs/diffinst.coco.res50.yaml", "configs/diffinst.coco.res50.inst.yaml"])
def test_learning_rates_of_the_release(name: str) -> None:
    released = load_json_fixture("lr_schedule")[name]
    settings = TrainConfig(
        learning_rate=released["base_lr"],
        iterations=released["max_iter"],
        warmup_iterations=released["warmup_iters"],
        warmup_factor=released["warmup_factor"],
        schedule_steps=tuple(released["steps"]),
        schedule_gamma=released["gamma"],
    )
    for iteration, rate in released["lr_at_iter"].items():
        assert lr_at(int(iteration), settings) == pytest.approx(rate, rel=1e-12), iteration


def test_warm_up_by_hand() -> None:
    # From 0.1 to 1 over 10 iterations: half way, 0.1 + 0.45 = 0.55.
    settings = TrainConfig(learning_rate=2.0, warmup_iterations=10, warmup_factor=0.1, schedule_steps=())
    assert lr_at(0, settings) == pytest.approx(0.2)
    assert lr_at(5, settings) == pytest.approx(1.1)
    assert lr_at(10, settings) == 2.0


def test_cosine_by_hand() -> None:
    settings = TrainConfig(learning_rate=2.0, warmup_iterations=0, schedule="cosine", iterations=100)
    assert lr_at(0, settings) == 2.0
    assert lr_at(50, settings) == pytest.approx(1.0)
    assert lr_at(25, settings) == pytest.approx(1 + 0.5**0.5)
    assert lr_at(100, settings) == pytest.approx(0.0)


@given(st.integers(0, 2000), st.sampled_from(["step", "cosine"]))
def test_never_rises_after_the_warm_up_and_never_exceeds_the_base(iteration: int, schedule: str) -> None:
    settings = TrainConfig(
        learning_rate=1.0, iterations=2000, warmup_iterations=50, schedule_steps=(700, 1500), schedule=schedule
    )
    assert 0 <= lr_at(iteration, settings) <= 1
    if iteration >= 50:
        assert lr_at(iteration + 1, settings) <= lr_at(iteration, settings)


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 1))
    model[1].requires_grad_(False)
    return model


def test_first_step_by_hand() -> None:
    # AdamW's first step is lr * sign(gradient), beside the decay lr * wd * weight; biases decay too.
    model = small_model()
    optimizer = build_optimizer(model, TrainConfig(learning_rate=0.1, weight_decay=0.5, warmup_iterations=0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, -3.0)
    optimizer.step()
    for name, value in model.state_dict().items():
        expected = before[name] if name.startswith("1.") else before[name] * (1 - 0.1 * 0.5) + 0.1
        torch.testing.assert_close(value, expected)


def test_set_learning_rate() -> None:
    optimizer = build_optimizer(small_model(), TrainConfig())
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


class TestClipping:
    def parameters(self) -> list[nn.Parameter]:
        parameters = [nn.Parameter(torch.zeros(size)) for size in (1, 2, 3)]
        parameters[0].grad = torch.tensor([3.0])
        parameters[1].grad = torch.tensor([0.0, 4.0])  # joint norm 5
        return parameters

    def test_scales_to_the_norm(self) -> None:
        parameters = self.parameters()
        assert float(clip_gradients(parameters, 1.0)) == 5.0
        torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6]))
        torch.testing.assert_close(parameters[1].grad, torch.tensor([0.0, 0.8]))
        assert parameters[2].grad is None

    @pytest.mark.parametrize("max_norm", [10.0, None])
    def test_leaves_small_gradients_alone(self, max_norm: float | None) -> None:
        parameters = self.parameters()
        assert float(clip_gradients(parameters, max_norm)) == 5.0
        assert parameters[0].grad == torch.tensor([3.0])

    def test_without_any_gradient(self) -> None:
        assert float(clip_gradients([nn.Parameter(torch.zeros(2))], 1.0)) == 0


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    for step in range(number):
        optimizer.zero_grad()
        model(torch.arange(6.0).reshape(2, 3) + step).square().sum().backward()
        optimizer.step()


def test_state_goes_around() -> None:
    model, twin = small_model(), small_model()
    optimizer, twin_optimizer = (build_optimizer(m, TrainConfig(learning_rate=0.01)) for m in (model, twin))
    take_steps(model, optimizer, 3)
    tensors = optimizer_tensors(optimizer, model)
    assert set(tensors) == {
        f"{layer}.{part}/{entry}"
        for layer in (0, 2)
        for part in ("weight", "bias")
        for entry in ("step", "exp_avg", "exp_avg_sq")
    }
    twin.load_state_dict(model.state_dict())
    load_optimizer_tensors(twin_optimizer, twin, {name: value.clone() for name, value in tensors.items()})
    take_steps(model, optimizer, 2)
    take_steps(twin, twin_optimizer, 2)
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        assert torch.equal(ours, theirs)


def test_state_of_another_model_is_refused() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="'1.weight', which is no trainable parameter"):
        load_optimizer_tensors(build_optimizer(model, TrainConfig()), model, {"1.weight/step": torch.tensor(1.0)})
