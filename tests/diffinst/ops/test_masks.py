import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import load_fixture
from torch.testing import assert_close

from diffinst.ops import masks as masks_module
from diffinst.ops.boxes import clip_boxes, has_area, scale_boxes
from diffinst.ops.masks import add_aligned_bilinear_, aligned_bilinear, paste_masks, paste_windows, subsample_masks


@pytest.fixture(params=["whole", "windows"])
def path(request, monkeypatch):
    """Both ways of pasting, whatever the size of the image."""
    limit = math.inf if request.param == "whole" else -1
    monkeypatch.setattr(masks_module, "_PASTE_WHOLE_UP_TO_PIXELS", limit)


def paste_slowly(probabilities, boxes, *, stride, image_size, output_size, threshold, clip):
    """Two resizes of the whole mask, then a loop over the pixels' rows and columns."""
    enlarged = aligned_bilinear(probabilities[:, None], stride)[:, :, : image_size[0], : image_size[1]]
    resized = F.interpolate(enlarged, size=output_size, mode="bilinear", align_corners=False)[:, 0]
    pasted = torch.zeros(len(probabilities), *output_size, dtype=torch.bool)
    for canvas, mask, (x1, y1, x2, y2) in zip(pasted, resized, boxes.tolist()):
        round_end = math.floor if clip == "truncated" else math.ceil
        window = slice(math.floor(y1), round_end(y2)), slice(math.floor(x1), round_end(x2))
        canvas[window] = mask[window] > threshold
    return pasted


def test_aligned_bilinear_by_hand():
    # Factor 2: pixel i lands on 2 i + 1, half-way values between, the first repeated before and the last after it.
    x = torch.tensor([[[[0.0, 4.0]]]])
    row = torch.tensor([0.0, 0.0, 2.0, 4.0])
    assert_close(aligned_bilinear(x, 2), torch.stack([row, row])[None, None])


@pytest.mark.parametrize(
    ("source", "factor", "expected"),
    [("ab_in", 1, "ab_x1"), ("ab_in", 2, "ab_x2"), ("ab_in", 4, "ab_x4"), ("ab_1px_in", 4, "ab_1px_x4")],
)
def test_aligned_bilinear_parity(source, factor, expected):
    ops = load_fixture("ops")
    assert_close(aligned_bilinear(torch.from_numpy(ops[source]), factor), torch.from_numpy(ops[expected]))


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_aligned_bilinear_keeps_the_pixels(factor):
    x = torch.rand(2, 3, 5, 6)
    enlarged = aligned_bilinear(x, factor)
    assert_close(enlarged[..., factor // 2 :: factor, factor // 2 :: factor], x)


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_adding_an_enlarged_map_gives_the_bits_of_enlarging_and_adding(factor, memory_format):
    coarse = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format)
    x = torch.randn(2, 3, 4 * factor, 5 * factor).contiguous(memory_format=memory_format)
    expected = x + aligned_bilinear(coarse, factor)
    add_aligned_bilinear_(x, coarse, factor)
    assert torch.equal(x, expected)


def test_aligned_bilinear_refuses_factor_zero():
    with pytest.raises(ValueError, match="factor must be at least 1"):
        aligned_bilinear(torch.zeros(1, 1, 2, 2), 0)


@pytest.mark.parametrize("size", [(16, 24), (13, 21), (15, 22), (2, 3)])
def test_subsample_equals_padding_first(size):
    masks = torch.rand(3, *size, generator=torch.Generator().manual_seed(0)) > 0.5
    canvas = torch.zeros(3, 16, 24, dtype=torch.bool)
    canvas[:, : size[0], : size[1]] = masks
    sampled = subsample_masks(masks, (4, 6))
    assert sampled.dtype == torch.bool
    assert torch.equal(sampled, canvas[:, 2::4, 2::4])


def test_subsample_without_instances():
    assert subsample_masks(torch.zeros(0, 13, 21, dtype=torch.bool), (4, 6)).shape == (0, 4, 6)


def test_subsample_refuses_masks_larger_than_the_features():
    with pytest.raises(ValueError, match="do not fit"):
        subsample_masks(torch.zeros(1, 20, 24, dtype=torch.bool), (4, 6))


def test_paste_by_hand(path):
    # Constant masks: only threshold and box decide. 4 x 4 image, box from 0.5 to 2.5.
    probabilities = torch.full((2, 1, 1), 0.5)
    probabilities[0] = 0.75
    boxes = torch.tensor([[0.5, 0.5, 2.5, 2.5]]).expand(2, 4)
    common = {"stride": 4, "image_size": (4, 4), "output_size": (4, 4), "threshold": 0.5}
    truncated = paste_masks(probabilities, boxes, clip="truncated", **common)
    covering = paste_masks(probabilities, boxes, clip="covering", **common)
    assert truncated[0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert covering[0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert not truncated[1].any()  # 0.5 is not above 0.5


@pytest.mark.parametrize("case", ["same", "up", "down", "aniso"])
def test_paste_parity(path, case):
    stored = load_fixture("postprocess")
    image_size = tuple(stored["image_hw"].tolist())
    output_size = tuple(stored[f"{case}_out_hw"].tolist())
    boxes = clip_boxes(scale_boxes(torch.from_numpy(stored["boxes_in"]), image_size, output_size), output_size)
    kept = has_area(boxes)
    assert_close(boxes[kept], torch.from_numpy(stored[f"{case}_boxes"]))
    pasted = paste_masks(
        torch.from_numpy(stored["mask_prob"]).float()[kept],
        boxes[kept],
        stride=4,
        image_size=image_size,
        output_size=output_size,
        threshold=0.5,
        clip="truncated",
    )
    height, width = output_size
    expected = np.unpackbits(stored[f"{case}_masks_packed"], axis=1)[:, : height * width].reshape(-1, height, width)
    # A few pixels lie within 1e-5 of the threshold and may fall on either side: at most 21 per case.
    assert (pasted.numpy() != expected.astype(bool)).sum() <= 21
    assert pasted.sum() > 1000


@pytest.mark.parametrize("clip", ["truncated", "covering"])
@pytest.mark.parametrize("output_size", [(61, 87), (30, 44), (200, 150)])
def test_paste_equals_slow_twin(path, clip, output_size):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(12, 16, 24, generator=generator)
    corners = torch.rand(12, 2, 2, generator=generator) * torch.tensor([output_size[1], output_size[0]])
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    boxes[0] = torch.tensor([0.0, 0.0, output_size[1], output_size[0]])
    boxes[1] = torch.tensor([3.2, 4.3, 3.2, 4.3])  # nothing
    arguments = {"stride": 4, "image_size": (61, 87), "output_size": output_size, "threshold": 0.5, "clip": clip}
    pasted, expected = paste_masks(probabilities, boxes, **arguments), paste_slowly(probabilities, boxes, **arguments)
    assert (pasted != expected).sum() <= 2  # values that rounding moves over the threshold
    assert pasted.is_contiguous() is False
    assert pasted.transpose(1, 2).is_contiguous()


def test_paste_whole_in_chunks(monkeypatch):
    probabilities = torch.rand(7, 8, 8, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[2.0, 3.0, 30.0, 20.0]]).expand(7, 4)
    arguments = {
        "stride": 4,
        "image_size": (32, 32),
        "output_size": (32, 32),
        "threshold": 0.5,
        "clip": "covering",
    }
    at_once = paste_masks(probabilities, boxes, **arguments)
    monkeypatch.setattr(masks_module, "_MAX_PASTED_FLOATS", 3 * 32 * 32)
    assert torch.equal(paste_masks(probabilities, boxes, **arguments), at_once)


def test_paste_nothing(path):
    pasted = paste_masks(
        torch.zeros(0, 8, 8),
        torch.zeros(0, 4),
        stride=4,
        image_size=(30, 32),
        output_size=(20, 21),
        threshold=0.5,
        clip="covering",
    )
    assert pasted.shape == (0, 20, 21)
    assert pasted.dtype == torch.bool


def test_paste_keeps_precision_under_autocast(path):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(5, 8, 8, generator=generator)
    boxes = torch.tensor([[0.0, 0.0, 32.0, 32.0]]).expand(5, 4)
    arguments = {
        "stride": 4,
        "image_size": (32, 32),
        "output_size": (32, 32),
        "threshold": 0.5,
        "clip": "covering",
    }
    expected = paste_masks(probabilities, boxes, **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(paste_masks(probabilities, boxes, **arguments), expected)


def test_paste_refuses_unknown_clip():
    with pytest.raises(ValueError, match="'truncated' or 'covering', got 'round'"):
        paste_masks(
            torch.zeros(1, 2, 2),
            torch.zeros(1, 4),
            stride=4,
            image_size=(8, 8),
            output_size=(8, 8),
            threshold=0.5,
            clip="round",
        )


@pytest.mark.parametrize("output_size", [(37, 51), (300, 410)])  # pasted whole, and box by box
@pytest.mark.parametrize("clip", ["covering", "truncated"])
def test_masks_of_a_mirrored_image_are_mirrored_back(output_size, clip):
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(3, 8, 12, generator=generator)
    height, width = output_size
    # Corners on whole pixels: those between are cut as the image's own, not as its mirror image's.
    boxes = torch.tensor([[0.0, 0, width, height], [3, 5, width // 2, height // 2], [30, 2, 34, 9]])
    mirrored_boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
    options = {"stride": 4, "image_size": (29, 45), "output_size": output_size, "threshold": 0.5, "clip": clip}
    found = paste_masks(probabilities, boxes, mirrored=True, **options)
    expected = paste_masks(probabilities, mirrored_boxes, **options).flip(2)
    assert found.flatten(1).any(dim=1)[:2].all()
    assert (found != expected).float().mean() < 1e-4  # sums in another order
    between = torch.tensor([[2.3, 5.0, 20.6, 31.0]])
    ones = torch.ones(1, 8, 12)
    columns = paste_masks(ones, between, mirrored=True, **options)[0].any(dim=0).nonzero().flatten()
    assert (columns[0], columns[-1] + 1) == ((2, 20) if clip == "truncated" else (2, 21))


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("output_size", [(61, 87), (30, 44), (200, 150)])
def test_what_is_computed_under_the_boxes_alone_gives_the_same(monkeypatch, output_size, mirrored):
    monkeypatch.setattr(masks_module, "_PASTE_WHOLE_UP_TO_PIXELS", -1)
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(12, 16, 24, generator=generator)
    corners = torch.rand(12, 2, 2, generator=generator) * torch.tensor([output_size[1], output_size[0]])
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    boxes[1] = torch.tensor([3.0, 4.0, 3.0, 4.0])  # nothing
    options = {"stride": 4, "image_size": (61, 87), "output_size": output_size, "threshold": 0.5, "clip": "covering"}
    asked = []

    def probabilities_of(i, rows, columns):
        asked.append((i, probabilities[i, rows, columns].numel()))
        return probabilities[i, rows, columns]

    found = paste_windows(probabilities_of, boxes, mask_size=(16, 24), mirrored=mirrored, **options)
    assert torch.equal(found, paste_masks(probabilities, boxes, mirrored=mirrored, **options))
    assert [i for i, _ in asked] == [0, *range(2, 12)]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) / (output_size[0] * output_size[1])
    smallest = min(range(len(asked)), key=lambda position: areas[asked[position][0]])
    assert asked[smallest][1] < 16 * 24 / 4
