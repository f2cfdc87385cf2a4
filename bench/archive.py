"""One archive of checked files: a zip of stored entries whose every byte follows from its first entry, `manifest.json`.

    manifest.json      {"format": ..., "version": 1, "files": [{"name", "size", "sha256", "crc32"}, ...], ...}
    the other entries  in order of name, stored, with fixed times and rights

Nothing in the file is free to differ: headers and directory are a function of names, sizes and CRCs, all of which the
manifest gives. So equal content gives equal bytes, and one pass over the file finds every byte that was changed and
says where it lies. Entries named `.gz` are compressed by themselves, and the manifest says what size they unpack to.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import struct
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

from bench.errors import BenchError, StoreError
from bench.record import dump_json

MANIFEST: Final = "manifest.json"
VERSION: Final = 1
MAX_MANIFEST_BYTES: Final = 64 * 1024**2
# What unpacks to more than this, and to more than so many times its size, is taken for an attack.
MAX_UNCHECKED_BYTES: Final = 64 * 1024**2
MAX_RATIO: Final = 100

_ELSEWHERE = 0xFFFFFFFF  # in place of a size or place that is written in 64 bits
_ZIP64 = _ELSEWHERE  # it is from here on
_CHUNK = 1024**2
_DATE = (0, 33)  # 1980-01-01, 00:00:00: the first that the format knows
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+@-]*(/[A-Za-z0-9_][A-Za-z0-9_.,=+@-]*)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """A file as it is stored. content_size: of what a `.gz` unpacks to, in bytes; None for the others."""

    name: str
    size: int
    sha256: str
    crc32: int
    content_size: int | None = None


@dataclass(frozen=True)
class Piece:
    """A stretch of the archive: known bytes, or those of an entry. what: for messages, 'the header of suite.yaml'."""

    what: str
    known: bytes = b""
    entry: Entry | None = None

    @property
    def size(self) -> int:
        return len(self.known) if self.entry is None else self.entry.size


@dataclass(frozen=True)
class Check:
    """What became of the check of an archive.

    findings: one line each, what is not as it should be and where; empty where all is well. manifest: its content, None
    where it cannot be trusted.
    """

    findings: tuple[str, ...]
    manifest: dict[str, Any] | None = field(default=None, repr=False)


def is_safe(name: str) -> bool:
    """Whether an entry may be called so: a relative path of plain names, none of which begins with a dot."""
    return len(name) <= 255 and _NAME.fullmatch(name) is not None


def compress(data: bytes) -> bytes:
    """gzip without a time and a name: the same data gives the same bytes with one version of zlib."""
    return gzip.compress(data, compresslevel=6, mtime=0)


def write_archive(path: Path, files: Mapping[str, bytes | Path], facts: Mapping[str, Any]) -> str:
    """Write an archive, whole or not at all.

    Args:
        files: entry name -> its bytes, or the file that has them. facts: what else the manifest says, JSON-able.
    Returns:
        SHA-256 of the manifest, which stands for all of the archive.
    Raises:
        StoreError: the file cannot be written, or one to be packed cannot be read.
    """
    for name in files:
        if not is_safe(name) or name == MANIFEST:
            raise ValueError(f"'{name}' is no name of an entry")
    try:
        entries = [_entry(name, files[name]) for name in sorted(files)]
        manifest = manifest_bytes(entries, facts)
        sources = {**files, MANIFEST: manifest}
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                for piece in layout(manifest, entries):
                    if piece.entry is None:
                        file.write(piece.known)
                    else:
                        _copy(sources[piece.entry.name], piece.entry, file)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.filename or path}: {error.strerror})") from error
    return hashlib.sha256(manifest).hexdigest()


def manifest_bytes(entries: Sequence[Entry], facts: Mapping[str, Any]) -> bytes:
    """The manifest of these entries."""
    files = []
    for entry in entries:
        listed: dict[str, Any] = {"name": entry.name, "size": entry.size, "sha256": entry.sha256, "crc32": entry.crc32}
        if entry.content_size is not None:
            listed["content_size"] = entry.content_size
        files.append(listed)
    return dump_json({"version": VERSION, **facts, "files": files}).encode()


def layout(manifest: bytes, entries: Sequence[Entry]) -> Iterator[Piece]:
    """All of an archive in order, the manifest first (APPNOTE.TXT 6.3, sections 4.3.7 to 4.3.16)."""
    first = Entry(MANIFEST, len(manifest), hashlib.sha256(manifest).hexdigest(), zlib.crc32(manifest))
    place, directory = 0, b""
    pieces: list[Piece] = []
    for entry in (first, *entries):
        local, central = _headers(entry, place)
        yield Piece(f"the header of {entry.name}", local)
        yield Piece(entry.name, entry=entry)
        pieces.append(Piece(f"the directory's line of {entry.name}", central))
        place += len(local) + entry.size
        directory += central
    yield from pieces
    yield Piece("the end of the directory", _end(len(entries) + 1, len(directory), place))


def check_archive(
    path: Path, *, sha256: str | None = None, progress: Callable[[int, int], None] = lambda *_: None
) -> Check:
    """Hold every byte of an archive to its manifest. Writes nothing and unpacks nothing.

    Args:
        sha256: of the manifest, as `write_archive` returned it; without it, a manifest that was rewritten together with
            what it lists cannot be told from the first one.
        progress: called with bytes checked and their total.
    Raises:
        BenchError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _check(file, path.stat().st_size, sha256, progress)
    except OSError as error:
        raise BenchError(f"{path}: cannot be read ({error.strerror}). Give an archive of diffbench pack") from error


def read_entries(path: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of all entries but the manifest, those named `.gz` unpacked and without that ending.

    Args:
        manifest: of a `check_archive` of the same file without findings.
    Raises:
        BenchError: an entry does not unpack to the size that the manifest gives.
    """
    entries = _entries_of(manifest)
    raw = dump_json(manifest).encode()
    with path.open("rb") as file:
        for piece in layout(raw, entries):
            data = file.read(piece.size)
            if piece.entry is None or piece.entry.name == MANIFEST:
                continue
            if hashlib.sha256(data).hexdigest() != piece.entry.sha256:
                raise BenchError(f"{path}: {piece.entry.name}: was changed while it was read")
            if piece.entry.content_size is None:
                yield piece.entry.name, data
            else:
                yield piece.entry.name.removesuffix(".gz"), _unpack(data, piece.entry)


def _entry(name: str, source: bytes | Path) -> Entry:
    digest, crc, size = hashlib.sha256(), 0, 0
    for chunk in _chunks(source):
        digest.update(chunk)
        crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    content_size = None
    if name.endswith(".gz"):
        content = source if isinstance(source, bytes) else source.read_bytes()
        content_size = len(gzip.decompress(content))
    return Entry(name, size, digest.hexdigest(), crc, content_size)


def _chunks(source: bytes | Path) -> Iterator[bytes]:
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _copy(source: bytes | Path, entry: Entry, file: BinaryIO) -> None:
    digest = hashlib.sha256()
    for chunk in _chunks(source):
        digest.update(chunk)
        file.write(chunk)
    if digest.hexdigest() != entry.sha256:
        raise StoreError(f"{entry.name}: was changed while it was packed. Pack again when nothing runs")


def _headers(entry: Entry, place: int) -> tuple[bytes, bytes]:
    """The header before an entry and its line in the directory."""
    name, size = entry.name.encode("ascii"), entry.size
    is_large, is_far = size >= _ZIP64, place >= _ZIP64
    shown = _ELSEWHERE if is_large else size
    needed = 45 if is_large or is_far else 20
    time, date = _DATE
    local_extra = struct.pack("<HHQQ", 1, 16, size, size) if is_large else b""
    numbers = ([size, size] if is_large else []) + ([place] if is_far else [])
    extra = struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
    common = (0, 0, time, date, entry.crc32, shown, shown, len(name))
    local = struct.pack("<IHHHHHIIIHH", 0x04034B50, 45 if is_large else 20, *common, len(local_extra))
    central = struct.pack(
        "<IHHHHHHIIIHHHHHII",
        *(0x02014B50, 3 << 8 | needed, needed, *common, len(extra)),
        *(0, 0, 0, 0o100644 << 16, _ELSEWHERE if is_far else place),
    )
    return local + name + local_extra, central + name + extra


def _end(count: int, size: int, place: int) -> bytes:
    """What follows the directory."""
    if count < 0xFFFF and size < _ZIP64 and place < _ZIP64:
        return struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, size, place, 0)
    large = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 3 << 8 | 45, 45, 0, 0, count, count, size, place)
    locator = struct.pack("<IIQI", 0x07064B50, 0, place + size, 1)
    return large + locator + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, _ELSEWHERE, _ELSEWHERE, 0)


def _check(file: BinaryIO, size: int, sha256: str | None, progress: Callable[[int, int], None]) -> Check:
    raw, problem = _read_manifest(file, size)
    if problem:
        return Check((problem,))
    if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256.lower():
        found = hashlib.sha256(raw).hexdigest()
        return Check((f"{MANIFEST}: its SHA-256 is {found}, not the {sha256} that was given",))
    try:
        manifest = json.loads(raw)
        entries = _entries_of(manifest)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return Check((f"{MANIFEST}: {_reason(error)}",))
    if dump_json(manifest).encode() != raw:
        return Check((f"{MANIFEST}: is not as diffbench pack writes it",))
    findings = [*_compare_names(file, entries), *_compare_bytes(file, size, raw, entries, progress)]
    return Check(tuple(findings), None if findings else manifest)


def _read_manifest(file: BinaryIO, size: int) -> tuple[bytes, str | None]:
    """The bytes of the first entry, or why they cannot be had."""
    file.seek(0)
    fixed = 30 + len(MANIFEST)
    header = file.read(fixed)
    if len(header) < fixed:
        return b"", f"the archive ends after {size} bytes, within the header of {MANIFEST}"
    crc, length = struct.unpack_from("<I", header, 14)[0], struct.unpack_from("<I", header, 22)[0]
    raw = file.read(length) if length <= MAX_MANIFEST_BYTES else b""
    expected, _ = _headers(Entry(MANIFEST, length, "", crc), 0)
    if header != expected:
        place = next(i for i, (one, two) in enumerate(zip(header, expected)) if one != two)
        return (
            b"",
            f"the header of {MANIFEST}: byte {place} is not as it should be; this is no archive of diffbench pack",
        )
    if length > MAX_MANIFEST_BYTES:
        return b"", f"the header of {MANIFEST}: it gives {length} bytes, and at most {MAX_MANIFEST_BYTES} are read"
    if len(raw) < length:
        return b"", f"the archive ends after {size} bytes, within {MANIFEST}"
    if zlib.crc32(raw) != crc:
        return b"", f"{MANIFEST}: its content does not match the checksum in its header"
    return raw, None


def _entries_of(manifest: Any) -> list[Entry]:
    """The files that a manifest lists.

    Raises:
        ValueError, KeyError, TypeError: it is not one, or one that asks for what no archive needs.
    """
    if manifest["version"] != VERSION:
        raise ValueError(
            f"version {manifest['version']!r}, but this program reads {VERSION}. Use the one that wrote it"
        )
    entries = [Entry(**listed) for listed in manifest["files"]]
    for entry in entries:
        if not isinstance(entry.name, str) or not is_safe(entry.name) or entry.name == MANIFEST:
            raise ValueError(f"lists {entry.name!r}, which is no name that a file in here may have")
        numbers = [entry.size, entry.crc32, entry.content_size or 0]
        if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers) or entry.crc32 >= 2**32:
            raise ValueError(f"{entry.name}: its size or checksum is no number of bytes")
        if not isinstance(entry.sha256, str) or not _SHA256.fullmatch(entry.sha256):
            raise ValueError(f"{entry.name}: its sha256 is none")
        if entry.name.endswith(".gz") != (entry.content_size is not None):
            raise ValueError(f"{entry.name}: has a content_size exactly when its name ends in .gz")
        if (entry.content_size or 0) > max(MAX_UNCHECKED_BYTES, MAX_RATIO * entry.size):
            raise ValueError(f"{entry.name}: {entry.size} bytes that unpack to {entry.content_size} are refused")
    names = [entry.name for entry in entries]
    if names != sorted(set(names)):
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        raise ValueError(f"lists {twice} twice" if twice else "its files are not in order of name")
    return entries


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"has no {error}"
    if isinstance(error, json.JSONDecodeError):
        return f"is no JSON ({error})"
    return "is no manifest" if isinstance(error, (TypeError, RecursionError)) else str(error)


def _compare_names(file: BinaryIO, entries: Sequence[Entry]) -> Iterator[str]:
    """Entries that the zip's own directory has and the manifest has not, and the other way round."""
    try:
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            found = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError, struct.error):
        return  # told by `_compare_bytes`
    counts = Counter(info.filename for info in found)
    expected = {MANIFEST, *(entry.name for entry in entries)}
    for name, count in sorted(counts.items()):
        if not is_safe(name):
            yield f"{name!r}: refused, its name leads elsewhere or is no plain one"
        elif name not in expected:
            yield f"{name}: is in the archive, but not in {MANIFEST}"
        elif count > 1:
            yield f"{name}: is in the archive {count} times"
    for name in sorted(expected - counts.keys()):
        yield f"{name}: is in {MANIFEST}, but not in the archive"
    for info in found:
        if info.compress_type != zipfile.ZIP_STORED:
            yield f"{info.filename}: is compressed, and entries are stored as they are; it is not unpacked"


def _compare_bytes(
    file: BinaryIO, size: int, raw: bytes, entries: Sequence[Entry], progress: Callable[[int, int], None]
) -> Iterator[str]:
    """Every stretch of the file that is not what the manifest asks for."""
    file.seek(0)
    place = 0
    for piece in layout(raw, entries):
        if piece.entry is None:
            found = file.read(piece.size)
            if len(found) == piece.size and found != piece.known:
                first = next(i for i, (one, two) in enumerate(zip(found, piece.known)) if one != two)
                yield f"{piece.what}: byte {place + first} of the archive is not as it should be"
            length = len(found)
        else:
            digest, length = hashlib.sha256(), 0
            while length < piece.size and (chunk := file.read(min(_CHUNK, piece.size - length))):
                digest.update(chunk)
                length += len(chunk)
                progress(place + length, size)
            if length == piece.size and digest.hexdigest() != piece.entry.sha256:
                yield f"{piece.what}: its content does not match its SHA-256"
        if length < piece.size:
            yield f"the archive ends after {size} bytes, within {piece.what}"
            return
        place += piece.size
    if size > place:
        yield f"{size - place} bytes follow the end of the archive at byte {place}"


def _unpack(data: bytes, entry: Entry) -> bytes:
    """The content of a `.gz`, of which no more is unpacked than the manifest says."""
    assert entry.content_size is not None
    unpacker = zlib.decompressobj(wbits=31)
    try:
        content = unpacker.decompress(data, entry.content_size + 1)
    except zlib.error as error:
        raise BenchError(f"{entry.name}: cannot be unpacked ({error})") from error
    if len(content) != entry.content_size or not unpacker.eof or unpacker.unused_data:
        raise BenchError(f"{entry.name}: does not unpack to the {entry.content_size} bytes that {MANIFEST} gives")
    return content
