from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffinst.federated import FederatedDraws, choose_classes, draw_federated, sampling_weights

BACKGROUND = 6


class HostReads(TorchDispatchMode):
    """Counts the operators after which the host waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def chosen(arrival: list[float], labels: list[int], num_classes: int) -> list[int]:
    """One stage of six classes."""
    draws = FederatedDraws(torch.tensor([arrival]), num_classes)
    return choose_classes(draws, torch.tensor([labels]))[0].nonzero().flatten().tolist()


class TestByHand:
    arrival = (0.5, 0.1, 0.4, 0.2, float("inf"), 0.3)

    def test_the_earliest_of_those_that_are_not_present(self) -> None:
        # Class 2 and the background are present; 4 - 2 = 2 more: 1 and 3.
        assert chosen([*self.arrival], [2, BACKGROUND, 2], 4) == [1, 2, 3]

    def test_the_background_counts_only_where_it_is(self) -> None:
        assert chosen([*self.arrival], [2, 2], 4) == [1, 2, 3, 5]

    def test_no_instance_at_all(self) -> None:
        assert chosen([*self.arrival], [BACKGROUND] * 3, 4) == [1, 3, 5]

    def test_more_present_than_wanted(self) -> None:
        assert chosen([*self.arrival], [0, 2, 3, 4, BACKGROUND], 3) == [0, 2, 3, 4]

    def test_fewer_others_than_wanted(self) -> None:
        # Where the release raises. Class 4 has weight 0, so it takes part only if it is present.
        assert chosen([*self.arrival], [2, BACKGROUND], 50) == [0, 1, 2, 3, 5]
        assert chosen([*self.arrival], [4, BACKGROUND], 50) == [0, 1, 2, 3, 4, 5]

    def test_stages_are_apart(self) -> None:
        draws = FederatedDraws(torch.tensor([self.arrival, self.arrival[::-1]]), 3)
        found = choose_classes(draws, torch.tensor([[0, BACKGROUND], [BACKGROUND, BACKGROUND]]))
        # The second stage: 0.3, inf, 0.2, 0.4, 0.1, 0.5.
        assert [row.nonzero().flatten().tolist() for row in found] == [[0, 1], [2, 4]]

    def test_weights(self) -> None:
        assert sampling_weights([4, 0, 900], 0.5).tolist() == [2.0, 0.0, 30.0]
        assert sampling_weights([4, 0, 900], 0.0).tolist() == [1.0, 1.0, 1.0]


def choose_slowly(arrival: Tensor, labels: list[int], num_classes: int) -> set[int]:
    found = set(labels)
    for number in sorted(range(len(arrival)), key=lambda number: float(arrival[number])):
        if len(found) < num_classes and number not in found and bool(arrival[number].isfinite()):
            found.add(number)
    return found - {len(arrival)}


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 12), st.integers(1, 15))
def test_equals_the_slow_choice(seed: int, num_all: int, num_proposals: int, num_classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(3, (num_all,), generator=generator)
    draws = draw_federated(weights, num_classes, seed=seed, iteration=3, num_stages=2)
    labels = torch.randint(num_all + 1, (2, num_proposals), generator=generator)
    for row, arrival, of_stage in zip(choose_classes(draws, labels), draws.arrival, labels.tolist()):
        assert set(row.nonzero().flatten().tolist()) == choose_slowly(arrival, of_stage, num_classes)


def test_draws_are_a_function_of_seed_iteration_and_stage() -> None:
    weights = torch.ones(20)
    first = draw_federated(weights, 5, seed=1, iteration=2, num_stages=3)
    again = draw_federated(weights, 5, seed=1, iteration=2, num_stages=2)
    assert torch.equal(first.arrival[:2], again.arrival)
    rows = [*first.arrival]
    rows += draw_federated(weights, 5, seed=1, iteration=3, num_stages=1).arrival
    rows += draw_federated(weights, 5, seed=2, iteration=2, num_stages=1).arrival
    assert len({tuple(row.tolist()) for row in rows}) == 5


def test_draws_are_pinned() -> None:
    """A change here changes every federated training."""
    draws = draw_federated(torch.tensor([1.0, 4.0, 0.0, 2.0]), 2, seed=0, iteration=0, num_stages=1)
    expected = torch.tensor([[0.6879107, 0.6941808, torch.inf, 1.3150609]])
    torch.testing.assert_close(draws.arrival, expected)


def test_classes_are_sampled_as_by_drawing_one_after_the_other() -> None:
    """The share of draws that have a class among the first two, as torch.multinomial's law says.

    Weights 1, 2, 3, 0: P(first) = w / 6; P(second | first) = w / (6 - w of the first). For class 0:
    1/6 + 2/6 * 1/4 + 3/6 * 1/3 = 5/12; class 1: 2/6 + 1/6 * 2/5 + 3/6 * 2/3 = 11/15; class 2: the rest of 2, 17/20.
    """
    weights = torch.tensor([1.0, 2.0, 3.0, 0.0])
    draws = draw_federated(weights, 3, seed=0, iteration=0, num_stages=4000)
    found = choose_classes(draws, torch.full((4000, 1), 4)).double().mean(0)
    # Four standard deviations of a share of 4000 are at most 0.032.
    torch.testing.assert_close(found, torch.tensor([5 / 12, 11 / 15, 17 / 20, 0.0]).double(), rtol=0, atol=0.032)
    theirs = torch.multinomial(weights.expand(4000, 4), 2, generator=torch.Generator().manual_seed(0))
    shares = torch.zeros(4000, 4).scatter(1, theirs, 1.0).double().mean(0)
    torch.testing.assert_close(found, shares, rtol=0, atol=0.045)


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    draw_federated(torch.ones(4), 2, seed=0, iteration=0, num_stages=2)
    assert torch.equal(state, torch.get_rng_state())


def test_the_host_reads_nothing_of_the_choice() -> None:
    draws = draw_federated(torch.ones(30), 12, seed=0, iteration=0, num_stages=3)
    with HostReads() as reads:
        choose_classes(draws, torch.randint(31, (3, 40)))
    assert reads.count == 0


@pytest.mark.gpu
def test_the_choice_does_not_wait_for_the_device() -> None:
    draws = draw_federated(torch.ones(1203), 50, seed=0, iteration=0, num_stages=6)
    labels = torch.randint(1204, (6, 1000))
    expected = choose_classes(draws, labels)
    on_device, there = draws.to("cuda"), labels.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = choose_classes(on_device, there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), expected)
