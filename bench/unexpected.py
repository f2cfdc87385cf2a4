"""What nobody foresaw: a bug, or a machine that fails. The command line tools then end with a code of its own."""

from __future__ import annotations

import os
import sys
import traceback

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h; Python's own, 1, means a regression or a failed run
TRACEBACK_VARIABLE = "DIFFBENCH_TRACEBACK"


def tell(program: str, error: Exception, *, with_traceback: bool = False) -> int:
    """Print `error` as one line, after its traceback where that is wanted, and return the exit code."""
    with_traceback = with_traceback or os.environ.get(TRACEBACK_VARIABLE, "0") not in ("", "0")
    said = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    way_out = "Please report it" if with_traceback else f"Set {TRACEBACK_VARIABLE}=1 to see where"
    if with_traceback:
        traceback.print_exception(error, file=sys.stderr)
    print(f"{program}: unexpected error (exit code {EXIT_CODE}): {said}. {way_out}", file=sys.stderr)
    return EXIT_CODE
