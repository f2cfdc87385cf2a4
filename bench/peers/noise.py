"""The harness's noise in another interpreter, and how it takes the place of the released code's own draws.

The rule is that of `diffinst/diffusion/noise.py`, written again because a peer's interpreter has no diffinst; a test
holds the two equal, bit by bit.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bench.peers.protocol import PeerError


def key_bits(*key: int | str) -> int:
    """128 bits of the SHA-256 of a key; 1 and "1" differ."""
    parts = [part if isinstance(part, str) else int(part) for part in key]
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:16], "little")


def noise_for(seed: int, image_id: int, step: int, purpose: str, shape: Sequence[int]) -> np.ndarray:
    """Standard normal float32 draws of one (seed, image, step, purpose), as `diffinst.diffusion.noise.noise_for`."""
    generator = np.random.Generator(np.random.Philox(key=key_bits(seed, image_id, step, purpose)))
    return generator.standard_normal(tuple(shape), dtype=np.float32)


class Draws:
    """Stands in for torch.randn and torch.randn_like while the released code samples one image.

    It draws in this order: the initial boxes (1, N, 4); then for each step but the last the DDIM noise of the K
    proposals that renewal kept, (1, K, 4), and the N - K fresh boxes behind them, (1, N - K, 4). The harness draws all
    N for either purpose, and puts kept proposals first; the released code is given the same rows of them.
    """

    def __init__(self, torch: Any, noise: Callable[[int, str], np.ndarray], num_proposals: int) -> None:
        """`noise`: (step, purpose) -> (N, 4); purposes as in the harness: "initial", "step" and "renewal"."""
        self.count = 0
        self._torch = torch
        self._noise = noise
        self._num_proposals = num_proposals
        self._kept = num_proposals

    def randn(self, *size: Any, dtype: Any = None, device: Any = None, **_: Any) -> Any:
        """As torch.randn; sizes may be tensors, as in the released code."""
        shape = tuple(int(side) for side in (size[0] if len(size) == 1 and hasattr(size[0], "__len__") else size))
        step, place = divmod(self.count - 1, 2)
        if self.count == 0:
            return self._give(shape, self._noise(0, "initial"), dtype, device)
        if place == 0:
            raise self._unexpected("torch.randn", shape)
        return self._give(shape, self._noise(step, "renewal")[self._kept :], dtype, device)

    def randn_like(self, other: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
        """As torch.randn_like, whose type is that of its argument: float64 from the second step on."""
        shape = tuple(other.shape)
        step, place = divmod(self.count - 1, 2)
        if self.count == 0 or place != 0 or len(shape) != 3:
            raise self._unexpected("torch.randn_like", shape)
        self._kept = shape[1]
        return self._give(shape, self._noise(step, "step")[: shape[1]], dtype or other.dtype, device or other.device)

    def _give(self, shape: tuple[int, ...], values: np.ndarray, dtype: Any, device: Any) -> Any:
        if shape != (1, *values.shape):
            raise self._unexpected("a draw", shape)
        self.count += 1
        return self._torch.from_numpy(values.copy())[None].to(device=device or "cpu", dtype=dtype)

    def _unexpected(self, what: str, shape: tuple[int, ...]) -> PeerError:
        return PeerError(
            f"the checkout's code called {what} for {shape} as draw {self.count + 1} of an image with "
            f"{self._num_proposals} proposals, which the released code does not. Use the released version"
        )


@contextlib.contextmanager
def injected(torch: Any, noise: Callable[[int, str], np.ndarray], *, num_proposals: int, steps: int) -> Iterator[None]:
    """Within this context torch.randn and torch.randn_like return the harness's noise for one image.

    Raises:
        PeerError: the code within drew otherwise than the released one.
    """
    draws, randn, randn_like = Draws(torch, noise, num_proposals), torch.randn, torch.randn_like
    torch.randn, torch.randn_like = draws.randn, draws.randn_like
    try:
        yield
    finally:
        torch.randn, torch.randn_like = randn, randn_like
    expected = 2 * steps - 1
    if draws.count != expected:
        raise PeerError(
            f"the checkout's code drew {draws.count} times for {steps} steps, the released code {expected} times. "
            "Use the released version"
        )
