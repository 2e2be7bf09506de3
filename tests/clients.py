"""Clients drawn around common factors, for the tests of single rules; what a rule misses, dense."""

from __future__ import annotations

import torch
from conftest import dense, dense_mean, merged_factors, normal
from torch import Tensor

from fedlora.adapter import Adapter, ClientResult, ClientState, Factors, flatten, overlay
from fedlora.rules import Plan, get_rule

SHAPE = (9, 7)
SCALINGS = (2.0, 0.5, 4.0, 1.0)
NAMES = ("a", "b", "c")
EXAMPLES = {"a": 10, "b": 20, "c": 30}
SHARES = (1 / 6, 2 / 6, 3 / 6)


def around(
    seed: int, count: int = 3, r: int = 3, spread: float = 1.0
) -> tuple[list[Factors], Tensor]:
    """Clients around a common pair of factors, scalings of their own, unequal weights."""
    m, n = SHAPE
    A, B = normal(seed, r, n), normal(seed + 1, m, r)
    clients = [
        Factors(
            A + spread * normal(seed + 100 * k, r, n),
            (B + spread * normal(seed + 100 * k + 1, m, r)) / s,
            s,
        )
        for k, s in zip(range(1, count + 1), SCALINGS, strict=False)
    ]
    return clients, weights(seed, count)


def weights(seed: int, count: int) -> Tensor:
    """Unequal weights that sum to one."""
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    return drawn / drawn.sum()


def written(factors: Factors, scaling: float) -> Factors:
    """The same increment in another scaling, B taking the ratio."""
    return Factors(factors.A, factors.B * (factors.scaling / scaling), scaling)


def turned(factors: Factors, Q: Tensor) -> Factors:
    """The same increment, its pairs turned."""
    return Factors(Q.mT @ factors.A, factors.B @ Q, factors.scaling)


def moved(factors: Factors, seed: int, size: float) -> Factors:
    """Noise of that size on both factors."""
    (m, n), r = factors.shape, factors.rank
    A = factors.A + size * normal(seed, r, n).to(factors.A)
    return Factors(A, factors.B + size * normal(seed + 1, m, r).to(factors.B), factors.scaling)


def missed(name: str, prev: Factors, clients: list[Factors], w: Tensor, **options: float) -> float:
    """||sum w_k dW_k - what the rule gives||_F."""
    got = dense(merged_factors(get_rule(name, **options)(prev, clients, w)))
    return float((dense_mean(clients, w) - got).norm())


def restless(
    client: str, round: int, plan: Plan, sent: Adapter, state: ClientState
) -> ClientResult:  # fmt: skip
    """A fit: moves every part that the plan trains, from the client's own where it keeps some."""
    own = plan.trains - plan.shares
    held = sent if state.adapter is None else overlay(flatten(state.adapter, own), sent)
    drawn = 100 * round + 10 * NAMES.index(client)
    changed = {
        name: tensor + 0.1 * normal(drawn + index, *tensor.shape).float()
        for index, (name, tensor) in enumerate(flatten(held, plan.trains).items())
    }
    adapter = overlay(changed, held)
    kept = ClientState(adapter if own else None)
    return ClientResult(client, adapter, EXAMPLES[client], {}, kept)
