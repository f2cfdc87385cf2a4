"""The noise of a peer's interpreter is the harness's, bit by bit, and stands where the released code draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from bench.peers import noise as peer
from bench.peers.protocol import PeerError
from diffinst.config import RELEASED, SamplerConfig
from diffinst.diffusion import noise as ours
from diffinst.diffusion.sampler import sample
from diffinst.diffusion.schedule import NoiseSchedule
from diffinst.structures import HeadOutput


@pytest.mark.parametrize("seed", [0, 41])
@pytest.mark.parametrize("image_id", [1, 2**40 + 7])
@pytest.mark.parametrize(("step", "purpose"), [(0, "initial"), (0, "step"), (3, "renewal")])
def test_both_rules_give_the_same_bits(seed: int, image_id: int, step: int, purpose: str) -> None:
    expected = ours.noise_for(seed, image_id, step, purpose, (50, 4))
    found = torch.from_numpy(peer.noise_for(seed, image_id, step, purpose, (50, 4)))
    assert_close(found, expected, rtol=0, atol=0)


def test_known_draws() -> None:
    # The numbers of tests/diffinst/diffusion/test_noise.py, so that this holds where there is no diffinst.
    known = np.array([0.398368061, -0.240446702, 0.509261906, -0.084186174], dtype=np.float32)
    np.testing.assert_array_equal(peer.noise_for(0, 1, 0, "initial", (4,)), known)


def _noise(step: int, purpose: str) -> np.ndarray:
    return peer.noise_for(0, 7, step, purpose, (5, 4))


def test_draws_take_the_rows_that_the_harness_uses() -> None:
    with peer.injected(torch, _noise, num_proposals=5, steps=3):
        initial = torch.randn((1, 5, 4), device="cpu")
        first = torch.randn_like(torch.zeros(1, 2, 4))
        fresh = torch.randn(1, torch.tensor(3), 4, device=torch.device("cpu"))
        second = torch.randn_like(torch.zeros(1, 0, 4, dtype=torch.float64))
        last = torch.randn(1, 5, 4)
    assert_close(initial[0], torch.from_numpy(_noise(0, "initial")), rtol=0, atol=0)
    assert_close(first[0], torch.from_numpy(_noise(0, "step")[:2]), rtol=0, atol=0)
    assert_close(fresh[0], torch.from_numpy(_noise(0, "renewal")[2:]), rtol=0, atol=0)
    assert second.dtype == torch.float64
    assert_close(last[0], torch.from_numpy(_noise(1, "renewal")), rtol=0, atol=0)


def test_afterwards_torch_draws_itself() -> None:
    randn, randn_like = torch.randn, torch.randn_like
    with peer.injected(torch, _noise, num_proposals=5, steps=1):
        assert torch.randn is not randn
        torch.randn(1, 5, 4)
    assert (torch.randn, torch.randn_like) == (randn, randn_like)


def test_code_that_draws_otherwise_is_refused() -> None:
    randn = torch.randn

    def draw(*shapes: tuple[int, ...], steps: int) -> None:
        with peer.injected(torch, _noise, num_proposals=5, steps=steps):
            for shape in shapes:
                torch.randn(shape)

    for shape in ((2, 5, 4), (1, 6, 4)):
        with pytest.raises(PeerError, match="released version"):
            draw(shape, steps=1)
    with pytest.raises(PeerError, match="drew 1 times for 2 steps"):
        draw((1, 5, 4), steps=2)
    with pytest.raises(PeerError, match="as draw 2"):
        draw((1, 5, 4), (1, 5, 4), steps=2)
    assert torch.randn is randn


def _released_loop(x: torch.Tensor, schedule: NoiseSchedule, logits: torch.Tensor) -> torch.Tensor:
    """Two steps as parity/README.md tells of the released order: drop, add noise, put fresh boxes behind."""
    x_0 = x.clamp(-2, 2)
    noise_pred = schedule.predict_noise(x.double(), x_0.double(), torch.tensor([999]))
    keep = logits[0].sigmoid().amax(-1) > 0.5
    x_0, noise_pred, x = x_0[:, keep], noise_pred[:, keep], x[:, keep]
    alpha, after = schedule.alpha(999), schedule.alpha(499)
    sigma = ((1 - alpha / after) * (1 - after) / (1 - alpha)) ** 0.5
    x = x_0 * after**0.5 + (1 - after - sigma**2) ** 0.5 * noise_pred + sigma * torch.randn_like(x)
    return torch.cat((x, torch.randn(1, 5 - keep.sum(), 4)), dim=1)


def test_a_released_loop_and_our_sampler_see_the_same_boxes() -> None:
    schedule, logits = NoiseSchedule(1000), torch.tensor([[[1.0], [-1.0], [2.0], [-3.0], [-1.0]]])

    def denoise(boxes_xyxy: torch.Tensor, t: torch.Tensor) -> HeadOutput:
        return HeadOutput(class_logits=logits[None], boxes_xyxy=boxes_xyxy[None], mask_params=None)

    settings = SamplerConfig(**RELEASED["sampler"], sampling_steps=2, num_proposals=5)
    whwh = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    steps = sample(
        denoise,
        whwh=whwh,
        schedule=schedule,
        settings=settings,
        snr_scale=2.0,
        noise=lambda step, purpose: ours.noise_for(0, 7, step, purpose, (5, 4))[None],
    )
    with peer.injected(torch, _noise, num_proposals=5, steps=2):
        theirs = _released_loop(torch.randn(1, 5, 4), schedule, logits)
    assert_close(steps[1].x_t.double(), theirs.double(), rtol=1e-5, atol=1e-5)
