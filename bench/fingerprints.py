"""What files hold, as digests: those of weights, of annotations and of every image of a split. Loads no torch.

Content is read once: a cache beside the results knows a file again by size and times. A file that changed in the last
seconds before it was read is not trusted to keep its times when it changes again, so it is read again next time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from bench.errors import StoreError
from bench.record import dump_json
from bench.store import write_atomic
from diffinst.config import DataConfig
from diffinst.data import catalog
from diffinst.data.catalog import Split
from diffinst.errors import DataError

_VERSION: Final = 1
_SETTLED_NS = 2_000_000_000  # coarser than the times of any file system in use
_THREADS = 4

# (files read so far, files to read): told while a set is read for the first time.
Progress = Callable[[int, int], None]


class Fingerprints:
    """Digests of files, 16 hex digits of SHA-256 each.

    Args:
        cache: file that remembers digests; None remembers nothing. A damaged one counts as none.
        progress: told while many files are read.
    """

    def __init__(self, cache: Path | None = None, progress: Progress | None = None) -> None:
        self._cache, self._progress = cache, progress
        self._files: dict[str, list[Any]] = {}  # path -> size, modified ns, changed ns, digest
        self._names: dict[str, list[str]] = {}  # annotations and ids -> file names of images
        self._splits: dict[tuple[Any, ...], str | None] = {}
        self._is_changed = False
        if cache is not None:
            self._load(cache)

    def of_file(self, path: Path) -> str:
        """Digest of a file's content.

        Raises:
            OSError: it cannot be read.
        """
        return self._of_files([path])[0]

    def of_split(self, data: DataConfig, split: Split, root: Path | None) -> str | None:
        """Digest of the annotations of a split and of all its images.

        Args:
            data: the data set. root: folder of the data sets; None takes the environment's.
        Returns:
            None for the generated set, which its parameters and its code determine, and where the files are not found:
            reading them says what is wrong.
        """
        key = (data.model_dump_json(), split, None if root is None else str(root.absolute()))
        if key not in self._splits:
            self._splits[key] = None if data.dataset == "shapes" else self._read_split(data, split, root)
        return self._splits[key]

    def save(self) -> None:
        """Write the cache if it has changed.

        Raises:
            StoreError: it cannot be written.
        """
        if self._cache is None or not self._is_changed or not self._cache.parent.is_dir():
            return
        write_atomic(self._cache, dump_json({"version": _VERSION, "files": self._files, "names": self._names}))
        self._is_changed = False

    def _load(self, cache: Path) -> None:
        try:
            content = json.loads(cache.read_text(encoding="utf-8"))
            if content["version"] == _VERSION:
                self._files, self._names = dict(content["files"]), dict(content["names"])
        except (OSError, ValueError, KeyError, TypeError):
            return

    def _read_split(self, data: DataConfig, split: Split, root: Path | None) -> str | None:
        try:
            paths = catalog.resolve(data, split, root)
            annotations = self.of_file(paths.annotations)
            names = self._image_names(paths, annotations)
            images = self._of_files([paths.images / name for name in names])
        except (OSError, DataError):
            return None
        digest = hashlib.sha256(f"annotations {annotations}\n".encode())
        for name, content in zip(names, images):
            digest.update(f"{name} {content}\n".encode())
        return digest.hexdigest()[:16]

    def _image_names(self, paths: catalog.SplitPaths, annotations: str) -> list[str]:
        """Names, below the image folder, of the images that a split has, as far as they are there; sorted."""
        ids = "all" if paths.image_ids is None else ",".join(map(str, sorted(paths.image_ids)))
        key = hashlib.sha256(f"{annotations} {ids}".encode()).hexdigest()[:16]
        if key not in self._names:
            try:
                content = json.loads(paths.annotations.read_bytes())
            except ValueError:
                return []  # reading the set tells
            images = content.get("images") if isinstance(content, dict) else None
            wanted = None if paths.image_ids is None else set(paths.image_ids)
            entries = [
                entry
                for entry in (images if isinstance(images, list) else ())
                if isinstance(entry, dict) and (wanted is None or entry.get("id") in wanted)
            ]
            self._names[key] = sorted({name for entry in entries for name in _names_of(entry)})
            self._is_changed = True
        return [name for name in self._names[key] if (paths.images / name).is_file()]

    def _of_files(self, paths: Iterable[Path]) -> list[str]:
        known: dict[Path, str] = {}
        unknown: list[tuple[Path, os.stat_result]] = []
        wanted = list(paths)
        for path in wanted:
            facts = path.stat()
            held = self._files.get(str(path.absolute()))
            if held is not None and held[:3] == _state(facts):
                known[path] = held[3]
            elif path not in known:
                unknown.append((path, facts))
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            digests = pool.map(_digest, [path for path, _ in unknown])
            for done, ((path, facts), digest) in enumerate(zip(unknown, digests), start=1):
                known[path] = digest
                self._remember(path, facts, digest)
                if self._progress is not None:
                    self._progress(done, len(unknown))
        return [known[path] for path in wanted]

    def _remember(self, path: Path, facts: os.stat_result, digest: str) -> None:
        if time.time_ns() - max(facts.st_mtime_ns, facts.st_ctime_ns) < _SETTLED_NS:
            return
        self._files[str(path.absolute())] = [*_state(facts), digest]
        self._is_changed = True


def _state(facts: os.stat_result) -> list[int]:
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _names_of(entry: dict[str, Any]) -> Iterator[str]:
    """Names under which the readers look for an image; LVIS gives the end of a URL, with or without its folder.

    Names that lead out of the image folder are none: the readers refuse them.
    """
    url = entry.get("coco_url")
    ends = [] if not isinstance(url, str) else ["/".join(url.split("/")[-2:]), url.rpartition("/")[2]]
    for name in (entry.get("file_name"), entry.get("coco_file"), *ends):
        if isinstance(name, str) and name and not Path(name).is_absolute() and ".." not in Path(name).parts:
            yield name


def fingerprints_for(nodes_folder: Path, progress: Progress | None = None) -> Fingerprints:
    """With the cache that belongs to a results folder."""
    return Fingerprints(nodes_folder / "fingerprints.json", progress)


def save_if_possible(fingerprints: Fingerprints) -> None:
    """Keep what was read; a folder that cannot be written to is only slower next time, and is told when work begins."""
    try:
        fingerprints.save()
    except StoreError:
        return
