"""What is passed between the parts: small typed structures, a shape per field.

Legend: B images, N proposals, M ground-truth instances of an image, G the largest M of a batch, K classes, S head
stages, P filter parameters of the dynamic mask head, C channels, (H, W) the padded network input, D kept detections.
Boxes are xyxy in pixels of the resized, unpadded image unless a name says otherwise; sizes are (height, width).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from diffinst.ops.rle import RLE


class FeatureShape(NamedTuple):
    """Channels and stride (input pixels per feature pixel) of a feature map."""

    channels: int
    stride: int


def _move(value: Any, device: torch.device | str) -> Any:
    if not isinstance(value, Tensor):
        return value
    # Towards the host a copy that is not waited for may be read before it is there.
    return value.to(device, non_blocking=torch.device(device).type != "cpu")


class _Movable:
    """Adds `.to(device)` to a dataclass whose fields are tensors, lists of tensors or plain values."""

    def to(self, device: torch.device | str) -> Self:
        moved = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            moved[field.name] = (
                [_move(item, device) for item in value] if isinstance(value, list) else _move(value, device)
            )
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass
class ImageBatch(_Movable):
    """Normalised images, zero-padded right and bottom to one size.

    images: (B, 3, H, W) float32, H and W multiples of the backbone's size divisor.
    image_sizes: B resized, unpadded (height, width); boxes live in these.
    original_sizes: B (height, width) of the files; detections are returned in these.
    image_ids: B ids of the data set; the noise of an image is a function of its id.
    """

    images: Tensor
    image_sizes: list[tuple[int, int]]
    original_sizes: list[tuple[int, int]]
    image_ids: list[int]

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def whwh(self) -> Tensor:
        """(B, 4) float32 (w, h, w, h) of the resized, unpadded images, on the images' device."""
        rows = [(w, h, w, h) for h, w in self.image_sizes]
        return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4).to(self.images.device, non_blocking=True)


@dataclass
class Target(_Movable):
    """Ground truth of one image.

    boxes_xyxy: (M, 4) float32 pixels of the resized image. labels: (M,) int64 in [0, K).
    masks: (M, h, w) bool at the resized, unpadded size; None where only boxes are known.
    """

    boxes_xyxy: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class HeadOutput(_Movable):
    """Predictions of every stage of the box head.

    class_logits: (S, B, N, K). boxes_xyxy: (S, B, N, 4) pixels, not clipped. mask_params: (S, B, N, P), None without
    masks.
    """

    class_logits: Tensor
    boxes_xyxy: Tensor
    mask_params: Tensor | None = None


@dataclass
class Features(_Movable):
    """What the image alone determines; computed once per image, however many sampling steps.

    pyramid: p2..p5, each (B, C, H/stride, W/stride), strides 4, 8, 16, 32.
    mask_features: (B, Cm, H/4, W/4), None without masks.
    pixel_table: the pyramid once more, as `diffinst.ops.roi.pool_boxes` may want it; None where it does not.
    """

    pyramid: list[Tensor]
    mask_features: Tensor | None = None
    pixel_table: Tensor | None = None


@dataclass
class Candidates(_Movable):
    """Detections of one image before masks are computed, best score first.

    boxes_xyxy: (D, 4) pixels of the resized image, not clipped. scores: (D,) probabilities. labels: (D,) int64.
    mask_params: (D, P), None without masks.
    """

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor
    mask_params: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores)


@dataclass
class Detections(_Movable):
    """Final detections of one image in pixels of the original file, best score first.

    boxes_xyxy: (D, 4) clipped to the image, none empty. scores: (D,). labels: (D,) int64.
    masks: (D, height, width) bool, None without masks. encodings: in their place, D masks as COCO's run lengths.
    """

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None
    encodings: list[RLE] | None = None

    def __len__(self) -> int:
        return len(self.scores)


@dataclass
class Sample:
    """One image as it leaves the loader: decoded, augmented and resized, not yet normalised.

    image: (3, h, w) uint8 RGB. original_size: (height, width) of the file. target: None at test time.
    """

    image: Tensor
    image_id: int
    original_size: tuple[int, int]
    target: Target | None = None
