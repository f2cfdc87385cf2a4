"""Weights files of detectron2 and its projects, read without executing what a pickle says."""

from __future__ import annotations

import io
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.peers.protocol import PeerError

# What detectron2's model zoo files are made of: containers, strings, numbers and NumPy arrays.
_ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
}
_NUMPY_FUNCTIONS = ("_reconstruct", "scalar")


def _from_buffer(data: Any, dtype: np.dtype, shape: tuple[int, ...], order: Literal["C", "F"]) -> np.ndarray:
    """An array out of a pickle of protocol 5."""
    return np.frombuffer(data, dtype=dtype).reshape(shape, order=order)


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _NUMPY_FUNCTIONS and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return super().find_class("numpy.core.multiarray", name)
        if name == "_frombuffer" and module in ("numpy.core.numeric", "numpy._core.numeric"):
            return _from_buffer
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no weights need")
        return _ALLOWED[module, name]


def read_weights(path: Path) -> dict[str, Any]:
    """The content of a `.pth` or `.pkl` file: 'model' (name -> tensor or array) and what stands beside it.

    Raises:
        PeerError: it cannot be read, or holds more than data.
    """
    import torch

    try:
        if path.suffix == ".pkl":
            content = _DataUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what a damaged file seems to be; it fails below
                content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise PeerError(f"{path}: cannot be read: {error.strerror}. Give a .pth or .pkl file") from error
    # A damaged pickle can raise nearly anything.
    except (
        pickle.UnpicklingError,
        EOFError,
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        IndexError,
    ) as error:
        reason = str(error).strip().partition("\n")[0]
        raise PeerError(
            f"{path}: is no file of weights ({reason}). Give a .pth or .pkl file that holds data alone"
        ) from error
    if not isinstance(content, dict):
        raise PeerError(f"{path}: holds a {type(content).__name__}, not named weights")
    return content if isinstance(content.get("model"), dict) else {"model": content}


def load_into(model: Any, path: Path, *, complete: bool, ignored: frozenset[str] = frozenset()) -> None:
    """Load a file into a model by detectron2's own rules for names.

    Args:
        complete: every parameter must be in the file and fit; else, as where a backbone begins a training, some must.
        ignored: names that may be missing.
    Raises:
        PeerError: see `complete`.
    """
    from detectron2.checkpoint import DetectionCheckpointer

    content = read_weights(path)
    found = DetectionCheckpointer(model)._load_model(content)
    wrong = [f"{name} is {tuple(there)} instead of {tuple(here)}" for name, there, here in found.incorrect_shapes]
    missing = [name for name in found.missing_keys if name not in ignored]
    shaped = {name for name, _, _ in found.incorrect_shapes}
    if complete:
        problems = wrong + [f"{name} is missing" for name in missing if name not in shaped]
        problems += [f"{name} has no place" for name in found.unexpected_keys if name not in ignored]
    else:
        problems = [] if len(missing) < len(model.state_dict()) else ["no name of it is one of the model's"]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise PeerError(
            f"{path}: is of another model: {'; '.join(problems[:3])}{more}. Give its recipe and options, or other "
            "weights"
        )
