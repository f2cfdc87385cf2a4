from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from diffinst.ops.linear import prepare_linear
from diffinst.ops.paths import forget_paths, paths_taken


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layers of any size are packed."""
    for name in ("_PACK_FROM_ROWS", "_PACK_FROM_WEIGHTS"):
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
