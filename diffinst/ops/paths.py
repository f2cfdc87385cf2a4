"""Which of several equivalent computations ran: told where one is chosen, kept for whoever measures.

Where an operation has a fast form that only some devices or types have, the choice depends on more than the settings.
A measurement says what was measured: it forgets what was noted before, works, and asks `paths_taken`.
"""

from __future__ import annotations

import torch

_taken: dict[str, set[str]] = {}


def note_path(operation: str, path: str) -> None:
    """Say that `operation` ('box_pooling') was computed by `path` ('bags') in this process; cheap, may be repeated."""
    if not torch.compiler.is_compiling():  # what is compiled says so, and chooses by itself
        _taken.setdefault(operation, set()).add(path)


def paths_taken() -> dict[str, list[str]]:
    """Operation -> the paths it took since the last `forget_paths`, sorted."""
    return {operation: sorted(paths) for operation, paths in sorted(_taken.items())}


def forget_paths() -> None:
    """Begin anew."""
    _taken.clear()
