"""Known answers of the rules that merge increments, against dense float64 matrices multiplied out.

Scalings are those of plain and of rank-stabilised LoRA, which differ from client to client.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    assert_near,
    dense,
    dense_mean,
    nearest_of_rank,
    normal,
    random_factors,
    same_bits,
)
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter import Adapter, ClientResult, ClientState, Factors, Merged, lora_scaling
from fedlora.lowrank import truncate
from fedlora.policy import Policy, Receiver
from fedlora.rules import Plan, get_rule
from fedlora.simulation import Round, simulate

ALPHA = 16.0
both_scalings = pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])


def drawn(
    seed: int,
    ranks: Sequence[int] = (3, 3, 3),
    shape: tuple[int, int] = (9, 7),
    scalings: Sequence[float] | None = None,
) -> tuple[list[Factors], Tensor]:
    """Clients with scalings of their own, and unequal weights."""
    chosen = scalings or [(2.0, 0.5, 4.0, 1.0)[k % 4] for k in range(len(ranks))]
    clients = [
        random_factors(seed + 100 * k, *shape, r, s)
        for k, (r, s) in enumerate(zip(ranks, chosen, strict=True))
    ]
    weights = torch.rand(len(ranks), generator=torch.Generator().manual_seed(seed)).double() + 0.1
    return clients, weights / weights.sum()


def spectrum(matrix: Tensor) -> Tensor:
    return torch.from_numpy(np.linalg.svd(matrix.numpy(), compute_uv=False))


def merged(name: str, prev: Factors, clients: list[Factors], weights: Tensor, **options: object):
    return get_rule(name, **options)(prev, clients, weights)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what averaging factors misses


def test_fedavgs_error_is_the_weighted_covariance_of_the_factors() -> None:
    """sum w_k (B_k - Bbar)(A_k - Abar) = sum_(i<j) w_i w_j (B_i - B_j)(A_i - A_j)."""
    for seed in range(10):
        clients, w = drawn(seed, (3, 3, 3, 3))
        missed = dense_mean(clients, w) - dense(merged("fedavg", clients[0], clients, w))
        A, B = [c.A for c in clients], [c.scaling * c.B for c in clients]
        mean_A = sum(x * a for x, a in zip(w, A, strict=True))
        mean_B = sum(x * b for x, b in zip(w, B, strict=True))
        around = sum(w[k] * (B[k] - mean_B) @ (A[k] - mean_A) for k in range(4))
        pairs = sum(w[i] * w[j] * (B[i] - B[j]) @ (A[i] - A[j]) for j in range(4) for i in range(j))
        assert_near(missed, around)
        assert_near(missed, pairs)


def test_fras_error_is_the_singular_tail_and_never_above_fedavgs() -> None:
    for seed in range(100):
        clients, w = drawn(seed)
        mean, prev = dense_mean(clients, w), random_factors(seed, 9, 7, 3)
        fra = float((mean - dense(merged("fra", prev, clients, w))).norm())
        fedavg = float((mean - dense(merged("fedavg", prev, clients, w))).norm())
        assert fra == pytest.approx(float(spectrum(mean)[3:].norm()), rel=1e-9)
        assert fra <= fedavg


@both_scalings
@pytest.mark.parametrize("ranks", [(2, 4, 8), (8, 1, 1), (3, 3, 5)])
def test_fra_with_mixed_ranks_is_the_dense_svd_of_the_mean_increment(
    ranks: tuple[int, ...], rslora: bool
) -> None:
    """FlexLoRA: each client's own alpha / r or alpha / sqrt(r), the server's for the result."""
    clients, w = drawn(1, ranks, (14, 11), [lora_scaling(ALPHA, r, rslora) for r in ranks])
    prev = random_factors(2, 14, 11, 8, lora_scaling(ALPHA, 8, rslora))
    result = merged("fra", prev, clients, w)
    want = sum(
        x * ALPHA / (math.sqrt(c.rank) if rslora else c.rank) * c.B @ c.A
        for x, c in zip(w, clients, strict=True)
    )
    assert_near(dense(result), nearest_of_rank(want, 8))
    lengths = spectrum(want)[:8] / prev.scaling  # the balanced gauge, in the server's scaling
    assert_close(result.B.norm(dim=0).square(), lengths)
    assert_close(result.A.norm(dim=1).square(), lengths)


# ---------------------------------------------------------------- exact rules: what is folded


@pytest.mark.parametrize("scalings", [(2.0,) * 4, (2.0, 0.5, 4.0, 1.0)], ids=["equal", "unequal"])
def test_fedex_is_fedavg_with_a_residual_of_rank_k_minus_1_times_r(
    scalings: tuple[float, ...],
) -> None:
    clients, w = drawn(0, (3,) * 4, (30, 20), scalings)
    prev = random_factors(5, 30, 20, 3)
    answer = merged("fedex", prev, clients, w)
    assert same_bits(answer.factors, merged("fedavg", prev, clients, w))
    missed = dense_mean(clients, w) - dense(answer.factors)
    assert_near(dense(answer.residual), missed)
    assert int(torch.linalg.matrix_rank(missed)) == 9


@both_scalings
def test_flora_keeps_a_and_leaves_the_weighted_stack_to_be_folded(rslora: bool) -> None:
    ranks = (1, 4, 2)
    clients, w = drawn(3, ranks, scalings=[lora_scaling(ALPHA, r, rslora) for r in ranks])
    prev = random_factors(4, 9, 7, 3, 0.5)
    answer = merged("flora", prev, clients, w)
    assert torch.equal(answer.factors.A, prev.A)
    assert torch.equal(answer.factors.B, torch.zeros(9, 3, dtype=torch.float64))
    assert torch.equal(answer.residual.A, torch.cat([c.A for c in clients]))
    columns = [x * c.scaling * c.B for x, c in zip(w, clients, strict=True)]
    assert_close(answer.residual.scaling * answer.residual.B, torch.cat(columns, dim=1))


def holding(sigma: Tensor, tau: float) -> int:
    """The fewest singular values whose squares hold the share tau, counted one by one."""
    squares = sigma.square().tolist()
    return next(p for p in range(1, 99) if sum(squares[:p]) >= tau * sum(squares))


@pytest.mark.parametrize("tau", [0.3, 0.8, 0.9, 0.97, 0.999])
def test_fedmomentum_keeps_rank_r_and_then_just_enough_for_the_energy(tau: float) -> None:
    for seed in range(5):
        clients, w = drawn(seed, (2, 3, 1), (12, 9))
        mean = dense_mean(clients, w)
        answer = merged("fedmomentum", random_factors(7, 12, 9, 2), clients, w, tau=tau)
        both = max(2, holding(spectrum(mean), tau))
        assert answer.residual.rank == both - 2
        assert_near(dense(answer.factors), nearest_of_rank(mean, 2))
        assert_near(dense(answer.factors) + dense(answer.residual), nearest_of_rank(mean, both))


def test_fedmomentum_with_all_the_energy_is_exact_over_twelve_decades() -> None:
    clients, w = drawn(0, (2, 3, 2), (12, 9))
    wide = [
        Factors(c.A, c.B * 10.0 ** -torch.arange(0, 12, 12 / c.rank), c.scaling) for c in clients
    ]
    answer = merged("fedmomentum", random_factors(7, 12, 9, 2), wide, w)
    assert_near(dense(answer.factors) + dense(answer.residual), dense_mean(wide, w))


@pytest.mark.parametrize("tau", [0.3, 0.8, 0.97, 1.0])
def test_florist_sends_the_fewest_directions_that_hold_the_energy(tau: float) -> None:
    for seed in range(5):
        clients, w = drawn(seed, (2, 3, 1), (12, 9))
        mean, prev = dense_mean(clients, w), random_factors(7, 12, 9, 2)
        answer = merged("florist", prev, clients, w, tau=tau)
        fewest = 6 if tau == 1.0 else holding(spectrum(mean), tau)
        assert answer.residual.rank == fewest
        assert_near(dense(answer.residual), nearest_of_rank(mean, fewest))
        assert torch.equal(answer.factors.A, prev.A)
        assert not bool(answer.factors.B.any())


@pytest.mark.parametrize("name", ["fedmomentum", "florist"])
@pytest.mark.parametrize("tau", [0.0, -0.1, 1.1])
def test_a_share_of_energy_outside_0_to_1_is_refused(name: str, tau: float) -> None:
    clients, w = drawn(0)
    with pytest.raises(ValueError, match=rf"share of energy must be above 0 .* got {tau}"):
        merged(name, random_factors(7, 9, 7), clients, w, tau=tau)


# ---------------------------------------------------------------- fedsvd


@pytest.mark.parametrize("live", [0, 1, 2, 4])
def test_fedsvds_a_is_orthonormal_whatever_the_rank_of_what_was_learned(live: int) -> None:
    prev = random_factors(0, 9, 7, 4, 2.0)
    low = normal(1, live, 4)
    clients = [Factors(prev.A, normal(k, 9, live) @ low, s) for k, s in ((2, 2.0), (3, 0.5))]
    w = torch.tensor([0.3, 0.7], dtype=torch.float64)
    result = merged("fedsvd", prev, clients, w)
    assert float((result.A @ result.A.mT - torch.eye(4).double()).abs().max()) < 1e-12
    assert_near(dense(result), dense_mean(clients, w))
    assert_close(result.scaling * result.B.norm(dim=0), spectrum(dense_mean(clients, w))[:4])
    gone = prev.A - prev.A @ result.A.mT @ result.A  # nothing of the old row space is lost
    assert float(gone.norm()) < 1e-12 * float(prev.A.norm())


# ---------------------------------------------------------------- raflora


def by_rows(clients: Sequence[Factors], weights: Tensor) -> Tensor:
    """Row by row: the mean of s_k b_i a_i over the clients that have row i, dense."""
    total = torch.zeros(clients[0].shape, dtype=torch.float64)
    for row in range(max(client.rank for client in clients)):
        have = [k for k, client in enumerate(clients) if client.rank > row]
        reach = sum(float(weights[k]) for k in have)
        for k in have:
            pair = clients[k].scaling * torch.outer(clients[k].B[:, row], clients[k].A[row])
            total += float(weights[k]) / reach * pair if reach else 0 * pair
    return total


@both_scalings
@pytest.mark.parametrize("weights", [(0.2, 0.5, 0.3), (0.0, 0.4, 0.6), (0.7, 0.3, 0.0)])
def test_raflora_averages_every_rank_row_over_the_clients_that_have_it(
    weights: tuple[float, ...], rslora: bool
) -> None:
    """Where a client has no weight, the rows that it alone reaches stay as they were."""
    ranks = (1, 2, 4)
    clients, _ = drawn(0, ranks, scalings=[lora_scaling(ALPHA, r, rslora) for r in ranks])
    w = torch.tensor(weights, dtype=torch.float64)
    prev = random_factors(5, 9, 7, 4, lora_scaling(ALPHA, 4, rslora))
    want = by_rows(clients, w)
    reached = max(rank for rank, weight in zip(ranks, weights, strict=True) if weight)
    kept = prev.scaling * prev.B[:, reached:] @ prev.A[reached:]
    assert_near(dense(merged("raflora", prev, clients, w)), nearest_of_rank(want + kept, 4))
    narrow = replace(prev, A=prev.A[:2], B=prev.B[:, :2])
    assert_near(dense(merged("raflora", narrow, clients, w)), nearest_of_rank(want, 2))


def test_raflora_with_equal_ranks_is_fra() -> None:
    for seed in range(5):
        clients, w = drawn(seed)
        prev = random_factors(seed, 9, 7)
        assert_near(
            dense(merged("raflora", prev, clients, w)), dense(merged("fra", prev, clients, w))
        )


def echo(
    client: str, round: int, plan: Plan, sent: Adapter, state: ClientState
) -> ClientResult:  # fmt: skip
    """A client that learns nothing returns what it was sent."""
    return ClientResult(client, sent, 10)


@both_scalings
def test_raflora_keeps_the_energy_beyond_the_smallest_rank_that_fra_loses(rslora: bool) -> None:
    """Ranks 2, 4, 8, 16 over ten rounds: with plain weights pair i counts reach_i^10 of itself."""
    ranks = {"a": 2, "b": 4, "c": 8, "d": 16}
    first = truncate(random_factors(0, 40, 30, 20, lora_scaling(ALPHA, 16, rslora)), 16)
    start = Adapter({"x": replace(first, A=first.A.float(), B=first.B.float())})
    sigma = spectrum(dense(start.layers["x"]))[:16]
    reach = torch.tensor([sum(r > i for r in ranks.values()) / 4 for i in range(16)]).double()
    receivers = {c: Receiver(r, lora_scaling(ALPHA, r, rslora)) for c, r in ranks.items() if r < 16}

    def last(name: str) -> Round:
        policy = Policy(receivers=receivers)
        rounds = simulate(get_rule(name), echo, start, list(ranks), rounds=10, policy=policy)
        return list(rounds)[-1]

    def beyond(values: Tensor) -> float:
        return float(values[2:].square().sum() / values.square().sum())

    kept = spectrum(dense(last("raflora").state.adapter.layers["x"]))[:16]
    lost = spectrum(dense(last("fra").state.adapter.layers["x"]))[:16]
    # ten rounds of float32; fra's smallest values end at 1e-6 of the largest
    assert_close(kept, sigma, rtol=1e-5, atol=0)
    assert_close(lost, sigma * reach**10, rtol=1e-5, atol=1e-6 * float(sigma[0]))
    assert beyond(kept) > 0.6
    assert beyond(lost) < 0.01


def test_merged_answers_are_told_from_bare_factors() -> None:
    clients, w = drawn(0)
    names = ("fedex", "flora", "fedmomentum", "florist", "fra", "raflora", "fedavg")
    kinds = {name: merged(name, random_factors(1, 9, 7), clients, w) for name in names}
    assert [isinstance(kinds[name], Merged) for name in names] == [True] * 4 + [False] * 3
