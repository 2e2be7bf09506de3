"""Laws of what is made of a decomposition: gauges, alignment, compression, shares of energy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import assert_near, dense, nearest_of_rank, normal, orthogonal, random_factors
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter import Factors, rescaled
from fedlora.lowrank import align, compress, rank_for_energy, rotation, singular_values, split
from fedlora.lowrank import truncate as cut

M, N, R = 12, 9, 4


def falling(scaling: float = 2.0) -> Factors:
    """Singular values 8, 4, 2, 1 (with the scaling), on a non-square layer."""
    S = 2.0 ** torch.tensor([3, 2, 1, 0], dtype=torch.float64) / scaling
    return Factors(orthogonal(0, N)[:R], orthogonal(1, M)[:, :R] * S, scaling)


def distance(factors: Factors, reference: Factors) -> float:
    """Between the factors themselves, once both are written with one scaling."""
    near = rescaled(reference, factors.scaling)
    return math.hypot(float((factors.A - near.A).norm()), float((factors.B - near.B).norm()))


def turned(factors: Factors, Q: Tensor) -> Factors:
    return Factors(Q.mT @ factors.A, factors.B @ Q, factors.scaling)


# ---------------------------------------------------------------- alignment


@pytest.mark.parametrize("scaling", [0.5, 2.0, 8.0])
def test_aligning_keeps_the_product_and_no_rotation_lies_nearer(scaling: float) -> None:
    factors, reference = random_factors(0, M, N, R), random_factors(1, M, N, R, scaling)
    aligned = align(factors, reference)
    assert_near(dense(aligned), dense(factors), 1e-14)
    best = distance(aligned, reference)
    for seed in range(200):
        step = torch.linalg.matrix_exp(0.1 * (S := normal(seed, R, R)) - 0.1 * S.mT)
        assert best <= distance(turned(factors, orthogonal(seed, R)), reference)
        assert best <= distance(turned(aligned, step), reference)


@pytest.mark.parametrize("scaling", [0.5, 2.0, 8.0])
def test_aligning_undoes_a_rotation_whatever_the_references_scaling(scaling: float) -> None:
    """B carries the ratio of scalings: only once it is taken out do both factors fit."""
    factors = random_factors(0, M, N, R)
    aligned = align(turned(factors, orthogonal(5, R)), rescaled(factors, scaling))
    assert_close(aligned.A, factors.A)
    assert_close(aligned.B, factors.B)


def test_aligning_different_ranks_is_refused_with_both() -> None:
    with pytest.raises(ValueError, match="rank 4 cannot be aligned with rank 3"):
        align(random_factors(0, M, N, 4), random_factors(1, M, N, 3))


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_the_rotation_is_orthogonal_at_any_scale_and_the_nearest(scale: float) -> None:
    matrix = normal(0, R, R)
    Q = rotation(matrix * scale)
    assert_close(Q.mT @ Q, torch.eye(R, dtype=torch.float64))
    for seed in range(100):
        assert float((Q * matrix).sum()) >= float((orthogonal(seed, R) * matrix).sum())


def test_without_a_preference_nothing_turns() -> None:
    assert torch.equal(rotation(torch.zeros(3, 3).double()), torch.eye(3).double())
    kept = random_factors(0, M, N, R)
    zero = Factors(torch.zeros(R, N).double(), torch.zeros(M, R).double(), 1.0)
    assert torch.equal(align(kept, zero).A, kept.A)


def test_the_aligned_gauge_is_the_balanced_one_turned_onto_the_previous_factors() -> None:
    factors, previous = random_factors(0, M, N, 7), random_factors(1, M, N, R, 8.0)
    result, balanced = cut(factors, R, gauge="aligned", previous=previous), cut(factors, R)
    assert_near(dense(result), dense(balanced), 1e-13)
    assert distance(result, previous) < distance(balanced, previous)
    assert_close(result.A, align(balanced, previous).A)
    assert_close(result.A @ result.A.mT, result.B.mT @ result.B)  # a turn keeps the balance


def test_the_aligned_gauge_finds_the_previous_factors_again() -> None:
    """A round that changes nothing hands back the very same pairs, so kept momentum fits."""
    previous = cut(random_factors(0, M, N, R), R)
    previous = turned(previous, orthogonal(7, R))
    result = cut(previous, R, gauge="aligned", previous=previous)
    assert_close(result.A, previous.A)
    assert_close(result.B, previous.B)


@pytest.mark.parametrize("previous", [None, random_factors(1, M, N, 2)])
def test_the_aligned_gauge_without_a_partner_of_its_rank_is_balanced(
    previous: Factors | None,
) -> None:
    factors = random_factors(0, M, N, 7)
    assert torch.equal(cut(factors, R, gauge="aligned", previous=previous).A, cut(factors, R).A)


def test_split_hands_out_the_aligned_part_and_leaves_the_tail_alone() -> None:
    factors, previous = random_factors(0, M, N, 7), random_factors(1, M, N, R)
    merged = split(factors, R, gauge="aligned", previous=previous)
    assert_near(dense(merged.factors), nearest_of_rank(dense(factors), R), 1e-12)
    assert_near(dense(merged.factors) + dense(merged.residual), dense(factors), 1e-13)


# ---------------------------------------------------------------- energy


@pytest.mark.parametrize(
    ("energy", "rank"),
    [
        (1e-9, 1),
        (64 / 85, 1),
        (64 / 85 + 1e-9, 2),
        (80 / 85, 2),
        (84 / 85, 3),
        (0.999, 4),
        (1.0, 4),
    ],
)
def test_the_fewest_directions_that_hold_the_share_of_energy(energy: float, rank: int) -> None:
    """Squares 64, 16, 4, 1 of 85; a share that is met exactly needs no further direction."""
    assert rank_for_energy(singular_values(falling()), energy) == rank
    for scale in (1e-170, 1e170):
        assert rank_for_energy(singular_values(falling()) * scale, energy) == rank


def test_no_directions_hold_the_energy_of_nothing() -> None:
    assert rank_for_energy(torch.zeros(0).double(), 0.9) == 0


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.1, math.nan])
def test_a_share_outside_zero_and_one_is_refused(energy: float) -> None:
    with pytest.raises(ValueError, match="a share of energy must be above 0 and at most 1"):
        rank_for_energy(torch.ones(3).double(), energy)
    for function in (lambda: split(falling(), 2, energy=energy),
                     lambda: compress(falling(), energy=energy)):  # fmt: skip
        with pytest.raises(ValueError, match="a share of energy"):
            function()


@pytest.mark.parametrize(("energy", "held"), [(0.5, 2), (0.95, 3), (0.999, 4), (1.0, 4)])
def test_splits_tail_ends_where_both_parts_hold_the_share(energy: float, held: int) -> None:
    merged = split(falling(), 2, energy=energy)
    assert merged.factors.rank == 2
    assert merged.residual.rank == held - 2
    whole = dense(merged.factors) + dense(merged.residual)
    assert_near(whole, nearest_of_rank(dense(falling()), held), 1e-13)


# ---------------------------------------------------------------- compression


@pytest.mark.parametrize("scaling", [0.5, 2.0])
def test_compressing_is_exact_in_as_few_pairs_as_there_are_directions(scaling: float) -> None:
    few = random_factors(0, M, N, 3, scaling)
    turn = normal(3, 3, 20)
    many = Factors(turn.mT @ few.A, few.B @ torch.linalg.pinv(turn).mT, scaling)
    merged = compress(many)
    assert (merged.factors.rank, merged.residual.rank) == (3, 0)
    assert merged.factors.scaling == scaling
    assert_near(dense(merged.factors), dense(few), 1e-13)
    assert_close(merged.factors.A @ merged.factors.A.mT, merged.factors.B.mT @ merged.factors.B)


def test_compressing_more_pairs_than_the_layer_has_directions_is_exact() -> None:
    many = random_factors(0, M, N, 50)
    merged = compress(many)
    assert merged.factors.rank == N
    assert_near(dense(merged.factors), dense(many), 1e-13)


@pytest.mark.parametrize(
    ("rank", "energy", "kept"),
    [(None, 0.95, 3), (2, 1.0, 2), (2, 0.999, 2), (4, 0.5, 1), (0, 1.0, 0)],
)
def test_compressing_cuts_at_the_rank_or_the_energy_and_gives_the_rest(
    rank: int | None, energy: float, kept: int
) -> None:
    merged = compress(falling(), rank, energy)
    assert merged.factors.rank == kept
    assert merged.residual.rank == R - kept
    assert_near(dense(merged.factors) + dense(merged.residual), dense(falling()), 1e-13)
    tail = np.linalg.svd(dense(merged.residual).numpy(), compute_uv=False)[: R - kept]
    assert_close(torch.from_numpy(tail.copy()), 2.0 ** torch.arange(R - kept - 1, -1, -1).double())


def test_compressing_nothing_gives_no_pairs() -> None:
    zero = Factors(normal(0, 4, N), torch.zeros(M, 4).double(), 2.0)
    merged = compress(zero)
    assert (merged.factors.rank, merged.residual.rank) == (0, 0)
    assert merged.factors.shape == (M, N)
