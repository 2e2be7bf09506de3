"""Statistics of a few seeds against closed forms, tables and cases by hand."""

import math

import numpy as np
import pytest

from fedlora.significance import (
    centred,
    estimate,
    hedges,
    holm,
    paired,
    rank_correlation,
    t_quantile,
)

pytest.importorskip("scipy")


@pytest.mark.parametrize(
    ("n", "want"), [(2, 12.7062), (3, 4.3027), (5, 2.7764), (10, 2.2622), (31, 2.0423)]
)
def test_the_quantiles_are_those_of_the_table_of_students_t(n, want):
    assert t_quantile(n) == pytest.approx(want, abs=5e-5)


def test_with_two_values_the_quantile_is_that_of_a_cauchy_distribution():
    assert t_quantile(2) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-12)


def test_a_mean_and_its_interval_by_hand():
    found = estimate([1.0, 2.0, math.nan, 6.0])  # mean 3, deviations -2, -1, 3: variance 14 / 2
    assert (found.n, found.mean) == (3, 3.0)
    assert found.sd == pytest.approx(math.sqrt(7), rel=1e-15)
    assert found.half == pytest.approx(4.302653 * math.sqrt(7 / 3), rel=1e-6)


def test_one_value_has_no_interval_and_none_no_mean():
    one, none = estimate([0.7]), estimate([math.nan])
    assert (one.n, one.mean) == (1, 0.7)
    assert math.isnan(one.half)
    assert math.isnan(one.sd)
    assert none.n == 0
    assert math.isnan(none.mean)


def test_a_paired_test_by_hand():
    """Differences 1, 2, 3: mean 2, deviation 1, t = 2 sqrt(3); with two degrees of freedom the
    two-sided p of t is 1 - t / sqrt(t^2 + 2) = 1 - sqrt(12 / 14).
    """
    found = paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found.n == 3
    assert found.difference.mean == 2.0
    assert found.t == pytest.approx(2 * math.sqrt(3), rel=1e-15)
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-12)
    assert found.d == pytest.approx(2.0, rel=1e-15)
    assert found.g == pytest.approx(
        2.0 / math.sqrt(math.pi), rel=1e-12
    )  # J(2) = Gamma(1)/Gamma(.5)


def test_a_paired_test_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    first, second = [0.81, 0.84, 0.79, 0.83, 0.86], [0.80, 0.82, 0.80, 0.81, 0.83]
    want = stats.ttest_rel(first, second)
    found = paired(first, second)
    assert found.t == pytest.approx(want.statistic, rel=1e-12)
    assert found.p == pytest.approx(want.pvalue, rel=1e-12)
    low, high = want.confidence_interval(0.95)
    assert found.difference.mean - found.difference.half == pytest.approx(low, rel=1e-12)
    assert found.difference.mean + found.difference.half == pytest.approx(high, rel=1e-12)


def test_pairs_that_differ_by_the_same_amount_carry_no_test():
    """0.3 - 0.2 and 0.8 - 0.7 differ by rounding alone: no t of 10^15."""
    found = paired([0.3, 0.8, 0.6], [0.2, 0.7, 0.5])
    assert found.difference.mean == pytest.approx(0.1)
    assert all(math.isnan(value) for value in (found.t, found.p, found.d, found.g))
    assert math.isnan(paired([0.3], [0.2]).p)
    with pytest.raises(ValueError, match="2 values and 1 of the baseline make no pairs"):
        paired([1.0, 2.0], [1.0])


def test_hedges_factors_are_those_of_the_table():
    """J of f degrees of freedom (Hedges 1981, table 1)."""
    for f, want in ((2, 0.5642), (4, 0.7979), (10, 0.9228), (50, 0.9849)):
        assert hedges(f + 1) == pytest.approx(want, abs=1e-4)
    assert math.isnan(hedges(2))


def test_holms_correction_by_hand():
    """0.01 x 4, 0.02 x 3, 0.03 x 2 raised to 0.06, 0.9 x 1; what is no test counts for nothing."""
    found = holm([0.03, 0.01, math.nan, 0.9, 0.02])
    assert [found[place] for place in (1, 4, 0, 3)] == pytest.approx([0.04, 0.06, 0.06, 0.9])
    assert math.isnan(found[2])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_values_are_centred_within_their_group():
    assert centred([1.0, 2.0, 3.0, 10.0], ["a", "a", "a", "b"]) == [-1.0, 0.0, 1.0, 0.0]


def test_rank_correlation_sees_order_alone():
    spearmanr = pytest.importorskip("scipy.stats").spearmanr
    rho, p = rank_correlation([1.0, 2.0, 3.0, 4.0], [1.0, 10.0, 100.0, 1000.0])
    assert rho == pytest.approx(1.0)
    assert p == pytest.approx(2 / 24)  # of the orders of four only this one and its reverse
    rho, _ = rank_correlation([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0])  # 1 - 6 * 4 / (4 * 15)
    assert rho == pytest.approx(0.6)
    tied = rank_correlation([1.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0])
    assert tied[0] == pytest.approx(spearmanr([1.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0])[0])
    assert tied[1] == pytest.approx(4 / 24)  # the two that are level may change places
    x, y = np.random.default_rng(5).normal(size=(2, 12))
    found = rank_correlation(x.tolist(), (x + y).tolist())
    assert found == pytest.approx(tuple(spearmanr(x, x + y)), abs=0.01)
    assert all(math.isnan(value) for value in rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))
    assert all(math.isnan(value) for value in rank_correlation([1.0, 2.0], [1.0, 2.0]))


def test_without_scipy_the_remedy_is_named(monkeypatch):
    def refuse(name, *rest):
        raise ImportError("No module named 'scipy'")

    monkeypatch.setattr("fedlora.significance.import_module", refuse)
    with pytest.raises(ImportError, match=r"pip install 'fedlora\[report\]'"):
        estimate([1.0, 2.0])
