from __future__ import annotations

import pytest
import torch
from helpers import needs_compiler

from diffinst.errors import ConfigError
from diffinst.heads import compiled
from diffinst.heads.compiled import call_compiled


def double_plus(x: torch.Tensor, y: float) -> torch.Tensor:
    return (2 * x + y).sin()


@needs_compiler
def test_gives_what_the_function_gives_in_any_shape() -> None:
    for shape in ((3,), (4, 2), (5, 7), (0, 7)):
        x = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)
        torch.testing.assert_close(call_compiled(double_plus, x, 0.5), double_plus(x, 0.5))


def test_what_cannot_be_compiled_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch._dynamo.exc.Unsupported("\nno compiler found\nand a long story")

    monkeypatch.setattr(compiled, "_compiled", lambda _: fail)
    with pytest.raises(ConfigError, match=r"^sampler.compile: torch.compile fails here \(no compiler found\). Set"):
        call_compiled(double_plus, torch.zeros(1), 0.0)


def test_an_error_of_the_function_itself_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(compiled, "_compiled", lambda _: fail)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        call_compiled(double_plus, torch.zeros(1), 0.0)
