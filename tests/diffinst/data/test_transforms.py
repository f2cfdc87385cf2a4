from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from diffinst.config import DataConfig
from diffinst.data.transforms import (
    Recipe,
    boxes_of_masks,
    nearest_index,
    plan_test,
    plan_training,
    shortest_edge_size,
    transform_boxes,
    transform_image,
    transform_masks,
    transform_target,
)
from diffinst.structures import Target

SIDES = st.integers(1, 60)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("size", "shortest", "longest", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),  # 640 * 800 / 480 = 1066.67
        ((640, 480), 800, 1333, (1067, 800)),
        ((427, 640), 800, 1333, (800, 1199)),  # 640 * 800 / 427 = 1199.06
        ((200, 1000), 800, 1333, (267, 1333)),  # 4000 wide, times 1333 / 4000: 266.6 high
        ((200, 1000), 800, None, (800, 4000)),
        ((96, 96), 96, 96, (96, 96)),
        ((3, 900), 10, 90, (1, 90)),  # 0.3 rounds to 0, but a size is at least 1
    ],
)
def test_shortest_edge_by_hand(
    size: tuple[int, int], shortest: int, longest: int | None, expected: tuple[int, int]
) -> None:
    assert shortest_edge_size(size, shortest, longest) == expected


def test_nearest_index_by_hand() -> None:
    assert nearest_index(4, 2).tolist() == [1, 3]  # centres of the two target pixels: 1.0 and 3.0
    assert nearest_index(2, 4).tolist() == [0, 0, 1, 1]
    assert nearest_index(3, 5).tolist() == [0, 0, 1, 2, 2]  # 0.3, 0.9, 1.5, 2.1, 2.7
    assert nearest_index(5, 5).tolist() == [0, 1, 2, 3, 4]


@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 1000))
def test_masks_resize_as_pillow_does_nearest(height: int, width: int, to_height: int, to_width: int, seed: int) -> None:
    masks = torch.rand((2, height, width), generator=_generator(seed)) > 0.5
    resized = transform_masks(masks, Recipe((height, width), (to_height, to_width)))
    # Where a centre falls exactly between two pixels, Pillow's rounding errors decide.
    rows = (2 * np.arange(to_height) + 1) * height % (2 * to_height) > 0
    columns = (2 * np.arange(to_width) + 1) * width % (2 * to_width) > 0
    clear = (rows[:, None] | (height == to_height)) & (columns | (width == to_width))
    for mask, result in zip(masks.numpy(), resized.numpy()):
        image = Image.fromarray(mask.astype(np.uint8)).resize((to_width, to_height), Image.Resampling.NEAREST)
        assert np.array_equal(np.asarray(image)[clear], result[clear])


def test_flip_by_hand() -> None:
    recipe = Recipe((2, 3), (2, 3), flip=True)
    image = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    assert transform_image(image, recipe)[0].tolist() == [[6, 3, 0], [15, 12, 9]]
    masks = torch.tensor([[[True, False, False], [False, True, True]]])
    assert transform_masks(masks, recipe).tolist() == [[[False, False, True], [True, True, False]]]
    assert transform_boxes(torch.tensor([[0.0, 0.0, 1.0, 2.0]]), recipe).tolist() == [[2.0, 0.0, 3.0, 2.0]]


def test_a_crop_by_hand() -> None:
    """A 4 x 4 image, doubled, the rectangle from (x 2, y 4) of 4 x 2 (height x width) cut out, then halved to 2 x 1."""
    recipe = Recipe((4, 4), (2, 1), crop_resize=(8, 8), crop=(4, 2, 4, 2))
    masks = torch.zeros((1, 4, 4), dtype=torch.bool)
    masks[0, 2:4, 1] = True  # doubled: rows 4 to 7, columns 2 and 3, all of the crop
    assert transform_masks(masks, recipe).tolist() == [[[True], [True]]]
    # The box of that mask covers the result; one from the left edge to x = 1.5 ends half way: (3 - 2) / 2.
    boxes = torch.tensor([[1.0, 2.0, 2.0, 4.0], [0.0, 0.0, 1.5, 3.0]])
    assert transform_boxes(boxes, recipe).tolist() == [[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.5, 1.0]]
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    image[2:, 1] = 200
    assert transform_image(image, recipe).shape == (3, 2, 1)


def test_image_steps_are_those_of_pillow() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    recipe = Recipe((30, 40), (50, 44), flip=True, crop_resize=(60, 80), crop=(3, 7, 25, 22))
    step = Image.fromarray(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((80, 60), Image.Resampling.BILINEAR)
    expected = step.crop((7, 3, 29, 28)).resize((44, 50), Image.Resampling.BILINEAR)
    assert np.array_equal(transform_image(image, recipe).permute(1, 2, 0).numpy(), np.asarray(expected))


@given(SIDES, SIDES, SIDES, SIDES, st.booleans())
def test_the_box_of_the_whole_image_stays_that(h: int, w: int, to_h: int, to_w: int, flip: bool) -> None:
    box = transform_boxes(torch.tensor([[0.0, 0.0, w, h]]), Recipe((h, w), (to_h, to_w), flip=flip))
    assert_close(box, torch.tensor([[0.0, 0.0, to_w, to_h]]), rtol=1e-6, atol=0)


@given(st.integers(0, 10_000))
def test_boxes_and_masks_move_together(seed: int) -> None:
    """A rectangle's box and mask, through any recipe: they agree to the rounding of two nearest resizes."""
    data = DataConfig(shortest_edge_train=(40, 70), crop_shortest_edge=(50, 60), crop_size_range=(20, 40))
    masks = torch.zeros((1, 48, 64), dtype=torch.bool)
    masks[0, 10:35, 20:50] = True
    recipe = plan_training((48, 64), data, _generator(seed))
    moved = boxes_of_masks(transform_masks(masks, recipe))
    exact = transform_boxes(torch.tensor([[20.0, 10.0, 50.0, 35.0]]), recipe)
    if bool(moved.any()):
        assert_close(moved, exact, rtol=0, atol=4.0)
    else:
        assert float((exact[:, 2:] - exact[:, :2]).min()) < 4


def test_boxes_of_masks_by_hand() -> None:
    masks = torch.zeros((3, 5, 7), dtype=torch.bool)
    masks[0, 2, 3] = True
    masks[1, 0, 6] = masks[1, 4, 0] = True
    assert boxes_of_masks(masks).tolist() == [[3, 2, 4, 3], [0, 0, 7, 5], [0, 0, 0, 0]]
    assert boxes_of_masks(masks[:0]).shape == (0, 4)


def test_training_plans_stay_within_their_bounds() -> None:
    data = DataConfig()
    seen_flip, seen_crop, seen_edge = set(), set(), set()
    for seed in range(300):
        recipe = plan_training((427, 640), data, _generator(seed))
        seen_flip.add(recipe.flip)
        seen_crop.add(recipe.crop is not None)
        before = (427, 640)
        if recipe.crop is not None:
            assert recipe.crop_resize in {(400, 600), (500, 749), (600, 899)}
            top, left, height, width = recipe.crop
            assert min(384, recipe.crop_resize[0]) <= height <= min(600, recipe.crop_resize[0])
            assert 384 <= width <= 600
            assert 0 <= top <= recipe.crop_resize[0] - height
            assert 0 <= left <= recipe.crop_resize[1] - width
            before = (height, width)
        candidates = {edge: shortest_edge_size(before, edge, 1333) for edge in data.shortest_edge_train}
        assert recipe.final in candidates.values()
        seen_edge.update(edge for edge, size in candidates.items() if size == recipe.final)
    assert seen_flip == seen_crop == {True, False}
    assert seen_edge == set(data.shortest_edge_train)


def test_probabilities_of_zero_and_one() -> None:
    never = DataConfig(flip_probability=0.0, crop_probability=0.0)
    always = DataConfig(flip_probability=1.0, crop_probability=1.0)
    for seed in range(50):
        recipe = plan_training((100, 100), never, _generator(seed))
        assert not recipe.flip
        assert recipe.crop is None
        recipe = plan_training((100, 100), always, _generator(seed))
        assert recipe.flip
        assert recipe.crop is not None


def test_plans_are_functions_of_the_generator() -> None:
    plans = [plan_training((300, 200), DataConfig(), _generator(seed)) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


def test_a_plan_takes_the_same_draws_whatever_it_decides() -> None:
    after = set()
    for probability in (0.0, 1.0):
        generator = _generator(3)
        plan_training((300, 200), DataConfig(crop_probability=probability), generator)
        after.add(float(torch.rand((), generator=generator)))
    assert len(after) == 1


def test_test_time_only_resizes() -> None:
    data = DataConfig(shortest_edge_test=100, longest_edge_test=150)
    assert plan_test((50, 60), data) == Recipe((50, 60), (100, 120))


def _target() -> Target:
    """A lying L in a 10 x 10 image whose upper right part the crop of `_CROP` cuts away."""
    masks = torch.zeros((2, 10, 10), dtype=torch.bool)
    masks[0, 2:8, 2:4] = True
    masks[0, 2:4, 2:9] = True  # the arm that makes the box wide
    masks[1, 0, 0] = True  # outside the crop
    boxes = torch.tensor([[2.0, 2.0, 9.0, 8.0], [0.0, 0.0, 1.0, 1.0]])
    return Target(boxes, torch.tensor([1, 0]), masks)


_CROP = Recipe((10, 10), (5, 8), crop_resize=(10, 10), crop=(5, 1, 5, 8))


@pytest.mark.parametrize(
    ("crop_boxes", "expected"),
    [
        ("released", [1.0, 0.0, 8.0, 3.0]),  # the old box, moved by (-1, -5) and clipped
        ("fixed", [1.0, 0.0, 3.0, 3.0]),  # only the upright part, columns 2 and 3, is left
    ],
)
def test_boxes_after_a_crop(crop_boxes: str, expected: list[float]) -> None:
    result = transform_target(_target(), _CROP, crop_boxes=crop_boxes)
    assert result.labels.tolist() == [1]
    assert result.boxes_xyxy.tolist() == [expected]
    assert result.masks is not None
    assert result.masks.shape == (1, 5, 8)


def test_without_masks_boxes_are_clipped() -> None:
    target = _target()
    result = transform_target(Target(target.boxes_xyxy, target.labels), _CROP, crop_boxes="fixed")
    assert result.boxes_xyxy.tolist() == [[1.0, 0.0, 8.0, 3.0]]
    assert result.masks is None


def test_what_the_crop_empties_is_dropped() -> None:
    recipe = Recipe((10, 10), (2, 2), crop_resize=(10, 10), crop=(8, 8, 2, 2))
    result = transform_target(_target(), recipe, crop_boxes="fixed")
    assert len(result) == 0
    assert result.boxes_xyxy.shape == (0, 4)
    assert result.masks is not None
    assert result.masks.shape == (0, 2, 2)


def test_a_mask_that_vanishes_takes_its_box_along() -> None:
    """One pixel of ten is lost when shrinking to a fifth; its box is not empty."""
    target = _target()
    result = transform_target(target, Recipe((10, 10), (2, 2)), crop_boxes="fixed")
    assert result.labels.tolist() == [1]


def test_no_instances() -> None:
    target = Target(torch.zeros((0, 4)), torch.zeros(0, dtype=torch.int64), torch.zeros((0, 10, 10), dtype=torch.bool))
    for recipe in (_CROP, Recipe((10, 10), (20, 20), flip=True)):
        result = transform_target(target, recipe, crop_boxes="fixed")
        assert len(result) == 0
        assert result.masks is not None
        assert result.masks.shape == (0, *recipe.final)


def test_inputs_survive() -> None:
    target, image = _target(), np.random.default_rng(0).integers(0, 256, (10, 10, 3), dtype=np.uint8)
    for recipe in (Recipe((10, 10), (10, 10)), Recipe((10, 10), (10, 10), flip=True), _CROP):
        target_before, image_before = deepcopy(target), image.copy()
        result, moved = transform_target(target, recipe, crop_boxes="fixed"), transform_image(image, recipe)
        moved.zero_()
        result.boxes_xyxy.zero_()
        result.labels.zero_()
        assert result.masks is not None
        result.masks.zero_()
        assert np.array_equal(image, image_before)
        assert_close(vars(target), vars(target_before), rtol=0, atol=0)
