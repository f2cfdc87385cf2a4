"""What a user of the harness can put right; caught only in the command line tools (exit code 2)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from diffinst.errors import DiffInstError


class BenchError(DiffInstError):
    """Base of the harness's errors."""


class SuiteError(BenchError):
    """One mistake in a suite file or in an override of it.

    Attributes:
        message: what is wrong, what is allowed and the way out; without the place.
        file: the suite file, or None for an argument of the command line.
        line, column: from 1; None where the mistake has no place of its own.
        key: dotted path of the culprit, 'sampler.sampling_steps' or 'axes.product.backbone[2]'; '' for the whole file.
    """

    def __init__(
        self,
        message: str,
        *,
        file: Path | None = None,
        line: int | None = None,
        column: int | None = None,
        key: str = "",
    ) -> None:
        self.message = message
        self.file = file
        self.line = line
        self.column = column
        self.key = key
        place = ":".join(str(part) for part in (file, line, column) if part is not None)
        super().__init__(": ".join(part for part in (place, key, message) if part))


class SuiteErrors(SuiteError):
    """All mistakes of a suite at once, in the order of the file; `str` has one line for each.

    Attributes:
        errors: at least one; file, line, column and key are those of the first.
    """

    def __init__(self, errors: Iterable[SuiteError]) -> None:
        self.errors = tuple(errors)
        first = self.errors[0]
        super().__init__(first.message, file=first.file, line=first.line, column=first.column, key=first.key)

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)


class RecordError(BenchError):
    """A record is missing, malformed, of an unknown version, or would overwrite a different one."""


class NewerRecordError(RecordError):
    """A record was written by a newer version of this program: it is not damaged, and must not be displaced."""


class PeerError(BenchError):
    """An engine of another interpreter cannot be run as asked: no such interpreter, a package or a file is missing."""


class PeerCrash(BenchError):
    """The process of such an engine ended without a result, or with one that makes no sense."""


class EvaluatorError(BenchError):
    """Two evaluators of the same predictions disagree: a bug, and no score can be trusted until it is found."""


class StoreError(BenchError):
    """The results folder cannot be used: not writable, or in use by another run."""
