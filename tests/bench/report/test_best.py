"""Which values are bold, and how often by chance alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from report_records import make_record, with_error

from bench.report.best import find_best

B = 400


def cells_of(*aps: float, noise: float = 0.002, seed: int = 0, **changes: Any) -> dict[tuple[Any, ...], list[Any]]:
    """Cells whose resamples share what images do, and differ by `noise` besides."""
    generator = np.random.default_rng(seed)
    common = generator.normal(0, 0.05, B)
    return {
        (place,): [with_error(make_record(place, ap=ap), 0.05, ap + common + generator.normal(0, noise, B), **changes)]
        for place, ap in enumerate(aps)
    }


def test_a_difference_on_the_same_images_is_seen_through_what_they_share() -> None:
    found = find_best(cells_of(0.30, 0.31, 0.25), ["segm/AP"])
    assert found.cells == {("segm/AP", (1,))}
    assert found.num_tests == 1


def test_the_next_best_decides() -> None:
    assert find_best(cells_of(0.30, 0.3001, 0.10), ["segm/AP"]).cells == frozenset()


def test_equal_values_and_single_cells_are_not_best() -> None:
    assert find_best(cells_of(0.3, 0.3), ["segm/AP"]).cells == frozenset()
    assert find_best(cells_of(0.3), ["segm/AP"]).num_tests == 0


def test_records_that_were_not_drawn_together_are_never_bold() -> None:
    apart = cells_of(0.2, 0.4)
    apart[(1,)][0]["resamples"]["segm/AP"]["seed"] = 1
    assert find_best(apart, ["segm/AP"]).num_tests == 0
    old = {(place,): [make_record(place, ap=ap)] for place, ap in enumerate((0.2, 0.4))}
    assert find_best(old, ["segm/AP"]).num_tests == 0
    assert find_best(old, ["latency_s/total", "flops"]).num_tests == 0


def test_other_images_and_other_rules_are_groups_of_their_own() -> None:
    cells = cells_of(0.30, 0.31) | {(9,): cells_of(0.9, images="b")[(0,)]}
    assert find_best(cells, ["segm/AP"]).cells == {("segm/AP", (1,))}
    agnostic = cells_of(0.30, 0.31)
    agnostic[(1,)][0]["config"]["data"]["class_agnostic"] = True
    assert find_best(agnostic, ["segm/AP"]).num_tests == 0


def test_records_of_before_labels_were_told_are_of_the_set_of_the_others() -> None:
    """A table that was partly measured anew has one best value, not one of each age."""
    cells = cells_of(0.30, 0.31, 0.25, 0.20)
    for place in (0, 1):
        cells[(place,)][0]["resamples"]["segm/AP"]["images"] = "a:1"
    found = find_best(cells, ["segm/AP"])
    assert found.cells == {("segm/AP", (1,))}
    assert found.num_tests == 1


@pytest.mark.parametrize(
    ("name", "value"), [("shapes_seed", 7), ("shapes_image_size", 192), ("val_annotations", "b.json")]
)
def test_other_data_under_the_same_ids_is_a_group_of_its_own(name: str, value: Any) -> None:
    cells = cells_of(0.30, 0.31)
    cells[(1,)][0]["config"]["data"][name] = value
    assert find_best(cells, ["segm/AP"]).num_tests == 0


def test_sizes_at_test_time_are_meant_to_be_compared() -> None:
    cells = cells_of(0.30, 0.31)
    cells[(1,)][0]["config"]["data"]["shortest_edge_test"] = 32
    assert find_best(cells, ["segm/AP"]).cells == {("segm/AP", (1,))}


def test_seeds_are_paired_and_count() -> None:
    def runs(place: int, aps: tuple[float, ...]) -> list[Any]:
        return [
            with_error(make_record(place, seed=seed, ap=ap), 0.01, np.random.default_rng(place).normal(ap, 1e-4, B))
            for seed, ap in enumerate(aps)
        ]

    # The trainings differ by 3 points each time, or by anything between -1 and 7.
    alike = {(0,): runs(0, (0.30, 0.40, 0.35)), (1,): runs(1, (0.33, 0.43, 0.38))}
    assert find_best(alike, ["segm/AP"]).cells == {("segm/AP", (1,))}
    unlike = {(0,): runs(0, (0.30, 0.40, 0.35)), (1,): runs(1, (0.37, 0.39, 0.38))}
    assert find_best(unlike, ["segm/AP"]).cells == frozenset()
    # One of them has lost a seed: they are no longer paired.
    assert find_best({**alike, (1,): alike[(1,)][:2]}, ["segm/AP"]).num_tests == 0


def test_all_tests_of_a_table_are_decided_together() -> None:
    def p_near_three_percent(**changes: Any) -> dict[tuple[Any, ...], list[Any]]:
        # 2.17 standard errors apart.
        generator = np.random.default_rng(3)
        draws = generator.normal(0, 1, B)
        draws = (draws - draws.mean()) / draws.std(ddof=1) * 0.01
        return {
            (place,): [with_error(make_record(place, ap=ap), 0.05, ap + place * draws, **changes)]
            for place, ap in enumerate((0.3, 0.3217))
        }

    alone = p_near_three_percent()
    assert find_best(alone, ["segm/AP"]).cells
    both = {("a", *key): value for key, value in alone.items()}
    both |= {("b", *key): value for key, value in p_near_three_percent(images="b").items()}
    found = find_best(both, ["segm/AP"])
    assert (found.cells, found.num_tests) == (frozenset(), 2)


@pytest.mark.parametrize("num_cells", [2, 6])
def test_equals_are_seldom_bold(num_cells: int) -> None:
    """A/A: cells of equal skill, whose AP differs by what the resamples say; at most 5 % may have a best one."""
    alarms, num_trials = 0, 400
    for trial in range(num_trials):
        generator = np.random.default_rng([trial, num_cells])
        aps = (0.3 + generator.normal(0, 0.002, num_cells)).tolist()
        alarms += bool(find_best(cells_of(*aps, seed=trial), ["segm/AP"]).cells)
    assert alarms / num_trials <= 0.072  # 5 %, and two standard errors of 400 trials
