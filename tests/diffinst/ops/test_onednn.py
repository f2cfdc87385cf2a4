from __future__ import annotations

import pytest
import torch

from diffinst.ops.onednn import applies_to


def test_float32_on_a_cpu_and_operators_that_exist() -> None:
    weight = torch.ones(1)
    assert applies_to(weight, "_linear_pointwise", "_convolution_pointwise_")
    assert not applies_to(weight, "_linear_pointwise", "_no_such_operator")
    assert not applies_to(weight.double())
    assert not applies_to(weight.to("meta"))
    with torch.autocast("cpu"):
        assert not applies_to(weight)


@pytest.mark.parametrize(("name", "value"), [("is_available", lambda: False), ("enabled", False)])
def test_without_the_library(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    monkeypatch.setattr(f"torch.backends.mkldnn.{name}", value)
    assert not applies_to(torch.ones(1))
