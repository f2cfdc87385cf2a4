"""Counts that can be worked out on paper."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.measure.flops import count_flops, count_parameters
from diffinst.backbones.frozen_norm import ConvFrozenNorm
from diffinst.ops.linear import prepare_linear
from diffinst.ops.paths import forget_paths, paths_taken


def test_parameters_count_once_buffers_never() -> None:
    layer = nn.Linear(3, 5)
    model = nn.ModuleList([layer, layer, nn.BatchNorm1d(4)])
    # 3 * 5 weights and 5 biases, once; 4 scales and 4 shifts; running statistics are buffers.
    assert count_parameters(model) == 20 + 8
    layer.weight.requires_grad_(False)
    assert count_parameters(model) == 28


def test_a_multiply_add_is_two_operations() -> None:
    a, b = torch.ones(2, 3), torch.ones(3, 5)
    assert count_flops(lambda: a @ b) == 2 * 2 * 3 * 5
    convolution = nn.Conv2d(3, 4, kernel_size=3, bias=False)
    image = torch.ones(1, 3, 10, 10)
    # 8 x 8 outputs of 4 channels, each a sum over 3 x 3 x 3.
    with torch.inference_mode():
        assert count_flops(lambda: convolution(image)) == 2 * 8 * 8 * 4 * 27


def test_nothing_costs_nothing() -> None:
    assert count_flops(lambda: None) == 0


def test_linear_layers_by_another_operator_count_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_PACK_FROM_ROWS", "_PACK_FROM_WEIGHTS"):
        monkeypatch.setattr(f"diffinst.ops.linear.{name}", 0)
    layer, x = nn.Linear(5, 3), torch.ones(7, 5)
    with torch.inference_mode():
        prepared = prepare_linear(layer, 7)
        assert prepared is not layer
        assert count_flops(lambda: prepared(x)) == count_flops(lambda: layer(x)) == 2 * 7 * 5 * 3


def test_convolutions_that_end_a_residual_count_the_same() -> None:
    convolution = ConvFrozenNorm(8, 6, 3, padding=1, groups=2)
    x, total = torch.ones(2, 8, 5, 4), torch.ones(2, 6, 5, 4)
    expected = 2 * (2 * 6 * 5 * 4) * (4 * 9)
    with torch.inference_mode():
        forget_paths()
        assert count_flops(lambda: convolution.rectified_sum(x, total)) == expected
        assert paths_taken() == {"residual": ["torch"]}
        inner = [tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, total)]
        forget_paths()
        assert count_flops(lambda: convolution.rectified_sum(*inner)) == expected
        assert paths_taken() == {"residual": ["onednn_fused"]}
