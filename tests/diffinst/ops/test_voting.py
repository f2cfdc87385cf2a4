"""Box voting: by hand, against the release's stored results, and against a loop over clusters."""

from __future__ import annotations

import pytest
import torch
from helpers import load_fixture
from torch import Tensor
from torch.testing import assert_close

from diffinst.ops.voting import MIN_SOFT_SCORE, Votes, soft_vote, vote

MERGE = {"vote": vote, "soft_vote": soft_vote}


def _random(num: int, *, seed: int, num_classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(num, 2, generator=generator) * 60
    sizes = 20 + torch.rand(num, 2, generator=generator) * 10
    labels = torch.randint(num_classes, (num,), generator=generator)
    return torch.cat([corners, corners + sizes], dim=1), torch.rand(num, generator=generator), labels


def _iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def _slow(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, *, soft: bool) -> list[tuple]:
    """(box, score, label, source) by taking the best box that is left and what overlaps it, again and again."""
    left = sorted(range(len(boxes)), key=lambda i: -float(scores[i]))
    found: list[tuple] = []
    rows, weights, classes = boxes.double().tolist(), scores.double().tolist(), labels.tolist()
    while left:
        best = left[0]
        overlap = {i: _iou(rows[best], rows[i]) if classes[i] == classes[best] else 0.0 for i in left}
        members = [i for i in left if i == best or overlap[i] >= threshold]
        left = [i for i in left if i not in members]
        total = sum(weights[i] for i in members)
        box = [sum(rows[i][side] * weights[i] for i in members) / total for side in range(4)]
        found.append((box, weights[best], classes[best], best))
        for i in members[1:] if soft else []:
            score = weights[i] * (1 - overlap[i])
            if score >= MIN_SOFT_SCORE:
                found.append((rows[i], score, classes[i], i))
    return sorted(found, key=lambda item: -item[1])


def _assert_same(found: Votes, expected: list[tuple]) -> None:
    boxes, scores, labels, source = zip(*expected)
    assert found.source.tolist() == list(source)
    assert found.labels.tolist() == list(labels)
    assert_close(found.scores, torch.tensor(scores))
    assert_close(found.boxes_xyxy, torch.tensor(boxes), rtol=1e-5, atol=1e-4)


def test_vote_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [50, 50, 60, 60], [0, 0, 10, 10]])
    found = vote(boxes, torch.tensor([0.2, 0.6, 0.5, 0.9]), torch.tensor([1, 1, 1, 0]), iou_threshold=0.65)
    # Boxes 1 and 0 overlap by 80 / 100; box 3 is of another class. y2 = (0.6 * 8 + 0.2 * 10) / 0.8 = 8.5.
    assert_close(found.boxes_xyxy, torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8.5], [50, 50, 60, 60]]))
    assert_close(found.scores, torch.tensor([0.9, 0.6, 0.5]))
    assert found.labels.tolist() == [0, 1, 1]
    assert found.source.tolist() == [3, 1, 2]


def test_soft_vote_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 9]])
    found = soft_vote(boxes, torch.tensor([0.9, 0.4, 0.4]), torch.zeros(3, dtype=torch.int64), iou_threshold=0.65)
    # One cluster. Left of box 1: 0.4 * (1 - 0.8) = 0.08, it stays; of box 2: 0.4 * (1 - 0.9) = 0.04, below 0.05.
    # y2 = (0.9 * 10 + 0.4 * 8 + 0.4 * 9) / 1.7 = 15.8 / 1.7.
    assert_close(found.boxes_xyxy, torch.tensor([[0.0, 0, 10, 15.8 / 1.7], [0, 0, 10, 8]]))
    assert_close(found.scores, torch.tensor([0.9, 0.08]))
    assert found.source.tolist() == [0, 1]


def test_overlap_at_the_threshold_joins() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]])
    labels = torch.zeros(2, dtype=torch.int64)
    assert len(vote(boxes, torch.tensor([0.9, 0.8]), labels, iou_threshold=0.5).scores) == 1
    assert len(vote(boxes, torch.tensor([0.9, 0.8]), labels, iou_threshold=0.51).scores) == 2


def test_a_chain_is_not_one_cluster() -> None:
    # Each overlaps its neighbour by 2/3, the outer two by less: the middle one goes with the better of them.
    boxes = torch.tensor([[0.0, 0, 10, 10], [2, 0, 12, 10], [4, 0, 14, 10]])
    found = vote(boxes, torch.tensor([0.9, 0.5, 0.8]), torch.zeros(3, dtype=torch.int64), iou_threshold=0.6)
    assert_close(found.boxes_xyxy[:, 0], torch.tensor([0.5 * 2 / 1.4, 4.0]))
    assert found.source.tolist() == [0, 2]


@pytest.mark.parametrize("name", ["vote", "soft_vote"])
def test_parity(name: str) -> None:
    stored = load_fixture("tta_vote")
    boxes, scores, labels = (torch.from_numpy(stored[key]) for key in ("boxes", "scores", "labels"))
    found = MERGE[name](boxes, scores, labels.long(), iou_threshold=0.65)
    assert_close(found.boxes_xyxy[:30], torch.from_numpy(stored[f"{name}_boxes"]), rtol=1e-5, atol=1e-3)
    assert_close(found.scores[:30], torch.from_numpy(stored[f"{name}_scores"]), rtol=1e-5, atol=1e-6)
    assert found.labels[:30].tolist() == stored[f"{name}_labels"].tolist()


@pytest.mark.parametrize("threshold", [0.3, 0.65])
@pytest.mark.parametrize("name", ["vote", "soft_vote"])
def test_equals_the_loop_over_clusters(name: str, threshold: float) -> None:
    for seed in range(5):
        boxes, scores, labels = _random(120, seed=seed)
        expected = _slow(boxes, scores, labels, threshold, soft=name == "soft_vote")
        assert len(expected) > 10
        _assert_same(MERGE[name](boxes, scores, labels, iou_threshold=threshold), expected)


def test_in_parts_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, scores, labels = _random(90, seed=7)
    expected = soft_vote(boxes, scores, labels, iou_threshold=0.5)
    monkeypatch.setattr("diffinst.ops.voting._MAX_OVERLAPS", 300)
    for found, whole in zip(soft_vote(boxes, scores, labels, iou_threshold=0.5), expected):
        assert_close(found, whole, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vote", "soft_vote"])
@pytest.mark.parametrize("threshold", [0.0, 0.65, 1.0])
def test_nothing_one_and_boxes_without_area(name: str, threshold: float) -> None:
    merge = MERGE[name]
    empty = merge(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), iou_threshold=threshold)
    assert [tuple(part.shape) for part in empty] == [(0, 4), (0,), (0,), (0,)]
    boxes = torch.tensor([[3.0, 3, 3, 3], [3, 3, 3, 3], [0, 0, 10, 10]])
    found = merge(boxes, torch.tensor([0.5, 0.4, 0.0]), torch.tensor([0, 0, 1]), iou_threshold=threshold)
    assert_close(found.boxes_xyxy[:3], boxes)
    assert found.scores.isfinite().all()


def test_inputs_are_left_unchanged() -> None:
    given = _random(30, seed=1)
    before = [part.clone() for part in given]
    soft_vote(*given, iou_threshold=0.65)
    for part, copy in zip(given, before):
        assert_close(part, copy, rtol=0, atol=0)
