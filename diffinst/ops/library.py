"""torchvision's compiled operators, without the package around them.

Importing torchvision takes a second and 160 MB, as its models, data sets and transforms bring torch's compiler and much
more with them. A detection needs one operator of it, which is in a library of its own.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


@cache
def operators() -> Any:
    """`torch.ops.torchvision`, once its operators are registered.

    Raises:
        ImportError: they cannot be: torchvision is missing, or of another release than torch.
    """
    package = find_spec("torchvision")
    problem: OSError | None = None
    if package is not None and package.origin is not None and not _are_registered():
        # _C.so, in later releases _C_stable.so, and both in between.
        for path in sorted(Path(package.origin).parent.glob("_C*")):
            try:
                torch.ops.load_library(path)
            except OSError as error:  # built for another torch
                problem = problem or error
    if not _are_registered():
        # torch says that it could not, the system why.
        reason = None if problem is None else problem.__cause__ or problem
        why = "" if reason is None else f" ({str(reason).splitlines()[0]})"
        raise ImportError(
            f"torchvision's compiled operators do not load with torch {torch.__version__}{why}: install the "
            "torchvision release that was built for it (pip install --force-reinstall torch torchvision)"
        ) from problem
    return torch.ops.torchvision


def _are_registered() -> bool:
    return hasattr(torch.ops.torchvision, "nms") and hasattr(torch.ops.torchvision, "roi_align")
