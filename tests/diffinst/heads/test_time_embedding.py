from __future__ import annotations

import math

import pytest
import torch
from helpers import load_fixture
from released_tiny_model import released_tiny_model
from torch.testing import assert_close

from diffinst.heads.time_embedding import TimeEmbedding, sinusoidal_embedding


def test_by_hand() -> None:
    """Width 4: frequencies 1 and 1/10000."""
    expected = torch.tensor([[0.0, 0.0, 1.0, 1.0], [math.sin(5), math.sin(5e-4), math.cos(5), math.cos(5e-4)]])
    assert_close(sinusoidal_embedding(torch.tensor([0, 5]), 4), expected)


def test_width_2_is_defined() -> None:
    assert_close(sinusoidal_embedding(torch.tensor([3]), 2), torch.tensor([[math.sin(3), math.cos(3)]]))


@pytest.mark.parametrize("dim", [256, 32])
def test_sinusoid_parity(dim: int) -> None:
    fixture = load_fixture("ops")
    t = torch.from_numpy(fixture["sin_t"])
    out = sinusoidal_embedding(t, dim)
    # Processors differ in the last bit of a frequency, which t multiplies before the sine is taken.
    allowed = 1e-6 + t.double()[:, None] * torch.finfo(torch.float32).eps
    assert ((out - torch.from_numpy(fixture[f"sin_dim{dim}"])).abs() <= allowed).all()


def test_embedding_parity() -> None:
    fixture = load_fixture("head_io")
    t = torch.from_numpy(fixture["t"])
    assert_close(sinusoidal_embedding(t, 32), torch.from_numpy(fixture["time_sinusoid"]), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        out = released_tiny_model().box_head.time_embedding(t)
    assert_close(out, torch.from_numpy(fixture["time_emb"]), rtol=1e-5, atol=1e-5)


def test_states_its_width() -> None:
    embedding = TimeEmbedding(6)
    assert embedding(torch.tensor([1, 2, 3])).shape == (3, embedding.out_dim) == (3, 24)
