"""Match tables on disk: which detections of a scored run are right, for whatever asks images rather than means."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from bench.errors import RecordError
from bench.stats.bootstrap import Matches

_VERSION = 1


@dataclass(frozen=True)
class StoredMatches:
    """A match table from a file; shapes and meanings as in `diffinst.evaluation.matches.MatchTable`."""

    image_ids: np.ndarray
    category_ids: np.ndarray
    thresholds: np.ndarray
    image: np.ndarray
    category: np.ndarray
    score: np.ndarray
    matched: np.ndarray
    ignored: np.ndarray
    num_instances: np.ndarray


def file_name(iou_type: str) -> str:
    """'matches-segm.npz': where a score node keeps the tables of an IoU type."""
    return f"matches-{iou_type}.npz"


class _ScoredMatches(Matches, Protocol):
    @property
    def score(self) -> np.ndarray: ...


def write_matches(path: Path, tables: Mapping[str, _ScoredMatches]) -> None:
    """Write the tables of one evaluation, by size; the same tables give the same bytes.

    Args:
        tables: 'all', 'small', ...: of the same detections.
    """
    first = next(iter(tables.values()))
    counts = np.stack([table.num_instances for table in tables.values()])
    held = np.nonzero(counts.any(axis=0))
    content = {
        "version": np.array(_VERSION),
        "sizes": np.array(list(tables)),
        **{name: getattr(first, name) for name in ("image_ids", "category_ids", "thresholds", "image", "category")},
        "score": first.score,
        "matched": np.packbits(np.stack([table.matched for table in tables.values()]), axis=-1),
        "ignored": np.packbits(np.stack([table.ignored for table in tables.values()]), axis=-1),
        # Most categories have no instance in most images.
        "held": np.stack(held).astype(np.int32),
        "num_instances": counts[:, held[0], held[1]],
    }
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_matches(path: Path) -> dict[str, StoredMatches]:
    """The tables of a file, by size.

    Raises:
        RecordError: the file is unreadable, or not of this version.
    """
    try:
        # Opened here: NumPy leaves a file open that is no archive.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        if content["version"] != _VERSION:
            raise RecordError(f"{path}: version {content['version']} of match tables, not {_VERSION}. Score again")
        shape = (len(content["category_ids"]), len(content["image_ids"]))
        tables = {}
        for place, size in enumerate(content["sizes"].tolist()):
            num_instances = np.zeros(shape, dtype=content["num_instances"].dtype)
            num_instances[tuple(content["held"])] = content["num_instances"][place]
            bits = {
                name: np.unpackbits(content[name][place], axis=-1, count=len(content["image"])).astype(bool)
                for name in ("matched", "ignored")
            }
            names = ("image_ids", "category_ids", "thresholds", "image", "category", "score")
            shared = {name: content[name] for name in names}
            tables[size] = StoredMatches(num_instances=num_instances, **bits, **shared)
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged or of another kind"
        raise RecordError(f"{path}: cannot be read ({reason}). Delete its node's folder and run again") from error
    return tables
