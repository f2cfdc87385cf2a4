from __future__ import annotations

import warnings
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from helpers import load_fixture
from hypothesis import given
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffinst import matching
from diffinst.matching import MatcherWarning, match, pad_targets
from diffinst.structures import Target

# Where the release repairs by its rule and loses nothing, both forms agree with it.
KEPT_ALL = ["mixed", "compete", "degenerate_pred", "degenerate_gt", "none_in_centre"]
NOTHING = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
COST_SETTINGS = {"weights": (2.0, 5.0, 2.0), "focal": (0.25, 2.0)}
LOST_SOME = ["duplicate_gt", "gt18_sumk_gt_q20", "gt20_q20", "many_gt15_q20"]


def load_case(name: str, mode: str = "focal") -> tuple[Tensor, Tensor, list[Target], Tensor, Tensor]:
    """Logits, boxes, targets, whwh and the released match of a case of the matcher fixture; mode: of the class cost."""
    arrays = {key: torch.from_numpy(value) for key, value in load_fixture("matcher").items() if key.startswith(name)}
    logits, boxes = arrays[f"{name}__pred_logits"], arrays[f"{name}__pred_boxes"]
    images = [f"{name}__img{image}__" for image in range(len(logits))]
    targets = [Target(arrays[f"{image}gt_xyxy"], arrays[f"{image}labels"]) for image in images]
    expected = torch.full(logits.shape[:2], -1)
    for row, image in zip(expected, images):
        matched = image.replace("__img", f"__{mode}__img")
        row[arrays[f"{matched}selected"]] = arrays[f"{matched}gt_idx"]
    return logits, boxes, targets, torch.stack([arrays[f"{image}size_whwh"] for image in images]), expected


def crowd(
    seed: int, *, num_images: int, num_proposals: int, num_instances: int
) -> tuple[Tensor, Tensor, list[Target], Tensor]:
    """Proposals bunched around overlapping instances."""
    generator = torch.Generator().manual_seed(seed)
    centre = 14 + 100 * torch.rand(num_images, num_instances, 2, generator=generator)
    half = 4 + 20 * torch.rand(num_images, num_instances, 2, generator=generator)
    wanted = torch.cat([centre - half, centre + half], -1)
    near = torch.randint(num_instances, (num_images, num_proposals, 1), generator=generator)
    boxes = wanted.gather(1, near.expand(-1, -1, 4)) + 4 * torch.randn(
        num_images, num_proposals, 4, generator=generator
    )
    boxes = torch.cat([torch.minimum(boxes[..., :2], boxes[..., 2:] - 1), boxes[..., 2:]], -1)
    logits = torch.randn(num_images, num_proposals, 3, generator=generator)
    labels = torch.randint(3, (num_images, num_instances), generator=generator)
    targets = [Target(*both) for both in zip(wanted, labels)]
    return logits, boxes, targets, torch.full((num_images, 4), 128.0)


def covered(matched: Tensor) -> int:
    return len(set(matched[matched >= 0].tolist()))


class TestByHand:
    # One image of 100 x 100, K = 1, all logits equal: the class cost is the same for all pairs.
    whwh = torch.full((1, 4), 100.0)

    def match(self, boxes: list[list[float]], wanted: list[list[float]], **kwargs: object) -> list[int]:
        predicted = torch.tensor([boxes])
        targets = [Target(torch.tensor(wanted), torch.zeros(len(wanted), dtype=torch.int64))]
        return match(torch.zeros(1, len(boxes), 1), predicted, pad_targets(targets), self.whwh, **kwargs)[0].tolist()

    def test_k_is_the_whole_part_of_the_summed_ious(self) -> None:
        # IoUs with the instance [0, 0, 10, 10]: 1, 0.9, 0.8, 0.1, 0 -> sum 2.8 -> k = 2: the two nearest.
        boxes = [[0, 0, 1, 10], [0, 0, 10, 9], [50, 50, 60, 60], [0, 0, 10, 10], [0, 0, 8, 10]]
        assert self.match([[float(x) for x in box] for box in boxes], [[0.0, 0.0, 10.0, 10.0]]) == [-1, 0, -1, 0, -1]

    def test_k_sums_ota_k_ious_only(self) -> None:
        boxes = [[0.0, 0.0, 10.0, 10.0]] * 4 + [[0.0, 0.0, 10.0, 9.9]]
        assert self.match(boxes, [[0.0, 0.0, 10.0, 10.0]], ota_k=5).count(0) == 4  # 4 * 1 + 0.99
        assert self.match(boxes, [[0.0, 0.0, 10.0, 10.0]], ota_k=2).count(0) == 2

    def test_k_is_at_least_one(self) -> None:
        # The far proposal overlaps nothing; it is the only one.
        assert self.match([[80.0, 80.0, 90.0, 90.0]], [[0.0, 0.0, 10.0, 10.0]]) == [0]

    def test_contested_proposal_keeps_its_cheapest_instance(self) -> None:
        # Both instances overlap the first proposal best; it is exactly the first. The second instance moves on.
        wanted = [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 8.0]]
        boxes = [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 2.0], [60.0, 60.0, 70.0, 70.0]]
        assert self.match(boxes, wanted) == [0, 1, -1]

    def test_spare_proposals_are_given_up_when_none_is_free(self) -> None:
        # The first instance claims all three proposals (IoU 1, 0.9, 0.8 -> 2, the second claims the third and loses it
        # or not); the far one must still get one, and not the best of the others.
        wanted = [[0.0, 0.0, 10.0, 10.0], [80.0, 80.0, 90.0, 90.0]]
        boxes = [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.9], [0.0, 0.0, 9.9, 10.0]]
        matched = self.match(boxes, wanted)
        assert matched[0] == 0
        assert sorted(matched) == [0, 0, 1]

    def test_class_cost_decides_between_equal_boxes(self) -> None:
        boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 10.0]]])
        logits = torch.tensor([[[2.0, -2.0], [-2.0, 2.0]]])
        targets = [Target(boxes[0].clone(), torch.tensor([1, 0]))]
        assert match(logits, boxes, pad_targets(targets), self.whwh, ota_k=1).tolist() == [[1, 0]]

    def test_centre_in_the_box_outweighs_a_better_shape(self) -> None:
        # The first proposal's centre lies on the instance's border, so outside: 100 more, although its GIoU is better.
        boxes = [[5.0, 0.0, 15.0, 10.0], [4.0, 4.0, 5.0, 5.0]]
        assert self.match(boxes, [[0.0, 0.0, 10.0, 10.0]]) == [-1, 0]


@pytest.mark.parametrize("case", [*KEPT_ALL, *LOST_SOME, "random12"])
def test_released_matcher_is_reproduced(case: str) -> None:
    for mode in ("focal", "bce"):
        logits, boxes, targets, whwh, expected = load_case(case, mode)
        matched = match(logits, boxes, pad_targets(targets), whwh, method="released", class_loss=mode)
        assert torch.equal(matched, expected), mode


@pytest.mark.parametrize("case", KEPT_ALL)
def test_fixed_matcher_agrees_where_nothing_is_lost(case: str) -> None:
    logits, boxes, targets, whwh, expected = load_case(case)
    assert torch.equal(match(logits, boxes, pad_targets(targets), whwh), expected)


@pytest.mark.parametrize("case", LOST_SOME)
def test_fixed_matcher_keeps_what_the_release_loses(case: str) -> None:
    logits, boxes, targets, whwh, expected = load_case(case)
    assert covered(expected[0]) < len(targets[0])
    assert covered(match(logits, boxes, pad_targets(targets), whwh)[0]) == len(targets[0])


@pytest.mark.parametrize("mode", ["focal", "bce"])
@pytest.mark.parametrize("name", ["iou", "cost"])
def test_costs_of_the_release(name: str, mode: str) -> None:
    logits, boxes, targets, whwh, _ = load_case("mixed")
    settings = COST_SETTINGS if mode == "focal" else COST_SETTINGS | {"focal": None}
    found = matching._cost_and_iou(logits, boxes, pad_targets(targets), whwh, **settings)[name == "iou"]
    for image in (1, 2):
        expected = torch.from_numpy(load_fixture("matcher")[f"mixed__{mode}__img{image}__{name}"]).T
        # The release leaves 1e5 or inf on the costs of taken or unmatched pairs.
        untouched = expected < 50_000
        assert untouched.any()
        torch.testing.assert_close(found[image, : len(expected)][untouched], expected[untouched], rtol=1e-5, atol=1e-5)


def match_slowly(cost: list[list[float]], iou: Tensor) -> list[int]:
    """The fixed matcher of one image, pair by pair; cost and IoU are (M, N)."""
    instances, proposals = (range(size) for size in iou.shape)
    claims: dict[int, list[int]] = {p: [] for p in proposals}
    for g in instances:
        k = max(int(iou[g].topk(min(5, len(proposals))).values.sum()), 1)
        for p in sorted(proposals, key=lambda p: cost[g][p])[:k]:
            claims[p].append(g)
    held = {p: min(gs if len(gs) == 1 else instances, key=lambda g: cost[g][p]) for p, gs in claims.items() if gs}
    while True:
        lost = [g for g in instances if g not in held.values()]
        free = [p for p in proposals if p not in held]
        if not free:
            best = {min((p for p in held if held[p] == g), key=lambda p: cost[g][p]) for g in set(held.values())}
            free = [p for p in proposals if p not in best]
        if not lost or not free:
            return [held.get(p, -1) for p in proposals]
        wishes: dict[int, list[int]] = {}
        for g in lost:
            wishes.setdefault(min(free, key=lambda p: cost[g][p]), []).append(g)
        held |= {p: min(gs, key=lambda g: cost[g][p]) for p, gs in wishes.items()}


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 15))
def test_fixed_matcher_equals_the_slow_one_and_loses_nothing(seed: int, num_proposals: int, num_instances: int) -> None:
    logits, boxes, targets, whwh = crowd(seed, num_images=3, num_proposals=num_proposals, num_instances=num_instances)
    matched = match(logits, boxes, pad_targets(targets), whwh)
    costs, ious = matching._cost_and_iou(logits, boxes, pad_targets(targets), whwh, **COST_SETTINGS)
    for row, cost, iou in zip(matched, costs, ious):
        assert row.tolist() == match_slowly(cost.tolist(), iou)
        assert covered(row) == min(num_instances, num_proposals)


def test_released_matcher_says_when_it_would_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "RELEASED_MAX_ROUNDS", 20)
    endless = 0
    for seed in range(200):
        logits, boxes, targets, whwh = crowd(seed, num_images=1, num_proposals=12, num_instances=11)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            matched = match(logits, boxes, pad_targets(targets), whwh, method="released")
        if caught:
            endless += 1
            assert caught[0].category is MatcherWarning
            assert "train.matcher: fixed" in str(caught[0].message)
            assert covered(matched) < 11
    assert 0 < endless < 100


class HostReads(TorchDispatchMode):
    """Counts the operators after which the host waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["released", "fixed"])
@pytest.mark.parametrize("num_instances", [1, 60])
def test_the_host_waits_once_a_round_whatever_the_number_of_instances(num_instances: int, method: str) -> None:
    logits, boxes, targets, whwh = crowd(0, num_images=3, num_proposals=100, num_instances=num_instances)
    padded = pad_targets(targets)
    with HostReads() as reads:
        match(logits, boxes, padded, whwh, method=method)
    assert 1 <= reads.count <= 3


@pytest.mark.parametrize("method", ["released", "fixed"])
def test_batch_and_stages_equal_one_by_one(method: str) -> None:
    logits, boxes, targets, whwh = crowd(0, num_images=4, num_proposals=20, num_instances=7)
    targets = [Target(t.boxes_xyxy[:count], t.labels[:count]) for t, count in zip(targets, (7, 0, 1, 4))]
    stacked = match(
        torch.stack([logits, logits.flip(0)]),
        torch.stack([boxes, boxes.flip(0)]),
        pad_targets(targets),
        whwh,
        method=method,
    )
    assert stacked.shape == (2, 4, 20)
    for image, target in enumerate(targets):
        for stage, source in enumerate((image, 3 - image)):
            alone = match(
                logits[source : source + 1],
                boxes[source : source + 1],
                pad_targets([target]),
                whwh[image : image + 1],
                method=method,
            )
            assert torch.equal(stacked[stage, image], alone[0])


def test_padding_claims_nothing() -> None:
    # Both proposals lie at the origin, where the padding's empty boxes are, and far from the two instances, which both
    # want the first one, its class being likelier.
    boxes = torch.tensor([[[1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 2.0, 2.0]]]).expand(2, -1, -1)
    logits = torch.tensor([[[3.0], [-3.0]]]).expand(2, -1, -1)
    far = Target(torch.tensor([[60.0, 60.0, 70.0, 70.0], [60.0, 62.0, 70.0, 72.0]]), torch.tensor([0, 0]))
    crowded = Target(far.boxes_xyxy[[0, 0, 1, 1]], torch.zeros(4, dtype=torch.int64))
    for method in ("fixed", "released"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MatcherWarning)  # the second image has too many instances
            matched = match(logits, boxes, pad_targets([far, crowded]), torch.full((2, 4), 100.0), method=method)
        assert matched[0].tolist() == [0, 1]


def test_inputs_survive_and_carry_no_gradient() -> None:
    logits, boxes, targets, whwh = crowd(1, num_images=2, num_proposals=10, num_instances=8)
    copies = [x.clone() for x in (logits, boxes, targets[0].boxes_xyxy)]
    matched = match(logits.requires_grad_(), boxes.requires_grad_(), pad_targets(targets), whwh)
    assert not matched.requires_grad
    for before, after in zip(copies, (logits, boxes, targets[0].boxes_xyxy)):
        assert torch.equal(before, after)


def test_nothing_to_match() -> None:
    matched = match(torch.zeros(2, 3, 5), torch.rand(2, 3, 4), pad_targets([NOTHING, NOTHING]), torch.ones(2, 4))
    assert matched.tolist() == [[-1] * 3] * 2


def test_fewer_proposals_than_ota_k() -> None:
    logits, boxes, targets, whwh = crowd(2, num_images=1, num_proposals=4, num_instances=2)
    assert covered(match(logits, boxes, pad_targets(targets), whwh, ota_k=5)) == 2


def test_not_finite_predictions_end() -> None:
    logits, boxes, targets, whwh = crowd(3, num_images=1, num_proposals=6, num_instances=6)
    for value in (torch.nan, torch.inf):
        for method in ("fixed", "released"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", MatcherWarning)
                matched = match(logits, torch.full_like(boxes, value), pad_targets(targets), whwh, method=method)
            assert matched.shape == (1, 6)


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="'released' or 'fixed', not 'simota'"):
        match(torch.zeros(1, 1, 1), torch.zeros(1, 1, 4), pad_targets([NOTHING]), torch.ones(1, 4), method="simota")
