from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffinst.data.samplers import (
    Draw,
    RepeatedEpochs,
    TrainingBatches,
    augmentation_generator,
    batches_of_equal_size,
    draws_of_iteration,
    epoch_order,
    repeat_factors,
    repeated_order,
)


def test_an_epoch_is_a_permutation_of_its_seed_and_number() -> None:
    order = epoch_order(50, seed=1, epoch=2)
    assert sorted(order.tolist()) == [*range(50)]
    assert order.tolist() != [*range(50)]
    others = [epoch_order(50, seed=1, epoch=3), epoch_order(50, seed=2, epoch=2)]
    assert all(order.tolist() != other.tolist() for other in others)


def test_the_order_is_pinned() -> None:
    """A change here changes every training."""
    assert epoch_order(8, seed=0, epoch=0).tolist() == [6, 0, 1, 7, 2, 5, 3, 4]


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 5))
def test_every_epoch_has_every_image_once(num_images: int, batch_size: int, seed: int) -> None:
    batches = TrainingBatches(num_images=num_images, batch_size=batch_size, seed=seed)
    stream = [draw for batch in islice(batches, 3 * num_images) for draw in batch]
    assert [draw.position for draw in stream] == [*range(len(stream))]
    for epoch in range(len(stream) // num_images):
        part = stream[epoch * num_images : (epoch + 1) * num_images]
        assert Counter(draw.index for draw in part) == Counter(range(num_images))


def test_epochs_follow_each_other_in_new_orders() -> None:
    stream = [draw.index for draw in draws_of_iteration(0, num_images=20, batch_size=60, seed=0)]
    orders = [epoch_order(20, seed=0, epoch=epoch).tolist() for epoch in range(3)]
    assert stream == [index for order in orders for index in order]
    assert orders[0] != orders[1] != orders[2]


def test_starting_later_gives_the_rest() -> None:
    whole = [*TrainingBatches(num_images=7, batch_size=3, seed=4, end_iteration=12)]
    rest = [*TrainingBatches(num_images=7, batch_size=3, seed=4, start_iteration=5, end_iteration=12)]
    assert len(whole) == 12
    assert rest == whole[5:]


def test_a_batch_may_be_larger_than_the_set() -> None:
    draws = draws_of_iteration(0, num_images=2, batch_size=5, seed=0)
    assert [draw.position for draw in draws] == [0, 1, 2, 3, 4]
    assert {draw.index for draw in draws} == {0, 1}


class TestRepeatFactors:
    def test_by_hand(self) -> None:
        # Eight images; class 0 on 4 (1/2), class 1 on 2 (1/4), class 2 on 1 (1/8). With a threshold of 1/2 they ask for
        # 1, sqrt(2) and 2; an image follows the class that asks for most.
        labels = [{0}, {0, 1}, {0, 2}, {0}, {1}, set(), set(), set()]
        expected = [1, 2**0.5, 2, 1, 2**0.5, 1, 1, 1]
        assert repeat_factors(labels, 0.5).tolist() == pytest.approx(expected)

    def test_a_class_counts_once_an_image(self) -> None:
        assert repeat_factors([[3, 3, 3], [3], [], []], 1.0).tolist() == pytest.approx([2**0.5, 2**0.5, 1, 1])

    def test_a_threshold_that_no_class_is_below(self) -> None:
        assert repeat_factors([{0}, {1}, {0, 1}], 0.3).tolist() == [1, 1, 1]

    @given(st.lists(st.sets(st.integers(0, 4)), min_size=1, max_size=12), st.floats(0.001, 2, allow_nan=False))
    def test_equals_the_slow_rule(self, labels: list[set[int]], threshold: float) -> None:
        expected = []
        for found in labels:
            wanted = [1.0]
            for label in found:
                share = sum(label in other for other in labels) / len(labels)
                wanted.append((threshold / share) ** 0.5)
            expected.append(max(wanted))
        assert repeat_factors(labels, threshold).tolist() == pytest.approx(expected)


class TestRepeatedOrder:
    def test_whole_factors_by_hand(self) -> None:
        order = repeated_order(torch.tensor([1.0, 3.0, 2.0]).double(), seed=0, epoch=0)
        assert sorted(order.tolist()) == [0, 1, 1, 1, 2, 2]

    def test_without_repeats_it_is_the_plain_order(self) -> None:
        for epoch in range(3):
            plain = epoch_order(11, seed=5, epoch=epoch)
            assert torch.equal(repeated_order(torch.ones(11).double(), seed=5, epoch=epoch), plain)

    def test_is_pinned(self) -> None:
        """A change here changes every training with repeat factors."""
        factors = torch.tensor([1.5, 2.25, 1.0, 1.75]).double()
        assert [repeated_order(factors, seed=0, epoch=epoch).tolist() for epoch in range(2)] == [
            [1, 1, 3, 3, 0, 2],
            [2, 3, 1, 1, 0],
        ]

    def test_rounding_is_right_on_average(self) -> None:
        """Over 2000 epochs an image comes as often as its factor says; four standard deviations are at most 0.045."""
        factors = torch.tensor([1.0, 1.1, 1.5, 2.9, 3.25]).double()
        counts = [torch.bincount(repeated_order(factors, seed=7, epoch=epoch), minlength=5) for epoch in range(2000)]
        stacked = torch.stack(counts).double()
        torch.testing.assert_close(stacked.mean(0), factors, rtol=0, atol=0.045)
        assert ((stacked - factors).abs() < 1).all()  # never further than to the next whole number

    def test_images_are_rounded_independently(self) -> None:
        factors = torch.full((2,), 1.5).double()
        counts = [tuple(repeated_order(factors, seed=1, epoch=epoch).bincount(minlength=2)) for epoch in range(200)]
        assert min(Counter(tuple(map(int, pair)) for pair in counts).values()) > 25  # four pairs, 50 of each expected


@given(st.lists(st.floats(1, 3), min_size=1, max_size=8), st.integers(1, 7), st.integers(0, 3), st.integers(0, 30))
def test_a_killed_training_with_repeats_goes_on_with_the_same_order(
    factors: list[float], batch_size: int, seed: int, start: int
) -> None:
    chosen = torch.tensor(factors).double()
    settings = {"num_images": len(factors), "batch_size": batch_size, "seed": seed, "end_iteration": 31}
    whole = [*TrainingBatches(**settings, factors=chosen)]
    assert [*TrainingBatches(**settings, factors=chosen, start_iteration=start)] == whole[start:]
    stream = [draw for batch in whole for draw in batch]
    assert [draw.position for draw in stream] == [*range(31 * batch_size)]
    epochs = [index for epoch in range(len(stream)) for index in repeated_order(chosen, seed, epoch).tolist()]
    assert [draw.index for draw in stream] == epochs[: len(stream)]


def test_positions_may_be_asked_for_in_any_order() -> None:
    factors = torch.tensor([1.5, 2.5, 1.0]).double()
    in_order = RepeatedEpochs(factors, seed=3)
    expected = [in_order.index_at(position) for position in range(40)]
    backwards = RepeatedEpochs(factors, seed=3)
    assert [backwards.index_at(position) for position in reversed(range(40))] == expected[::-1]


def test_an_image_cannot_be_left_out() -> None:
    with pytest.raises(ValueError, match="must be at least 1, not 0.5"):
        RepeatedEpochs(torch.tensor([1.0, 0.5]), seed=0)


@pytest.mark.parametrize(("num_images", "batch_size"), [(0, 1), (1, 0)])
def test_nothing_to_draw_from(num_images: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        draws_of_iteration(0, num_images=num_images, batch_size=batch_size, seed=0)


def test_augmentation_belongs_to_seed_and_position() -> None:
    draws = {
        float(torch.rand((), generator=augmentation_generator(seed, position)))
        for seed in (0, 1)
        for position in (0, 1)
    }
    assert len(draws) == 4
    again = [float(torch.rand((), generator=augmentation_generator(0, 7))) for _ in range(2)]
    assert again[0] == again[1]


def test_draws_leave_the_global_random_state_alone() -> None:
    state = torch.get_rng_state()
    draws_of_iteration(3, num_images=11, batch_size=4, seed=9)
    augmentation_generator(0, 0)
    assert torch.equal(state, torch.get_rng_state())


def test_draws_compare_by_value() -> None:
    assert Draw(1, 2) == Draw(1, 2)


def test_batches_of_equal_size_by_hand() -> None:
    # Padded to multiples of 32: (32, 64), (64, 64), (32, 64), (32, 64), (64, 64).
    sizes = [(30, 40), (33, 64), (32, 33), (1, 64), (64, 50)]
    assert batches_of_equal_size(sizes, batch_size=2, size_divisor=32) == [[0, 2], [3], [1, 4]]
    assert batches_of_equal_size(sizes, batch_size=9, size_divisor=32) == [[0, 2, 3], [1, 4]]
    assert batches_of_equal_size(sizes, batch_size=9, size_divisor=1) == [[0], [1], [2], [3], [4]]
    assert batches_of_equal_size([], batch_size=2, size_divisor=32) == []


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(1, 100)), max_size=30), st.integers(1, 5))
def test_no_image_of_a_batch_is_padded_beyond_its_own_size(sizes: list[tuple[int, int]], batch_size: int) -> None:
    batches = batches_of_equal_size(sizes, batch_size=batch_size, size_divisor=32)
    assert sorted(index for batch in batches for index in batch) == [*range(len(sizes))]
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert len({(-(-sizes[index][0] // 32), -(-sizes[index][1] // 32)) for index in batch}) == 1
