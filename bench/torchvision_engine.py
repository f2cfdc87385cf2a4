"""torchvision's Mask R-CNN as an engine: its network, losses and post-processing on our images and batches.

The harness decodes, augments and resizes; so that both stand on the same pixels, torchvision's own resizing is off.
Training is in float32: with autocast its proposals would be rounded to bfloat16. Nothing is downloaded, so networks
begin with random weights; thresholds of scores and suppression are those of the recipe.
"""

from __future__ import annotations

import contextlib
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from diffinst.backbones.fpn import FPN
from diffinst.backbones.tiny import Tiny
from diffinst.config import SamplerConfig
from diffinst.engine.train import target_of
from diffinst.errors import CheckpointError, DataError
from diffinst.ops.library import operators
from diffinst.structures import Detections, Sample

SIZE_DIVISOR = 32
SCOPES = ("preprocess",)  # what is timed apart from the total

_NO_LIMIT = 2**31
_STRIDES = (4, 8, 16, 32)  # of the maps that regions are pooled from, in all recipes
_PREFIX = "model/"  # of the weights in a file that a training wrote
_COCO_CLASSES = 91  # torchvision's published weights: the background and COCO's category ids, unused ones too
_CLASS_LAYERS = (
    "roi_heads.box_predictor.cls_score",
    "roi_heads.box_predictor.bbox_pred",
    "roi_heads.mask_predictor.mask_fcn_logits",
)


class _AsGiven(GeneralizedRCNNTransform):
    """torchvision's transform without its resize: normalises, and pads to one size."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target


class _TinyPyramid(nn.Module):
    """Our smallest backbone and an FPN, under the names that torchvision expects."""

    out_channels = 64

    def __init__(self) -> None:
        super().__init__()
        self.body = Tiny()
        self.fpn = FPN(self.body.out_shapes, out_channels=self.out_channels)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.fpn(self.body(images)).values()
        return OrderedDict((str(level), features) for level, features in enumerate(maps))


def _tiny(num_classes: int) -> MaskRCNN:
    """Mask R-CNN for a CPU: thin heads, and anchors from 12 to 96 pixels for images of a few hundred."""
    pyramid = _TinyPyramid()
    channels = pyramid.out_channels
    names = [str(level) for level in range(4)]
    width = 128
    return MaskRCNN(
        pyramid,
        rpn_anchor_generator=AnchorGenerator(
            sizes=tuple((size,) for size in (12, 24, 48, 96)), aspect_ratios=((0.5, 1.0, 2.0),) * 4
        ),
        rpn_pre_nms_top_n_train=500,
        rpn_pre_nms_top_n_test=500,
        rpn_post_nms_top_n_train=300,
        rpn_post_nms_top_n_test=300,
        rpn_batch_size_per_image=128,
        box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        box_head=TwoMLPHead(channels * 7**2, width),
        box_predictor=FastRCNNPredictor(width, num_classes),
        box_batch_size_per_image=64,
        mask_roi_pool=MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2),
        mask_head=MaskRCNNHeads(channels, (channels, channels), 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, num_classes),
    )


# Recipe -> constructor; takes the number of classes, the background included.
RECIPES: dict[str, Callable[[int], MaskRCNN]] = {
    "maskrcnn_resnet50_fpn_v2": lambda num_classes: maskrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=num_classes
    ),
    "maskrcnn_resnet50_fpn": lambda num_classes: maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=num_classes
    ),
    "maskrcnn_tiny_fpn": _tiny,
}


def build_network(recipe: str, num_classes: int, seed: int) -> MaskRCNN:
    """A recipe's network for K classes; its initial weights depend on the seed alone.

    Raises:
        ImportError: torchvision's operators do not load.
    """
    operators()  # or it would not be known before regions are suppressed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = RECIPES[recipe](num_classes + 1)
    old = network.transform
    network.transform = _AsGiven(old.min_size, old.max_size, old.image_mean, old.image_std, SIZE_DIVISOR)
    for pool in (network.roi_heads.box_roi_pool, network.roi_heads.mask_roi_pool):
        # Left to itself it takes the strides from the first batch that it sees, and wrong ones where padding is wide:
        # a training that goes on would not be the same.
        pool.scales = [1 / stride for stride in _STRIDES]
        low, high = (int(math.log2(stride)) for stride in (_STRIDES[0], _STRIDES[-1]))
        pool.map_levels = initLevelMapper(low, high, pool.canonical_scale, pool.canonical_level)
    return network


def network_losses(network: MaskRCNN) -> Callable[[list[Sample], int], dict[str, Tensor]]:
    """The network's own losses, for `diffinst.engine.train.train`; their sampling draws from torch's generators."""

    def losses(samples: list[Sample], iteration: int) -> dict[str, Tensor]:  # noqa: ARG001 - a LossFunction
        device = next(network.parameters()).device
        found: dict[str, Tensor] = network(_images(samples, device), [_target(sample, device) for sample in samples])
        return found

    return losses


def _untimed(scope: str) -> AbstractContextManager[object]:  # noqa: ARG001 - a timer is told the scope
    return contextlib.nullcontext()


@torch.inference_mode()
def detect(
    network: MaskRCNN,
    samples: Sequence[Sample],
    settings: SamplerConfig,
    *,
    timer: Callable[[str], AbstractContextManager[object]] = _untimed,
) -> list[Detections]:
    """Detections in pixels of the files.

    Args:
        network: in evaluation mode.
        samples: images that pad to the same size.
        settings: `max_detections` and `mask_threshold` are used.
        timer: called with each of `SCOPES`.
    """
    network.roi_heads.detections_per_img = settings.max_detections or _NO_LIMIT
    with timer("preprocess"):
        batch, _ = network.transform(_images(samples, next(network.parameters()).device))
    features = network.backbone(batch.tensors)
    proposals, _ = network.rpn(batch, features)
    found, _ = network.roi_heads(features, proposals, batch.image_sizes)
    found = network.transform.postprocess(found, batch.image_sizes, [sample.original_size for sample in samples])
    return [_detections(item, settings.mask_threshold) for item in found]


def _detections(found: dict[str, Tensor], mask_threshold: float) -> Detections:
    boxes_xyxy = found["boxes"]
    keep = (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all(dim=1)
    masks = found["masks"][:, 0] >= mask_threshold
    # Labels count from 1 there: 0 is the background.
    return Detections(boxes_xyxy[keep], found["scores"][keep], found["labels"][keep] - 1, masks[keep])


def _images(samples: Sequence[Sample], device: torch.device) -> list[Tensor]:
    return [sample.image.to(device, non_blocking=True).float() / 255 for sample in samples]


def _target(sample: Sample, device: torch.device) -> dict[str, Tensor]:
    target = target_of(sample)
    if target.masks is None:
        raise DataError(f"image {sample.image_id}: has boxes only, and Mask R-CNN learns from masks. Use other data")
    return {
        "boxes": target.boxes_xyxy.to(device, non_blocking=True),
        "labels": target.labels.to(device, non_blocking=True) + 1,
        "masks": target.masks.to(device, non_blocking=True).to(torch.uint8),
    }


def load_weights(network: MaskRCNN, path: Path, category_ids: Sequence[int]) -> None:
    """Copy weights from a file that the harness wrote, or from a state dict in .safetensors or .pth.

    A file of torchvision's published models (91 classes: COCO's category ids) gives the rows of `category_ids`.

    Raises:
        CheckpointError: no such file, or the weights of another network.
    """
    state = _read_weights(path)
    own = network.state_dict()
    if (rows := _rows_of_coco(state, own, category_ids)) is not None:
        state = {key: _take_rows(key, value, rows) for key, value in state.items()}
    problems = [f"{key} is missing" for key in own if key not in state]
    problems += [f"{key} is unknown to the network" for key in state if key not in own]
    problems += [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{path}: weights of another network: {'; '.join(problems[:3])}{more}. Choose the recipe they belong to"
        )
    network.load_state_dict(state)


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    # torch.load has an exception of its own for each way in which a file can be wrong.
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, EOFError, pickle.PickleError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path}: cannot be read as .safetensors or .pth ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: holds no state dict. Save network.state_dict()")
    if any(key.startswith(_PREFIX) for key in state):
        state = {key.removeprefix(_PREFIX): value for key, value in state.items() if key.startswith(_PREFIX)}
    return state


def _rows_of_coco(state: dict[str, Tensor], own: dict[str, Tensor], category_ids: Sequence[int]) -> list[int] | None:
    key = f"{_CLASS_LAYERS[0]}.weight"
    if key not in state or len(state[key]) != _COCO_CLASSES or len(own[key]) == _COCO_CLASSES:
        return None
    return [0, *category_ids] if max(category_ids) < _COCO_CLASSES else None


def _take_rows(key: str, value: Tensor, rows: list[int]) -> Tensor:
    if key.rpartition(".")[0] not in _CLASS_LAYERS:
        return value
    by_class = value.reshape(_COCO_CLASSES, -1, *value.shape[1:])
    return by_class[rows].reshape(-1, *value.shape[1:])
