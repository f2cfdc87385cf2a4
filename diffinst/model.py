"""DiffusionInst (arXiv:2212.02773): what an image determines, and what is run on it once per sampling step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from diffinst.backbones.base import Backbone
from diffinst.backbones.fpn import FPN
from diffinst.diffusion.schedule import NoiseSchedule
from diffinst.heads.box_head import BoxHead
from diffinst.heads.mask_branch import MaskBranch
from diffinst.heads.mask_head import MaskHeadKernel, apply_mask_head
from diffinst.ops.roi import levels_of_table
from diffinst.structures import Features, HeadOutput, ImageBatch, Sample


class DiffusionInst(nn.Module):
    """The network, as three calls: `make_batch`, `encode` once per image, `denoise` once per sampling step.

    Args:
        backbone: also says how images are normalised and padded.
        fpn: built from the backbone's shapes.
        box_head: built from the pyramid's strides.
        mask_branch: None for boxes only (DiffusionDet, arXiv:2211.09788).
        mask_head_channels: hidden channels of the dynamic mask head.
        mask_head_kernel: how its masks are computed, see `diffinst.heads.mask_head.apply_mask_head`.
        num_classes: K.
        num_train_timesteps: length of the diffusion process that the box head is trained for, in `self.schedule`.
        snr_scale: boxes are diffused as signals in [-snr_scale, snr_scale].
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        backbone: Backbone,
        fpn: FPN,
        box_head: BoxHead,
        mask_branch: MaskBranch | None,
        mask_head_channels: Sequence[int] = (8, 8),
        mask_head_kernel: MaskHeadKernel = "auto",
        num_classes: int,
        num_train_timesteps: int = 1000,
        snr_scale: float = 2.0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.fpn = fpn
        self.box_head = box_head
        self.mask_branch = mask_branch
        self.num_classes = num_classes
        self.mask_head_channels = tuple(mask_head_channels)
        self.mask_head_kernel = mask_head_kernel
        self.schedule = NoiseSchedule(num_train_timesteps)
        self.snr_scale = snr_scale
        # Constants of the backbone: they move with the model and stay out of its checkpoints.
        self.register_buffer("pixel_mean", torch.tensor(backbone.pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(backbone.pixel_std).view(3, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the model is; batches are made there."""
        return self.pixel_mean.device

    def make_batch(self, samples: Sequence[Sample]) -> ImageBatch:
        """Normalises images and zero-pads them, right and bottom, to one size that the backbone divides.

        Args:
            samples: at least one; images (3, h, w) uint8 RGB of any sizes. Their targets are not looked at.
        """
        sizes = [(sample.image.shape[1], sample.image.shape[2]) for sample in samples]
        divisor = self.backbone.size_divisor
        height, width = (-(-max(side) // divisor) * divisor for side in zip(*sizes))
        images = torch.zeros(len(samples), 3, height, width, device=self.device)
        for padded, sample, (h, w) in zip(images, samples, sizes):
            pixels = sample.image.to(self.device, non_blocking=True)
            torch.div(pixels - self.pixel_mean, self.pixel_std, out=padded[:, :h, :w])
        return ImageBatch(
            images=images,
            image_sizes=sizes,
            original_sizes=[sample.original_size for sample in samples],
            image_ids=[sample.image_id for sample in samples],
        )

    def encode(self, images: Tensor) -> Features:
        """(B, 3, H, W) normalised, padded images -> pyramid and mask features."""
        features, pyramid = self.encode_boxes(images)
        return replace(features, mask_features=self.encode_masks(pyramid))

    def encode_boxes(self, images: Tensor) -> tuple[Features, list[Tensor]]:
        """The first half of `encode`, all that `denoise` needs, and the pyramid that `encode_masks` wants."""
        # Convolutions and box pooling are fastest with the channels innermost, on CPUs and GPUs alike.
        maps = self.backbone(images.contiguous(memory_format=torch.channels_last))
        pyramid = list(self.fpn.from_coarsest(maps))[::-1]
        table = self.box_head.pixel_table(pyramid)
        if table is not None:
            pyramid = levels_of_table(table, pyramid)
        return Features(pyramid=self.box_head.lay_out(pyramid), pixel_table=table), pyramid

    def encode_masks(self, pyramid: list[Tensor]) -> Tensor | None:
        """The second half: (B, Cm, H/4, W/4) mask features, None without masks."""
        return None if self.mask_branch is None else self.mask_branch(pyramid)

    def denoise(self, features: Features, boxes_xyxy: Tensor, t: Tensor, *, compiled: bool = False) -> HeadOutput:
        """Predictions of every head stage for noisy boxes (B, N, 4) in pixels at timesteps t (B,).

        Args:
            compiled: see `diffinst.heads.box_head.BoxHead.forward`.
        """
        output: HeadOutput = self.box_head(features.pyramid, boxes_xyxy, t, features.pixel_table, compiled=compiled)
        return output

    def mask_logits(self, mask_features: Tensor, mask_params: Tensor, image_index: Tensor | None = None) -> Tensor:
        """(D, H/4, W/4) logits of D instances; see `diffinst.heads.mask_head.apply_mask_head`."""
        return apply_mask_head(
            mask_features, mask_params, image_index, channels=self.mask_head_channels, kernel=self.mask_head_kernel
        )
