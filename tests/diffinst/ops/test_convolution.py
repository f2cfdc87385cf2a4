from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from diffinst.ops.convolution import convolve_into
from diffinst.ops.paths import forget_paths, paths_taken


@pytest.fixture(autouse=True)
def _no_paths() -> Iterator[None]:
    forget_paths()
    yield
    forget_paths()


def make(
    *, batch: int = 2, channels: int = 4, out: int = 6, size: int = 5, kernel: int = 1, groups: int = 1
) -> list[Tensor]:
    """A map to be added to, one to be convolved, a weight and a bias."""
    torch.manual_seed(0)
    maps = [torch.randn(batch, count, size, size + 2) for count in (out, channels)]
    weight = torch.randn(out, channels // groups, kernel, kernel)
    return [*(map.contiguous(memory_format=torch.channels_last) for map in maps), weight, torch.randn(out)]


def test_by_hand() -> None:
    total, x = torch.tensor([1.0, -9.0]).view(1, 2, 1, 1), torch.tensor([3.0]).view(1, 1, 1, 1)
    weight, bias = torch.tensor([2.0, 1.0]).view(2, 1, 1, 1), torch.tensor([0.5, 0.0])
    with torch.inference_mode():
        # 1 + 2 * 3 + 0.5, and -9 + 3, which is below zero
        assert convolve_into(total, x, weight, bias).flatten().tolist() == [7.5, 0.0]


@given(st.integers(1, 3), st.sampled_from([4, 16]), st.integers(1, 9), st.sampled_from([1, 3]), st.sampled_from([1, 2]))
def test_equals_convolution_sum_and_relu(batch: int, channels: int, size: int, kernel: int, groups: int) -> None:
    total, x, weight, bias = make(batch=batch, channels=channels, size=size, kernel=kernel, groups=groups)
    padding = (kernel // 2, kernel // 2)
    with torch.inference_mode():
        expected = functional.relu(functional.conv2d(x, weight, bias, padding=padding, groups=groups) + total)
        found = convolve_into(total, x, weight, bias, padding=padding, groups=groups)
    assert_close(found, expected, rtol=1e-6, atol=1e-5)


def test_no_map_is_made() -> None:
    total, x, weight, bias = make()
    with torch.no_grad():
        assert convolve_into(total, x, weight, bias).data_ptr() == total.data_ptr()
    assert paths_taken() == {"residual": ["onednn_fused"]}


@pytest.mark.parametrize("why", ["gradients", "layout", "precision", "switched off", "autocast"])
def test_elsewhere_torchs_own_convolution_runs_and_keeps_its_inputs(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    total, x, weight, bias = make()
    if why == "layout":
        total = total.contiguous()
    if why == "precision":
        total, x, weight, bias = (tensor.double() for tensor in (total, x, weight, bias))
    if why == "switched off":
        monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    before = total.clone()
    with torch.set_grad_enabled(why == "gradients"), torch.autocast("cpu", enabled=why == "autocast"):
        expected = functional.relu(functional.conv2d(x, weight, bias).add_(total))
        assert_close(convolve_into(total, x, weight, bias), expected)
    assert torch.equal(total, before)
    assert paths_taken() == {"residual": ["torch"]}
