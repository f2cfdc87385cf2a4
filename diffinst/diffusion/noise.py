"""Random draws that belong to a key, such as (seed, image id, step): the same whatever the batch, worker or restart.

A key is hashed (SHA-256), so neighbouring keys give unrelated draws and no draw depends on those before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def noise_for(seed: int, image_id: int, step: int, purpose: str, shape: Sequence[int]) -> Tensor:
    """Standard normal draws of one (seed, image, step, purpose); in training the iteration stands in for the image.

    NumPy's Philox and ziggurat are used because they give the same bits on every processor and take a 128-bit key;
    torch's normal draws depend on the vector instructions at hand and its CPU generator reads 32 bits of the seed.

    Args:
        seed: of the whole run.
        image_id: id of the image in its data set; not its place in a batch.
        step: sampling step, counted from 0.
        purpose: what the draw is for, e.g. "initial", "step", "renewal".
        shape: of the result.
    Returns:
        float32 CPU tensor of `shape`.
    """
    generator = np.random.Generator(np.random.Philox(key=_key_bits(seed, image_id, step, purpose)))
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a key, for draws that are not normal: timesteps, permutations, coin flips.

    Args:
        key: integers and strings, e.g. (seed, iteration, "t").
    """
    return torch.Generator().manual_seed(_key_bits(*key) & 0xFFFFFFFFFFFFFFFF)


def _key_bits(*key: int | str) -> int:
    """128 bits of the SHA-256 of a key; 1 and "1" differ, NumPy and Python integers do not."""
    parts = [part if isinstance(part, str) else int(part) for part in key]
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:16], "little")
