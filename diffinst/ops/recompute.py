"""Gradients in less memory: what is cheap to compute is computed again in the backward instead of being kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def map_in_parts(
    function: Callable[..., Tensor], rows: Sequence[Tensor], shared: Sequence[Tensor], part_size: int
) -> Tensor:
    """`function(*rows, *shared)`, computed `part_size` rows at a time, and again part by part in the backward.

    What one part needs is all that is ever alive beside inputs, output and gradients. Gradients are written where they
    belong and added up in place, where automatic differentiation would put them together from those of the parts. They
    cannot be differentiated again.

    Args:
        function: (some rows of each, *shared) -> as many rows; without random numbers, and looking at no other tensor
            that wants a gradient.
        rows: tensors of R >= 1 rows each. shared: what all parts need whole, such as weights.
    """
    mapped: Tensor = _InParts.apply(function, part_size, len(rows), *rows, *shared)
    return mapped


@contextlib.contextmanager
def computed_again(tensor: Tensor, again: Callable[[], Tensor]) -> Iterator[None]:
    """What is done to `tensor` within keeps, for the backward, `again` in its place: it has to give the same.

    What `again` reads must not change before the backward. Nobody looks after that, nor after changes in place of any
    other tensor that the operations within keep.

    Args:
        again: called without gradients, once for each operation that wants the tensor, in the types (autocast) of here.
    """
    device = tensor.device.type
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    # The functions must not hold the tensor itself: they live as long as what is kept. It outlives the block.
    wanted = tensor.data_ptr(), tensor.shape, tensor.stride()

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        is_it = (saved.data_ptr(), saved.shape, saved.stride()) == wanted
        return again if is_it and saved.numel() else saved

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            return kept()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], part_size: int, num_rows_inputs: int, *tensors: Tensor
    ) -> Tensor:
        ctx.function, ctx.part_size, ctx.num_rows_inputs = function, part_size, num_rows_inputs
        device = tensors[0].device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.save_for_backward(*tensors)
        rows, shared = tensors[:num_rows_inputs], tensors[num_rows_inputs:]
        return torch.cat([function(*part, *shared) for part in zip(*(tensor.split(part_size) for tensor in rows))])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[3:]
        count, size = ctx.num_rows_inputs, ctx.part_size
        device, dtype, enabled = ctx.autocast
        places = [place for place, is_wanted in enumerate(wanted) if is_wanted]
        # Of rows as laid out as they are, so that what comes before need not copy them.
        found = {place: torch.empty_like(tensors[place]) for place in places if place < count}
        for number, of_output in enumerate(gradient.split(size)):
            here = slice(number * size, number * size + len(of_output))
            inputs = [tensor[here] if place < count else tensor for place, tensor in enumerate(tensors)]
            inputs = [part.detach().requires_grad_(is_wanted) for part, is_wanted in zip(inputs, wanted)]
            with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
                output = ctx.function(*inputs)
            parts = torch.autograd.grad(output, [inputs[place] for place in places], of_output)
            memory = [of_output, *parts]
            for place, part in zip(places, parts):
                if place < count:
                    found[place][here] = part
                elif place in found:
                    found[place] += part
                else:  # to be added to, so no other tensor may lie there
                    found[place] = part if _is_alone(part, memory) else part.clone()
            del inputs, output, parts, memory
        return None, None, None, *(found.get(place) for place in range(len(tensors)))


def _is_alone(tensor: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Does a tensor, one of `tensors`, fill memory that no other of them is in?"""
    storage = tensor.untyped_storage()
    sharing = [other for other in tensors if other.untyped_storage().data_ptr() == storage.data_ptr()]
    return len(sharing) == 1 and storage.nbytes() == tensor.nbytes
