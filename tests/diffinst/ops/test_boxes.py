import math

import numpy as np
import pytest
import torch
from helpers import load_fixture
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.ops import box_convert, clip_boxes_to_image, generalized_box_iou
from torchvision.ops import box_iou as torchvisions_box_iou

from diffinst.ops.boxes import (
    apply_deltas,
    box_area,
    box_cxcywh_to_xyxy,
    box_iou,
    box_xyxy_to_cxcywh,
    clip_boxes,
    has_area,
    paired_giou,
    scale_boxes,
)


@pytest.fixture(scope="module")
def ops() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(array)) for name, array in load_fixture("ops").items()}


def random_boxes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centre_and_size = torch.rand(count, 4, generator=generator, dtype=torch.float64) * 100
    return box_cxcywh_to_xyxy(centre_and_size)


def test_conversions_by_hand():
    # centre (50, 40), size 20 x 10 -> x from 40 to 60, y from 35 to 45
    cxcywh, xyxy = torch.tensor([[50.0, 40.0, 20.0, 10.0]]), torch.tensor([[40.0, 35.0, 60.0, 45.0]])
    assert_close(box_cxcywh_to_xyxy(cxcywh), xyxy)
    assert_close(box_xyxy_to_cxcywh(xyxy), cxcywh)


def test_conversions_parity(ops):
    assert_close(box_xyxy_to_cxcywh(ops["giou_b1"]), ops["cx_from_xyxy"])
    assert_close(box_cxcywh_to_xyxy(ops["cx_from_xyxy"]), ops["xyxy_roundtrip"])


@pytest.mark.parametrize("shape", [(0, 4), (3, 4), (2, 0, 4), (2, 3, 4)])
def test_conversions_keep_shapes(shape):
    assert box_cxcywh_to_xyxy(torch.rand(shape)).shape == shape
    assert box_xyxy_to_cxcywh(torch.rand(shape)).shape == shape


def test_giou_by_hand():
    a = torch.tensor([0.0, 0.0, 2.0, 2.0])
    pairs = {
        (0.0, 0.0, 2.0, 2.0): 1.0,  # the same box
        (1.0, 0.0, 3.0, 2.0): 2 / 6,  # overlap 2, union 6, hull 6
        (1.0, 1.0, 3.0, 3.0): 1 / 7 - 2 / 9,  # overlap 1, union 7, hull 9
        (3.0, 0.0, 5.0, 2.0): 0 - 2 / 10,  # apart: union 8, hull 10
    }
    b = torch.tensor(list(pairs))
    assert_close(paired_giou(a.expand(4, 4), b), torch.tensor(list(pairs.values())))


def test_giou_equals_torchvision_diagonal():
    a, b = random_boxes(50, 1), random_boxes(50, 2)
    assert_close(paired_giou(a, b), generalized_box_iou(a, b).diagonal())


def test_giou_parity(ops):
    rows, columns = ops["giou"].shape
    giou = paired_giou(ops["giou_b1"][:, None].expand(rows, columns, 4), ops["giou_b2"][None].expand(rows, columns, 4))
    is_defined = ~ops["giou"].isnan()
    assert_close(giou[is_defined], ops["giou"][is_defined])
    assert giou.isfinite().all()


def test_giou_of_boxes_without_area_has_finite_gradient():
    point = torch.tensor([[5.0, 5.0, 5.0, 5.0], [5.0, 5.0, 5.0, 9.0]], requires_grad=True)
    giou = paired_giou(point, point.detach())
    giou.sum().backward()
    assert_close(giou, torch.zeros(2))
    assert_close(point.grad, torch.zeros(2, 4))


def test_giou_gradient():
    a, b = random_boxes(6, 3).requires_grad_(), random_boxes(6, 4)
    assert torch.autograd.gradcheck(paired_giou, (a, b))


def test_giou_empty():
    assert paired_giou(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


@given(st.lists(st.floats(-50, 50, width=32), min_size=8, max_size=8))
def test_giou_is_symmetric_and_bounded(corners):
    points = torch.tensor(corners, dtype=torch.float64).reshape(2, 2, 2)
    a, b = torch.cat([points.amin(1), points.amax(1)], dim=1)[:, None]
    assert_close(paired_giou(a, b), paired_giou(b, a))
    assert -1 <= paired_giou(a, b).item() <= 1


def test_apply_deltas_by_hand():
    # Box 10 wide, 20 high at centre (15, 30). dx = 2 / 2 widths -> 25; dy = 1 / 2 heights -> 40;
    # width times e^log(2) = 20, height times e^log(0.5) = 10.
    deltas = torch.tensor([[2.0, 1.0, math.log(2), math.log(0.5)]])
    boxes = torch.tensor([[10.0, 20.0, 20.0, 40.0]])
    assert_close(apply_deltas(deltas, boxes), torch.tensor([[15.0, 35.0, 35.0, 45.0]]))


def test_apply_deltas_limits_growth():
    boxes = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    grown = apply_deltas(torch.tensor([[0.0, 0.0, 1000.0, 0.0]]), boxes)
    assert_close(grown[0, 2] - grown[0, 0], torch.tensor(100_000.0))


def test_apply_deltas_parity(ops):
    assert_close(apply_deltas(ops["delta_in"], ops["delta_boxes"]), ops["delta_out"])


def test_apply_deltas_keeps_boxes_without_width():
    moved = apply_deltas(torch.ones(1, 4), torch.tensor([[5.0, 0.0, 5.0, 10.0]]))
    assert moved[0, 0] == moved[0, 2] == 5


def test_apply_deltas_of_zero_is_the_box():
    boxes = random_boxes(20)
    assert_close(apply_deltas(torch.zeros(20, 4, dtype=torch.float64), boxes), boxes)


def test_scale_clip_and_area_by_hand():
    boxes = torch.tensor([[-10.0, 10.0, 30.0, 80.0], [50.0, 5.0, 60.0, 10.0]])
    scaled = scale_boxes(boxes, (50, 40), (100, 20))  # y doubles, x halves
    assert_close(scaled, torch.tensor([[-5.0, 20.0, 15.0, 160.0], [25.0, 10.0, 30.0, 20.0]]))
    clipped = clip_boxes(scaled, (100, 20))
    assert_close(clipped, torch.tensor([[0.0, 20.0, 15.0, 100.0], [20.0, 10.0, 20.0, 20.0]]))
    assert has_area(clipped).tolist() == [True, False]
    assert_close(box_area(clipped), torch.tensor([1200.0, 0.0]))


def test_inputs_survive():
    boxes, deltas = random_boxes(5), torch.rand(5, 4, dtype=torch.float64)
    before = boxes.clone(), deltas.clone()
    apply_deltas(deltas, boxes)
    clip_boxes(boxes, (10, 10))
    scale_boxes(boxes, (10, 10), (20, 20))
    assert_close((boxes, deltas), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_formats_clipping_and_overlap_are_torchvisions_to_the_last_bit(dtype):
    boxes, others = random_boxes(300, 3).to(dtype), random_boxes(200, 4).to(dtype)
    centred = box_xyxy_to_cxcywh(boxes)
    assert torch.equal(centred, box_convert(boxes, "xyxy", "cxcywh"))
    assert torch.equal(box_cxcywh_to_xyxy(centred), box_convert(centred, "cxcywh", "xyxy"))
    assert torch.equal(clip_boxes(boxes, (7, 9)), clip_boxes_to_image(boxes, (7, 9)))
    assert torch.equal(box_iou(boxes, others), torchvisions_box_iou(boxes, others))
