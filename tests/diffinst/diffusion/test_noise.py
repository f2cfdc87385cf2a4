import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffinst.diffusion.noise import generator_for, noise_for

KEY = {"seed": 0, "image_id": 7, "step": 0, "purpose": "initial", "shape": (50, 4)}


def test_same_key_same_draws():
    before = torch.random.get_rng_state()
    first, second = noise_for(**KEY), noise_for(**KEY)
    assert torch.equal(first, second)
    assert first.dtype == torch.float32
    assert first.shape == (50, 4)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("change", [{"seed": 1}, {"image_id": 8}, {"step": 1}, {"purpose": "renewal"}])
def test_every_part_of_the_key_counts(change):
    correlation = np.corrcoef(noise_for(**KEY).flatten(), noise_for(**KEY | change).flatten())[0, 1]
    assert abs(correlation) < 0.25  # 200 draws: standard error 0.07


def test_draws_are_standard_normal():
    draws = torch.cat([noise_for(0, image_id, 0, "initial", (100, 4)).flatten() for image_id in range(100)])
    assert abs(draws.mean()) < 0.02  # standard error 0.005
    assert abs(draws.std() - 1) < 0.02
    assert_close((draws.abs() > 2).float().mean(), torch.tensor(0.0455), atol=0.004, rtol=0)


def test_draws_never_change():
    # Recorded results name their seed: these numbers must stay.
    known = [0.398368061, -0.240446702, 0.509261906, -0.084186174]
    assert_close(noise_for(0, 1, 0, "initial", (4,)), torch.tensor(known), rtol=0, atol=0)
    assert torch.randint(1000, (4,), generator=generator_for(0, 1, "t")).tolist() == [832, 899, 385, 847]


def test_numpy_integers_are_the_same_key():
    assert torch.equal(noise_for(**KEY), noise_for(**KEY | {"image_id": np.int64(7)}))


def test_numbers_and_text_are_different_keys():
    a, b, c = (torch.rand(8, generator=generator_for(*key)) for key in [(1, 2), ("1", 2), (12,)])
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)


def test_no_draws():
    assert noise_for(**KEY | {"shape": (0, 4)}).shape == (0, 4)
