from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffinst.ops.recompute import computed_again, map_in_parts


def gated(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Rows that a weight maps, each by its own gate."""
    return torch.tanh(x @ weight) * gate + bias


def inputs(num_rows: int = 7) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return [draw(num_rows, 3), draw(num_rows, 1)], [draw(3, 2), draw(2)]


@pytest.mark.parametrize("part_size", [1, 2, 3, 7, 100])
def test_parts_give_the_same(part_size: int) -> None:
    rows, shared = inputs()
    expected = gated(*rows, *shared)
    wanted = torch.autograd.grad(expected.sin().sum(), [*rows, *shared])
    sizes = []

    def function(*tensors: Tensor) -> Tensor:
        sizes.append(len(tensors[0]))
        return gated(*tensors)

    mapped = map_in_parts(function, rows, shared, part_size)
    assert_close(mapped, expected)
    assert max(sizes) == min(part_size, 7)
    assert sum(sizes) == 7
    for gradient, other in zip(torch.autograd.grad(mapped.sin().sum(), [*rows, *shared]), wanted, strict=True):
        assert_close(gradient, other)
    assert sum(sizes) == 14  # again in the backward


def test_what_wants_no_gradient_gets_none() -> None:
    rows, shared = inputs()
    rows[0].requires_grad_(False)
    shared[1].requires_grad_(False)
    expected = torch.autograd.grad(gated(*rows, *shared).sum(), [rows[1], shared[0]])
    mapped = map_in_parts(gated, rows, shared, 2)
    for gradient, other in zip(torch.autograd.grad(mapped.sum(), [rows[1], shared[0]]), expected, strict=True):
        assert_close(gradient, other)
    with pytest.raises(RuntimeError, match="appears to not have been used|does not require grad"):
        torch.autograd.grad(map_in_parts(gated, rows, shared, 2).sum(), [rows[0]])


def test_gradients_in_the_same_memory_are_added_up_apart() -> None:
    """The gradients of two summands are one tensor, and that of a sum has no memory of its own."""
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    a, b, c = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2,), (2,), ()))
    weight = torch.arange(12, dtype=torch.float64).view(6, 2)
    mapped = map_in_parts(lambda x, a, b, c: x + (a + b) + c, [x], [a, b, c], 2)
    found = torch.autograd.grad((mapped * weight).sum(), [x, a, b, c])
    for gradient, expected in zip(found, [weight, weight.sum(0), weight.sum(0), weight.sum()], strict=True):
        assert_close(gradient, expected)


def test_parts_run_in_the_type_that_they_ran_in() -> None:
    rows, shared = ([tensor.detach().float().requires_grad_() for tensor in group] for group in inputs())
    seen = []

    def function(*tensors: Tensor) -> Tensor:
        mapped = tensors[0] @ tensors[2]
        seen.append(mapped.dtype)
        return mapped * tensors[1] + tensors[3]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        mapped = map_in_parts(function, rows, shared, 4)
    mapped.sum().backward()
    assert seen == [torch.bfloat16] * 4


def test_a_tensor_is_not_kept_but_computed_again() -> None:
    x, weight = torch.randn(5, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    calls = []

    def again() -> Tensor:
        assert not torch.is_grad_enabled()
        calls.append(1)
        return x * 2

    doubled = x * 2
    gone = weakref.ref(doubled)
    with computed_again(doubled, again):
        mapped = doubled * weight
    del doubled
    gc.collect()
    assert gone() is None
    mapped.sum().backward()
    assert calls == [1]
    assert_close(weight.grad, 2 * x.detach().sum(0))
    assert_close(x.grad, (2 * weight.detach()).expand(5, 3))


def test_it_is_computed_again_in_the_types_of_the_first_time() -> None:
    x, weight = torch.randn(5, 3, requires_grad=True), torch.randn(3, 3)
    dtypes = []

    def again() -> Tensor:
        mapped = x @ weight
        dtypes.append(mapped.dtype)
        return mapped

    with torch.autocast("cpu", dtype=torch.bfloat16):
        mapped = x @ weight
        with computed_again(mapped, again):
            squared = mapped * mapped
    squared.sum().backward()
    assert set(dtypes) == {torch.bfloat16}


def test_views_and_empty_tensors_are_kept_as_they_are() -> None:
    def never() -> Tensor:
        raise AssertionError

    x, weight = torch.randn(4, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    mapped = x * 1
    with computed_again(mapped, never):
        (mapped.t() * weight).sum().backward()
    assert_close(weight.grad, x.detach().sum(1))
    empty, other = torch.zeros(0, 4, requires_grad=True) * 1, torch.zeros(0, 4, requires_grad=True)
    with computed_again(empty, never):
        (other * 1 * empty).sum().backward()
