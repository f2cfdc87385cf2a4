from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from diffinst.ops.linear import Linear, linear, prepare_linear
from diffinst.ops.paths import forget_paths, paths_taken


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layers of any size are packed, and mapped by the kernel."""
    for name in ("_PACK_FROM_ROWS", "_PACK_FROM_WEIGHTS", "_MAP_FROM_ROWS"):
        monkeypatch.setattr(f"diffinst.ops.linear.{name}", 0)
    forget_paths()
    yield
    forget_paths()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("num_rows", "in_features", "out_features"), [(1, 1, 1), (7, 5, 3), (64, 256, 130)])
def test_equals_the_layer(num_rows: int, in_features: int, out_features: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(in_features, out_features, bias=bias)
    x = torch.randn(num_rows, in_features)
    with torch.inference_mode():
        prepared = prepare_linear(layer, num_rows)
        assert paths_taken() == {"linear": ["onednn_packed"]}
        exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None).float()
        assert_close(prepared(x), exact, rtol=1e-5, atol=1e-6)
        # Parts of any size and layout.
        assert_close(torch.cat([prepared(part) for part in x.tensor_split(3)]), exact, rtol=1e-5, atol=1e-6)
        assert_close(prepared(x.t().contiguous().t()), exact, rtol=1e-5, atol=1e-6)
        assert prepared(x[:0]).shape == (0, out_features)


def test_new_weights_are_seen_by_the_next() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    with torch.no_grad():
        before = prepare_linear(layer, 5)(x)
        layer.weight.data.mul_(2)
        assert_close(prepare_linear(layer, 5)(x), layer(x))
        assert not torch.allclose(before, layer(x))


def test_where_it_does_not_apply_the_layer_itself_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(4, 3)
    assert prepare_linear(layer, 5) is layer  # gradients
    with torch.inference_mode():
        assert prepare_linear(nn.Linear(4, 3, dtype=torch.float64), 5).__class__ is nn.Linear
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert prepare_linear(layer, 5) is layer
        with monkeypatch.context() as patch:
            patch.setattr("torch.backends.mkldnn.is_available", lambda: False)
            assert prepare_linear(layer, 5) is layer
        assert paths_taken() == {"linear": ["torch"]}
        monkeypatch.setattr("diffinst.ops.linear._PACK_FROM_ROWS", 6)
        assert prepare_linear(layer, 5) is layer
        assert prepare_linear(layer, 6) is not layer
        monkeypatch.setattr("diffinst.ops.linear._PACK_FROM_WEIGHTS", 13)
        assert prepare_linear(layer, 6) is layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 9, 5, 3), (64, 256, 130), (40, 24, 300)])
def test_rows_have_the_same_gradients(shape: tuple[int, ...], bias: bool) -> None:
    *lead, in_features, out_features = shape
    torch.manual_seed(0)
    x = torch.randn(*lead, in_features, requires_grad=True)
    layer = Linear(in_features, out_features, bias=bias)
    leaves = [x, *layer.parameters()]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    mapped, expected = layer(x), nn.functional.linear(*exact)
    assert paths_taken() == {"linear": ["onednn"]}
    assert_close(mapped, expected.float(), rtol=1e-5, atol=1e-5)
    weights = torch.randn(out_features, *lead).movedim(0, -1)  # a gradient that is not contiguous
    found = torch.autograd.grad((mapped * weights).sum(), leaves)
    for gradient, wanted in zip(found, torch.autograd.grad((expected * weights).sum(), exact), strict=True):
        assert_close(gradient, wanted.float(), rtol=1e-5, atol=1e-4)
    with torch.inference_mode():
        assert torch.equal(layer(x), mapped)


def test_gradients_of_a_sum_have_no_memory_of_their_own() -> None:
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    linear(x, weight).sum().backward()  # of which every element is one and the same
    assert_close(x.grad, weight.detach().sum(0).expand(6, 4))
    assert_close(weight.grad, x.detach().sum(0).expand(5, 4))


def test_a_bias_may_lie_anywhere() -> None:
    x, weight = torch.randn(6, 4), torch.randn(5, 4)
    for bias in (torch.randn(10)[::2], torch.randn(1).expand(5)):
        assert_close(linear(x, weight, bias), nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_only_what_wants_a_gradient_gets_one() -> None:
    x, weight, bias = torch.randn(6, 4), torch.randn(5, 4), torch.randn(5, requires_grad=True)
    linear(x, weight, bias).sum().backward()
    assert_close(bias.grad, torch.full((5,), 6.0))
    assert (x.grad, weight.grad) == (None, None)
    assert not linear(x, weight).requires_grad


def test_gradients_cannot_be_differentiated_again() -> None:
    x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(linear(x, weight).square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_few_rows_and_other_types_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffinst.ops.linear._MAP_FROM_ROWS", 6)
    layer = Linear(4, 3)
    for x in (torch.randn(5, 4), torch.randn(0, 4), torch.randn(5, 1, 4)):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(6, 4)).dtype == torch.bfloat16
    assert layer.double()(torch.randn(6, 4, dtype=torch.float64)).dtype == torch.float64
    assert paths_taken() == {"linear": ["torch"]}
    layer.float()(torch.randn(2, 3, 4))
    assert paths_taken() == {"linear": ["onednn", "torch"]}
