"""Merging from sums alone: what is sent is linear and bounded, what is decoded is the sum."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import dense, nearest_of_rank, normal, random_factors, random_results
from torch import Tensor

from fedlora.adapter import ClientResult, Factors, flatten, frobenius, overlay, stacked
from fedlora.rules import Plan, get_rule, rule_names
from fedlora.server import ServerState, aggregate, plan_round
from fedlora.sums import (
    EXCHANGES,
    Exchange,
    Message,
    Warm,
    add_up,
    linear_merge,
    linear_message,
    summed,
    weighted,
)

each_exchange = pytest.mark.parametrize("name", EXCHANGES)
SHAPE = (30, 50)
SEED = 5


def near(prev: Factors, seed: int, spread: float) -> Factors:
    """A client that moved a little away from what it was sent."""
    A = prev.A + spread * normal(seed, *prev.A.shape)
    B = prev.B + spread * normal(seed + 1, *prev.B.shape)
    return Factors(A, B, prev.scaling)


def a_round(spread: float, clients: int = 5) -> tuple[Factors, list[Factors]]:
    prev = random_factors(0, *SHAPE, 4)
    return prev, [weighted(near(prev, 10 * k, spread), 1 / clients) for k in range(1, clients + 1)]


def size(message: Message) -> float:
    return math.sqrt(sum(float(tensor.square().sum()) for tensor in message.values()))


@each_exchange
def test_messages_are_linear_and_no_longer_than_allowed(name: str) -> None:
    exchange, prev = EXCHANGES[name], random_factors(0, *SHAPE, 4)
    public = exchange.begin(prev, SEED)
    one, two = random_factors(3, *SHAPE, 6), random_factors(4, *SHAPE, 2)
    both = stacked(one, two)
    for _ in range(exchange.messages):
        left, right, total = (exchange.encode(public, part) for part in (one, two, both))
        for key, tensor in total.items():
            torch.testing.assert_close(left[key] + right[key], tensor)
        for seed in range(20):
            wild = random_factors(seed, *SHAPE, 1 + seed % 5)
            rows = public.get("V", prev.A.mT).mT
            aimed = Factors(rows, normal(seed, SHAPE[0], len(rows)), 1.0)  # all of it in the basis
            for part in (wild, aimed):
                limit = exchange.stretch * frobenius(part) * (1 + 1e-9)
                assert size(exchange.encode(public, part)) <= limit
        found = exchange.follow(public, total)
        if isinstance(found, Factors):
            return
        public = found
    raise AssertionError(f"{name} did not end in {exchange.messages} messages")


def test_the_whole_increment_is_exact() -> None:
    prev, parts = a_round(1.0)
    want = sum(map(dense, parts))
    torch.testing.assert_close(dense(summed(EXCHANGES["increment"], prev, parts, SEED)), want)


def test_rows_are_exact_where_b_alone_was_trained() -> None:
    prev = random_factors(0, *SHAPE, 4)
    parts = [Factors(prev.A, normal(k, SHAPE[0], 4), prev.scaling) for k in range(4)]
    got = dense(summed(EXCHANGES["rows"], prev, parts, SEED))
    torch.testing.assert_close(got, sum(map(dense, parts)))


@pytest.mark.parametrize("name", ["power", "sketch", "warm"])
@pytest.mark.parametrize("spread", [0.01, 0.1])
def test_overlapping_rounds_are_near_the_best_of_rank_r(name: str, spread: float) -> None:
    """At most 0.2 % of the sum is lost beyond what rank r loses anyway."""
    prev, parts = a_round(spread)
    want = sum(map(dense, parts))
    got = dense(summed(EXCHANGES[name], prev, parts, SEED))
    best = float((want - nearest_of_rank(want, 4)).norm())
    assert float((want - got).norm()) <= best + 0.002 * float(want.norm())


class Counting:
    """Adds up, and keeps what the server saw."""

    def __init__(self) -> None:
        self.totals: list[Message] = []

    def __call__(self, messages: Iterable[Message]) -> Message:
        self.totals.append(add_up(messages))
        return self.totals[-1]


@pytest.mark.parametrize(("spread", "messages"), [(0.02, 1), (30.0, 2)])
def test_the_warm_sketch_asks_again_where_the_subspaces_are_unrelated(
    spread: float, messages: int
) -> None:
    """One message of little more than the adapter's size, two where it would be far off."""
    prev, parts = a_round(spread)
    counted = Counting()
    got = dense(summed(EXCHANGES["warm"], prev, parts, SEED, counted))
    assert len(counted.totals) == messages
    want = sum(map(dense, parts))
    numbers = sum(tensor.numel() for tensor in counted.totals[0].values())
    assert numbers == 4 * sum(SHAPE) + 4 * SHAPE[0]
    loose = dense(summed(Warm(tolerance=math.inf), prev, parts, SEED))
    two = dense(summed(EXCHANGES["power"], prev, parts, SEED))
    missed = [float((want - found).norm() / want.norm()) for found in (got, loose, two)]
    assert missed[0] == pytest.approx(missed[2], rel=0.02, abs=1e-3)
    assert (missed[1] > 1.2 * missed[0]) == (messages == 2)


def test_the_first_round_takes_two_messages() -> None:
    prev = random_factors(0, *SHAPE, 4)
    start = Factors(prev.A, torch.zeros_like(prev.B), prev.scaling)
    parts = [weighted(near(start, k, 0.1), 0.25) for k in (2, 4, 6, 8)]
    counted = Counting()
    got = dense(summed(EXCHANGES["warm"], start, parts, SEED, counted))
    assert len(counted.totals) == 2
    want = sum(map(dense, parts))
    best = float((want - nearest_of_rank(want, 4)).norm())
    assert float((want - got).norm()) <= 1.2 * best + 0.01 * float(want.norm())


LINEAR = [  # one that reweighs (hetlora) has to see every client
    name
    for name in rule_names()
    if get_rule(name).laws["linear"] is True and get_rule(name).reweigh is None
]


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("round", [1, 2])
def test_linear_rules_come_out_of_sums(name: str, round: int) -> None:
    """The same adapter as by the server that saw every client, up to float32's rounding."""
    rule, results = get_rule(name), random_results(7)
    state = ServerState(results[0].adapter)
    plan = plan_round(rule, "average", state, round)
    held = [as_sent(result, state, plan) for result in results]
    total = add_up([linear_message(r.adapter, plan, float(r.examples)) for r in held])
    got, want = linear_merge(total, state.adapter), aggregate(rule, state, held, round).adapter
    for layer, factors in want.layers.items():
        torch.testing.assert_close(dense(got.layers[layer]), dense(factors), rtol=1e-5, atol=1e-6)
    for head, tensor in want.dense.items():
        torch.testing.assert_close(got.dense[head], tensor)


def as_sent(result: ClientResult, state: ServerState, plan: Plan) -> ClientResult:
    """The result as the server completes it."""
    adapter = overlay(flatten(result.adapter, plan.shares), state.adapter)
    return replace(result, adapter=adapter)


def test_there_are_linear_rules_to_test() -> None:
    assert {"fedavg", "ffa", "rolora"} <= set(LINEAR)


def test_nobody_taking_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weights of the clients sum to 0\.0"):
        linear_merge({"weight": torch.tensor(0.0)}, random_results(7)[0].adapter)


# ---------------------------------------------------------------- a protocol that shows sums only

ONE = 2.0**40  # fixed point: a number is so many units of a ring of 2^64


class Masked:
    """Pairwise masks in a ring of 2^64 (Bonawitz et al. 2017, without drop-outs).

    `seen` is all that reaches the server.
    """

    def __init__(self) -> None:
        self.seen: list[dict[str, np.ndarray]] = []

    def __call__(self, sent: Iterable[Message]) -> Message:
        messages = list(sent)
        rng = np.random.default_rng(0)
        masks = [{name: np.zeros(t.shape, np.uint64) for name, t in m.items()} for m in messages]
        for left in range(len(messages)):
            for right in range(left):
                for name in masks[0]:
                    mask = rng.integers(0, 2**64, masks[0][name].shape, np.uint64, endpoint=False)
                    masks[left][name] += mask
                    masks[right][name] -= mask
        self.seen = [
            {name: encoded(tensor) + mask[name] for name, tensor in message.items()}
            for message, mask in zip(messages, masks, strict=True)
        ]
        return {
            name: decoded(np.add.reduce([sent[name] for sent in self.seen])) for name in masks[0]
        }


def encoded(tensor: Tensor) -> np.ndarray:
    return np.round(tensor.numpy() * ONE).astype(np.int64).view(np.uint64)


def decoded(units: np.ndarray) -> Tensor:
    return torch.from_numpy(units.view(np.int64).astype(np.float64) / ONE)


@pytest.mark.parametrize("name", ["rows", "power", "warm"])
def test_a_server_that_sees_only_masked_messages_gets_the_same_sum(name: str) -> None:
    prev, parts = a_round(0.05)
    exchange: Exchange = EXCHANGES[name]
    masked = Masked()
    got = dense(summed(exchange, prev, parts, SEED, masked))
    want = dense(summed(exchange, prev, parts, SEED))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
    assert len(masked.seen) == len(parts)
    alone = np.concatenate([v.ravel() for v in masked.seen[0].values()]) / 2.0**64
    assert abs(alone.mean() - 0.5) < 5 * math.sqrt(1 / 12 / alone.size)  # uniform: says nothing
    assert alone.var() == pytest.approx(1 / 12, rel=0.2)
