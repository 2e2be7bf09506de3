"""Every rule of the registry against its own claims and against what holds for all of them.

A new file in `fedlora/rules` is enrolled here by being there: with every combination of its
options that are choices, in rounds 1 to 4 of its plan. The laws are in `laws`; the last tests
show that they catch wrong rules.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import (
    assert_near,
    dense,
    merged_factors,
    merged_whole,
    normal,
    random_factors,
    same_adapters,
    same_bits,
)
from laws import CHECKS, SHAPES, Case, all_cases, check_valid, claims, drawn
from torch import Tensor

import fedlora.rules as registry
from fedlora.adapter import Adapter, ClientResult, Factors, Merged, mean_factors, mix
from fedlora.answers import checked_weights
from fedlora.lowrank import split
from fedlora.rules import LAWS, Rule, get_rule, rule_names
from fedlora.server import ServerState, aggregate

SCALES = (1e-18, 1e-9, 1e15)
CASES = all_cases()
CLAIMED = [(case, law) for case in CASES for law in LAWS if claims(case.rule, law)]
RULES = [case.rule for case in CASES if case.round == 1]
DECLINED = [(rule, law) for rule in RULES for law in LAWS if rule.laws[law] is not True]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.parametrize(("case", "law"), CLAIMED, ids=lambda value: str(value))
def test_a_claimed_law_holds(case: Case, law: str) -> None:
    for seed in range(5):
        CHECKS[law](case, seed)


@pytest.mark.parametrize(
    ("rule", "law"), DECLINED, ids=[f"{Case(rule, 1)}-{law}" for rule, law in DECLINED]
)
def test_a_declined_law_really_fails_and_carries_a_sentence_why(rule: Rule, law: str) -> None:
    """In every round; where the rule changes its ways with the rounds, in one at least."""
    reason = rule.laws[law]
    assert isinstance(reason, str)
    assert len(reason.split()) >= 5, f"{reason!r} is no sentence"

    def holds(case: Case, seed: int) -> bool:
        try:
            CHECKS[law](case, seed)
        except (AssertionError, ValueError):
            return False
        return True

    cases = [case for case in CASES if case.rule is rule]
    held = [all(holds(case, seed) for seed in range(5)) for case in cases]
    in_phases = len({rule.plan(case.round, {}) for case in cases}) > 1
    assert not (all(held) if in_phases else any(held)), f"{law} holds: claim it"


def test_every_law_has_a_check_and_every_rule_a_case() -> None:
    assert set(CHECKS) == set(LAWS)
    assert {case.rule.name for case in CASES} == set(rule_names())
    assert {"balanced", "orthonormal", "keep", "drop"} <= {
        value for case in CASES for value in case.rule.options.values()
    }


# ---------------------------------------------------------------- what holds for all rules


@every_case
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_result_is_finite_float64_of_the_right_shape_rank_and_scaling(
    case: Case, shape: tuple[int, int]
) -> None:
    prev, clients, weights = drawn(case, 0, shape=shape)
    check_valid(case, prev, case.rule(prev, clients, weights))


@every_case
def test_the_order_of_client_and_weight_pairs_does_not_matter(case: Case) -> None:
    prev, clients, weights = drawn(case, 1)
    want = case.rule(prev, clients, weights)
    for order in itertools.permutations(range(3)):
        got = case.rule(prev, [clients[k] for k in order], weights[list(order)])
        assert_near(dense(merged_factors(got)), dense(merged_factors(want)), 1e-12)
        assert_near(merged_whole(got), merged_whole(want), 1e-12)


@every_case
def test_the_order_of_results_does_not_change_a_bit_of_the_aggregate(case: Case) -> None:
    prev, clients, _ = drawn(case, 2, scalings=(2.0, 2.0, 2.0))
    single = [Factors(f.A.float(), f.B.float(), f.scaling) for f in (prev, *clients)]
    state = ServerState(Adapter({"x": single[0]}))
    results = [
        ClientResult(f"c{k}", Adapter({"x": factors}), 10 * k)
        for k, factors in enumerate(single[1:], start=1)
    ]
    want = aggregate(case.rule, state, results, case.round).adapter
    for order in itertools.permutations(results):
        assert same_adapters(aggregate(case.rule, state, order, case.round).adapter, want)


@every_case
def test_arguments_are_left_alone_and_two_runs_agree_to_the_bit(case: Case) -> None:
    prev, clients, weights = drawn(case, 3)
    first, second = (case.rule(prev, clients, weights) for _ in range(2))
    assert same_bits(merged_factors(first), merged_factors(second))
    assert torch.equal(merged_whole(first), merged_whole(second))
    fresh_prev, fresh_clients, fresh_weights = drawn(case, 3)
    assert same_bits(prev, fresh_prev)
    assert all(same_bits(x, y) for x, y in zip(clients, fresh_clients, strict=True))
    assert torch.equal(weights, fresh_weights)


@every_case
def test_a_clients_scaling_is_a_way_of_writing_and_nothing_else(case: Case) -> None:
    """The same increments in other scalings, alpha 16 at rank 4 or rsLoRA, give the same."""
    prev, clients, weights = drawn(case, 4)
    other = [
        Factors(f.A, f.B * (f.scaling / s), s)
        for f, s in zip(clients, (4.0, 8.0, 0.1), strict=True)
    ]
    want, got = (merged_whole(case.rule(prev, given, weights)) for given in (clients, other))
    assert_near(got, want, 1e-12)


@every_case
def test_zero_updates_give_a_zero_increment_that_can_train(case: Case) -> None:
    """B = 0 for all is every first round."""
    prev, clients, weights = drawn(case, 5)
    zero = Factors(prev.A, torch.zeros_like(prev.B), prev.scaling)
    idle = [Factors(f.A, torch.zeros_like(f.B), f.scaling) for f in clients]
    answer = case.rule(zero, idle, weights)
    check_valid(case, prev, answer)
    assert not bool(merged_whole(answer).any())
    assert float(merged_factors(answer).A.norm(dim=1).min()) > 1e-3


@every_case
def test_no_pair_is_dead_where_clients_are_rank_deficient(case: Case) -> None:
    """Pairs with B = 0 must have an A to train from; rank 1 of 3 here, written with three rows."""
    prev, clients, weights = drawn(case, 6)
    one = clients[0].B[:, :1] @ normal(0, 1, 3)
    low = [Factors(clients[0].A, one, clients[0].scaling)] * 3
    answer = case.rule(prev, low, weights)
    check_valid(case, prev, answer)
    assert float(merged_factors(answer).A.norm(dim=1).min()) > 1e-3
    if claims(case.rule, "idempotent") and "B" in case.rule.plan(case.round, {}).receives:
        assert_near(merged_whole(answer), dense(low[0]), 1e-12)


@every_case
def test_a_client_counted_twice_at_half_the_weight_counts_once(case: Case) -> None:
    prev, clients, weights = drawn(case, 7)
    twice = torch.cat([weights[:1] / 2, weights[:1] / 2, weights[1:]])
    answer = case.rule(prev, [clients[0], *clients], twice)
    check_valid(case, prev, answer)
    if claims(case.rule, "exact") or claims(case.rule, "linear"):
        want = merged_whole(case.rule(prev, clients, weights))
        assert_near(merged_whole(answer), want, 1e-12)


@every_case
@pytest.mark.parametrize("scale", SCALES)
def test_scales_from_1e18_to_1e15_give_the_same_result_at_that_scale(
    case: Case, scale: float
) -> None:
    plain, scaled = drawn(case, 8), drawn(case, 8, scale=scale)
    answer = case.rule(*scaled)
    check_valid(case, scaled[0], answer)
    if claims(case.rule, "exact") or claims(case.rule, "linear"):
        assert_near(merged_whole(answer) / scale, merged_whole(case.rule(*plain)), 1e-11)
    wild = [Factors(f.A, f.B * s, f.scaling) for f, s in zip(plain[1], SCALES, strict=True)]
    check_valid(case, plain[0], case.rule(plain[0], wild, plain[2]))


@every_case
def test_one_client_alone_comes_back(case: Case) -> None:
    prev, clients, _ = drawn(case, 9)
    alone = torch.ones(1, dtype=torch.float64)
    answer = case.rule(prev, clients[1:2], alone)
    check_valid(case, prev, answer)
    if claims(case.rule, "weighted"):
        assert_near(merged_whole(answer), dense(clients[1]), 1e-12)


@every_case
def test_what_clients_are_not_sent_never_changes(case: Case) -> None:
    """`receives` leaves a part out because everybody has it from the start: to the bit."""
    prev, clients, weights = drawn(case, 10)
    factors = merged_factors(case.rule(prev, clients, weights))
    for part in frozenset({"A", "B"}) - case.rule.plan(case.round, {}).receives:
        assert torch.equal(getattr(factors, part), getattr(prev, part))


@every_case
def test_keeping_the_residual_changes_nothing_but_what_is_reported(case: Case) -> None:
    if "residual" not in case.rule.options:
        return
    prev, clients, weights = drawn(case, 11)
    other = replace(case.rule, options=dict(case.rule.options) | {"residual": "drop"})
    got, want = (merged_factors(rule(prev, clients, weights)) for rule in (case.rule, other))
    assert_near(got.A, want.A, 1e-8)  # the routes may differ: gram has half the digits in a vector
    assert_near(dense(got), dense(want), 1e-12)


@pytest.mark.parametrize("name", rule_names())
def test_a_rules_docstring_has_formula_source_and_what_it_keeps_loses_and_costs(name: str) -> None:
    doc = get_rule(name).doc
    first, *rest = doc.splitlines()
    text = "\n".join(rest)
    assert re.search(r"[=(]", first) or "\nFormula: " in text, f"no formula in {first!r}"
    assert first.endswith((".", ":"))
    for line in ("Source: ", "Keeps: ", "Loses: ", "Cost per layer and client: ", "DP: "):
        assert re.search(rf"(^|\s){line}\S+(\s\S+){{2}}", text), f"{name} says nothing on {line}"
    assert re.search(r"\b20\d\d\b", text), "no year"
    assert re.search(r"\d{4}\.\d{5}", text), "no paper"
    assert re.fullmatch(r"[A-Z`].{10,90}\.", get_rule(name).summary)


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([0.5, math.nan], "nan is not a finite"),
        ([1.5, -0.5], "-0.5 is not a finite number >= 0"),
        ([math.inf, 0.0], "inf is not a finite"),
        ([0.0, 0.0], "sum to 0, not to 1"),
        ([0.5, 0.6], r"sum to 1\.1, not to 1"),
        ([0.5, 0.25, 0.25], "3 weights for 2 clients"),
    ],
)
def test_weights_that_are_no_average_are_refused_with_the_value(
    weights: list[float], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        checked_weights(weights, 2)
    layer = random_factors(0)
    with pytest.raises(ValueError, match=says):
        get_rule("fra")(layer, [layer, layer], weights)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("weight", ["1", True, None])
def test_a_weight_that_is_no_number_is_refused(weight: object) -> None:
    with pytest.raises(ValueError, match=f"weight {weight!r} is not a number"):
        checked_weights([weight], 1)  # type: ignore[list-item]


# ---------------------------------------------------------------- would wrong rules be caught?


def transposed(prev: Factors, clients: list[Factors], weights: Tensor) -> Factors | Merged:
    merged = split(mix(clients, weights, prev.scaling), prev.rank, previous=prev)
    tail = merged.residual
    return Merged(merged.factors, Factors(tail.B.mT, tail.A.mT, tail.scaling))


def unscaled(prev: Factors, clients: list[Factors], weights: Tensor) -> Factors | Merged:
    bare = [Factors(client.A, client.B, prev.scaling) for client in clients]
    return split(mix(bare, weights, prev.scaling), prev.rank, previous=prev)


def one_root(prev: Factors, clients: list[Factors], weights: Tensor) -> Factors | Merged:
    merged = split(mix(clients, weights, prev.scaling), prev.rank, gauge="orthonormal")
    B, A = merged.factors.B, merged.factors.A
    return Merged(Factors(A, B / B.norm(dim=0).sqrt(), prev.scaling), merged.residual)


def first(prev: Factors, clients: list[Factors], weights: Tensor) -> Factors | Merged:
    return Factors(clients[0].A, mean_factors(clients, weights, prev.scaling).B, prev.scaling)


def uniform(prev: Factors, clients: list[Factors], weights: Tensor) -> Factors | Merged:
    alike = torch.full_like(weights, 1 / len(clients))
    return mean_factors(clients, alike, prev.scaling)


def single(prev: Factors, clients: list[Factors], weights: Tensor) -> Factors | Merged:
    mixed = mix(clients, weights, prev.scaling)
    return split(Factors(mixed.A.float().double(), mixed.B, prev.scaling), prev.rank)


def right(prev: Factors, clients: list[Factors], weights: Tensor) -> Factors | Merged:
    return split(mix(clients, weights, prev.scaling), prev.rank, previous=prev)


@pytest.fixture
def registered() -> Iterator[Callable[[Any], Case]]:
    """Registers functions as rules that claim every law; takes them out again."""
    names = set(registry._RULES)

    def register(merge: Any) -> Case:
        registry.rule(**dict.fromkeys(LAWS, True))(merge)
        return Case(get_rule(merge.__name__), 1)

    yield register
    for name in set(registry._RULES) - names:
        del registry._RULES[name]


@pytest.mark.parametrize(
    ("wrong", "laws"),
    [
        (transposed, ["exact"]),
        (unscaled, ["exact", "weighted", "idempotent"]),
        (one_root, ["exact", "weighted", "idempotent"]),
        (first, ["exact", "weighted"]),
        (uniform, ["exact", "weighted"]),
        (single, ["exact", "linear"]),
    ],
)
def test_the_suite_catches_a_wrong_rule(
    wrong: Any, laws: list[str], registered: Callable[[Any], Case]
) -> None:
    case = registered(wrong)
    assert case.rule.name in rule_names()
    for law in laws:
        with pytest.raises((AssertionError, ValueError)):
            CHECKS[law](case, 0)


def test_the_suite_passes_a_right_rule(registered: Callable[[Any], Case]) -> None:
    case = registered(right)
    for law in set(LAWS) - {"linear"}:
        CHECKS[law](case, 0)


def test_toy_rules_leave_no_trace() -> None:
    assert not {"transposed", "unscaled", "right"} & set(rule_names())


def test_a_rule_must_take_a_stand_on_each_law_and_bear_a_free_name() -> None:
    with pytest.raises(TypeError, match="a stand on each law: exact, linear"):
        registry.rule(exact=True)
    with pytest.raises(ValueError, match=r"'fra' is there already, from fedlora\.rules\.fra"):

        @registry.rule(**dict.fromkeys(LAWS, True))
        def fra() -> None: ...
