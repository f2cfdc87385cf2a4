"""torchvision's compiled operators, without the package around them.

Importing torchvision takes a second and 160 MB, as its models, data sets and transforms bring torch's compiler and much
more with them. A detection needs one operator of it, which is in a library of 2 MB.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

_LIBRARIES = ("_C_stable*", "_C*")  # the second in torchvision 0.27 and before


@cache
def operators() -> Any:
    """`torch.ops.torchvision`, once its operators are registered.

    Raises:
        ImportError: they cannot be: torchvision is missing, or of another release than torch.
    """
    package = find_spec("torchvision")
    if package is not None and package.origin is not None and not _are_registered():
        folder = Path(package.origin).parent
        for path in [path for pattern in _LIBRARIES for path in sorted(folder.glob(pattern)) if path.is_file()][:1]:
            try:
                torch.ops.load_library(path)
            except OSError:  # built for another torch
                break
    if not _are_registered():
        raise ImportError(
            f"torchvision's compiled operators do not load with torch {torch.__version__}: install the torchvision "
            "release that was built for it (pip install --force-reinstall torch torchvision)"
        )
    return torch.ops.torchvision


def _are_registered() -> bool:
    return hasattr(torch.ops.torchvision, "nms") and hasattr(torch.ops.torchvision, "roi_align")
