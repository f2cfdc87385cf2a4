from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffinst.data.samplers import (
    Draw,
    TrainingBatches,
    augmentation_generator,
    batches_of_equal_size,
    draws_of_iteration,
    epoch_order,
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
