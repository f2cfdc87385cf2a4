from __future__ import annotations

import weakref

import pytest
import torch
from helpers import load_fixture
from released_tiny_model import released_tiny_model
from torch import Tensor
from torch.testing import assert_close

from diffinst.heads.dynamic_conv import DynamicConv


def _one_by_one(conv: DynamicConv, proposal_features: Tensor, roi_features: Tensor) -> Tensor:
    """Slow, obvious twin: proposal by proposal, pixel by pixel."""
    rows = []
    for feature, roi in zip(proposal_features, roi_features):
        generated = conv.generate(feature)
        half = conv.dim * conv.dim_dynamic
        weight1 = generated[:half].reshape(conv.dim, conv.dim_dynamic)
        weight2 = generated[half:].reshape(conv.dim_dynamic, conv.dim)
        pixels = []
        for y in range(roi.shape[1]):
            for x in range(roi.shape[2]):
                hidden = conv.norm1(roi[:, y, x] @ weight1).relu()
                pixels.append(conv.norm2(hidden @ weight2).relu())
        rows.append(conv.out_norm(conv.out(torch.cat(pixels))).relu())
    return torch.stack(rows)


def test_equals_the_slow_twin() -> None:
    torch.manual_seed(0)
    conv = DynamicConv(dim=6, dim_dynamic=3, resolution=2)
    proposal_features, roi_features = torch.randn(4, 6), torch.randn(4, 6, 2, 2)
    expected = _one_by_one(conv, proposal_features, roi_features)
    assert_close(conv(proposal_features, roi_features), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("elements", [1, 100, 10**6])
def test_parts_of_the_proposals_give_the_same(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    torch.manual_seed(0)
    conv = DynamicConv(dim=6, dim_dynamic=3, resolution=2)
    proposal_features, roi_features = torch.randn(7, 6), torch.randn(7, 6, 2, 2)
    expected = conv(proposal_features, roi_features)  # at once: gradients are on
    monkeypatch.setattr("diffinst.heads.dynamic_conv._FILTER_ELEMENTS_CPU", elements)
    for name in ("_PACK_FROM_ROWS", "_PACK_FROM_WEIGHTS"):
        monkeypatch.setattr(f"diffinst.ops.linear.{name}", 0)
    generated = []
    conv._interact = lambda *arguments: generated.append(len(arguments[0])) or type(conv)._interact(conv, *arguments)  # type: ignore[method-assign, func-returns-value]
    with torch.inference_mode():
        assert_close(conv(proposal_features, roi_features), expected, rtol=1e-5, atol=1e-6)
    assert generated == {1: [1] * 7, 100: [3, 3, 1], 10**6: [7]}[elements]


@pytest.mark.parametrize(("elements", "num_parts"), [(1, 7), (100, 3), (10**6, 1)])
def test_parts_in_training_have_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch, elements: int, num_parts: int
) -> None:
    torch.manual_seed(0)
    conv = DynamicConv(dim=6, dim_dynamic=3, resolution=2)
    inputs = torch.randn(7, 6, requires_grad=True), torch.randn(7, 6, 2, 2, requires_grad=True)
    leaves = [*inputs, *conv.parameters()]
    expected = torch.autograd.grad(conv(*inputs).square().sum(), leaves)
    monkeypatch.setattr("diffinst.heads.dynamic_conv._FILTER_ELEMENTS_TRAINING_CPU", elements)
    calls = []
    conv._interact = lambda *arguments: calls.append(1) or type(conv)._interact(conv, *arguments)  # type: ignore[method-assign, func-returns-value]
    loss = conv(*inputs).square().sum()
    assert len(calls) == num_parts
    for gradient, wanted in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
    assert len(calls) == num_parts * (2 if num_parts > 1 else 1)  # again in the backward


def test_features_that_are_pooled_again_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    conv = DynamicConv(dim=6, dim_dynamic=3, resolution=2)
    proposal_features, source = torch.randn(7, 6, requires_grad=True), torch.randn(7, 6, 2, 2, requires_grad=True)
    leaves = [proposal_features, source, *conv.parameters()]
    expected = torch.autograd.grad(conv(proposal_features, source * 2).square().sum(), leaves)
    monkeypatch.setattr("diffinst.heads.dynamic_conv._FILTER_ELEMENTS_TRAINING_CPU", 100)
    pooled = source * 2
    gone, calls = weakref.ref(pooled), []
    loss = conv(proposal_features, pooled, lambda: calls.append(1) or source * 2).square().sum()
    del pooled
    assert gone() is None
    for gradient, wanted in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
    assert calls == [1]


def test_no_proposals() -> None:
    conv = DynamicConv(dim=6, dim_dynamic=3, resolution=2)
    assert conv(torch.zeros(0, 6), torch.zeros(0, 6, 2, 2)).shape == (0, 6)
    with torch.inference_mode():
        assert conv(torch.zeros(0, 6), torch.zeros(0, 6, 2, 2)).shape == (0, 6)


def test_stage_0_parity() -> None:
    fixture = {name: torch.from_numpy(array) for name, array in load_fixture("head_io").items()}
    stage = released_tiny_model().box_head.stages[0]
    attention_in = fixture["stage0_self_attn_in"].transpose(0, 1)  # (N, B, D) -> (B, N, D)
    attention_out = fixture["stage0_self_attn_out"].transpose(0, 1)
    with torch.no_grad():
        proposal_features = stage.self_attention_norm(attention_in + attention_out).flatten(0, 1)
        out = stage.dynamic_conv(proposal_features, fixture["stage0_roi_features"])
    assert_close(out, fixture["stage0_dynconv_out"], rtol=1e-4, atol=1e-5)
