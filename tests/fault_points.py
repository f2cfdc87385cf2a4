"""Strikes at the k-th moment at which a program changes a results folder: kills it, tears a file, or fills the disk.

A moment is a call that changes the folder: opening a file for writing, fsync, rename, link, remove, a new folder. All
processes forked from the one that calls `install` share one count. Nothing in the program itself knows of it.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Action = Literal["count", "kill all", "kill one", "tear", "full", "refused"]
_LINE = 160  # bytes of a line in the journal, all alike, so that its size is the count
_ERRORS = {"full": errno.ENOSPC, "refused": errno.EACCES}
_FREEING = ("remove",)  # what works on a full disk


@dataclass(frozen=True)
class Strike:
    """What happens at moment `at` (from 1).

    'kill all': the program and this process end by SIGKILL before the call. 'kill one': this process alone. 'tear': as
    'kill all', and a file about to be flushed loses its second half, as in a power cut (what grows in place was
    flushed before). 'full': from that moment on no
    write succeeds (ENOSPC); 'refused': likewise (EACCES). 'count': nothing.
    journal: gets a line a moment. main: process id of the program.
    """

    action: Action
    at: int
    root: Path
    journal: Path
    main: int


def moments(journal: Path) -> list[str]:
    """What happened, in order: 'fsync .store/train-1/.done.json.x.tmp'."""
    return [line.strip() for line in journal.read_text().splitlines()] if journal.exists() else []


def install(strike: Strike) -> None:
    """Count from now on, in this process and those forked from it."""
    root, really_open = str(strike.root), os.open
    prefixes = {root, os.path.realpath(root)}

    def moment(name: str, path: Any, handle: int | None = None) -> None:
        text = os.fspath(path) if not isinstance(path, int) else str(Path(f"/proc/self/fd/{path}").readlink())
        text = text.decode() if isinstance(text, bytes) else text
        if not any(text.startswith(prefix) for prefix in prefixes):
            return
        line = f"{name} {text.removeprefix(os.path.realpath(root)).removeprefix(root).lstrip('/')}"
        journal = really_open(strike.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(journal, fcntl.LOCK_EX)
            os.write(journal, f"{line[: _LINE - 1]:<{_LINE - 1}}\n".encode())
            number = os.fstat(journal).st_size // _LINE
        finally:
            os.close(journal)
        if strike.action in _ERRORS:
            if number >= strike.at and name not in _FREEING:
                raise OSError(_ERRORS[strike.action], os.strerror(_ERRORS[strike.action]), text)
        elif strike.action != "count" and number == strike.at:
            if strike.action == "tear" and handle is not None and text.endswith((".tmp", ".partial")):
                os.truncate(text, Path(text).stat().st_size // 2)
            if strike.action != "kill one":
                os.kill(strike.main, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(module: Any, function: str, name: str, place: int) -> None:
        really: Callable[..., Any] = getattr(module, function)

        def struck(*arguments: Any, **options: Any) -> Any:
            moment(name, arguments[place], arguments[0] if name == "fsync" else None)
            return really(*arguments, **options)

        setattr(module, function, struck)

    def open_handle(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and "dir_fd" not in options:
            moment("open", path)
        return really_open(path, flags, *rest, **options)

    really_open_file = io.open

    def open_file(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if set(mode) & set("wax+") and not isinstance(path, int):
            moment("open", path)
        return really_open_file(path, mode, *rest, **options)

    os.open = open_handle  # type: ignore[assignment]
    io.open = open_file  # type: ignore[assignment]
    for function, name, place in (
        ("replace", "rename", 1),
        ("rename", "rename", 1),
        ("link", "link", 1),
        ("unlink", "remove", 0),
        ("remove", "remove", 0),
        ("mkdir", "mkdir", 0),
        ("fsync", "fsync", 0),
    ):
        wrap(os, function, name, place)
