"""Time per image and scope: raw samples in seconds, and their summary."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from bench.measure.disturbances import Watch

SCOPES = ("preprocess", "backbone", "head", "masks")
TOTAL = "total"

# Images before the first timed one: caches, lazy initialisation and the choice of kernels settle on them.
WARMUP_IMAGES = 3

Timer = Callable[[str], AbstractContextManager[None]]


class ScopeTimer:
    """Collects the time spent in named scopes of one image; a scope entered several times adds up.

    On CUDA the device is synchronised at both ends of a scope, so work is counted where it was asked for.
    """

    def __init__(self, device: torch.device | str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.elapsed_s: dict[str, float] = {}
        self._clock = clock
        self._device = torch.device(device)

    @contextlib.contextmanager
    def __call__(self, scope: str) -> Iterator[None]:
        self._synchronise()
        start = self._clock()
        try:
            yield
        finally:
            self._synchronise()
            self.elapsed_s[scope] = self.elapsed_s.get(scope, 0.0) + self._clock() - start

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def measure_latency(
    run_one: Callable[[int, Timer], object],
    num_images: int,
    *,
    device: torch.device | str,
    min_images: int = 10,
    min_seconds: float = 3.0,
    clock: Callable[[], float] = time.perf_counter,
    stop: Callable[[], bool] = lambda: False,
    watch: Watch | None = None,
) -> dict[str, list[float]]:
    """Time images one by one, going round the data set, until both minima are reached.

    Args:
        run_one: handles image `index` and enters the scopes of `SCOPES` through the given timer.
        num_images: images to go round, >= 1; `index` runs from 0 to num_images - 1.
        min_images, min_seconds: how much is timed at least, warm-up excluded.
        stop: asked after each image; True ends the measurement early.
        watch: marks the timed images that were disturbed; it looks before and after each, in no image's time.
    Returns:
        scope -> seconds of each timed image, in order; all lists equally long. 'total' is the time around the whole
        image, so at least the sum of its scopes; a scope that an image never entered is 0 s there.
    """
    samples: dict[str, list[float]] = {scope: [] for scope in (*SCOPES, TOTAL)}
    for index in range(WARMUP_IMAGES):
        run_one(index % num_images, ScopeTimer(device, clock))
        if stop():
            return samples
    begin = clock()
    index = 0
    while index < min_images or clock() - begin < min_seconds:
        timer = ScopeTimer(device, clock)
        if watch is not None:
            watch.before()
        with timer(TOTAL):
            run_one(index % num_images, timer)
        if watch is not None:
            watch.after(timer.elapsed_s[TOTAL])
        for scope, values in samples.items():
            values.append(timer.elapsed_s.get(scope, 0.0))
        index += 1
        if stop():
            break
    return samples


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile, q in [0, 100], linear between neighbours as numpy's default.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    position = (len(ordered) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def summarise_latency(samples: dict[str, list[float]]) -> dict[str, float]:
    """Metric name -> seconds: 'latency_s/<scope>' is the median, with '/p5' and '/p95' beside it."""
    summary = {}
    for scope, values in samples.items():
        summary[f"latency_s/{scope}"] = percentile(values, 50)
        summary[f"latency_s/{scope}/p5"] = percentile(values, 5)
        summary[f"latency_s/{scope}/p95"] = percentile(values, 95)
    return summary
