"""Clients of smaller rank: what they are sent, in their scaling, and how it is merged again."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from clients import EXAMPLES, NAMES, restless
from conftest import (
    assert_near,
    dense,
    dense_mean,
    nearest_of_rank,
    random_factors,
    same_adapters,
    same_bits,
)
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter import Adapter, ClientResult, Factors, byte_count, flatten, lora_scaling
from fedlora.policy import Policy, Receiver, cut_for
from fedlora.rules import get_rule
from fedlora.server import ServerState, aggregate
from fedlora.simulation import Round, simulate

SINGLE = 1e-6  # float32 at rest
ALPHA, RANKS = 8.0, {"a": 1, "b": 2, "c": 4}
both_scalings = pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])


def wide(rslora: bool = False) -> Adapter:
    """A global adapter of rank 4, its pairs in falling order, and a head."""
    s = lora_scaling(ALPHA, 4, rslora)
    layers = {}
    for seed, (name, m, n) in enumerate((("x", 9, 7), ("y", 6, 10))):
        first = random_factors(seed, m, n, 4, s)
        falling = 2.0 ** -torch.arange(4)
        layers[name] = Factors(first.A.float(), (first.B * falling).float(), s)
    return Adapter(layers, {"h": torch.zeros(3)})


def receivers(rslora: bool = False, *, keep_A: bool = False) -> dict[str, Receiver]:
    return {
        c: Receiver(r, lora_scaling(ALPHA, r, rslora), keep_A) for c, r in RANKS.items() if r < 4
    }


def mixed(rule: str, rslora: bool = False, rounds: int = 4, **settings: object) -> list[Round]:
    options = settings.pop("options", {})
    policy = Policy(receivers=receivers(rslora), **settings)  # type: ignore[arg-type]
    start = wide(rslora)
    return list(
        simulate(get_rule(rule, **options), restless, start, NAMES, rounds=rounds, policy=policy)  # type: ignore[arg-type]
    )


@both_scalings
@pytest.mark.parametrize("keep_A", [False, True])
def test_a_smaller_client_is_sent_the_first_pairs_of_the_same_increment(
    rslora: bool, keep_A: bool
) -> None:
    """s_k B' A' = s B[:, :r_k] A[:r_k], both factors sharing the change, or A as it was."""
    adapter = wide(rslora)
    for receiver in receivers(rslora, keep_A=keep_A).values():
        r = receiver.rank
        for name, got in cut_for(adapter, receiver).layers.items():
            full = adapter.layers[name]
            assert got.scaling == receiver.scaling
            want = full.scaling * full.B[:, :r].double() @ full.A[:r].double()
            assert_near(receiver.scaling * got.B.double() @ got.A.double(), want, SINGLE)
            if keep_A:
                assert torch.equal(got.A, full.A[:r])
            else:  # as balanced as it was
                lengths = got.B.norm(dim=0) / got.A.norm(dim=1)
                assert_close(lengths, (full.B.norm(dim=0) / full.A.norm(dim=1))[:r])
    assert cut_for(adapter, None) is adapter


@both_scalings
def test_a_federation_of_mixed_ranks_sends_cuts_and_counts_their_bytes(rslora: bool) -> None:
    before = wide(rslora)
    for round in mixed("fra", rslora):
        rows = sum(RANKS.values())
        assert round.bytes_up == round.bytes_down == 4 * (rows * (9 + 7 + 6 + 10) + 3 * 3)
        for result in round.results:
            rank = RANKS[result.client]
            sent = cut_for(before, receivers(rslora).get(result.client))
            for name, got in result.adapter.layers.items():
                assert (got.rank, got.scaling) == (rank, lora_scaling(ALPHA, rank, rslora))
                assert 0 < float((got.A - sent.layers[name].A).abs().max()) < 0.5  # one step on
        before = round.state.adapter
        assert all(factors.rank == 4 for factors in before.layers.values())


def folded(adapter: Adapter, name: str) -> Tensor:
    none = torch.zeros(adapter.layers[name].shape, dtype=torch.float64)
    return dense(adapter.frozen[name]) if name in adapter.frozen else none


def came_back(round: Round, name: str) -> tuple[list[Factors], list[float]]:
    shares = [result.examples / sum(EXAMPLES.values()) for result in round.results]
    return [result.adapter.layers[name] for result in round.results], shares


@both_scalings
def test_fra_merges_mixed_ranks_to_the_dense_svd_in_every_round(rslora: bool) -> None:
    for round in mixed("fra", rslora):
        for name, layer in round.state.adapter.layers.items():
            want = nearest_of_rank(dense_mean(*came_back(round, name)), 4)
            assert_near(dense(layer), want, SINGLE)


@both_scalings
@pytest.mark.parametrize("rule", ["flora", "fedmomentum", "florist"])
def test_folding_rules_are_exact_with_mixed_ranks(rule: str, rslora: bool) -> None:
    options = {"tau": 1.0} if rule == "florist" else {}
    before = wide(rslora)
    for round in mixed(rule, rslora, options=options):
        after = round.state.adapter
        for name, layer in after.layers.items():
            want = folded(before, name) + dense_mean(*came_back(round, name))
            assert_near(dense(layer) + folded(after, name), want, SINGLE)
        before = after


@both_scalings
def test_raflora_averages_rows_over_those_who_reach_them_in_every_round(rslora: bool) -> None:
    for round in mixed("raflora", rslora):
        for name, layer in round.state.adapter.layers.items():
            want = torch.zeros(layer.shape, dtype=torch.float64)
            clients, shares = came_back(round, name)
            for row in range(4):
                reach = sum(w for c, w in zip(clients, shares, strict=True) if c.rank > row)
                for c, w in zip(clients, shares, strict=True):
                    if c.rank > row:
                        pair = torch.outer(c.B[:, row].double(), c.A[row].double())
                        want += w / reach * c.scaling * pair
            assert_near(dense(layer), nearest_of_rank(want, 4), SINGLE)


@both_scalings
def test_hetlora_averages_in_the_servers_scaling_what_it_sent_in_the_clients(rslora: bool) -> None:
    """Clients who return what they were sent leave every pair but for the share that reached it."""
    adapter = wide(rslora)
    results = [
        ClientResult(c, cut_for(adapter, receivers(rslora).get(c)), EXAMPLES[c]) for c in NAMES
    ]
    policy = Policy(receivers=receivers(rslora))
    merged = aggregate(get_rule("hetlora"), ServerState(adapter), results, 1, policy).adapter
    reach = torch.tensor([1.0, 5 / 6, 1 / 2, 1 / 2])
    for name, full in adapter.layers.items():
        assert_close(merged.layers[name].A, reach[:, None] * full.A)
        assert_close(merged.layers[name].B, full.B * reach)


@both_scalings
@pytest.mark.parametrize("policy", [{}, {"server_lr": 0.5}, {"robust": "norm_clipping"}], ids=str)
@pytest.mark.parametrize("rule", ["raflora", "hetlora"])
def test_a_round_of_small_clients_that_train_nothing_changes_nothing(
    rule: str, policy: dict[str, Any], rslora: bool
) -> None:
    """Pairs that no client of the round holds stay: nobody has said anything about them."""
    adapter = wide(rslora)
    cuts = {c: Receiver(2, lora_scaling(ALPHA, 2, rslora)) for c in NAMES}
    results = [ClientResult(c, cut_for(adapter, cuts[c]), EXAMPLES[c]) for c in NAMES]
    after = aggregate(
        get_rule(rule), ServerState(adapter), results, 1, Policy(receivers=cuts, **policy)
    )
    for name, before in adapter.layers.items():
        assert_near(dense(after.adapter.layers[name]), dense(before), SINGLE)


@pytest.mark.parametrize("ranks", [(1, 2, 2), (1, 2, 4)])
def test_raflora_is_steady_whatever_ranks_take_part(ranks: tuple[int, ...]) -> None:
    adapter = wide()
    cuts = {c: Receiver(r, ALPHA / r) for c, r in zip(NAMES, ranks, strict=True)}
    results = [ClientResult(c, cut_for(adapter, cuts[c]), EXAMPLES[c]) for c in NAMES]
    state = aggregate(get_rule("raflora"), ServerState(adapter), results, 1, Policy(receivers=cuts))
    for name, before in adapter.layers.items():
        assert_near(dense(state.adapter.layers[name]), dense(before), SINGLE)


@pytest.mark.parametrize("rule", ["fra", "fedmomentum", "raflora"])
def test_what_the_clients_of_a_round_were_not_sent_is_in_the_log(rule: str) -> None:
    """Example weights 1/6, 1/3, 1/2 at ranks 1, 2, 4: what fra's formula forgets, to the digit."""
    adapter = wide()
    results = [ClientResult(c, cut_for(adapter, receivers().get(c)), EXAMPLES[c]) for c in NAMES]
    policy = Policy(receivers=receivers())
    state = aggregate(get_rule(rule), ServerState(adapter), results, 1, policy)
    share = torch.tensor([0.0, 1 / 6, 1 / 2, 1 / 2], dtype=torch.float64)
    lost = [dense(Factors(f.A, f.B * share, f.scaling)) for f in adapter.layers.values()]
    whole = [dense(factors) for factors in adapter.layers.values()]
    want = math.hypot(*(float(x.norm()) for x in lost)) / math.hypot(
        *(float(x.norm()) for x in whole)
    )
    assert state.memory["unsent"] == pytest.approx(want, rel=1e-9)
    if rule == "fra":
        gone = [
            before - dense(after)
            for before, after in zip(whole, state.adapter.layers.values(), strict=True)
        ]
        for got, expected in zip(gone, lost, strict=True):
            assert_near(got, expected, SINGLE)


def test_nothing_is_unsent_where_all_hold_all_or_there_is_nothing_yet() -> None:
    adapter = wide()
    results = [ClientResult("c", adapter, 1)]
    policy = Policy(receivers=receivers())
    assert aggregate(
        get_rule("fra"), ServerState(adapter), results, 1, policy
    ).memory["unsent"] == 0.0  # fmt: skip
    plain = aggregate(get_rule("fra"), ServerState(adapter), results, 1)
    assert "unsent" not in plain.memory
    zero = Adapter(
        {n: Factors(f.A, torch.zeros_like(f.B), f.scaling) for n, f in adapter.layers.items()}
    )
    small = [ClientResult("a", cut_for(zero, receivers()["a"]), 1)]
    fresh = aggregate(get_rule("fra"), ServerState(zero), small, 1, policy)
    assert fresh.memory["unsent"] == 0.0


def test_personal_adapters_have_their_clients_rank_and_head() -> None:
    for round in mixed("fra", head="local"):
        assert list(round.personal) == list(NAMES)
        for result in round.results:
            own, client = round.personal[result.client], result.client
            cut = cut_for(round.state.adapter, receivers().get(client))
            for name, factors in cut.layers.items():
                assert same_bits(own.layers[name], factors)
                assert factors.rank == RANKS[client]
            assert result.state.adapter is not None
            assert torch.equal(own.dense["h"], result.state.adapter.dense["h"])
    assert byte_count(flatten(round.personal["a"])) < byte_count(flatten(round.personal["c"]))


def test_the_order_of_results_changes_no_bit_with_mixed_ranks() -> None:
    for name in ("fra", "flora", "hetlora", "raflora", "florist", "fedmomentum"):
        results = mixed(name, rounds=1)[0].results
        policy = Policy(receivers=receivers(), server_lr=0.7, robust="norm_clipping")
        merged = [
            aggregate(get_rule(name), ServerState(wide()), order, 1, policy).adapter
            for order in itertools.permutations(results)
        ]
        assert all(same_adapters(merged[0], other) for other in merged)
