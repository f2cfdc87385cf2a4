"""Parity with the released FPN is tested with the ResNet."""

from __future__ import annotations

import torch
from torch import nn
from torch.testing import assert_close

from diffinst.backbones.fpn import FPN
from diffinst.structures import FeatureShape


def test_top_down_sum_by_hand() -> None:
    """One channel, weights of one: every level is itself plus all coarser ones, repeated."""
    fpn = FPN({f"res{i + 2}": FeatureShape(1, 4 * 2**i) for i in range(4)}, out_channels=1)
    for conv in [*fpn.lateral, *fpn.output]:
        nn.init.zeros_(conv.weight)
        conv.weight.data[0, 0, conv.weight.shape[-1] // 2, conv.weight.shape[-1] // 2] = 1
    coarsest = torch.tensor([[[[1.0, 2.0]]]])
    zeros = {f"res{i + 2}": torch.zeros(1, 1, 8 // 2**i, 16 // 2**i) for i in range(4)}
    out = fpn(zeros | {"res5": coarsest, "res3": torch.full((1, 1, 4, 8), 10.0)})
    assert list(out) == ["p2", "p3", "p4", "p5"]
    assert_close(out["p5"], coarsest)
    assert_close(out["p4"][0, 0], torch.tensor([[1.0, 1, 2, 2]] * 2))
    assert_close(out["p3"][0, 0], torch.tensor([[11.0] * 4 + [12.0] * 4] * 4))
    assert_close(out["p2"][0, 0], torch.tensor([[11.0] * 8 + [12.0] * 8] * 8))


def test_states_its_shapes_and_keeps_its_input() -> None:
    fpn = FPN({"res2": FeatureShape(3, 4), "res3": FeatureShape(5, 8)}, out_channels=7)
    assert fpn.out_shapes == {"p2": (7, 4), "p3": (7, 8)}
    features = {"res2": torch.randn(2, 3, 4, 6), "res3": torch.randn(2, 5, 2, 3)}
    before = {name: x.clone() for name, x in features.items()}
    out = fpn(features)
    assert {name: tuple(x.shape) for name, x in out.items()} == {"p2": (2, 7, 4, 6), "p3": (2, 7, 2, 3)}
    assert all(torch.equal(features[name], before[name]) for name in before)


def test_maps_go_when_they_have_been_used_and_the_numbers_stay() -> None:
    torch.manual_seed(0)
    fpn = FPN({f"res{i + 2}": FeatureShape(3, 4 * 2**i) for i in range(3)}, out_channels=4)
    features = {f"res{i + 2}": torch.randn(2, 3, 16 // 2**i, 8 // 2**i) for i in range(3)}
    with_gradients = fpn(features)
    left = []
    with torch.no_grad():
        maps = []
        for level in fpn.from_coarsest(features):
            left.append(list(features))
            maps.append(level)
    assert left == [["res2", "res3"], ["res2"], []]
    assert all(map(torch.equal, maps[::-1], with_gradients.values()))
