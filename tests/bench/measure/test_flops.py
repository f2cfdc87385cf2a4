"""Counts that can be worked out on paper."""

from __future__ import annotations

import torch
from torch import nn

from bench.measure.flops import count_flops, count_parameters


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
