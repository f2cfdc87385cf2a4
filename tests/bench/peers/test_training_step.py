"""What a step of the released training does with losses; no detectron2 needed."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bench.peers.protocol import PeerError
from bench.peers.training_step import _refuse_stand_ins, build_optimizer, take_step

FULL = SimpleNamespace(ENABLED=True, CLIP_TYPE="full_model", CLIP_VALUE=1.0, NORM_TYPE=2.0)


class Model(nn.Module):
    """Its gradient is (3, 4) times 10: of norm 50."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def forward(self, batch: list[Any]) -> dict[str, torch.Tensor]:
        assert batch == [10.0]
        return {"a": 30.0 * self.weight[0], "b": 40.0 * self.weight[1]}


@pytest.mark.parametrize(
    ("clipping", "gradient"),
    [
        (FULL, [0.6, 0.8]),
        (SimpleNamespace(**{**vars(FULL), "ENABLED": False}), [30.0, 40.0]),
        (SimpleNamespace(**{**vars(FULL), "CLIP_TYPE": "value"}), [30.0, 40.0]),
    ],
)
def test_a_step_sums_losses_clips_and_updates(clipping: SimpleNamespace, gradient: list[float]) -> None:
    model = Model()
    model.weight.grad = torch.tensor([7.0, 7.0])  # of the step before, which does not count
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    take_step(model, [10.0], [model.weight], optimizer, clipping)
    assert model.weight.tolist() == pytest.approx([-value for value in gradient])


def test_the_optimizer_has_a_group_for_each_parameter() -> None:
    solver = SimpleNamespace(OPTIMIZER="ADAMW", BASE_LR=0.25, WEIGHT_DECAY=0.125)
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    optimizer = build_optimizer(SimpleNamespace(SOLVER=solver), parameters)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["params"] for group in optimizer.param_groups] == [[parameter] for parameter in parameters]
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.25, 0.125)}
    solver.OPTIMIZER = "SGD"
    with pytest.raises(PeerError, match="SOLVER.OPTIMIZER is 'SGD'; a training step is measured with ADAMW alone"):
        build_optimizer(SimpleNamespace(SOLVER=solver), parameters)


def test_stochastic_depth_is_not_stood_in_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    monkeypatch.setitem(sys.modules, "timm.models.layers", ModuleType("timm.models.layers"))
    _refuse_stand_ins(model)
    model[0].drop_prob = 0.1
    with pytest.raises(PeerError, match="needs timm"):
        _refuse_stand_ins(model)
