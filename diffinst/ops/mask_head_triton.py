"""The dynamic mask head as one Triton kernel, for inference on a CUDA device.

`diffinst.heads.mask_head` has the same in PyTorch: what a CPU and a training run, and what this is held against. There,
hidden activations of all instances go through memory layer by layer; here they never leave the registers, features and
filters are read and logits written, and that is all.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffinst.errors import ConfigError

# Pixels of a program and warps that share them: 4 pixels a thread. With the usual channels (8, 8, 8, 1) the compiler
# takes 96 registers a thread for compute capability 9.0 and spills none. Nothing else was tried on a device.
_BLOCK = 512
_NUM_WARPS = 4
# The loops are unrolled: 136 weights compile within a second or two, 528 in 7 s, 2080 in 72 s.
_MAX_WEIGHTS = 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _load_kernel() -> tuple[Any, bool]:
    """The kernel, and whether it is interpreted.

    Raises:
        ConfigError: there is no Triton.
    """
    try:
        import triton

        from diffinst.ops.mask_head_kernel import mask_head_kernel
    except ImportError as error:
        raise ConfigError(
            "mask_head_kernel 'triton': Triton is not installed. Run: python -m pip install triton. Or set "
            "mask_head_kernel to 'torch'"
        ) from error
    return mask_head_kernel, not isinstance(mask_head_kernel, triton.JITFunction)


def _num_weights(in_channels: int, channels: Sequence[int]) -> int:
    return sum(before * after for before, after in zip((in_channels, *channels), (*channels, 1)))


def require_triton(device: torch.device | str, in_channels: int, channels: Sequence[int]) -> None:
    """Refuse to go on where `mask_logits` cannot run, before any work is done.

    Args:
        device: that the tensors will be on.
        in_channels, channels: of the mask features and of the hidden layers.
    Raises:
        ConfigError: there is no Triton, the device is not CUDA and Triton does not interpret (TRITON_INTERPRET=1 in the
            environment, before it is imported), or the layers are too large to unroll.
    """
    _, is_interpreted = _load_kernel()
    kind = torch.device(device).type
    if kind != "cuda" and not is_interpreted:
        raise ConfigError(
            f"mask_head_kernel 'triton' needs a CUDA device, and this is {kind!r}. Set mask_head_kernel to 'torch', or "
            "TRITON_INTERPRET=1 in the environment to run it slowly in Triton's interpreter"
        )
    num_weights = _num_weights(in_channels, channels)
    if num_weights > _MAX_WEIGHTS:
        raise ConfigError(
            f"mask_head_kernel 'triton' takes up to {_MAX_WEIGHTS} weights of an instance, and mask features of "
            f"{in_channels} channels with mask_head_channels {list(channels)} have {num_weights}. Set mask_head_kernel "
            "to 'torch'"
        )


def mask_logits(mask_features: Tensor, mask_params: Tensor, *, channels: Sequence[int]) -> Tensor:
    """Masks of the instances of one image, without gradients.

    Args:
        mask_features: (C, H, W), float32, bfloat16 or float16.
        mask_params: (D, P) of these types, filters as `diffinst.heads.mask_head.split_mask_params` cuts them.
        channels: of the hidden layers, which are followed by ReLU.
    Returns:
        (D, H, W) logits in float32, computed in float32 whatever the inputs' types.
    Raises:
        ConfigError: as `require_triton`.
        ValueError: the parameters do not fit the channels, a type is another, or a gradient is wanted.
    """
    in_channels, height, width = mask_features.shape
    require_triton(mask_features.device, in_channels, channels)
    num_instances, num_params = mask_params.shape
    num_weights = _num_weights(in_channels, channels)
    expected = num_weights + sum(channels) + 1
    if num_params != expected:
        raise ValueError(f"mask_params has {num_params} parameters per instance, but these channels need {expected}")
    for name, tensor in (("mask_features", mask_features), ("mask_params", mask_params)):
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; allowed: {', '.join(map(str, _DTYPES))}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, and this kernel has none")
    num_pixels = height * width
    logits = torch.empty(num_instances, height, width, device=mask_features.device)
    if logits.numel() == 0:
        return logits
    kernel, _ = _load_kernel()
    # Instances come first, because neighbours then read the same pixels, and the second axis ends at 65,535.
    grid = (num_instances, -(-num_pixels // _BLOCK))
    with torch.cuda.device_of(mask_features):
        kernel[grid](
            mask_features.contiguous(),
            mask_params.contiguous(),
            logits,
            num_pixels,
            num_params,
            SIZES=(in_channels, *channels, 1),
            NUM_WEIGHTS=num_weights,
            BLOCK=_BLOCK,
            num_warps=_NUM_WARPS,
        )
    return logits
