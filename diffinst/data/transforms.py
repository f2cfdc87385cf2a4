"""Resizing, flipping and cropping of an image together with its ground truth.

The recipe is the released one (detectron2's ResizeShortestEdge, RandomFlip and absolute-range RandomCrop): flip, then
either the final resize, or a first resize, a crop and the final resize. All geometry is decided first, as a `Recipe`;
masks then go through it as one composed index, so that they are read once however many steps there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffinst.config import DataConfig, SamplerConfig
from diffinst.structures import Target

Size = tuple[int, int]  # (height, width)
Rectangle = tuple[int, int, int, int]  # top, left, height, width

# Boxes narrower than this many pixels after clipping are empty (detectron2 structures/boxes.py uses the same bound).
_MIN_BOX_SIDE = 1e-5


def shortest_edge_size(size: Size, shortest: int, longest: int | None) -> Size:
    """The size whose shorter edge is `shortest`, made smaller where the longer edge would exceed `longest`.

    Rounds half up, after both scalings (detectron2 data/transforms, ResizeShortestEdge).
    """
    height, width = size
    scale = shortest / min(height, width)
    new_height, new_width = (shortest, scale * width) if height < width else (scale * height, shortest)
    if longest is not None and max(new_height, new_width) > longest:
        scale = longest / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


@dataclass(frozen=True)
class Recipe:
    """What happens to one image, in this order: flip, resize to `crop_resize`, crop, resize to `final`.

    crop_resize and crop are given together or not at all; `crop` lies inside `crop_resize`.
    """

    original: Size
    final: Size
    flip: bool = False
    crop_resize: Size | None = None
    crop: Rectangle | None = None


def plan_test(size: Size, data: DataConfig) -> Recipe:
    """Resize only."""
    return Recipe(original=size, final=shortest_edge_size(size, data.shortest_edge_test, data.longest_edge_test))


@dataclass(frozen=True)
class View:
    """One augmented copy of a test image: resized, then perhaps mirrored, left to right.

    number: its place in the order of `plan_views`. size: (height, width). box_sizes: detections count whose box, as
    the root of its area in pixels of this size, lies between the two; None where all count.
    """

    number: int
    size: Size
    mirrored: bool
    box_sizes: tuple[float, float] | None


def plan_views(size: Size, settings: SamplerConfig) -> list[View]:
    """The views of an image of `size`, in the released order: each size as it is, then mirrored.

    Two shortest edges may give one size where `tta_longest_edge` limits both; both are kept, with their own box sizes.
    """
    smallest = settings.tta_min_box_sizes or (-math.inf,) * len(settings.tta_shortest_edges)
    largest = settings.tta_max_box_sizes or (math.inf,) * len(settings.tta_shortest_edges)
    views: list[View] = []
    for shortest, low, high in zip(settings.tta_shortest_edges, smallest, largest):
        resized = shortest_edge_size(size, shortest, settings.tta_longest_edge)
        limits = None if (low, high) == (-math.inf, math.inf) else (low, high)
        for mirrored in (False, True) if settings.tta_flip else (False,):
            views.append(View(len(views), resized, mirrored, limits))
    return views


def plan_training(size: Size, data: DataConfig, generator: torch.Generator) -> Recipe:
    """Draw flip, scale and crop. Always takes eight numbers from the generator, whichever of them are used."""
    draws = torch.rand(8, generator=generator, dtype=torch.float64).tolist()

    def between(draw: float, low: int, high: int) -> int:
        return low + min(int(draw * (high - low + 1)), high - low)

    def choose(draw: float, options: Sequence[int]) -> int:
        return options[between(draw, 0, len(options) - 1)]

    flip = draws[0] < data.flip_probability
    crop_resize: Size | None = None
    crop: Rectangle | None = None
    before = size
    if draws[1] < data.crop_probability:
        crop_resize = shortest_edge_size(size, choose(draws[2], data.crop_shortest_edge), None)
        smallest, largest = data.crop_size_range
        height, width = (
            between(draw, min(edge, smallest), min(edge, largest)) for draw, edge in zip(draws[3:5], crop_resize)
        )
        top = between(draws[5], 0, crop_resize[0] - height)
        left = between(draws[6], 0, crop_resize[1] - width)
        crop = (top, left, height, width)
        before = (height, width)
    final = shortest_edge_size(before, choose(draws[7], data.shortest_edge_train), data.longest_edge_train)
    return Recipe(original=size, final=final, flip=flip, crop_resize=crop_resize, crop=crop)


def _resize_image(image: np.ndarray, size: Size) -> np.ndarray:
    if image.shape[:2] == size:
        return image
    height, width = size
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def transform_image(image: np.ndarray, recipe: Recipe) -> Tensor:
    """(h, w, 3) uint8 -> (3, H, W) uint8, bilinear with PIL's anti-aliasing; the input is left unchanged."""
    if recipe.flip:
        image = image[:, ::-1]
    if recipe.crop_resize is not None and recipe.crop is not None:
        image = _resize_image(np.ascontiguousarray(image), recipe.crop_resize)
        top, left, height, width = recipe.crop
        image = image[top : top + height, left : left + width]
    image = _resize_image(np.ascontiguousarray(image), recipe.final)
    return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))


def view_image(image: np.ndarray, view: View) -> Tensor:
    """(h, w, 3) uint8 -> (3, H, W) uint8 as the view has it; the mirrored one has the pixels of the other exactly."""
    resized = transform_image(image, Recipe(original=(image.shape[0], image.shape[1]), final=view.size))
    return resized.flip(2) if view.mirrored else resized


def nearest_index(source: int, target: int) -> Tensor:
    """(target,) int64: the source pixel that the centre of each target pixel falls into.

    floor((i + 1/2) * source / target) in integers. PIL's nearest resize reads the same, but for centres exactly between
    two pixels, where its rounding errors decide.
    """
    return (2 * torch.arange(target) + 1) * source // (2 * target)


def _axis_index(recipe: Recipe, axis: int) -> Tensor:
    """For each final row (axis 0) or column (axis 1), the row or column of the original file."""
    if recipe.crop_resize is not None and recipe.crop is not None:
        start, length = recipe.crop[axis], recipe.crop[axis + 2]
        index = nearest_index(recipe.original[axis], recipe.crop_resize[axis])[start : start + length]
        index = index[nearest_index(length, recipe.final[axis])]
    else:
        index = nearest_index(recipe.original[axis], recipe.final[axis])
    return recipe.original[1] - 1 - index if axis == 1 and recipe.flip else index


def transform_masks(masks: Tensor, recipe: Recipe) -> Tensor:
    """(M, h, w) bool -> (M, H, W) bool, nearest; flips are exact."""
    rows, columns = _axis_index(recipe, 0), _axis_index(recipe, 1)
    return masks.index_select(1, rows).index_select(2, columns)


def transform_boxes(boxes_xyxy: Tensor, recipe: Recipe) -> Tensor:
    """(M, 4) pixels of the file -> (M, 4) float32 pixels of the result, clipped to it."""
    boxes = boxes_xyxy.to(torch.float64)
    if recipe.flip:
        boxes = torch.stack(
            [recipe.original[1] - boxes[:, 2], boxes[:, 1], recipe.original[1] - boxes[:, 0], boxes[:, 3]], 1
        )
    before = recipe.original
    if recipe.crop_resize is not None and recipe.crop is not None:
        boxes = boxes * _scale(before, recipe.crop_resize)
        top, left, height, width = recipe.crop
        boxes = boxes - torch.tensor([left, top, left, top], dtype=torch.float64)
        before = (height, width)
    boxes = boxes * _scale(before, recipe.final)
    height, width = recipe.final
    limit = torch.tensor([width, height, width, height], dtype=torch.float64)
    return torch.minimum(boxes.clamp(min=0), limit).to(torch.float32)


def _scale(before: Size, after: Size) -> Tensor:
    x, y = after[1] / before[1], after[0] / before[0]
    return torch.tensor([x, y, x, y], dtype=torch.float64)


def boxes_of_masks(masks: Tensor) -> Tensor:
    """(M, h, w) bool -> (M, 4) float32 xyxy around the set pixels, corners outside; zeros where a mask is empty."""
    num, height, width = masks.shape
    if num == 0:
        return torch.zeros((0, 4))
    rows, columns = masks.any(dim=2).to(torch.uint8), masks.any(dim=1).to(torch.uint8)
    boxes = torch.stack(
        [
            columns.argmax(dim=1),
            rows.argmax(dim=1),
            width - columns.flip(1).argmax(dim=1),
            height - rows.flip(1).argmax(dim=1),
        ],
        dim=1,
    ).to(torch.float32)
    return boxes * rows.any(dim=1)[:, None]


def transform_target(target: Target, recipe: Recipe, *, crop_boxes: str) -> Target:
    """Ground truth of the file -> ground truth of the result, without what has become empty.

    Args:
        target: boxes and masks in pixels of the file.
        crop_boxes: what a crop makes of boxes: "released" clips them, "fixed" draws them anew around the cropped masks.
    """
    boxes = transform_boxes(target.boxes_xyxy, recipe)
    masks = None if target.masks is None else transform_masks(target.masks, recipe)
    if masks is not None and recipe.crop is not None and crop_boxes == "fixed":
        boxes = boxes_of_masks(masks)
    keep = ((boxes[:, 2:] - boxes[:, :2]) > _MIN_BOX_SIDE).all(dim=1)
    if masks is not None:
        keep &= masks.flatten(1).any(dim=1) if masks.numel() else keep
    if bool(keep.all()):
        return Target(boxes, target.labels.clone(), masks)
    return Target(boxes[keep], target.labels[keep], None if masks is None else masks[keep])
