from __future__ import annotations

from pathlib import Path

import pytest

from bench.errors import SuiteErrors
from bench.plan import build_plan
from bench.suite import load_suite
from bench.ties import ClaimTie

SUITE = """\
data: {dataset: shapes}
axes: {product: {sampling_steps: [1, 4], eval_seed: [0, 1]}}
"""


def load(tmp_path: Path, claims: str, *overrides: str):
    path = tmp_path / "s.yaml"
    path.write_text(SUITE + claims)
    return load_suite(path, overrides)


def test_a_tie_fits_the_cells_that_have_its_values(tmp_path: Path) -> None:
    suite = load(tmp_path, "claims:\n  - {claim: one, cell: {sampling_steps: 4}}\n  - {claim: two}\n")
    one, two = suite.claims
    assert (one.claim, one.cell, one.place.line) == ("one", {"sampling_steps": 4}, 4)
    assert [one.fits(cell.axes) for cell in suite.cells] == [False, False, True, True]
    assert two == ClaimTie("two", None)
    assert not any(two.fits(cell.axes) for cell in suite.cells)


def test_an_axis_may_be_dotted(tmp_path: Path) -> None:
    (tie,) = load(tmp_path, "claims: [{claim: one, cell: {sampler.sampling_steps: 1}}]").claims
    assert tie.cell == {"sampling_steps": 1}


def test_no_key_an_empty_list_and_ties_are_three_things(tmp_path: Path) -> None:
    assert load(tmp_path, "").claims is None
    assert load(tmp_path, "claims: []").claims == ()


def test_ties_change_no_id(tmp_path: Path) -> None:
    plain, tied = load(tmp_path, ""), load(tmp_path, "claims: [{claim: one, cell: {sampling_steps: 4}}]")
    assert build_plan(plain) == build_plan(tied)


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ("claims: 3", "s.yaml:3:9: claims: 3 is not allowed. Allowed: a list of mappings"),
        ("claims: [one]", "s.yaml:3:10: claims[0]: 'one' is not allowed. Allowed: a mapping with claim"),
        ("claims: [{cell: {sampling_steps: 1}}]", "s.yaml:3:10: claims[0]: needs claim, the id of a claim"),
        ("claims: [{claim: one, cel: {}}]", "claims[0].cel: unknown key. Allowed: claim, cell. Did you mean 'cell'?"),
        ("claims: [{claim: one, cell: {}}]", "claims[0].cell: {} is not allowed. Allowed: a mapping from axis"),
        (
            "claims: [{claim: one, cell: {sampling_step: 1}}]",
            "s.yaml:3:30: claims[0].cell.sampling_step: no axis. Allowed: sampling_steps, eval_seed, seed. "
            "Did you mean 'sampling_steps'?",
        ),
        (
            "claims: [{claim: one, cell: {sampling_steps: 2}}]",
            "claims[0].cell: {sampling_steps: 2} fits no cell of the suite",
        ),
        ("claims: [{claim: one}, {claim: one}]", "claims[1]: 'one' is tied to this cell already"),
    ],
)
def test_mistakes(tmp_path: Path, claims: str, message: str) -> None:
    with pytest.raises(SuiteErrors) as caught:
        load(tmp_path, claims)
    assert message in str(caught.value)
    assert str(caught.value).count("\n") == 0


def test_replaced_axes_may_leave_a_tie_without_a_cell(tmp_path: Path) -> None:
    suite = load(tmp_path, "claims: [{claim: one, cell: {sampling_steps: 4}}]", "sampling_steps=[1]")
    assert [suite.claims[0].fits(cell.axes) for cell in suite.cells] == [False, False]
