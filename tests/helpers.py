"""Shared by the tests: stored outputs of the released code, and small builders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"


def load_fixture(name: str) -> dict[str, np.ndarray]:
    """All arrays of tests/golden/<name>.npz."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def load_json_fixture(name: str) -> Any:
    """The content of tests/golden/<name>.json."""
    return json.loads((GOLDEN / f"{name}.json").read_text())
