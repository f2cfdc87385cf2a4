"""Which source a measurement came from: the commit, and the patch that makes of it what ran.

The patch covers what can change a number (`SCOPE`), files that git does not know yet included. It is made through an
index and an object folder of its own, so that looking changes nothing in the repository.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE_ROOT = Path(__file__).resolve().parents[2]
# Results are being written while we look; only what can change a number counts.
SCOPE = ("diffinst", "bench", "suites", "pyproject.toml")
MAX_PATCH_BYTES = 1 << 20  # of a patch that people commit beside their records
_MAX_NEW_BYTES = 64 << 20  # of files that git does not know; more is data, not source

_TIMEOUT_S = 30.0
# Paths below these are part of programs, not of somebody's machine.
_SYSTEM_ROOTS = ("bin", "dev", "etc", "lib", "proc", "sys", "usr")
# As in `bench.record`: an absolute path of at least two parts, no part of a word, a URL or a relative path.
_ABSOLUTE_PATH = re.compile(r"(?<![\w./<>~-])/([^\s/'\"`,;:()<>|\\]+)/[^\s/'\"`,;:()<>|\\]+")


@dataclass(frozen=True)
class Source:
    """State of the source.

    commit, dirty: None where the source is no git checkout, or git cannot say. patch: `git apply` on the commit makes
    the source that ran; None where it is clean. reason: why there is no patch although the source is dirty.
    """

    commit: str | None = None
    dirty: bool | None = None
    patch: bytes | None = None
    reason: str | None = None

    @property
    def digest(self) -> str | None:
        """SHA-256 of the patch."""
        return None if self.patch is None else hashlib.sha256(self.patch).hexdigest()

    @property
    def file_name(self) -> str | None:
        """Of the patch; it follows from its content."""
        return None if self.digest is None else f"{self.digest[:16]}.patch"

    def facts(self) -> dict[str, Any]:
        """For a record: `commit`, `dirty` and, where it is dirty, `diff` with `sha256` and `bytes`, or a `reason`."""
        found: dict[str, Any] = {"commit": self.commit, "dirty": self.dirty}
        if self.patch is not None:
            found["diff"] = {"sha256": self.digest, "bytes": len(self.patch)}
        elif self.dirty:
            found["diff"] = {"sha256": None, "reason": self.reason}
        return found


def source_state(root: Path = SOURCE_ROOT) -> Source:
    """The commit of the checkout at `root` and what differs from it in `SCOPE`."""
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(os.fsdecode(top).strip()).resolve() != root.resolve():
        return Source()  # installed from a wheel, or inside somebody else's repository
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", *SCOPE)
    name = None if commit is None else commit.decode().strip()
    if changes is None:
        return Source(name)
    if not changes.strip():
        return Source(name, dirty=False)
    if name is None:
        return Source(name, dirty=True, reason="there is no commit that it could be a difference to")
    patch, reason = _patch(root)
    return Source(name, dirty=True, patch=patch, reason=reason)


def private_reason(patch: bytes, private: Iterable[str]) -> str | None:
    """Why a patch should not be published as it is; None if nothing speaks against it.

    Args:
        private: texts that tell the machine or its user, such as the home folder and the host's name.
    """
    if len(patch) > MAX_PATCH_BYTES:
        return f"it has {len(patch)} bytes, more than the {MAX_PATCH_BYTES} that go beside records"
    text = patch.decode("utf-8", errors="replace")
    if any(re.search(rf"(?<![\w.-]){re.escape(word)}(?![\w-])", text) for word in private if len(word) > 1):
        return "it names this machine, its user or a folder of theirs"
    # Headers hold /dev/null and relative paths only.
    if any(match[1] not in _SYSTEM_ROOTS for match in _ABSOLUTE_PATH.finditer(text)):
        return "it holds an absolute path"
    return None


def _patch(root: Path) -> tuple[bytes | None, str | None]:
    new = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", *SCOPE)
    objects = _git(root, "rev-parse", "--git-path", "objects")
    if new is None or objects is None:
        return None, "git cannot list the changes"
    size = sum(_size(root / os.fsdecode(name)) for name in new.split(b"\0") if name)
    if size > _MAX_NEW_BYTES:
        return None, f"files that git does not know have {size >> 20} MiB in all, more than {_MAX_NEW_BYTES >> 20} MiB"
    with tempfile.TemporaryDirectory(prefix="diffinst-source-") as folder:
        elsewhere = {
            "GIT_INDEX_FILE": str(Path(folder) / "index"),
            "GIT_OBJECT_DIRECTORY": folder,
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str((root / os.fsdecode(objects).strip()).resolve()),
        }
        # Names that neither the commit nor the folder has would be an error to `git add`.
        tracked = (_git(root, "ls-tree", "--name-only", "HEAD", "--", *SCOPE) or b"").decode().split()
        scope = [name for name in SCOPE if name in tracked or (root / name).exists()]
        for command in (("read-tree", "HEAD"), ("add", "--all", "--", *scope)):
            if _git(root, *command, variables=elsewhere) is None:
                return None, f"`git {command[0]}` failed"
        # Options say what a user's settings would change otherwise.
        options = ["--cached", "--binary", "--full-index", "--no-renames", "--no-color", "--no-ext-diff"]
        options += ["--no-textconv", "--src-prefix=a/", "--dst-prefix=b/", "--unified=3", "--diff-algorithm=myers"]
        patch = _git(root, "diff", *options, "HEAD", "--", *scope, variables=elsewhere)
    return (patch, None) if patch else (None, "`git diff` failed")


def _git(root: Path, *arguments: str, variables: dict[str, str] | None = None) -> bytes | None:
    # Looking must not write: `git status` would otherwise refresh the index under somebody's feet.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", **(variables or {})}
    try:
        done = subprocess.run(
            ("git", "-C", str(root), *arguments),
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=True,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0
