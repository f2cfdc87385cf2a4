"""Weights files of detectron2 and its projects, read without executing what a pickle says."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

from bench.peers.protocol import PeerError
from diffinst.weights.unpickle import Array, Machine

_BUDGET = 4  # bytes that a pickle may have copied, in lengths of its file


def read_weights(path: Path) -> dict[str, Any]:
    """The content of a `.pth` or `.pkl` file: 'model' (name -> tensor or array) and what stands beside it.

    Raises:
        PeerError: it cannot be read, or holds more than data.
    """
    import torch

    try:
        if path.suffix == ".pkl":
            content = _read_pickle(path.read_bytes())
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what a damaged file seems to be; it fails below
                content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise PeerError(f"{path}: cannot be read: {error.strerror}. Give a .pth or .pkl file") from error
    # A damaged file of torch can raise nearly anything; what the other reader refuses is a ValueError.
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


def _read_pickle(data: bytes) -> Any:
    """What a pickle describes, its arrays made; see `diffinst.weights.unpickle`.

    Raises:
        RefusedPickle: it holds more than data.
    """
    content = Machine(io.BytesIO(data), _BUDGET * len(data)).run()
    # Weights lie at the top or in a dict there. Nothing else is looked at: it may be nested without end.
    if not isinstance(content, dict):
        return content
    made: dict[int, Any] = {}  # an array that is named many times is made once
    return {key: _arrays(value, made) for key, value in content.items()}


def _arrays(value: Any, made: dict[int, Any]) -> Any:
    if isinstance(value, dict):
        return {name: _array(entry, made) for name, entry in value.items()}
    return _array(value, made)


def _array(value: Any, made: dict[int, Any]) -> Any:
    if not isinstance(value, Array):
        return value
    if id(value) not in made:
        made[id(value)] = value.numpy()
    return made[id(value)]


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
