"""Truncation without the matrix, against NumPy's SVD of the dense float64 matrix."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import (
    assert_near,
    dense,
    dense_mean,
    nearest_of_rank,
    normal,
    orthogonal,
    random_factors,
    same_bits,
)
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter import Factors, frobenius, mean_factors, mix
from fedlora.lowrank import Gauge, Route, singular_values, split, truncate

ROUTES: tuple[Route, ...] = ("auto", "gram", "krylov", "exact", "qr", "dense")
GAUGES: tuple[Gauge, ...] = ("balanced", "orthonormal")
both_routes = pytest.mark.parametrize("route", ["gram", "qr"])
every_route = pytest.mark.parametrize("route", ROUTES)
every_gauge = pytest.mark.parametrize("gauge", GAUGES)
SHAPES = [(7, 5, 9), (5, 11, 4), (40, 30, 12), (30, 40, 60), (6, 64, 6)]  # m, n, R


def live(factors: Factors) -> int:
    """How many pairs carry something."""
    return int(((factors.B.norm(dim=0) > 0) & (factors.A.norm(dim=1) > 0)).sum())


def cancelling(size: float, m: int = 30, n: int = 20) -> tuple[Factors, Tensor]:
    """A sum of rank one beside terms `size` times larger that cancel to the last bit."""
    small, large = random_factors(1, m, n, 1, 1.0), random_factors(2, m, n, 3, 1.0)
    stacked = Factors(
        torch.cat([small.A, large.A, large.A]),
        torch.cat([small.B, size * large.B, -size * large.B], dim=1),
        1.0,
    )
    return stacked, dense(small)


@every_route
@every_gauge
@pytest.mark.parametrize(("m", "n", "R"), SHAPES)
def test_truncate_is_the_best_approximation_of_its_rank(
    m: int, n: int, R: int, gauge: Gauge, route: Route
) -> None:
    factors = random_factors(0, m, n, R, scaling=3.0)
    for rank in (1, 3, min(m, n)):
        result = truncate(factors, rank, gauge=gauge, route=route)
        want = nearest_of_rank(dense(factors), min(rank, R))
        assert (result.rank, result.shape, result.scaling) == (rank, (m, n), 3.0)
        assert result.A.dtype == result.B.dtype == torch.float64
        # gram leaves out what is below 1e-7 of the largest, krylov turns near ties by 1e-6
        assert_near(dense(result), want, 2e-6 if route == "krylov" else 1e-7)
        missed = float((dense(factors) - dense(result)).norm())
        best = float((dense(factors) - want).norm())
        assert missed <= best * (1 + 1e-12) + 1e-7 * float(want.norm())


@both_routes
def test_routes_agree_with_a_decaying_spectrum_to_twelve_digits(route: Route) -> None:
    decay = 2.0 ** -torch.arange(12.0, dtype=torch.float64)
    factors = Factors(orthogonal(0, 20)[:12], orthogonal(1, 30)[:, :12] * decay, 0.5)
    result = truncate(factors, 6, route=route)
    assert_near(dense(result), nearest_of_rank(dense(factors), 6), 1e-12)
    assert_close(singular_values(factors), 0.5 * decay)


def test_fras_error_is_the_singular_tail_and_never_above_fedavgs() -> None:
    """||E||^2 = sum of sigma_i^2 beyond r; averaging the factors misses at least as much."""
    for seed in range(20):
        clients = [random_factors(100 * seed + k, r=2, scaling=1.0) for k in range(3)]
        weights = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
        mean = dense_mean(clients, weights)
        sigma = np.linalg.svd(mean.numpy(), compute_uv=False)
        fra = float((mean - dense(truncate(mix(clients, weights, 1.0), 2))).norm())
        fedavg = float((mean - dense(mean_factors(clients, weights, 1.0))).norm())
        assert math.isclose(fra, float(np.sqrt((sigma[2:] ** 2).sum())), rel_tol=1e-9)
        assert fra <= fedavg


@every_route
@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1e15])
def test_scales_between_1e18_and_1e15_do_no_harm(scale: float, route: Route) -> None:
    factors = random_factors(0, 12, 9, 6)
    for scaled in (
        Factors(factors.A, factors.B * scale, factors.scaling),
        Factors(factors.A * scale, factors.B, factors.scaling),
        Factors(factors.A / scale, factors.B * scale, factors.scaling),
    ):
        want = nearest_of_rank(dense(scaled), 3)
        assert_near(dense(truncate(scaled, 3, route=route)), want, 1e-11)


@every_route
def test_rows_of_very_different_size_do_no_harm_beside_each_other(route: Route) -> None:
    factors = random_factors(0, 12, 9, 4)
    sizes = torch.tensor([1e15, 1.0, 1e-18, 1e-9], dtype=torch.float64)
    skewed = Factors(factors.A * sizes[:, None], factors.B / sizes, factors.scaling)
    assert_near(dense(truncate(skewed, 2, route=route)), nearest_of_rank(dense(factors), 2), 1e-11)


@every_route
def test_duplicated_clients_give_the_rank_of_one(route: Route) -> None:
    client = random_factors(0, 12, 9, 2)
    mixed = mix([client] * 5, [0.2] * 5, 2.0)
    result = truncate(mixed, 4, route=route)
    assert_near(dense(result), dense(client), 1e-12)
    assert live(result) == 2


@every_route
@every_gauge
def test_a_zero_increment_has_rank_zero_and_takes_the_previous_a(
    route: Route, gauge: Gauge
) -> None:
    """B = 0 is every first round: no directions of noise, and A can train."""
    previous = random_factors(3)
    for factors in (
        Factors(normal(0, 6, 5), torch.zeros(7, 6).double(), 2.0),
        Factors(torch.zeros(6, 5).double(), normal(0, 7, 6), 2.0),
    ):
        result = truncate(factors, 3, previous=previous, gauge=gauge, route=route)
        if gauge == "orthonormal":  # the same rows span it, of length one and at right angles
            assert_close(result.A @ result.A.mT, torch.eye(3).double())
            assert int(torch.linalg.matrix_rank(torch.cat([result.A, previous.A]))) == 3
        else:
            assert_close(result.A, previous.A)
        assert not bool(result.B.any())
        assert live(truncate(factors, 3, gauge=gauge, route=route)) == 0


@pytest.mark.parametrize("size", [1e2, 1e3, 1e4, 1e5, 1e6, 1e8])
def test_cancellation_leaves_the_sum_and_no_direction_of_noise(size: float) -> None:
    """A noisy pair is worse than an empty one: it takes the place of a row that could train."""
    stacked, want = cancelling(size)
    previous = random_factors(9, 30, 20, 4)
    result = truncate(stacked, 4, previous=previous)
    assert_near(dense(result), want, 1e-15 * size * 10)
    assert live(result) == 1
    assert float(result.A.norm(dim=1).min()) > 0.1


def test_a_total_cancellation_has_rank_zero() -> None:
    client = random_factors(0, 30, 20, 4)
    gone = mix([client, client], [1e8, -1e8], 2.0)
    assert live(truncate(gone, 4)) == 0
    assert live(truncate(mix([client] * 3, [0.1, 0.2, -0.3], 2.0), 4)) == 0
    assert split(gone, 4).residual.rank == 0


@pytest.mark.parametrize("size", [1.0, 1e4, 1e8])
def test_the_qr_route_keeps_its_digits_under_cancellation(size: float) -> None:
    stacked, want = cancelling(size)
    assert_near(dense(truncate(stacked, 2, route="qr")), want, 1e-15 * size * 10)


@every_route
@every_gauge
def test_missing_rows_come_from_the_previous_a_orthogonal_to_the_new_ones(
    route: Route, gauge: Gauge
) -> None:
    factors = random_factors(0, 12, 9, 2)
    previous = random_factors(1, 12, 9, 5)
    result = truncate(factors, 5, gauge=gauge, previous=previous, route=route)
    new, filled = result.A[:2], result.A[2:]
    assert_near(dense(result), dense(factors), 1e-12)
    assert not bool(result.B[:, 2:].any())
    assert float((filled @ new.mT).abs().max()) < 1e-12
    assert int(torch.linalg.matrix_rank(result.A)) == 5
    both = torch.cat([new, previous.A])
    assert int(torch.linalg.matrix_rank(torch.cat([both, filled]))) == 7, "not of the previous A"


def test_the_previous_a_fills_rows_where_all_clients_share_its_row_space() -> None:
    """With A frozen, increments live in the rows of the previous A: the others must remain."""
    previous = random_factors(0, 12, 9, 4)
    low = normal(1, 12, 2) @ normal(2, 2, 4)
    result = truncate(Factors(previous.A, low, 2.0), 4, previous=previous)
    assert live(result) == 2
    assert int(torch.linalg.matrix_rank(result.A)) == 4


def test_no_row_of_a_is_dead_where_the_rank_grows_beyond_the_previous_one() -> None:
    """Every pair of a wider adapter must be able to train: B is zero, so A must not be."""
    zero = Factors(normal(0, 3, 9), torch.zeros(12, 3).double(), 2.0)
    result = truncate(zero, 5, previous=Factors(zero.A, zero.B, 2.0))
    assert float(result.A.norm(dim=1).min()) > 0


def test_the_balanced_gauge_puts_the_root_of_s_on_both_factors() -> None:
    """A A^T = B^T B = S / scaling: the same length on both sides of every pair."""
    factors = random_factors(0, 12, 9, 6, scaling=4.0)
    result = truncate(factors, 3)
    lengths = torch.from_numpy(np.linalg.svd(dense(factors).numpy(), compute_uv=False)[:3] / 4.0)
    assert_close(result.A @ result.A.mT, torch.diag(lengths))
    assert_close(result.B.mT @ result.B, torch.diag(lengths))


@every_route
def test_the_orthonormal_gauge_has_orthonormal_rows_in_a_and_s_on_b(route: Route) -> None:
    factors = random_factors(0, 12, 9, 6, scaling=4.0)
    result = truncate(factors, 3, gauge="orthonormal", route=route)
    sigma = torch.from_numpy(np.linalg.svd(dense(factors).numpy(), compute_uv=False)[:3])
    assert_close(result.A @ result.A.mT, torch.eye(3).double())
    assert_close(result.B.mT @ result.B, torch.diag((sigma / 4.0) ** 2))


def test_the_orthonormal_gauge_is_orthonormal_to_1e13_on_a_spectrum_of_six_decades() -> None:
    spectrum = 10.0 ** -torch.arange(7.0, dtype=torch.float64)
    factors = Factors(orthogonal(0, 20)[:7], orthogonal(1, 30)[:, :7] * spectrum, 2.0)
    A = truncate(factors, 7, gauge="orthonormal").A
    assert float((A @ A.mT - torch.eye(7).double()).abs().max()) < 1e-13


@every_route
@every_gauge
def test_signs_are_fixed_so_that_the_result_depends_on_the_increment_alone(
    route: Route, gauge: Gauge
) -> None:
    """The largest entry of each left vector is positive, whatever the factors it came from."""
    factors = random_factors(0, 12, 9, 3)
    turn = normal(5, 3, 3)
    other = Factors(torch.linalg.solve(turn, factors.A), factors.B @ turn, factors.scaling)
    left = truncate(factors, 3, gauge=gauge, route=route)
    right = truncate(other, 3, gauge=gauge, route=route)
    assert_close(left.A, right.A)
    assert_close(left.B, right.B)
    largest = left.B.gather(0, left.B.abs().argmax(dim=0)[None])
    assert bool((largest > 0).all())
    assert_close(truncate(Factors(-factors.A, factors.B, 2.0), 3).B.abs(),
                 truncate(factors, 3).B.abs())  # fmt: skip


@every_gauge
@pytest.mark.parametrize(("m", "n", "R"), SHAPES)
def test_split_gives_the_best_part_and_the_tail_which_add_up_to_everything(
    m: int, n: int, R: int, gauge: Gauge
) -> None:
    factors = random_factors(0, m, n, R, scaling=3.0)
    merged = split(factors, 3, gauge=gauge)
    assert_near(dense(merged.factors), nearest_of_rank(dense(factors), 3), 1e-12)
    assert_near(dense(merged.factors) + dense(merged.residual), dense(factors), 1e-13)
    assert merged.residual.rank == min(m, n, R) - 3
    assert float((dense(merged.factors).mT @ dense(merged.residual)).norm()) < 1e-9


def test_split_of_what_fits_leaves_no_residual_and_fills_the_rows() -> None:
    factors, previous = random_factors(0, r=2), random_factors(1, r=3)
    merged = split(factors, 3, previous=previous)
    assert (merged.factors.rank, merged.residual.rank) == (3, 0)
    assert frobenius(merged.residual) == 0.0
    assert int(torch.linalg.matrix_rank(merged.factors.A)) == 3


def test_a_tiny_residual_is_right_where_subtracting_would_leave_noise() -> None:
    """At a spread of 1e-10 the tail keeps its digits; mix minus result would not."""
    common = random_factors(0, 12, 9, 2, 1.0)
    close = [
        Factors(common.A + 1e-10 * normal(k, 2, 9), common.B + 1e-10 * normal(9 + k, 12, 2), 1.0)
        for k in (1, 2, 3)
    ]
    mixed = mix(close, [1 / 3] * 3, 1.0)
    residual = split(mixed, 2).residual
    scaled = [float(s) for s in singular_values(mixed)[2:]]
    assert frobenius(residual) == pytest.approx(math.hypot(*scaled), rel=1e-6)
    assert frobenius(residual) < 1e-15 * 100


def test_inputs_of_lower_precision_are_summed_in_float64() -> None:
    single = Factors(
        normal(0, 6, 9, dtype=torch.float32), normal(1, 12, 6, dtype=torch.float32), 2.0
    )
    assert_near(dense(truncate(single, 3)), nearest_of_rank(dense(single), 3), 1e-11)
    sigma = singular_values(single)
    want = torch.from_numpy(np.linalg.svd(dense(single).numpy(), compute_uv=False)[:6])
    assert_close(sigma.double(), want)


@pytest.mark.parametrize("route", ROUTES)
def test_arguments_come_back_unchanged_and_two_runs_agree_to_the_bit(route: Route) -> None:
    factors, previous = random_factors(0), random_factors(1)
    kept = [random_factors(0), random_factors(1)]
    first = truncate(factors, 3, previous=previous, route=route)
    assert same_bits(first, truncate(factors, 3, previous=previous, route=route))
    assert same_bits(factors, kept[0])
    assert same_bits(previous, kept[1])


@pytest.mark.parametrize("rank", [0, -1, 6])
def test_a_rank_outside_the_layer_is_refused_with_its_bounds(rank: int) -> None:
    for cut in (truncate, split):
        with pytest.raises(ValueError, match=rf"rank {rank} is outside 1\.\.5 .* 7 x 5"):
            cut(random_factors(0), rank)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["A", "B"])
def test_nan_and_inf_are_refused(bad: float, side: str) -> None:
    good = random_factors(0)
    getattr(good, side)[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        truncate(good, 2)
    with pytest.raises(ValueError, match="NaN or Inf"):
        split(good, 2)
