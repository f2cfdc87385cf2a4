"""Starts `bench.worker`, tied to its parent first: loading torch takes seconds, in which the parent may be killed."""

from __future__ import annotations

import sys

from bench.server import die_with


def main(arguments: list[str]) -> int:
    """`--serve PARENT`: see `bench.worker.main`, which also says what is wrong with other arguments."""
    if arguments[:1] == ["--serve"] and arguments[1:] and arguments[1].isdigit():
        die_with(int(arguments[1]))
    from bench import worker  # loads torch

    return worker.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
