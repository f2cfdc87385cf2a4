"""Digests that find a changed byte in what a node computed.

done.json lists the SHA-256 of each of the node's files and holds a checksum of its own text. The files are hashed once,
when the node finishes, and again when another node is about to read them; a plan looks at sizes only, and stays quick.
What was stored before there were digests has none, and is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.errors import StoreError

# The last field of done.json, at its own place: a JSON string holds no line break, so nothing else looks like this.
_CHECKSUM = re.compile(r'(?<=\n  "checksum": ")[^"\n]*(?=")')


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hex.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Path relative to the folder -> SHA-256, in order of path."""
    return {str(path.relative_to(folder)): file_digest(path) for path in sorted(set(paths))}


def seal(text: str) -> str:
    """The text of a done.json whose field `checksum` is empty, with the SHA-256 of that text in the field."""
    return _CHECKSUM.sub(hashlib.sha256(text.encode()).hexdigest(), text, count=1)


def is_intact(text: str) -> bool:
    """Whether a done.json is as it was written; one without a checksum is from before there were any."""
    found = _CHECKSUM.search(text)
    if found is None or not found[0]:
        return True
    return hashlib.sha256(_CHECKSUM.sub("", text, count=1).encode()).hexdigest() == found[0]


def changed_files(folder: Path) -> list[str]:
    """Of a finished node, the files whose content is not what it was, or that are gone: paths relative to its folder.

    Raises:
        StoreError: done.json cannot be read, or has changed itself.
    """
    digests: dict[str, str] = _read_done(folder).get("digests", {})
    return [name for name, digest in digests.items() if _digest_or_none(folder / name) != digest]


def check_inputs(folders: Iterable[Path]) -> None:
    """Refuse to build on the files of finished nodes, as far as later nodes need them, when one has changed.

    Raises:
        StoreError: names the file and the way out.
    """
    for folder in folders:
        done = _read_done(folder)
        for name, digest in done.get("digests", {}).items():
            if name in done["files"] and _digest_or_none(folder / name) != digest:
                raise StoreError(
                    f"{folder / name}: has changed since it was written (its SHA-256 is another). Restore it, or "
                    "delete it and run the same command again: what it held is computed anew"
                )


def _read_done(folder: Path) -> dict[str, Any]:
    path = folder / "done.json"
    try:
        text = path.read_text(encoding="utf-8")
        content: dict[str, Any] = json.loads(text)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read ({error}). {WAY_OUT}") from error
    if not is_intact(text):
        raise StoreError(f"{path}: has changed since it was written. {WAY_OUT}")
    return content


WAY_OUT = "Delete this file and run the same command again: the node goes on from what else is there"


def _digest_or_none(path: Path) -> str | None:
    try:
        return file_digest(path)
    except OSError:
        return None
