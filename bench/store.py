"""Where results live, and how they get there without loss.

    DIR/<suite>/<machine>/<run_id>.json            records, committed by people
    DIR/<suite>/<machine>/history/<run_id>.N.json  records whose place a differing one took, and failures that came
                                                   after a result (a failure never takes its place)
    DIR/provenance/<digest>.patch, .lock.txt       what records name: the source's difference, the packages installed
    DIR/.store/<node_id>/                          what a node computed: node.json first, done.json last
    DIR/.store/code/<digest>.json                  the definitions that a digest of code stands for
    DIR/.store/fingerprints.json                   digests of data files, by size and times
    DIR/.lock                                      held by the one run-suite that works here

Every file is written whole: to a temporary name in the same folder, flushed to disk, then renamed. A node folder is
complete when its done.json exists and the files that it lists have their sizes; otherwise it is resumed or redone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bench.collector import collector_paused
from bench.digests import WAY_OUT, is_intact
from bench.errors import NewerRecordError, RecordError, StoreError
from bench.plain_record import PlainReader
from bench.plan import Node, PastNode
from bench.record import RunRecord, dump_json, dump_record, load_record

DONE_VERSION: Final = 1
ATTEMPTS_NAME = "attempts.txt"  # a line for each start
_FAILURE_NAME = "failure.txt"
RecordChange = Literal["new", "same", "replaced", "kept"]


class NodeResult(BaseModel):
    """The content of done.json.

    files: path relative to the node folder -> size in bytes, of what later nodes need. digests: path -> SHA-256, of
    those and of logs. checksum: of this file, see `bench.digests`; both are empty in older ones. outputs: JSON-able
    facts for later nodes and records. environment: of the process that ran it. attempts: starts, the finishing one
    included. spec_id, code, content: as of the node; '' in results that are older than these.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = DONE_VERSION
    id: str
    kind: str
    spec: dict[str, Any]
    inputs: list[str]
    started_at: str
    finished_at: str
    duration_s: float
    attempts: int
    files: dict[str, int]
    outputs: dict[str, Any]
    environment: dict[str, Any]
    spec_id: str = ""
    code: str = ""
    content: str = ""
    digests: dict[str, str] = {}
    checksum: str = ""


def past_of_result(done: NodeResult, parts: Mapping[str, str]) -> PastNode:
    """What a stored result tells a plan. The last part of a node that was resumed tells nothing of its time.

    Args:
        parts: of its code, see `Store.code_parts`.
    """
    return PastNode(
        done.kind,
        done.spec,
        done.duration_s if done.attempts == 1 else None,
        tuple(done.inputs),
        spec_id=done.spec_id,
        code=done.code,
        content=done.content,
        parts=parts,
    )


def now_text() -> str:
    """The time in UTC, ISO 8601, in seconds: '2026-01-02T03:04:05Z'."""
    return _time_text(datetime.now(UTC))


def later_text(started_at: str, seconds: float) -> str:
    """The time so long after `started_at`: an end that no jump of the clock puts before its start."""
    return _time_text(datetime.fromisoformat(started_at) + timedelta(seconds=seconds))


def _time_text(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def write_atomic(path: Path, text: str | bytes, *, replace: bool = True) -> None:
    """Write `text` (UTF-8) to `path` so that after a crash at any moment there is the old file or the new one, whole.

    Raises:
        FileExistsError: `path` exists and `replace` is False.
        StoreError: the folder cannot be written to.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text.encode() if isinstance(text, str) else text)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)  # mkstemp makes files private; records are shared
            if replace:
                temporary.replace(path)
            else:
                os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise _unusable(path, error) from error


def _remove_temporary(folder: Path, pattern: str = "") -> None:
    """Remove what a kill in the middle of `write_atomic`, or of safetensors' own writer (.tmpAb12Cd), left behind."""
    for path in [*folder.glob(f"{pattern}.*.tmp"), *folder.glob(".tmp??????")]:
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_REFUSED = {
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "larger than files may be here",
}
_IN_THE_WAY = dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file stands where a folder is needed")


def _unusable(path: Path, error: OSError) -> StoreError:
    reason = (_REFUSED | _IN_THE_WAY).get(error.errno or 0, error.strerror or str(error))
    return StoreError(f"{path}: cannot be written: {reason}. Free or allow it, or choose a folder with --results DIR")


def write_problem(error: BaseException) -> str | None:
    """In one line, what an OSError says of a disk or folder that takes no more; None for every other error."""
    if not isinstance(error, OSError) or error.errno not in _REFUSED:
        return None
    return str(_unusable(Path(str(error.filename or "a file")), error))


def check_inside(root: Path, path: Path) -> None:
    """Refuse a place that a link takes out of the results folder; the folder itself may be a link.

    Raises:
        StoreError: names the place.
    """
    if not path.resolve().is_relative_to(root.resolve()):
        raise StoreError(
            f"{path}: a link leads from here to {path.resolve()}, out of the results folder {root}. "
            "Remove the link, or choose a folder with --results DIR, which may be a link itself"
        )


def find_record(name: str, text: str, results: Path) -> Path:
    """The record that a file, or a run id (or its beginning) in a results folder, stands for.

    Args:
        name: of what is looked for, for the error.
    Raises:
        RecordError: no such record, or several.
    """
    path = Path(text)
    if not path.is_file():
        found = sorted(results.glob(f"[!.]*/[!.]*/{text}*.json")) if text.isalnum() else []
        if len(found) != 1:
            what = "no record" if not found else f"{len(found)} records, of which one is to be named by its path"
            raise RecordError(f"{name.upper()} {text}: {what}. Give a record's file, or its run id and --results DIR")
        path = found[0]
    return path.resolve()


class Store:
    """The results folder `root`. Reading needs no lock and creates nothing; writing goes under `lock()`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the results folder for one writer; the lock goes with the process, however it ends.

        Raises:
            StoreError: another process holds it, or the folder cannot be written to.
        """
        path = self.root / ".lock"
        check_inside(self.root, self.nodes_folder)
        try:
            self.nodes_folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise _unusable(self.root, error) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
                raise StoreError(
                    f"{self.root}: in use by another run-suite (process {holder}). "
                    "Wait for it, stop it, or choose another folder with --results DIR"
                ) from error
            try:
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            except OSError as error:
                raise _unusable(self.root, error) from error
            self._check_writable()
            _remove_temporary(self.root, "[!.]*/*/")
            _remove_temporary(self.root, "[!.]*/*/history/")
            for folder in (self.nodes_folder, self.nodes_folder / "code", *self._provenance_folders()):
                _remove_temporary(folder)
            yield
        finally:
            os.close(handle)

    def _check_writable(self) -> None:
        # The lock file may be writable from an earlier day in a folder that no longer is; a new file tells.
        try:
            with tempfile.TemporaryFile(dir=self.nodes_folder) as file:
                file.write(b"\0")
        except OSError as error:
            raise _unusable(self.root, error) from error

    # -- nodes --------------------------------------------------------------------------------------------------------

    @property
    def nodes_folder(self) -> Path:
        return self.root / ".store"

    def folder(self, node_id: str) -> Path:
        """Where the node keeps its files; it need not exist."""
        return self.nodes_folder / node_id

    def result(self, node_id: str) -> NodeResult | None:
        """What the node computed, or None when it is not complete.

        Raises:
            StoreError: done.json is there but unreadable, or belongs to another node.
        """
        path = self.folder(node_id) / "done.json"
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise StoreError(f"{path}: corrupt. {WAY_OUT}") from error
        if not is_intact(text):
            raise StoreError(f"{path}: has changed since it was written. {WAY_OUT}")
        try:
            done = NodeResult.model_validate_json(text)
        except ValidationError as error:
            raise StoreError(f"{path}: corrupt, or of another version. {WAY_OUT}") from error
        if done.id != node_id:
            raise StoreError(f"{path}: belongs to node {done.id}. Delete its folder to run it again")
        return done if not self.missing_files(done) else None

    def missing_files(self, done: NodeResult) -> list[str]:
        """Files that done.json lists and that are gone or have another size."""
        folder = self.folder(done.id)
        return [name for name, size in done.files.items() if _size(folder / name) != size]

    def is_done(self, node_id: str) -> bool:
        """Whether the node's result is there, whole, to be reused."""
        return self.result(node_id) is not None

    def attempts(self, node_id: str) -> int:
        """How often the node was started."""
        try:
            return len((self.folder(node_id) / ATTEMPTS_NAME).read_bytes().splitlines())
        except OSError:
            return 0

    def unfinished(self, node_id: str) -> str | None:
        """What became of earlier attempts at a node that is not done, in words; None where there were none."""
        folder = self.folder(node_id)
        if not folder.exists():  # most nodes of a large plan
            return None
        with contextlib.suppress(OSError):
            reason = (folder / _FAILURE_NAME).read_text(encoding="utf-8", errors="replace").strip()
            return f"failed before: {reason}"
        if (folder / "done.json").exists():
            return "part of what was stored is gone or damaged"
        return "begun before, goes on from what is there" if self.attempts(node_id) else None

    def note_failure(self, node_id: str, reason: str) -> None:
        """Keep why an attempt failed, until the next one begins."""
        write_atomic(self.folder(node_id) / _FAILURE_NAME, f"{reason}\n")

    def begin(self, node: Node) -> Path:
        """Make the node's folder ready for a (further) attempt and return it.

        Raises:
            StoreError: the folder holds the work of a different specification under the same id.
        """
        folder = self.folder(node.id)
        path = folder / "node.json"
        check_inside(self.root, folder)
        for found_path in folder.rglob("*"):
            if found_path.is_symlink():
                check_inside(self.root, found_path)
        content = {"id": node.id, "kind": node.kind, "inputs": list(node.inputs), "spec": node.spec}
        content |= {"spec_id": node.spec_id, "code": node.code, "content": node.content}
        try:
            folder.mkdir(exist_ok=True)
            (folder / "done.json").unlink(missing_ok=True)
            (folder / _FAILURE_NAME).unlink(missing_ok=True)
            _remove_temporary(folder)
        except OSError as error:
            raise _unusable(folder, error) from error
        if path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise StoreError(f"{path}: unreadable ({error}). Delete its folder to run it again") from error
            if found != json.loads(json.dumps(content)):
                raise StoreError(f"{path}: made for another specification. Delete its folder to run it again")
        else:
            write_atomic(path, dump_json(content))
        return folder

    def results(self) -> Iterator[NodeResult]:
        """All complete results, by id; what is damaged is left out, as running its node again tells of it."""
        for path in sorted(self.nodes_folder.glob("*/done.json")):
            with contextlib.suppress(StoreError):
                if (done := self.result(path.parent.name)) is not None:
                    yield done

    # -- code ---------------------------------------------------------------------------------------------------------

    def keep_code(self, digest: str, parts: Mapping[str, str]) -> None:
        """Remember what a digest of code stands for, to tell later what has changed.

        Raises:
            StoreError: the folder cannot be written to.
        """
        path = self._code_path(digest)
        if digest and not path.exists():
            try:
                path.parent.mkdir(exist_ok=True)
            except OSError as error:
                raise _unusable(path.parent, error) from error
            write_atomic(path, dump_json(dict(parts)))

    def code_parts(self, digest: str) -> dict[str, str]:
        """'module:name' -> digest of the definition, for the code with a digest; empty where it is not known."""
        try:
            content = json.loads(self._code_path(digest).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {str(name): str(value) for name, value in content.items()} if isinstance(content, dict) else {}

    def _code_path(self, digest: str) -> Path:
        return self.nodes_folder / "code" / f"{digest}.json"

    # -- provenance ---------------------------------------------------------------------------------------------------

    def keep_provenance(self, name: str, content: bytes, *, publish: bool = True) -> str:
        """Keep a file whose name follows from its content; once written it is never touched again.

        Args:
            publish: among what people commit; otherwise among what is not committed.
        Returns:
            Its path in the results folder.
        Raises:
            StoreError: the folder cannot be written to, or holds something else under the name.
        """
        folder = self._provenance_folders()[0 if publish else 1]
        path = folder / name
        try:
            folder.mkdir(exist_ok=True)
            found = path.read_bytes() if path.exists() else None
        except OSError as error:
            raise _unusable(path, error) from error
        if found is None:
            write_atomic(path, content)
        elif found != content:
            raise StoreError(f"{path}: damaged: it is not what its name says. Delete it, and it is written anew")
        return str(path.relative_to(self.root))

    def _provenance_folders(self) -> tuple[Path, Path]:
        return self.root / "provenance", self.nodes_folder / "provenance"

    # -- records ------------------------------------------------------------------------------------------------------

    def record_path(self, suite: str, machine: str, run_id: str) -> Path:
        return self.root / suite / machine / f"{run_id}.json"

    def records(self, suite: str | None = None, machine: str | None = None) -> list[RunRecord]:
        """Current records (no history), sorted by path.

        Raises:
            RecordError: one of them is unreadable.
        """
        with collector_paused():
            return [load_record(path) for path in self._record_files(suite, machine)]

    def plain_records(self, suite: str | None = None, machine: str | None = None) -> list[dict[str, Any]]:
        """The same as plain JSON objects, in a fraction of the time; parts that are equal are one object.

        Raises:
            RecordError: one of them is unreadable.
        """
        with collector_paused():
            reader = PlainReader()
            return [reader.load(path) for path in self._record_files(suite, machine)]

    def _record_files(self, suite: str | None, machine: str | None) -> list[Path]:
        pattern = f"{suite or '[!.]*'}/{machine or '[!.]*'}/*.json"
        return [path for path in sorted(self.root.glob(pattern)) if not path.name.startswith(".")]

    def write_record(self, record: RunRecord, machine: str) -> RecordChange:
        """Store a record; nothing is overwritten in silence.

        Returns:
            'new'; 'same': the stored one says the same and stays; 'replaced': the stored one differs or is a failure,
            and moves to history/; 'kept': the stored one is a result and the new one is not, which goes to history/.
        Raises:
            NewerRecordError: the stored one was written by a newer version of this program; it stays as it is.
            StoreError: the folder cannot be written to, or the stored record not be read.
        """
        path = self.record_path(record.suite, machine, record.run_id)
        text = dump_record(record)
        check_inside(self.root, path.parent / "history")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(path.parent, error) from error
        if not path.exists():
            write_atomic(path, text)
            return "new"
        try:
            stored = load_record(path)
        except NewerRecordError:
            raise
        except RecordError:
            try:
                damaged = path.read_bytes()
            except OSError as error:
                raise _unusable(path, error) from error
            self._to_history(path, damaged)
            write_atomic(path, text)
            return "replaced"
        if stored.same_result(record) and record.status == "ok":
            return "same"
        if stored.status == "ok" and record.status != "ok":
            self._to_history(path, text.encode())
            return "kept"
        self._to_history(path, dump_record(stored).encode())
        write_atomic(path, text)
        return "replaced"

    def _to_history(self, path: Path, content: bytes) -> None:
        folder = path.parent / "history"
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise _unusable(folder, error) from error
        names = (found.name.removeprefix(f"{path.stem}.") for found in folder.glob(f"{path.stem}.*.json"))
        taken = {int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdecimal()}
        numbered = [folder / f"{path.stem}.{number}.json" for number in sorted(taken)]
        if numbered and numbered[-1].read_bytes() == content:
            return  # a kill between keeping the old record and writing the new one
        write_atomic(folder / f"{path.stem}.{max(taken, default=0) + 1}.json", content, replace=False)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
