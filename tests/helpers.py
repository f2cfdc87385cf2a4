"""Shared by the tests: stored outputs of the released code, and small builders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler, which torch.compile needs")


def load_fixture(name: str) -> dict[str, np.ndarray]:
    """All arrays of tests/golden/<name>.npz."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def load_json_fixture(name: str) -> Any:
    """The content of tests/golden/<name>.json."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


# How much the tiny network enlarges a difference of rounding from one sampling step to the next (DIFFERENCES.md).
GROWTH = 40


def relative_error(values: Any, expected: Any) -> float:
    """Largest difference over largest value."""
    return float((values - expected).abs().max() / expected.abs().max())


def check_free_steps(errors: list[float]) -> None:
    """Steps that feed themselves are within 1e-4, or as far off as the rounding of the step before explains.

    A processor that rounds otherwise than the one that made the fixtures is a few 1e-6 off at the first step; what
    departs from the release shows as more than that times the network's own growth.
    """
    before = 0.0
    for step, error in enumerate(errors):
        allowed = max(1e-4, GROWTH * before)
        assert error <= allowed, (
            f"step {step}: {error:.1e}, and {allowed:.1e} is allowed; the step before: {before:.1e}"
        )
        before = error
