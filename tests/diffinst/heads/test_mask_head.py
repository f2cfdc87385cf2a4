from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers import load_fixture
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from diffinst.heads import mask_head
from diffinst.heads.mask_head import apply_mask_head, num_mask_params, split_mask_params


def _one_by_one(mask_features: Tensor, mask_params: Tensor, channels: Sequence[int], image_index: Tensor) -> Tensor:
    """Slow, obvious twin: each instance alone, with ordinary 1x1 convolutions."""
    masks = [mask_features.new_zeros(0, *mask_features.shape[-2:])]
    for params, image in zip(mask_params, image_index):
        sizes = list(zip((mask_features.shape[1], *channels), (*channels, 1)))
        position = 0
        weights, biases = [], []
        for before, after in sizes:
            weights.append(params[position : position + before * after].reshape(after, before, 1, 1))
            position += before * after
        for _, after in sizes:
            biases.append(params[position : position + after])
            position += after
        x = mask_features[image, None]
        for layer, (weight, bias) in enumerate(zip(weights, biases)):
            x = functional.conv2d(x.relu() if layer else x, weight, bias)
        masks.append(x[0])
    return torch.cat(masks)


def _random(
    num_images: int, num_instances: int, channels: Sequence[int], in_channels: int = 8
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_images, in_channels, 6, 7, generator=generator)
    return features, torch.randn(num_instances, num_mask_params(in_channels, channels), generator=generator)


@pytest.mark.parametrize(
    ("in_channels", "channels", "expected"),
    [(8, (8, 8), 153), (8, (), 9), (1, (1,), 4), (2, (3, 4), 2 * 3 + 3 * 4 + 4 + 3 + 4 + 1)],
)
def test_parameter_count_by_hand(in_channels: int, channels: tuple[int, ...], expected: int) -> None:
    assert num_mask_params(in_channels, channels) == expected


def test_by_hand() -> None:
    """One channel, one hidden unit, w = (2, 3), b = (-1, 5): 3 relu(2x - 1) + 5, so x = 0, 1, 2 give 5, 8, 14."""
    out = apply_mask_head(torch.tensor([[[0.0, 1.0, 2.0]]]), torch.tensor([[2.0, 3.0, -1.0, 5.0]]), channels=(1,))
    assert_close(out, torch.tensor([[[5.0, 8.0, 14.0]]]))


def test_split_parity() -> None:
    fixture = {name: torch.from_numpy(array) for name, array in load_fixture("ops").items()}
    layers = split_mask_params(fixture["dyn_kernels"], 8, (8, 8))
    for number, (weight, bias) in enumerate(layers):
        assert_close(weight.reshape(fixture[f"dyn_w{number}"].shape), fixture[f"dyn_w{number}"], rtol=0, atol=0)
        assert_close(bias.flatten(), fixture[f"dyn_b{number}"], rtol=0, atol=0)


def test_logits_parity() -> None:
    fixture = {name: torch.from_numpy(array) for name, array in load_fixture("ops").items()}
    out = apply_mask_head(fixture["dyn_feat"], fixture["dyn_kernels"])
    assert_close(out, fixture["dyn_logits"], rtol=1e-4, atol=1e-5)


@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    channels=st.lists(st.integers(1, 5), max_size=3),
    in_channels=st.integers(1, 9),
)
def test_equals_the_slow_twin(counts: list[int], channels: list[int], in_channels: int) -> None:
    features, params = _random(len(counts), sum(counts), channels, in_channels)
    image_index = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    out = apply_mask_head(features, params, image_index, channels=channels)
    assert_close(out, _one_by_one(features, params, channels, image_index), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8, 33, 41, generator=generator, requires_grad=training)
    params = torch.randn(5, 153, generator=generator, requires_grad=training)
    whole = apply_mask_head(features, params)
    for name in ("_TILE_ELEMENTS_CPU", "_TILE_ELEMENTS_TRAINING"):
        monkeypatch.setattr(mask_head, name, 5 * 16 * 300)  # 300 pixels a tile, which does not divide 33 * 41
    tiled = apply_mask_head(features, params)
    assert_close(tiled, whole, rtol=1e-5, atol=1e-5)
    if training:
        gradients = [torch.autograd.grad(logits.square().sum(), (features, params)) for logits in (tiled, whole)]
        assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-2)


def test_gradients() -> None:
    features, params = _random(2, 3, (2,), in_channels=2)
    features, params = features[..., :2, :3].double().requires_grad_(), params.double().requires_grad_()
    image_index = torch.tensor([0, 1, 1])
    assert torch.autograd.gradcheck(lambda f, p: apply_mask_head(f, p, image_index, channels=(2,)), (features, params))


def test_no_instances_still_give_a_gradient_path() -> None:
    features, params = _random(2, 0, (8, 8))
    features.requires_grad_()
    params.requires_grad_()
    out = apply_mask_head(features, params, torch.zeros(0, dtype=torch.int64))
    assert out.shape == (0, 6, 7)
    out.sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))
    assert params.grad is not None


def test_features_are_not_copied_per_instance() -> None:
    """Nothing as large as one copy of the features per instance is ever allocated at inference."""
    features, params = torch.randn(8, 128, 128), torch.randn(100, 153)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.inference_mode(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        apply_mask_head(features, params)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 100 * 128 * 128 * 4  # the logits themselves; the copies would be eight times that


@pytest.mark.parametrize(
    ("image_index", "message"),
    [(None, "image_index is needed"), ([1, 0], "must rise from 0 to 1"), ([0, 2], "must rise"), ([-1, 0], "must rise")],
)
def test_a_wrong_image_index_is_refused(image_index: list[int] | None, message: str) -> None:
    features, params = _random(2, 2, (8, 8))
    with pytest.raises(ValueError, match=message):
        apply_mask_head(features, params, None if image_index is None else torch.tensor(image_index))


def test_wrong_parameter_count_is_refused() -> None:
    with pytest.raises(ValueError, match="152 parameters per instance.*need 153"):
        apply_mask_head(torch.zeros(8, 4, 4), torch.zeros(1, 152))
