"""The laws of merge rules as functions of a rule and a seed, and the cases they are checked on.

Each raises AssertionError (or lets the rule's ValueError through) where the law does not hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args, get_origin

import torch
from conftest import (
    assert_near,
    dense,
    dense_mean,
    merged_factors,
    merged_whole,
    orthogonal,
    random_factors,
)
from torch import Tensor

from fedlora.adapter import Factors, Merged
from fedlora.rules import LAWS, Rule, get_rule, option_types, rule_names

Drawn = tuple[Factors, list[Factors], Tensor]
SHAPES = [(7, 5), (5, 9), (4, 40), (64, 3)]


@dataclass(frozen=True)
class Case:
    """A rule with options, in one round of its plan."""

    rule: Rule
    round: int

    def __str__(self) -> str:
        options = "".join(f"-{value}" for value in self.rule.options.values())
        return f"{self.rule.name}{options}-round{self.round}"


def variants(name: str) -> list[Rule]:
    """The rule with each combination of the options that are choices."""
    bare = get_rule(name)
    choices = {option: _choices(kind) for option, kind in option_types(bare).items()}
    choices = {option: values for option, values in choices.items() if values}
    combinations = itertools.product(*choices.values())
    return [get_rule(name, **dict(zip(choices, values, strict=True))) for values in combinations]


def _choices(kind: object) -> tuple[object, ...]:
    """The values of a choice; of `a number or 'auto'`, both, the number in the middle of rounds."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    words = [word for part in get_args(kind) if get_origin(part) is Literal
             for word in get_args(part)]  # fmt: skip
    return (*words, 2) if words and int in get_args(kind) else tuple(words)


def claims(rule: Rule, law: str) -> bool:
    """Whether this variant claims the law: what it drops it cannot give back."""
    dropped = law == "exact" and rule.options.get("residual", "keep") != "keep"
    return rule.laws[law] is True and not dropped


def drawn(
    case: Case,
    seed: int,
    *,
    shape: tuple[int, int] = (7, 5),
    ranks: Sequence[int] = (3, 3, 3),
    scalings: Sequence[float] = (2.0, 0.5, 4.0),
    scale: float = 1.0,
) -> Drawn:
    """The previous factors (rank 3) and clients as the plan of this round lets them train."""
    m, n = shape
    plan = case.rule.plan(case.round, {})
    moved = plan.trains & plan.shares
    prev = random_factors(seed, m, n, 3, 2.0, scale)
    clients = []
    for k, (r, s) in enumerate(zip(ranks, scalings, strict=True), start=1):
        fresh = random_factors(seed + 100 * k, m, n, r, s, scale)
        same_B = prev.B * (prev.scaling / s)  # the increment that was sent, in the client's scaling
        A = fresh.A if "A" in moved or r != prev.rank else prev.A
        B = fresh.B if "B" in moved or r != prev.rank else same_B
        clients.append(Factors(A, B, s))
    weights = torch.rand(len(clients), generator=torch.Generator().manual_seed(seed)).double() + 0.1
    return prev, clients, weights / weights.sum()


def check_valid(case: Case, prev: Factors, answer: Factors | Merged) -> None:
    """Finite float64 factors of the layer's shape and the wanted rank, in the old scaling."""
    factors = merged_factors(answer)
    assert factors.rank == (case.rule.options.get("rank") or prev.rank), "another rank"
    assert factors.shape == prev.shape, "another shape"
    assert factors.scaling == prev.scaling, "another scaling: what is sent carries none"
    for tensor in (factors.A, factors.B, merged_whole(answer)):
        assert tensor.dtype == torch.float64, "not float64"
        assert bool(torch.isfinite(tensor).all()), "not finite"


# ---------------------------------------------------------------- the laws


def check_exact(case: Case, seed: int) -> None:
    ranks = (2, 3, 1) if case.rule.laws["mixed_ranks"] is True else (3, 3, 3)
    for shape in SHAPES:
        prev, clients, weights = drawn(case, seed, shape=shape, ranks=ranks)
        whole = merged_whole(case.rule(prev, clients, weights))
        assert_near(whole, dense_mean(clients, weights), 1e-12)


def check_linear(case: Case, seed: int) -> None:
    """Sums of clients' factors give sums of results, and multiples multiples."""
    prev, left, weights = drawn(case, seed)
    _, right, _ = drawn(case, seed + 1)
    moved = case.rule.plan(case.round, {}).shares

    def merged(a: float, b: float) -> Factors:
        pairs = zip(left, right, strict=True)
        clients = [
            Factors(
                a * x.A + b * y.A if "A" in moved else x.A,
                a * x.B + b * y.B if "B" in moved else x.B,
                x.scaling,
            )
            for x, y in pairs
        ]
        answer = case.rule(prev, clients, weights)
        assert isinstance(answer, Factors), "what is left over is quadratic in the factors"
        return answer

    both, one, two = merged(2.0, -3.0), merged(1.0, 0.0), merged(0.0, 1.0)
    for part in ("A", "B"):
        got, x, y = (getattr(factors, part) for factors in (both, one, two))
        assert_near(got, 2.0 * x - 3.0 * y if part in moved else x, 1e-12)


def check_mixed_ranks(case: Case, seed: int) -> None:
    prev, clients, weights = drawn(case, seed, ranks=(1, 4, 2))
    check_valid(case, prev, case.rule(prev, clients, weights))


def check_equivariant(case: Case, seed: int) -> None:
    prev, clients, weights = drawn(case, seed)
    P, Q = orthogonal(seed, prev.shape[0]), orthogonal(seed + 1, prev.shape[1])

    def turned(factors: Factors) -> Factors:
        return Factors(factors.A @ Q.mT, P @ factors.B, factors.scaling)

    plain = case.rule(prev, clients, weights)
    other = case.rule(turned(prev), [turned(client) for client in clients], weights)
    for part in (merged_whole, lambda answer: dense(merged_factors(answer))):
        assert_near(part(other), P @ part(plain) @ Q.mT, 1e-10)


def check_weighted(case: Case, seed: int) -> None:
    prev, clients, _ = drawn(case, seed)
    for chosen, client in enumerate(clients):
        weights = torch.eye(len(clients), dtype=torch.float64)[chosen]
        assert_near(merged_whole(case.rule(prev, clients, weights)), dense(client), 1e-12)


def check_idempotent(case: Case, seed: int) -> None:
    prev, (_, client, _), weights = drawn(case, seed)
    assert_near(merged_whole(case.rule(prev, [client] * 3, weights)), dense(client), 1e-12)


def check_steady(case: Case, seed: int) -> None:
    """Of any rank and scaling that the rule takes: what was sent comes back, nothing grows."""
    prev, _, weights = drawn(case, seed)
    got = merged_whole(case.rule(prev, [prev] * 3, weights))
    assert_near(got, dense(prev), 1e-12)


def all_cases() -> list[Case]:
    """Every rule of the registry, every variant, rounds 1 to 4."""
    return [
        Case(rule, round)
        for name in rule_names()
        for rule in variants(name)
        for round in range(1, 5)
    ]


CHECKS: dict[str, Callable[[Case, int], None]] = {law: globals()[f"check_{law}"] for law in LAWS}
