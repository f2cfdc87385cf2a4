"""Functions through `torch.compile`, compiled where they are first called."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

from diffinst.errors import ConfigError

_Result = TypeVar("_Result")


def call_compiled(function: Callable[..., _Result], *arguments: Any) -> _Result:
    """`function(*arguments)` in compiled form, of any shapes: equal to it but for rounding, slow in the first calls.

    It cannot be looked into by what counts or records operators.

    Raises:
        ConfigError: it cannot be compiled here, for want of a C++ compiler for instance.
    """
    try:
        return _compiled(function)(*arguments)
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"sampler.compile: torch.compile fails here ({reason}). Set compile: none") from error


@cache
def _compiled(function: Callable[..., _Result]) -> Callable[..., _Result]:
    compiled: Callable[..., _Result] = torch.compile(function, fullgraph=True, dynamic=True)
    return compiled
