import torch
from helpers import load_fixture
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import batched_nms as torchvisions
from torchvision.ops import box_iou

from diffinst.ops.nms import batched_nms, classwise_nms


def nms_slowly(boxes, scores, labels, iou_threshold):
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        rivals = [j for j in kept if labels[j] == labels[i]]
        if not rivals or (box_iou(boxes[i : i + 1], boxes[rivals]) <= iou_threshold).all():
            kept.append(i)
    return kept


def test_by_hand():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 9], [0, 0, 10, 4]])
    scores = torch.tensor([0.5, 0.9, 0.8, 0.1])
    labels = torch.tensor([0, 0, 1, 0])
    # 1 is best and takes 0 (IoU 0.9) with it; 2 is of another class; 3 overlaps 1 by 4/9 only
    assert classwise_nms(boxes, scores, labels, iou_threshold=0.5).tolist() == [1, 2, 3]


def test_parity():
    ops = {name: torch.from_numpy(array) for name, array in load_fixture("ops").items() if name.startswith("nms_")}
    kept = classwise_nms(ops["nms_boxes"], ops["nms_scores"], ops["nms_labels"], iou_threshold=0.5)
    assert kept.tolist() == ops["nms_keep"].tolist()


def test_equals_slow_twin():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(300, 2, generator=generator) * 100
    boxes = torch.cat([corner, corner + torch.rand(300, 2, generator=generator) * 40], dim=1)
    scores, labels = torch.rand(300, generator=generator), torch.randint(3, (300,), generator=generator)
    expected = nms_slowly(boxes, scores, labels, 0.3)
    assert 10 < len(expected) < 290
    assert classwise_nms(boxes, scores, labels, iou_threshold=0.3).tolist() == expected


def test_nothing_and_boxes_without_area():
    assert len(classwise_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), iou_threshold=0.5)) == 0
    point = torch.full((3, 4), 7.0)
    kept = classwise_nms(point, torch.tensor([0.1, 0.3, 0.2]), torch.zeros(3).long(), iou_threshold=0.5)
    assert kept.tolist() == [1, 2, 0]


# On both sides of 1,000 boxes, from which on classes are gone through one by one; some left of and above the image.
@given(st.sampled_from([0, 1, 30, 1000, 1001, 1500]), st.integers(1, 5), st.integers(0, 99), st.booleans())
def test_equals_torchvisions(num_boxes, num_classes, seed, is_double):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(num_boxes, 2, generator=generator) * 200 - 40
    boxes = torch.cat([corner, corner + torch.rand(num_boxes, 2, generator=generator) * 60], dim=1)
    boxes = boxes.double() if is_double else boxes
    scores = torch.rand(num_boxes, generator=generator).to(boxes)
    labels = torch.randint(num_classes, (num_boxes,), generator=generator)
    found = batched_nms(boxes, scores, labels, 0.4)
    assert found.dtype == torch.int64
    assert found.tolist() == torchvisions(boxes, scores, labels, 0.4).tolist()
