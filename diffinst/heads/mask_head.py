"""Dynamic mask head: 1x1 convolutions with weights of their own for each instance (CondInst, arXiv:2003.05664).

The release repeats the mask features once per instance and runs grouped convolutions. Here the instances of an image
share them: the first layer of all instances is one matrix product with the features, the others are batched products.
In inference on a GPU all layers can be one kernel instead (`diffinst.ops.mask_head_triton`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffinst.ops import mask_head_triton
from diffinst.ops.paths import note_path

MaskHeadKernel = Literal["auto", "torch", "triton"]

# Hidden activations per tile of pixels, in elements: on a CPU they should stay in the cache, on a GPU fill the device.
_TILE_ELEMENTS_CPU = 2**19
_TILE_ELEMENTS_GPU = 2**26
# In training the hidden activations are kept for the backward up to this many elements per image (1 GiB in float32).
_TILE_ELEMENTS_TRAINING = 2**28


def _layer_sizes(in_channels: int, channels: Sequence[int]) -> list[tuple[int, int]]:
    """(in, out) of each layer: the hidden ones, then the one that gives the logit."""
    return list(zip((in_channels, *channels), (*channels, 1)))


def num_mask_params(in_channels: int, channels: Sequence[int]) -> int:
    """Number P of filter parameters of an instance; (8, (8, 8)) gives 8*8 + 8*8 + 8*1 + 8 + 8 + 1 = 153.

    Args:
        in_channels: channels of the mask features.
        channels: of the hidden layers; empty for a single linear layer.
    """
    return sum(before * after + after for before, after in _layer_sizes(in_channels, channels))


def split_mask_params(mask_params: Tensor, in_channels: int, channels: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Cuts filters into layers. In the vector, all weights come first, layer by layer, then all biases.

    Args:
        mask_params: (D, P), P = num_mask_params(in_channels, channels).
    Returns:
        Per layer (weight (D, out, in), bias (D, out, 1)), views of `mask_params`.
    Raises:
        ValueError: P does not fit the channels.
    """
    sizes = _layer_sizes(in_channels, channels)
    expected = num_mask_params(in_channels, channels)
    if mask_params.shape[-1] != expected:
        raise ValueError(
            f"mask_params has {mask_params.shape[-1]} parameters per instance, but mask features of {in_channels} "
            f"channels and hidden channels {tuple(channels)} need {expected}"
        )
    parts = mask_params.split([i * o for i, o in sizes] + [o for _, o in sizes], dim=-1)
    weights, biases = parts[: len(sizes)], parts[len(sizes) :]
    return [
        (weight.unflatten(-1, (after, before)), bias[..., None])
        for (before, after), weight, bias in zip(sizes, weights, biases)
    ]


def _logits_of_pixels(pixels: Tensor, mask_params: Tensor, channels: Sequence[int]) -> Tensor:
    """(C, T) features of T pixels and (D, P) filters -> (D, T) logits."""
    (weight, bias), *others = split_mask_params(mask_params, len(pixels), channels)
    num_instances, out_channels = weight.shape[:2]
    x = torch.addmm(bias.reshape(-1, 1), weight.reshape(-1, len(pixels)), pixels)  # (D * out, T)
    x = x.unflatten(0, (num_instances, out_channels))
    for weight, bias in others:
        x = torch.baddbmm(bias, weight, x.relu())
    return x[:, 0]


def _logits_of_image(
    mask_features: Tensor, mask_params: Tensor, channels: Sequence[int], kernel: MaskHeadKernel
) -> Tensor:
    """(C, H, W) features and (D, P) filters -> (D, H, W) logits, by tiles of pixels so that memory stays bounded."""
    training = torch.is_grad_enabled() and (mask_features.requires_grad or mask_params.requires_grad)
    if kernel == "triton" and not training:
        note_path("mask_head", "triton")
        return mask_head_triton.mask_logits(mask_features, mask_params, channels=channels)
    note_path("mask_head", "torch")
    pixels = mask_features.flatten(1).contiguous()  # rows of pixels, whatever layout the convolutions left
    num_pixels = pixels.shape[1]
    if training:
        tile_elements = _TILE_ELEMENTS_TRAINING
    else:
        tile_elements = _TILE_ELEMENTS_GPU if pixels.is_cuda else _TILE_ELEMENTS_CPU
    hidden_per_pixel = max(len(mask_params) * sum(channels), 1)
    tile = max(tile_elements // hidden_per_pixel, 256)
    if tile >= num_pixels:
        logits = _logits_of_pixels(pixels, mask_params, channels)
    elif training:
        # What a tile computed is computed again in the backward.
        tiles = [
            checkpoint(_logits_of_pixels, part, mask_params, channels, use_reentrant=False)
            for part in pixels.split(tile, dim=1)
        ]
        logits = torch.cat(tiles, dim=1)
    else:
        logits = torch.cat(
            [_logits_of_pixels(part, mask_params, channels) for part in pixels.split(tile, dim=1)], dim=1
        )
    return logits.unflatten(1, mask_features.shape[1:])


def apply_mask_head(
    mask_features: Tensor,
    mask_params: Tensor,
    image_index: Tensor | None = None,
    *,
    channels: Sequence[int] = (8, 8),
    kernel: MaskHeadKernel = "auto",
) -> Tensor:
    """Masks of instances from the mask features of their images.

    Args:
        mask_features: (C, H, W) of one image, or (B, C, H, W).
        mask_params: (D, P) filters of D instances, see `num_mask_params`.
        image_index: (D,) int64, the image of each instance, rising from 0 to B - 1; not needed for one image.
        channels: of the hidden layers.
        kernel: "torch" is matrix products; "triton" is one kernel, equal to them to 1e-5, where no gradient is wanted,
            and matrix products where one is; "auto" is "torch": the kernel was not timed on a GPU yet.
    Returns:
        (D, H, W) logits in the order of the instances; those of the kernel are in float32.
    Raises:
        ConfigError: "triton" where it cannot run, see `diffinst.ops.mask_head_triton.require_triton`.
        ValueError: the parameters do not fit the channels, or `image_index` is missing, falls or leaves the batch where
            there are several images.
    """
    if mask_features.dim() == 3:
        mask_features = mask_features[None]
    if len(mask_features) == 1:
        return _logits_of_image(mask_features[0], mask_params, channels, kernel)
    if image_index is None:
        raise ValueError(f"image_index is needed to tell the instances of {len(mask_features)} images apart")
    counts = _instances_per_image(image_index, len(mask_features))
    return torch.cat(
        [
            _logits_of_image(features, params, channels, kernel)
            for features, params in zip(mask_features, mask_params.split(counts))
        ]
    )


def _instances_per_image(image_index: Tensor, num_images: int) -> list[int]:
    """How many instances each image has. Waits for the device once."""
    images = torch.arange(num_images, device=image_index.device)
    counts = (image_index[:, None] == images).sum(dim=0)
    is_rising = (image_index[1:] >= image_index[:-1]).all()
    *per_image, rising = torch.cat([counts, is_rising[None]]).tolist()
    if not rising or sum(per_image) != len(image_index):
        raise ValueError(f"image_index must rise from 0 to {num_images - 1}, got {image_index.tolist()}")
    return per_image
