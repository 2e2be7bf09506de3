"""LoRA-FAIR, FLoRA-NA and FedRPCA, which fit: least squares, brute force, planted parts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from clients import SCALINGS, SHAPE, around, missed, written
from conftest import assert_near, dense, dense_mean, normal, random_factors, same_bits
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter import Factors
from fedlora.rules import get_rule
from fedlora.rules.fedrpca import common_part
from fedlora.rules.florana import _cross, _products

# ---------------------------------------------------------------- lorafair


@pytest.mark.parametrize("ridge", [0.0, 0.01, 2.0])
def test_lorafairs_correction_is_the_ridge_least_squares_solution(ridge: float) -> None:
    """lstsq of [A^T; sqrt(ridge) I] dB^T = [(mean - Bbar Abar)^T; 0], dense."""
    for seed in range(5):
        clients, w = around(seed)
        prev = random_factors(seed, *SHAPE, 3, 0.5)
        mean = get_rule("fedavg")(prev, clients, w)
        target = dense_mean(clients, w) / 0.5 - mean.B @ mean.A
        left = torch.cat([mean.A.mT, math.sqrt(ridge) * torch.eye(3).double()])
        right = torch.cat([target.mT, torch.zeros(3, SHAPE[0]).double()])
        correction = torch.linalg.lstsq(left, right, driver="gelsd").solution.mT
        got = get_rule("lorafair", ridge=ridge)(prev, clients, w)
        assert_close(got.A, mean.A)
        assert_near(got.B, mean.B + correction, 1e-11)


def test_lorafair_without_a_ridge_projects_onto_the_rows_of_the_mean_a() -> None:
    """Also where those rows do not span r dimensions."""
    for seed in range(5):
        clients, w = around(seed)
        if seed > 2:
            clients = [replace(c, A=torch.cat([c.A[:2], c.A[:1]])) for c in clients]
        prev = random_factors(seed, *SHAPE, 3)
        got = get_rule("lorafair", ridge=0.0)(prev, clients, w)
        onto = torch.linalg.pinv(got.A, rtol=1e-10) @ got.A
        assert_near(dense(got), dense_mean(clients, w) @ onto, 1e-10)


def test_lorafair_never_errs_more_than_fedavg() -> None:
    for seed in range(50):
        clients, w = around(seed, spread=1.0 if seed % 2 else 0.01)
        prev = random_factors(seed, *SHAPE, 3)
        bar = missed("fedavg", prev, clients, w) * (1 + 1e-12)
        assert missed("lorafair", prev, clients, w, ridge=0.0) <= bar
        assert missed("lorafair", prev, clients, w) <= bar


def test_a_negative_ridge_is_refused() -> None:
    clients, w = around(0)
    with pytest.raises(ValueError, match=r"ridge -0\.5 is below 0"):
        get_rule("lorafair", ridge=-0.5)(random_factors(1, *SHAPE, 3), clients, w)


# ---------------------------------------------------------------- florana


def objective(clients: list[Factors], w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """||(sum b_k s_k B_k)(sum a_k A_k) - sum w_k s_k B_k A_k||_F^2, dense."""
    A = sum(x * c.A for x, c in zip(a, clients, strict=True))
    B = sum(x * c.scaling * c.B for x, c in zip(b, clients, strict=True))
    return (B @ A - dense_mean(clients, w)).square().sum()


def fitted(clients: list[Factors], w: Tensor, **options: int) -> tuple[Tensor, Tensor]:
    """The weights that florana's answer is made of, by least squares from its factors."""
    prev = random_factors(99, *SHAPE, clients[0].rank, 0.5)
    answer = get_rule("florana", **options)(prev, clients, w)
    stack_A = torch.stack([c.A.flatten() for c in clients], dim=1)
    stack_B = torch.stack([(c.scaling / 0.5 * c.B).flatten() for c in clients], dim=1)
    a = torch.linalg.lstsq(stack_A, answer.A.flatten()[:, None]).solution
    b = torch.linalg.lstsq(stack_B, answer.B.flatten()[:, None]).solution
    assert_near(stack_A @ a, answer.A.flatten()[:, None])  # in the span, or it is no such sum
    assert_near(stack_B @ b, answer.B.flatten()[:, None])
    return a[:, 0], b[:, 0]


@pytest.mark.parametrize(("k", "n"), [(3, 11), (8, 5)])
def test_floranas_cross_products_are_the_dense_ones(k: int, n: int) -> None:
    """<B_i A_k, sum_j w_j B_j A_j>, with more inputs than clients and with fewer."""
    A, B = normal(1, k, 4, n), normal(2, k, 7, 4)
    w = torch.arange(1.0, k + 1).double() / k
    mean = torch.einsum("j,jmr,jrn->mn", w, B, A)
    want = torch.einsum("imr,krn,mn->ik", B, A, mean)
    assert_near(_cross(A, _products(A), _products(B.mT), w), want)


def test_florana_is_never_worse_than_fedavg() -> None:
    better = 0
    for seed in range(50):
        clients, w = around(seed, count=2 + seed % 3, spread=1.0 if seed % 2 else 0.1)
        prev = random_factors(seed, *SHAPE, 3)
        bar, got = missed("fedavg", prev, clients, w), missed("florana", prev, clients, w)
        assert got <= bar * (1 + 1e-12)
        better += got < 0.999 * bar
    assert better > 40


def test_floranas_weights_have_no_better_neighbour() -> None:
    for seed in range(10):
        clients, w = around(seed)
        a, b = fitted(clients, w, sweeps=500)
        norm, here = float(dense_mean(clients, w).norm()) ** 2, float(objective(clients, w, a, b))
        for trial in range(30):
            for size in (1e-1, 1e-2, 1e-3):
                beside = objective(
                    clients, w, a + size * normal(trial, 3), b + size * normal(trial + 500, 3)
                )
                assert float(beside) > here - 1e-7 * norm  # sweeps end where they gain 1e-12


def test_florana_with_two_clients_finds_what_brute_force_finds() -> None:
    """For every direction of a on a grid, the best b by dense least squares."""
    for seed in range(10):
        clients, w = around(seed, count=2, spread=0.3)
        target = dense_mean(clients, w).flatten()[:, None]
        best = math.inf
        for angle in torch.arange(0.0, math.pi, 0.005, dtype=torch.float64):
            A = angle.cos() * clients[0].A + angle.sin() * clients[1].A
            spans = torch.stack([(c.scaling * c.B @ A).flatten() for c in clients], dim=1)
            rest = target - spans @ torch.linalg.lstsq(spans, target).solution
            best = min(best, float(rest.square().sum()))
        a, b = fitted(clients, w, sweeps=500)
        got = float(objective(clients, w, a, b))
        assert best * 0.999 < got < best * (1 + 1e-9)  # between the grid's points, not beyond


# ---------------------------------------------------------------- fedrpca


def planted(seed: int, p: int, k: int, share: float = 0.04) -> tuple[Tensor, Tensor]:
    """A matrix of rank one, and a sparse one of like size."""
    low = normal(seed, p, 1) @ (1 + 0.3 * normal(seed + 1, 1, k))
    where = torch.rand(p, k, generator=torch.Generator().manual_seed(seed)) < share
    return low, 3.0 * normal(seed + 2, p, k) * where


def test_robust_pca_parts_a_planted_sum_into_its_terms() -> None:
    for seed in range(3):
        low, sparse = planted(seed, 200, 30)
        common = common_part(low + sparse)
        assert_near(common, low, 1e-6)
        assert_near(low + sparse - common, sparse, 1e-6)


def rpca_clients(count: int = 30) -> tuple[Factors, list[Factors], tuple[Tensor, ...]]:
    """Clients whose updates are planted, scalings of their own; and A's and B's two parts."""
    m, n, r = 60, 50, 4
    prev = random_factors(7, m, n, r, 0.5)
    parts = planted(0, r * n, count), planted(5, m * r, count)
    (low_A, sparse_A), (low_B, sparse_B) = parts
    clients = []
    for k in range(count):
        A = prev.A + (low_A + sparse_A)[:, k].reshape(r, n)
        B = prev.B + (low_B + sparse_B)[:, k].reshape(m, r)
        clients.append(written(Factors(A, B, 0.5), SCALINGS[k % 4]))
    return prev, clients, (low_A, sparse_A, low_B, sparse_B)


def test_fedrpca_counts_the_sparse_part_beta_times() -> None:
    prev, clients, (low_A, sparse_A, low_B, sparse_B) = rpca_clients()
    w = torch.arange(1.0, 31.0, dtype=torch.float64) / 465
    for beta in (0.0, 1.0, 2.0, 3.5):
        got = get_rule("fedrpca", beta=beta)(prev, clients, w)
        assert_near(got.A - prev.A, ((low_A + beta * sparse_A) @ w).reshape(4, 50), 1e-6)
        assert_near(got.B - prev.B, ((low_B + beta * sparse_B) @ w).reshape(60, 4), 1e-6)


def test_fedrpca_with_beta_1_is_fedavg() -> None:
    for clients, w in (around(0), around(1, count=4), around(2, count=1)):
        prev = random_factors(3, *SHAPE, 3, 0.5)
        got = get_rule("fedrpca", beta=1.0)(prev, clients, w)
        want = get_rule("fedavg")(prev, clients, w)
        assert_close(got.A, want.A)
        assert_close(got.B, want.B)


def test_fedrpca_of_clients_that_did_not_move_is_what_was_there() -> None:
    prev = random_factors(3, *SHAPE, 3, 0.5)
    got = get_rule("fedrpca")(prev, [prev] * 3, [0.2, 0.3, 0.5])
    assert same_bits(got, prev)


def test_fedrpca_of_one_client_moves_along_its_update_once_to_beta_times() -> None:
    """One column has rank one and is what it is: its sparse part is its largest entries."""
    prev, client = random_factors(3, *SHAPE, 3, 0.5), random_factors(4, *SHAPE, 3, 0.5)
    got = get_rule("fedrpca", beta=2.0)(prev, [client], [1.0])
    for part in ("A", "B"):
        step, own = (getattr(x, part) - getattr(prev, part) for x in (got, client))
        ratio = step / own
        assert bool(((ratio >= 1 - 1e-9) & (ratio <= 2 + 1e-9)).all())
