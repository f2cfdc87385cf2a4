import pytest
import torch
from helpers import load_fixture
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from diffinst.diffusion.schedule import NoiseSchedule, cosine_alphas_cumprod


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule(1000)


def test_by_hand():
    # T = 2, no offset: cos^2 falls 1, 1/2, 0. Betas 1/2 and 1, the latter cut to 0.999: products 1/2 and 1/2 * 0.001.
    alphas_cumprod = cosine_alphas_cumprod(2, offset=0.0)
    assert_close(alphas_cumprod, torch.tensor([0.5, 0.0005], dtype=torch.float64))


def test_parity(schedule):
    stored = {name: torch.from_numpy(array) for name, array in load_fixture("schedule").items() if array.ndim}
    assert_close(cosine_alphas_cumprod(1000), stored["alphas_cumprod"], rtol=1e-12, atol=0)
    for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"):
        assert_close(getattr(schedule, name), stored[name], rtol=1e-12, atol=0)
    assert_close([schedule.alpha(t) for t in range(1000)], stored["alphas_cumprod"].tolist(), rtol=1e-12, atol=0)


def test_add_noise_parity(schedule):
    stored = {name: torch.from_numpy(array) for name, array in load_fixture("diffusion").items()}
    x_0, noise = stored["q_x_start"], stored["q_noise"]
    assert_close(schedule.add_noise(x_0, noise, stored["q_t"]), stored["q_out"], rtol=1e-7, atol=1e-7)
    for t in (0, 1, 500, 998, 999):
        found = schedule.add_noise(x_0[:1], noise[:1], torch.tensor([t]))[0]
        assert_close(found, stored[f"q1_t{t}_out"], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("t", [1, 249, 499, 749, 999])
def test_predict_noise_parity(schedule, t):
    stored = {name: torch.from_numpy(array) for name, array in load_fixture("diffusion").items()}
    predicted = schedule.predict_noise(stored["q_x_start"], stored["q_noise"].clamp(-2, 2), torch.full((2,), t))
    assert_close(predicted, stored[f"pnfs_t{t}_out"].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_timesteps", [1, 2, 10, 1000])
def test_signal_falls_and_noise_rises(num_timesteps):
    alphas_cumprod = cosine_alphas_cumprod(num_timesteps)
    assert alphas_cumprod.shape == (num_timesteps,)
    assert (alphas_cumprod.diff() < 0).all()
    assert (alphas_cumprod > 0).all()
    assert (alphas_cumprod < 1).all()


@given(st.integers(0, 999), st.integers(0, 2**31))
def test_predict_noise_inverts_add_noise(t, seed):
    schedule = NoiseSchedule(1000)
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.rand(1, 5, 4, generator=generator) * 4 - 2
    noise = torch.randn(1, 5, 4, generator=generator)
    times = torch.tensor([t])
    found = schedule.predict_noise(schedule.add_noise(x_0, noise, times), x_0, times)
    assert_close(found, noise.double(), rtol=1e-10, atol=1e-10)


def test_each_image_has_its_own_time(schedule):
    x_0, noise, times = torch.ones(3, 2, 4), torch.full((3, 2, 4), 2.0), torch.tensor([0, 500, 999])
    together = schedule.add_noise(x_0, noise, times)
    alone = [schedule.add_noise(x_0[i : i + 1], noise[i : i + 1], times[i : i + 1]) for i in range(3)]
    assert_close(together, torch.cat(alone), rtol=0, atol=0)


def test_buffers_move_but_are_no_state(schedule):
    assert schedule.state_dict() == {}
    assert NoiseSchedule(10).to("meta").sqrt_alphas_cumprod.device.type == "meta"
    assert schedule.sqrt_alphas_cumprod.dtype == torch.float64


def test_no_instances(schedule):
    empty = torch.zeros(0, 20, 4)
    assert schedule.add_noise(empty, empty, torch.zeros(0, dtype=torch.int64)).shape == (0, 20, 4)


@pytest.mark.parametrize("t", [-1, 1000])
def test_alpha_refuses_other_times(schedule, t):
    with pytest.raises(ValueError, match=rf"t must be in \[0, 1000\), got {t}"):
        schedule.alpha(t)


def test_refuses_no_timesteps():
    with pytest.raises(ValueError, match="num_timesteps must be at least 1, got 0"):
        NoiseSchedule(0)
