from __future__ import annotations

import numpy as np
import pytest
import torch

from diffinst.drawing import PALETTE, _contour, _ink_on, add_legend, colour_of, draw_detections, enlarge
from diffinst.structures import Detections


def _image(height: int = 80, width: int = 120) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _detections(boxes: list[list[float]], *, labels: list[int], scores: list[float], size=(80, 120)) -> Detections:
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = True
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels), masks)


def test_a_pixel_inside_a_mask_is_tinted_by_hand() -> None:
    image = np.full((80, 120, 3), 100, dtype=np.uint8)
    drawn = draw_detections(image, _detections([[20, 30, 60, 70]], labels=[0], scores=[0.9]))
    # 100 * (1 - 0.42) + (0, 158, 222) * 0.42 = (58, 124.36, 151.24)
    assert drawn[50, 40].tolist() == [58, 124, 151]
    assert drawn[50, 100].tolist() == [100, 100, 100]


def test_a_pixel_in_several_masks_is_tinted_by_the_best_alone() -> None:
    image = np.full((80, 120, 3), 100, dtype=np.uint8)
    boxes = [[20.0, 30.0, 60.0, 70.0], [10.0, 10.0, 100.0, 75.0], [15.0, 20.0, 90.0, 72.0]]
    drawn = draw_detections(image, _detections(boxes, labels=[0, 1, 1], scores=[0.9, 0.8, 0.7]))
    assert drawn[50, 40].tolist() == [58, 124, 151]
    # 100 * (1 - 0.42) + (240, 110, 20) * 0.42 = (158.8, 104.2, 66.4)
    assert drawn[50, 80].tolist() == [159, 104, 66]


def test_the_box_is_drawn_on_its_outermost_pixels() -> None:
    image = np.zeros((80, 120, 3), dtype=np.uint8)
    found = _detections([[20, 30, 60, 70]], labels=[1], scores=[0.9])
    found.masks = None
    drawn = draw_detections(image, found)
    assert drawn[69, 40].tolist() == list(PALETTE[1])
    assert drawn[70, 40].tolist() == [0, 0, 0]
    assert drawn[50, 20].tolist() == drawn[50, 59].tolist() == list(PALETTE[1])
    assert drawn[50, 60].tolist() == [0, 0, 0]


def test_the_contour_is_the_outermost_ring_of_the_mask() -> None:
    mask = np.zeros((6, 7), dtype=bool)
    mask[1:5, 1:6] = True
    ring = mask.copy()
    ring[2:4, 2:5] = False
    assert (_contour(mask, 1) == ring).all()
    # A mask that fills its picture has its contour on the picture's border.
    assert _contour(np.ones((3, 3), dtype=bool), 1).sum() == 8


def test_the_input_is_left_unchanged_and_nothing_drawn_is_a_copy() -> None:
    image = _image()
    before = image.copy()
    drawn = draw_detections(image, _detections([[20, 30, 60, 70]], labels=[0], scores=[0.9]))
    assert (image == before).all()
    assert (drawn != before).any()
    none = draw_detections(image, _detections([], labels=[], scores=[]))
    assert (none == before).all()
    assert none is not image


def test_low_scores_and_too_many_are_not_drawn() -> None:
    image = _image()
    both = _detections([[5, 30, 40, 60], [70, 30, 110, 60]], labels=[0, 1], scores=[0.9, 0.2])
    one = _detections([[5, 30, 40, 60]], labels=[0], scores=[0.9])
    expected = draw_detections(image, one)
    assert (draw_detections(image, both, score_threshold=0.5) == expected).all()
    assert (draw_detections(image, both, max_detections=1) == expected).all()
    assert (draw_detections(image, both) != expected).any()


def test_the_best_detection_is_on_top() -> None:
    image = np.zeros((80, 120, 3), dtype=np.uint8)
    boxes = [[20.0, 30.0, 60.0, 70.0]] * 2
    drawn = draw_detections(image, _detections(boxes, labels=[3, 4], scores=[0.9, 0.8]))
    assert drawn[69, 40].tolist() == list(PALETTE[3])


def test_names_are_shown_and_a_class_without_one_by_its_number() -> None:
    image = _image()
    found = _detections([[20, 30, 60, 70]], labels=[1], scores=[0.9])
    named = draw_detections(image, found, ["disc", "ring"])
    unnamed = draw_detections(image, found, ["disc"])
    assert (named != unnamed).any()
    assert (unnamed == draw_detections(image, found, ["disc", "class 1"])).all()


@pytest.mark.parametrize(
    "box", [[0, 0, 120, 80], [0, 0, 1, 1], [119, 79, 120, 80], [-5, -5, 200, 200], [50, 40, 50, 40]]
)
@pytest.mark.parametrize("size", [(80, 120), (1, 1), (8, 300)])
def test_odd_boxes_and_images_are_drawn(box: list[float], size: tuple[int, int]) -> None:
    found = Detections(torch.tensor([box]).float(), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    drawn = draw_detections(_image(*size), found, ["a rather long class name"])
    assert drawn.shape == (*size, 3)
    assert drawn.dtype == np.uint8


def test_colours_belong_to_classes_and_do_not_repeat_soon() -> None:
    assert colour_of(2) == PALETTE[2]
    assert len({colour_of(label) for label in range(3 * len(PALETTE))}) == 3 * len(PALETTE)
    assert _ink_on((255, 255, 255)) == (0, 0, 0)
    assert _ink_on((0, 0, 90)) == (255, 255, 255)


def test_wrong_images_and_masks_are_refused() -> None:
    found = _detections([[20, 30, 60, 70]], labels=[0], scores=[0.9])
    with pytest.raises(ValueError, match=r"\(height, width, 3\) uint8"):
        draw_detections(_image().astype(np.float32), found)
    with pytest.raises(ValueError, match=r"masks are \(80, 120\), the image is \(40, 40\)"):
        draw_detections(_image(40, 40), found)


def test_a_small_picture_is_enlarged_by_a_whole_factor() -> None:
    image, found = _image(), _detections([[20, 30, 60, 70]], labels=[1], scores=[0.9])
    larger, moved = enlarge(image, found, 200, 1000)  # 80 x 3 = 240 is the least multiple from 200 on
    assert larger.shape == (240, 360, 3)
    assert (larger[::3, ::3] == image).all()
    assert (larger[2::3, 2::3] == image).all()
    assert moved.boxes_xyxy.tolist() == [[60, 90, 180, 210]]
    assert found.boxes_xyxy.tolist() == [[20, 30, 60, 70]]
    assert found.masks is not None
    assert moved.masks is not None
    assert int(moved.masks.sum()) == 9 * int(found.masks.sum())
    assert moved.masks[0, 90:210, 60:180].all()
    same_image, same = enlarge(image, found, 80, 1000)
    assert same_image is image
    assert same is found


def test_a_long_thin_picture_is_not_enlarged_beyond_bounds() -> None:
    found = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert enlarge(_image(3, 200), found, 360, 1000)[0].shape == (15, 1000, 3)
    assert enlarge(_image(3, 2000), found, 360, 1000)[0].shape == (3, 2000, 3)


def test_the_legend_is_below_and_names_every_class_with_its_colour_and_count() -> None:
    image = _image(300, 400)
    legend = add_legend(image, [2, 0, 2], ["disc", "ring", "star"])
    assert legend.shape[0] > 300
    assert legend.shape[1] == 400
    assert (legend[:300] == image).all()
    band = legend[300:]
    colours = {tuple(pixel) for pixel in band.reshape(-1, 3).tolist()}
    assert {PALETTE[0], PALETTE[2]} <= colours
    assert PALETTE[1] not in colours
    # In order of class, whatever the order of detections; the count is shown.
    columns = [np.flatnonzero((band == PALETTE[label]).all(axis=2).any(axis=0))[0] for label in (0, 2)]
    assert columns[0] < columns[1]
    assert (add_legend(image, [0, 2, 2], ["disc", "ring", "star"]) == legend).all()
    assert (add_legend(image, [0, 0, 2], ["disc", "ring", "star"]) != legend).any()
    assert (add_legend(image, [2, 0, 2], ["dish", "ring", "star"]) != legend).any()


def test_without_detections_there_is_no_legend() -> None:
    image = _image()
    for over in (True, False):
        same = add_legend(image, [], ["disc"], over=over)
        assert (same == image).all()
        assert same is not image


@pytest.mark.parametrize("size", [(1, 1), (8, 900), (900, 8), (60, 60), (600, 800)])
@pytest.mark.parametrize("num", [1, 60])
def test_legends_of_any_size(size: tuple[int, int], num: int) -> None:
    names = [f"{label} a rather long name of a class" for label in range(60)]
    image = np.zeros((*size, 3), dtype=np.uint8)
    below = add_legend(image, list(range(num)), names)
    assert below.shape[0] > size[0]
    assert size[1] <= below.shape[1] <= max(size[1], 180)
    assert (below[: size[0], : size[1]] == 0).all()
    # Every class has its square: the colours of the palette and their tones come back after 30.
    assert all((below == colour_of(label)).all(axis=2).any() for label in range(num))
    over = add_legend(image, list(range(num)), names, over=True)
    assert over.shape == image.shape
    assert (over[: size[0] // 2] == 0).all()
    # Sixty lines need two on 60 pixels, the second for those left out.
    assert (over != 0).any() == (size == (600, 800) or (size == (60, 60) and num == 1))


def test_names_with_accents_are_drawn() -> None:
    image = _image(60, 300)
    assert (add_legend(image, [0], ["Gr\u00fcn"]) != add_legend(image, [0], ["Gr\u00e5n"])).any()
