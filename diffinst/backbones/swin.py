"""Swin Transformer (arXiv:2103.14030) with a LayerNorm on each of its four maps, as in the release.

Blocks and merging are torchvision's. Its attention is equal to the release's for the same weights (both pad the map to
whole windows, zeros that are attended to like pixels, then shift, then mask) except where the padded map is one window
high or wide: there it leaves the shift out, and `_WindowAttention` puts it back. timm's is not equal at sizes that need
padding: it shifts before it pads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.swin_transformer import (
    PatchMerging,
    ShiftedWindowAttention,
    SwinTransformerBlock,
    shifted_window_attention,
)

from diffinst.backbones.base import Backbone
from diffinst.structures import FeatureShape

_PATCH_SIZE = 4
_BLOCKED = -100.0  # added to the logit of a pair that must not attend: the release's stand-in for -inf


class _WindowAttention(ShiftedWindowAttention):
    """torchvision's, shifted also along an axis on which the map is a single window. (B, H, W, C) in and out."""

    def define_relative_position_index(self) -> None:
        super().define_relative_position_index()
        # A function of the window size: not worth a place in every checkpoint.
        self.register_buffer("relative_position_index", self.relative_position_index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        shifts = [
            shift if size <= window else 0
            for size, window, shift in zip((height, width), self.window_size, self.shift_size)
        ]
        if not any(shifts):
            return super().forward(x)
        pad_y, pad_x = (-size % window for size, window in zip((height, width), self.window_size))
        x = functional.pad(x, (0, 0, 0, pad_x, 0, pad_y))
        x = torch.roll(x, [-shift for shift in shifts], dims=(1, 2))
        x = shifted_window_attention(
            x,
            self.qkv.weight,
            self.proj.weight,
            # One window on that axis, so that the mask is the same for all and can go with the bias.
            self.get_relative_position_bias() + self._mask(shifts, x.device),
            self.window_size,
            self.num_heads,
            shift_size=self.shift_size,  # used on the other axis alone
            qkv_bias=self.qkv.bias,
            proj_bias=self.proj.bias,
            training=self.training,
        )
        return torch.roll(x, shifts, dims=(1, 2))[:, :height, :width].contiguous()

    def _mask(self, shifts: list[int], device: torch.device) -> Tensor:
        """(N, N) for the N pixels of a window: blocked between those that the shift brought in and the others."""
        rows, columns = (
            torch.arange(window, device=device) >= window - shift for window, shift in zip(self.window_size, shifts)
        )
        region = (2 * rows[:, None] + columns.int()).flatten()
        return _BLOCKED * (region[:, None] != region)


class Swin(Backbone):
    """Swin Transformer; all of it is trained, as in the release, whose constructor is never given `freeze_at`.

    Args:
        embed_dim: channels of the first map; each stage doubles them.
        depths: blocks of the four stages; every second one is shifted by half a window.
        num_heads: attention heads of the four stages.
        window_size: side of a window, in pixels of a stage's map.
        stochastic_depth: share of samples whose last block is skipped in training; falls to 0 at the first block. Drawn
            from torch's global generator.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int = 7,
        stochastic_depth: float = 0.2,
    ) -> None:
        super().__init__()
        self.patch_projection = nn.Conv2d(3, embed_dim, _PATCH_SIZE, stride=_PATCH_SIZE)
        self.patch_norm = nn.LayerNorm(embed_dim)
        rates = (stochastic_depth * block / (sum(depths) - 1) for block in range(sum(depths)))
        self.stages, self.merges, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.out_shapes = {}
        for index, (depth, heads) in enumerate(zip(depths, num_heads)):
            channels = embed_dim * 2**index
            if index > 0:
                self.merges.append(PatchMerging(channels // 2))
            self.stages.append(
                nn.Sequential(
                    *(
                        SwinTransformerBlock(
                            channels,
                            heads,
                            window_size=[window_size, window_size],
                            shift_size=[window_size // 2 * (block % 2)] * 2,
                            stochastic_depth_prob=next(rates),
                            attn_layer=_WindowAttention,
                        )
                        for block in range(depth)
                    )
                )
            )
            self.norms.append(nn.LayerNorm(channels))
            self.out_shapes[f"res{index + 2}"] = FeatureShape(channels, _PATCH_SIZE * 2**index)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """See `Backbone`; of any size: each map is the one before, rounded up to even and halved."""
        height, width = images.shape[-2:]
        images = functional.pad(images, (0, -width % _PATCH_SIZE, 0, -height % _PATCH_SIZE))
        x = self.patch_norm(self.patch_projection(images).permute(0, 2, 3, 1))
        features = {}
        for index, (name, stage, norm) in enumerate(zip(self.out_shapes, self.stages, self.norms)):
            x = stage(x if index == 0 else self.merges[index - 1](x))
            features[name] = norm(x).permute(0, 3, 1, 2)
        return features


def swin_t() -> Swin:
    """Tiny: 28 million parameters."""
    return Swin(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), stochastic_depth=0.2)


def swin_s() -> Swin:
    """Small: 49 million."""
    return Swin(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), stochastic_depth=0.2)


def swin_b(window_size: int = 7) -> Swin:
    """Base: 87 million. Window 7 for weights of 224 pixel images, 12 for 384."""
    return Swin(
        embed_dim=128,
        depths=(2, 2, 18, 2),
        num_heads=(4, 8, 16, 32),
        window_size=window_size,
        stochastic_depth=0.3,
    )


def swin_l(window_size: int = 7) -> Swin:
    """Large: 195 million. Windows as for the base size."""
    return Swin(
        embed_dim=192,
        depths=(2, 2, 18, 2),
        num_heads=(6, 12, 24, 48),
        window_size=window_size,
        stochastic_depth=0.3,
    )
