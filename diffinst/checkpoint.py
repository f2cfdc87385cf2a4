"""Checkpoints: one safetensors file with weights, optimiser state and, as metadata, the configuration.

The file holds data only, so loading one runs no code. Writing is atomic: a reader sees the old file or the new one. A
SHA-256 over all of its content is in the metadata, so a byte that changes later is found.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffinst.config import Config
from diffinst.errors import CheckpointError

FORMAT_VERSION = 1
_FORMAT_KEY = "diffinst_format"
SOURCE_KEY = "source"
_LOSSES_KEY, _DIGEST_KEY, _CATEGORIES_KEY = "losses", "sha256", "category_ids"
_KNOWN_KEYS = {_FORMAT_KEY, SOURCE_KEY, _LOSSES_KEY, "config", "iteration", "class_names", _CATEGORIES_KEY}
_MODEL, _OPTIMIZER, _EMA = "model/", "optimizer/", "ema/"
_SHOWN = 3  # mismatches named in an error
_MAPPED_BYTES = 2**26  # of a file that is read, mapped at once


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds; tensors on the CPU.

    iteration: finished training iterations. class_names: K names, empty if unknown. optimizer: empty in a final file.
    source: where imported weights come from, empty for those trained here; see `diffinst.weights.importing`.
    ema: moving average of `model`, of the same names; empty where none was kept.
    losses: number of bytes, and their SHA-256, that the log of losses had when the file was written; None if unknown.
    category_ids: of the data set, one a class; empty if unknown, as in files of earlier versions.
    """

    path: Path
    config: Config
    iteration: int
    class_names: tuple[str, ...]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    source: dict[str, Any] = field(default_factory=dict)
    ema: dict[str, Tensor] = field(default_factory=dict)
    losses: tuple[int, str] | None = None
    category_ids: tuple[int, ...] = ()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the path given, in the same folder; at the end it takes the place of `path`, on disk, in one step.

    A writer that is killed leaves `path` untouched, and beside it a ".tmp" file, which the next one overwrites.
    """
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    _fsync(temporary)
    temporary.replace(path)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _fsync(path.parent)


def save_checkpoint(
    path: Path,
    *,
    model: Mapping[str, Tensor],
    config: Config,
    iteration: int,
    class_names: tuple[str, ...] = (),
    optimizer: Mapping[str, Tensor] | None = None,
    source: Mapping[str, Any] | None = None,
    ema: Mapping[str, Tensor] | None = None,
    losses: tuple[int, str] | None = None,
    category_ids: tuple[int, ...] = (),
) -> None:
    """Write a checkpoint atomically.

    Args:
        model: the state dict.
        config: of the whole run, with `num_classes` set.
        iteration: finished training iterations.
        optimizer: named tensors, see `diffinst.engine.optim.optimizer_tensors`; None for a file that is only evaluated.
        source: where imported weights come from, as JSON.
        ema: moving average of the state dict.
        losses: number of bytes of the log of losses so far, and their SHA-256.
        category_ids: of the data set, one a class; empty if unknown.
    Raises:
        CheckpointError: the folder cannot be written.
    """
    parts = {_MODEL: model, _OPTIMIZER: optimizer or {}, _EMA: ema or {}}
    tensors = {
        prefix + name: value.detach().cpu().contiguous()
        for prefix, part in parts.items()
        for name, value in part.items()
    }
    metadata = {
        _FORMAT_KEY: str(FORMAT_VERSION),
        "config": config.model_dump_json(),
        "iteration": str(iteration),
        "class_names": json.dumps(class_names),
    }
    if source:
        metadata[SOURCE_KEY] = json.dumps(source)
    if losses:
        metadata[_LOSSES_KEY] = json.dumps(losses)
    if category_ids:
        metadata[_CATEGORIES_KEY] = json.dumps(category_ids)
    metadata[_DIGEST_KEY] = _digest(metadata, tensors)
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)
            _sort_metadata(temporary)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot write the checkpoint ({error}). Check free space and permissions, then run the same "
            "command again: it goes on from the last one."
        ) from error


def _read(path: Path, *, with_tensors: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of one and the same file, also while a training puts another one in its place."""
    while True:
        before, problem = _identity(path), None
        try:
            with safe_open(path, framework="pt") as file:
                metadata, keys = file.metadata() or {}, list(file.keys())
            found = _read_tensors(path, keys) if with_tensors else {}
        except (OSError, SafetensorError) as error:
            problem = error
        if _identity(path) != before:
            if not path.is_file():
                raise CheckpointError(f"{path}: was removed while it was read. Give the one that is there now.")
            continue
        if problem is not None:
            raise CheckpointError(
                f"{path}: truncated, corrupt or not a checkpoint ({problem}). Delete it and train again, or copy it "
                "again."
            ) from problem
        return metadata, found


def _identity(path: Path) -> tuple[int, ...] | None:
    """Equal for as long as a name stands for the same file with the same content; None where there is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def load_checkpoint(path: Path, *, with_tensors: bool = True) -> Checkpoint:
    """Read a checkpoint.

    Args:
        with_tensors: False reads the head of the file alone, and leaves the dicts of tensors empty.
    Raises:
        CheckpointError: missing, truncated, or not written by this program in this format.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint. Give a .safetensors file written by `diffinst train`.")
    parts: dict[str, dict[str, Tensor]] = {_MODEL: {}, _OPTIMIZER: {}, _EMA: {}}
    metadata, found = _read(path, with_tensors=with_tensors)
    if _FORMAT_KEY not in metadata:
        raise CheckpointError(
            f"{path}: holds tensors but is no checkpoint of this program. Write one with `diffinst train`."
        )
    if metadata[_FORMAT_KEY] != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{path}: checkpoint format {metadata[_FORMAT_KEY]}, this version reads {FORMAT_VERSION}. Use the version "
            "that wrote it, or train again."
        )
    expected = metadata.pop(_DIGEST_KEY, None)  # none in files of earlier versions
    if with_tensors and expected is not None and _digest(metadata, found) != expected:
        raise CheckpointError(
            f"{path}: has changed since it was written (its content does not match its checksum). Delete it and train "
            "again, or copy it again."
        )
    if unknown := metadata.keys() - _KNOWN_KEYS:
        raise CheckpointError(
            f"{path}: corrupt, or of a newer version: its metadata hold '{min(unknown)}', which is unknown here. "
            "Use the version that wrote it, or train again."
        )
    for key, value in found.items():
        for prefix, tensors in parts.items():
            if key.startswith(prefix):
                tensors[key.removeprefix(prefix)] = value
    try:
        config = Config.model_validate_json(metadata["config"])
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{path}: its configuration is not valid in this version ({where}: {first['msg']}). Use the version that "
            "wrote it, or train again."
        ) from error
    except KeyError as error:
        raise CheckpointError(f"{path}: corrupt: its metadata lack {error}. Delete it and train again.") from error
    try:
        losses = json.loads(metadata.get(_LOSSES_KEY, "null"))
        return Checkpoint(
            path=path,
            config=config,
            iteration=int(metadata["iteration"]),
            class_names=tuple(json.loads(metadata["class_names"])),
            model=parts[_MODEL],
            optimizer=parts[_OPTIMIZER],
            ema=parts[_EMA],
            source=json.loads(metadata.get(SOURCE_KEY, "{}")),
            losses=None if losses is None else (int(losses[0]), str(losses[1])),
            category_ids=tuple(map(int, json.loads(metadata.get(_CATEGORIES_KEY, "[]")))),
        )
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{path}: corrupt: its metadata do not fit ({error}). Delete it and train again."
        ) from error


def _read_tensors(path: Path, keys: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of a safetensors file in memory of their own, with little more than that in use at any time.

    The library maps the file, and what has been read of it counts as memory of the process until the file is closed.
    """
    found: dict[str, Tensor] = {}
    waiting = list(keys)[::-1]
    while waiting:
        mapped = 0
        with safe_open(path, framework="pt") as file:
            while waiting and mapped < _MAPPED_BYTES:
                key = waiting.pop()
                found[key] = file.get_tensor(key).clone()
                mapped += found[key].nbytes
    return found


def load_model_weights(
    model: nn.Module, checkpoint: Checkpoint, *, use_ema: bool = False, take_over: bool = False
) -> None:
    """Give a model of the same configuration a checkpoint's weights, or their moving average.

    Args:
        take_over: the model's parameters become the checkpoint's own tensors, and what they were goes; otherwise the
            values are copied.
    Raises:
        CheckpointError: names or shapes differ, or no average was kept; the model is left unchanged.
    """
    if use_ema and not checkpoint.ema:
        raise CheckpointError(
            f"{checkpoint.path}: holds no moving average of the weights. Set sampler.use_ema to false, or train with "
            "train.ema_decay (0.999 in the released code)."
        )
    found, own = checkpoint.ema if use_ema else checkpoint.model, model.state_dict()
    differences = [f"{key} is missing" for key in own if key not in found]
    differences += [f"{key} is unknown to the model" for key in found if key not in own]
    differences += [
        f"{key} is {tuple(found[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in found and found[key].shape != value.shape
    ]
    if differences:
        more = f", and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise CheckpointError(
            f"{checkpoint.path}: checkpoint of another model: {'; '.join(differences[:_SHOWN])}{more}. Use the model "
            "configuration stored in the checkpoint, or a checkpoint of this model."
        )
    if take_over:  # copying would convert
        found = {name: value.to(own[name].dtype) for name, value in found.items()}
    model.load_state_dict(found, assign=take_over)


def _sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata in order of name; the library has them in any, and equal files should be equal.

    The format: 8 bytes of length, little-endian, then as many of JSON and spaces, then the tensors.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        head = json.loads(file.read(size))
        head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
        text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of metadata and tensors on the CPU, whatever the order in which a file holds them."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
