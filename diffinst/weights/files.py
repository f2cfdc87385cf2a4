"""Weights files of the released code: detectron2's `.pkl`, torch's `.pth` in both its formats. Nothing in them is run.

.pkl    a pickle of {"model": {name: numpy array}, "__author__": text, "matching_heuristics": bool}
.pth    {"model": {name: tensor}, "optimizer": ..., "iteration": n, "ema_state": {name: tensor}}, or the state alone
"""

from __future__ import annotations

import hashlib
import mmap
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffinst.checkpoint import replacing
from diffinst.errors import CheckpointError
from diffinst.weights.unpickle import Array, Machine, Name, RefusedPickle, Storage, TensorView

# A storage and its length in bytes -> its content.
ReadStorage = Callable[[Storage, int], bytes]
MODEL, EMA = "model", "ema_state"
_STATES = (MODEL, EMA, "state_dict")
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_TORCH_PROTOCOL = 1001
_MAGIC_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_BUDGET = 4  # of what the file's length allows to copy; text encoded for its bytes is copied twice
_STORAGE_DTYPES: dict[str, torch.dtype] = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class ReleasedFile:
    """What a file holds, tensors not read yet.

    states: "model" and, where the file has a moving average of the weights, "ema_state"; name -> Array or TensorView.
    open_storages: opens the file for reading torch's storages.
    """

    path: Path
    num_bytes: int
    states: dict[str, dict[str, Any]]
    open_storages: Callable[[], AbstractContextManager[ReadStorage]] = field(repr=False)

    def tensors(self, state: str = MODEL) -> dict[str, Tensor]:
        """The tensors of one state under the names of the file; all kinds of floats as float32, integers as they are.

        Raises:
            CheckpointError: the file has no such state, holds something else than numbers, or claims more of them than
                its length allows.
        """
        if state not in self.states:
            there = ", ".join(self.states)
            raise CheckpointError(f"{self.path}: no '{state}' in it. There: {there}")
        blocks: dict[Storage, Tensor] = {}
        found: dict[str, Tensor] = {}
        budget = _BUDGET * self.num_bytes
        with _one_line(self.path), self.open_storages() as read_storage:
            for name, value in self.states[state].items():
                try:
                    tensor = _tensor(value, blocks, read_storage)
                except (RuntimeError, TypeError, OverflowError) as error:
                    raise RefusedPickle(f"corrupt: {name[:80]} is no tensor that can be made") from error
                budget -= tensor.numel() * tensor.element_size()
                if budget < 0:
                    raise RefusedPickle("its tensors claim more bytes than the file has")
                # The noise schedule is checked in the precision it was stored in.
                is_wide = tensor.dtype == torch.float64 and "." not in name
                found[name] = tensor.float() if tensor.is_floating_point() and not is_wide else tensor
        return found


def _tensor(value: Any, blocks: dict[Storage, Tensor], read_storage: ReadStorage) -> Tensor:
    if isinstance(value, Array):
        return torch.from_numpy(value.numpy())
    if isinstance(value, TensorView):
        storage = value.storage
        dtype = _STORAGE_DTYPES[storage.type_name]
        if not value.num_elements:
            return torch.empty(value.size, dtype=dtype)
        if storage not in blocks:
            raw = read_storage(storage, storage.num_elements * dtype.itemsize)
            blocks[storage] = torch.frombuffer(bytearray(raw), dtype=dtype)
        return blocks[storage].as_strided(value.size, value.stride, value.offset)
    return torch.tensor(value)  # a number that numpy did not keep as an array


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except RefusedPickle as error:
        raise CheckpointError(
            f"{path}: {error}. Allowed are weights only: numpy arrays and torch tensors by name. Ask for such a file."
        ) from error


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_released(path: Path) -> ReleasedFile:
    """Look into a weights file; the format goes by the content, not by the name.

    Raises:
        CheckpointError: no such file; truncated or corrupt; it asks for something else than arrays (the name it asks
            for is given, nothing of it is run); or it holds no weights.
    """
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            if not num_bytes:
                raise CheckpointError(f"{path}: empty. Download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, _one_line(path):
                if content[:2] == b"PK":
                    value, open_storages = _read_zip(path, num_bytes)
                elif content[: len(_MAGIC_PICKLE)] == _MAGIC_PICKLE:
                    value, open_storages = _read_legacy(path, content, num_bytes)
                else:
                    value, open_storages = Machine(content, _BUDGET * num_bytes).run(), _no_storages
    except OSError as error:
        what = "is a folder" if path.is_dir() else f"cannot be read ({error.strerror})"
        raise CheckpointError(f"{path}: {what}. Give a .pkl or .pth file with weights") from error
    return ReleasedFile(path, num_bytes, _states(path, value), open_storages)


@contextmanager
def _no_storages() -> Iterator[ReadStorage]:
    """Of a pickle of numpy arrays, which has none: references to storages are refused when it is read."""
    yield lambda storage, _: storage.key.encode()


def _storage(reference: Any) -> Storage:
    """('storage', type, key, location, number of elements, ...), as torch writes references to its storages."""
    if isinstance(reference, tuple) and len(reference) >= 5 and reference[0] == "storage":
        kind, key, count = reference[1], reference[2], reference[4]
        name = kind.name.removeprefix("torch.") if isinstance(kind, Name) else ""
        if name in _STORAGE_DTYPES and isinstance(key, str) and type(count) is int and count >= 0:
            if any(entry is not None for entry in reference[5:]) or len(reference) > 6:
                raise RefusedPickle("views of storages, as torch before 0.4 wrote them, are not supported")
            return Storage(key, name, count)
    raise RefusedPickle("a reference in it is no storage of plain numbers")


def _read_zip(path: Path, num_bytes: int) -> tuple[Any, Callable[[], AbstractContextManager[ReadStorage]]]:
    """The format of torch 1.6 and later: an uncompressed archive of data.pkl and one file per storage."""

    @contextmanager
    def archive() -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(path) as opened:
                yield opened
        except RefusedPickle:
            raise
        # What zipfile raises for damaged entries: names, lengths, flags and offsets that cannot be.
        except (zipfile.BadZipFile, EOFError, struct.error, RuntimeError, KeyError, ValueError, OSError) as error:
            raise RefusedPickle(f"truncated or corrupt ({' '.join(str(error).split())[:100]})") from error

    with archive() as opened:
        entries = opened.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise RefusedPickle("a compressed archive, which torch does not write")
        if sum(entry.file_size for entry in entries) > num_bytes:
            raise RefusedPickle("corrupt: its parts claim more bytes than the file has")
        pickles = [entry.filename for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise RefusedPickle("an archive without data.pkl, so not written by torch.save")
        folder = pickles[0].removesuffix("data.pkl")
        names = {entry.filename for entry in entries}
        if f"{folder}byteorder" in names and opened.read(f"{folder}byteorder") != b"little":
            raise RefusedPickle("its numbers are big-endian, which is not supported")
        value = Machine(BytesIO(opened.read(pickles[0])), _BUDGET * num_bytes, _storage).run()

    @contextmanager
    def open_storages() -> Iterator[ReadStorage]:
        with archive() as opened:

            def read(storage: Storage, size: int) -> bytes:
                raw = opened.read(f"{folder}data/{storage.key}")
                if len(raw) != size:
                    raise RefusedPickle(f"corrupt: storage {storage.key} has {len(raw)} bytes instead of {size}")
                return raw

            yield read

    return value, open_storages


def _read_legacy(
    path: Path, content: mmap.mmap, num_bytes: int
) -> tuple[Any, Callable[[], AbstractContextManager[ReadStorage]]]:
    """The format before torch 1.6: five pickles in a row, then each storage with its length in front."""
    budget = _BUDGET * num_bytes
    head = [Machine(content, budget).run() for _ in range(3)]
    if head[0] != _TORCH_MAGIC or head[1] != _TORCH_PROTOCOL or not isinstance(head[2], dict):
        raise RefusedPickle("corrupt, or of a version of torch that is not known")
    if head[2].get("little_endian") is not True:
        raise RefusedPickle("its numbers are big-endian, which is not supported")
    storages: dict[str, Storage] = {}

    def note(reference: Any) -> Storage:
        storage = _storage(reference)
        return storages.setdefault(storage.key, storage)

    value = Machine(content, budget, note).run()
    keys = Machine(content, budget).run()
    # Types first: what is no text may be nested without end, and hashing it would crash.
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(storages) != set(keys):
        raise RefusedPickle("corrupt: its list of storages does not fit")
    starts: dict[str, int] = {}
    position = content.tell()
    for key in keys:
        size = storages[key].num_elements * _STORAGE_DTYPES[storages[key].type_name].itemsize
        count = content[position : position + 8]
        starts[key] = position + 8
        position += 8 + size
        if len(count) < 8 or position > num_bytes:
            raise RefusedPickle("truncated: storages are missing at its end")
        if struct.unpack("<q", count)[0] != storages[key].num_elements:
            raise RefusedPickle(f"corrupt: storage {key} has another length than its tensors say")

    @contextmanager
    def open_storages() -> Iterator[ReadStorage]:
        with path.open("rb") as file:

            def read(storage: Storage, size: int) -> bytes:
                file.seek(starts[storage.key])
                return file.read(size)

            yield read

    return value, open_storages


def _states(path: Path, value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no names and tensors, but a {type(value).__name__}. Give a state dict")
    if "blobs" in value and MODEL not in value:
        raise CheckpointError(
            f"{path}: Caffe2's weights, whose ResNet is another network (strides in the 1x1 convolutions). Give "
            "detectron2's torchvision variant of the file"
        )
    found = {key: value[key] for key in _STATES if isinstance(value.get(key), dict)} or {MODEL: value}
    if "state_dict" in found:
        found.setdefault(MODEL, found.pop("state_dict"))
    states = {}
    for key, state in found.items():
        wrong = [
            str(name)[:40]
            for name, entry in state.items()
            if not isinstance(name, str) or not isinstance(entry, (Array, TensorView, int, float))
        ]
        if wrong or not state:
            example = f", e.g. under '{' '.join(wrong[0].split())}'" if wrong else ""
            raise CheckpointError(f"{path}: holds no names and tensors{example}. Give a file with a model's state dict")
        prefix = "module." if all(name.startswith("module.") for name in state) else ""  # of data-parallel training
        states[key] = {name.removeprefix(prefix): entry for name, entry in state.items()}
    return states


def write_pth(path: Path, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write states as `torch.save` does; tensors only, so that `torch.load(path, weights_only=True)` takes it."""
    content = {key: {name: value.detach().clone() for name, value in state.items()} for key, state in states.items()}
    with replacing(path) as temporary:
        torch.save(content, temporary)


def write_pkl(path: Path, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write states as detectron2's model zoo has them: a pickle of numpy arrays."""
    content: dict[str, Any] = {
        key: {name: value.detach().cpu().contiguous().numpy() for name, value in state.items()}
        for key, state in states.items()
    }
    content |= {"__author__": "diffinst", "matching_heuristics": False}
    with replacing(path) as temporary, temporary.open("wb") as file:
        pickle.dump(content, file, protocol=4)
