import math

import pytest
import torch
from helpers import load_fixture
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from diffinst.diffusion.ddim import ddim_step, timestep_pairs
from diffinst.diffusion.schedule import NoiseSchedule


def test_pairs_by_hand():
    assert timestep_pairs(1000, 1) == [(999, -1)]
    assert timestep_pairs(1000, 4) == [(999, 749), (749, 499), (499, 249), (249, -1)]


@pytest.mark.parametrize("sampling_steps", [1, 2, 3, 4, 8, 50])
def test_pairs_parity(sampling_steps):
    times = load_fixture("schedule")[f"ddim_times_{sampling_steps}"].tolist()
    assert timestep_pairs(1000, sampling_steps) == list(zip(times[:-1], times[1:]))


@pytest.mark.parametrize("num_timesteps", [1, 2, 7, 100, 1000])
def test_pairs_fall_whatever_the_spacing(num_timesteps):
    for sampling_steps in range(1, num_timesteps + 1):
        pairs = timestep_pairs(num_timesteps, sampling_steps)
        assert len(pairs) == sampling_steps
        assert pairs[0][0] == num_timesteps - 1
        assert pairs[-1][1] == -1
        assert all(t > t_next for t, t_next in pairs)


@pytest.mark.parametrize("sampling_steps", [0, 11])
def test_pairs_refuse_impossible_counts(sampling_steps):
    with pytest.raises(ValueError, match=rf"sampling_steps must be in \[1, 10\], got {sampling_steps}"):
        timestep_pairs(10, sampling_steps)


def test_step_by_hand():
    # alpha 0.2 -> 0.5, eta 1: sigma^2 = (1 - 0.4) * 0.5 / 0.8 = 0.375, direction^2 = 1 - 0.5 - 0.375 = 0.125
    one = torch.ones(1, 1, 4)
    x_next = ddim_step(one, 2 * one, alpha=0.2, alpha_next=0.5, eta=1.0, noise=3 * one)
    expected = math.sqrt(0.5) + 2 * math.sqrt(0.125) + 3 * math.sqrt(0.375)
    assert_close(x_next, expected * one)


@given(st.integers(0, 998), st.integers(1, 999), st.integers(0, 1000))
def test_perfect_prediction_lands_on_the_forward_process(t_next, gap, seed):
    schedule = NoiseSchedule(1000)
    t = min(t_next + gap, 999)
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.rand(1, 6, 4, generator=generator) * 4 - 2
    noise = torch.randn(1, 6, 4, generator=generator)
    x_t = schedule.add_noise(x_0, noise, torch.tensor([t]))
    x_next = ddim_step(
        x_0,
        schedule.predict_noise(x_t, x_0, torch.tensor([t])),
        alpha=schedule.alpha(t),
        alpha_next=schedule.alpha(t_next),
        eta=0.0,
        noise=torch.full_like(x_0, 1e6),  # has no effect
    )
    assert_close(x_next, schedule.add_noise(x_0, noise, torch.tensor([t_next])), rtol=1e-4, atol=1e-4)


@given(st.integers(0, 998), st.floats(0, 1))
def test_variance_is_that_of_the_forward_process(t_next, eta):
    # With unit noise in both places the step must bring 1 - alpha_next of variance, whatever the share of fresh noise.
    schedule = NoiseSchedule(1000)
    parts = []
    for noise_pred, noise in [(1.0, 0.0), (0.0, 1.0)]:
        step = ddim_step(
            torch.zeros(1, dtype=torch.float64),
            torch.tensor([noise_pred], dtype=torch.float64),
            alpha=schedule.alpha(999),
            alpha_next=schedule.alpha(t_next),
            eta=eta,
            noise=torch.tensor([noise], dtype=torch.float64),
        )
        parts.append(step.item() ** 2)
    assert sum(parts) == pytest.approx(1 - schedule.alpha(t_next), rel=1e-9)


def test_inputs_survive_and_shapes_stay():
    x_0, noise_pred, noise = torch.rand(2, 3, 4), torch.rand(2, 3, 4), torch.rand(2, 3, 4)
    before = x_0.clone(), noise_pred.clone(), noise.clone()
    assert ddim_step(x_0, noise_pred, alpha=0.1, alpha_next=0.9, eta=1.0, noise=noise).shape == (2, 3, 4)
    assert_close((x_0, noise_pred, noise), before, rtol=0, atol=0)


@pytest.mark.parametrize(("alpha", "alpha_next"), [(0.5, 0.2), (0.5, 0.5), (0.0, 0.5), (0.5, 1.1)])
def test_refuses_times_the_wrong_way_round(alpha, alpha_next):
    zeros = torch.zeros(1, 1, 4)
    with pytest.raises(ValueError, match="0 < alpha < alpha_next <= 1"):
        ddim_step(zeros, zeros, alpha=alpha, alpha_next=alpha_next, eta=1.0, noise=zeros)
