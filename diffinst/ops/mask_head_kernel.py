"""The Triton kernel of `diffinst.ops.mask_head_triton`, which alone imports this: here Triton is needed on import."""

# Triton's language, which is Python only to look at.
# mypy: disable-error-code="no-untyped-def, assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mask_head_kernel(
    features,
    params,
    logits,
    num_pixels,
    num_params,
    SIZES: tl.constexpr,
    NUM_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All layers of one instance over BLOCK pixels; programs are (instance, block of pixels).

    Loops are unrolled and channels are elements of a tuple, so all activations are in registers, whatever their number:
    a channel has no axis that would have to be a power of two. Sums are in float32.

    Args:
        features: (SIZES[0], num_pixels) contiguous.
        params: (D, num_params) contiguous; all weights, layer by layer, then all biases.
        logits: (D, num_pixels) contiguous, written.
        SIZES: channels before each layer, then 1.
        NUM_WEIGHTS: of an instance, without its biases.
    """
    instance = tl.program_id(0).to(tl.int64)  # D * num_pixels may be more than 32 bits hold
    pixels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = pixels < num_pixels
    x = ()
    for channel in tl.static_range(SIZES[0]):
        row = features + channel * num_pixels.to(tl.int64)
        x = x + (tl.load(row + pixels, mask=is_inside, other=0.0).to(tl.float32),)
    weight = params + instance * num_params
    bias = weight + NUM_WEIGHTS
    for layer in tl.static_range(1, len(SIZES)):
        y = ()
        for _ in tl.static_range(SIZES[layer]):
            total = tl.full((BLOCK,), 0.0, tl.float32) + tl.load(bias).to(tl.float32)
            for before in tl.static_range(SIZES[layer - 1]):
                total += tl.load(weight + before).to(tl.float32) * x[before]
            weight += SIZES[layer - 1]
            bias += 1
            y = y + (tl.maximum(total, 0.0) if layer < len(SIZES) - 1 else total,)
        x = y
    tl.store(logits + instance * num_pixels + pixels, x[0], mask=is_inside)
