from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.stats.student import combine, two_sided_p, two_sided_quantile


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    # Printed tables, two-sided 5 %.
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (100, 1.9840), (math.inf, 1.9600)],
)
def test_quantiles_of_printed_tables(degrees: float, quantile: float) -> None:
    assert two_sided_quantile(0.05, degrees) == pytest.approx(quantile, abs=6e-5)
    assert two_sided_p(quantile, degrees) == pytest.approx(0.05, abs=2e-5)


def test_one_degree_of_freedom_is_cauchy() -> None:
    assert two_sided_p(1.0, 1) == pytest.approx(0.5)
    assert two_sided_p(math.sqrt(3), 1) == pytest.approx(1 / 3)


def test_fractions_are_rounded_down() -> None:
    assert two_sided_p(2.0, 4.9) == two_sided_p(2.0, 4)
    assert two_sided_p(2.0, 0.5) == two_sided_p(2.0, 1)


@given(st.floats(0, 50), st.integers(1, 400))
def test_a_chance_that_falls_with_t_and_is_even(t: float, degrees: int) -> None:
    assert 0 <= two_sided_p(t + 0.1, degrees) <= two_sided_p(t, degrees) + 1e-14 <= 1 + 2e-14
    assert two_sided_p(-t, degrees) == two_sided_p(t, degrees)


def test_combine_by_hand() -> None:
    # (1 + 3)^2 / (1 / 2 + 9 / 6) = 8
    error, degrees = combine([(1.0, 2), (3.0, 6)])
    assert error == pytest.approx(2.0)
    assert degrees == pytest.approx(8.0)
    assert combine([(4.0, math.inf), (0.0, 1)]) == (2.0, math.inf)
    assert combine([]) == (0.0, math.inf)
