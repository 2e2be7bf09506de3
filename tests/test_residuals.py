"""Residuals folded into a frozen increment or carried to the next round.

Every round is held to dense float64 sums of what came back; float32 at rest sets the tolerances.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from clients import NAMES, restless
from conftest import (
    assert_near,
    dense,
    dense_mean,
    nearest_of_rank,
    normal,
    random_factors,
    same_adapters,
    same_bits,
)
from torch import Tensor

from fedlora.adapter import (
    Adapter,
    ClientResult,
    ClientState,
    Factors,
    byte_count,
    copied,
    flatten,
    frobenius,
)
from fedlora.policy import Policy, residual_policy
from fedlora.rules import Plan, get_rule, rule_names
from fedlora.server import ServerState, aggregate
from fedlora.simulation import Fit, Round, simulate

M, N, R = 30, 20, 2
SINGLE = 1e-6  # float32 at rest


def single(factors: Factors) -> Factors:
    return Factors(factors.A.float(), factors.B.float(), factors.scaling)


START = Adapter(
    {
        "x": single(random_factors(0, M, N, R, 2.0)),
        "y": Factors(normal(1, R, 6).float(), torch.zeros(4, R), 2.0),
    },
    {"h": torch.zeros(3)},
)
FOLDING = [
    ("fedex", {}),
    ("flora", {}),
    ("fedmomentum", {}),
    ("florist", {"tau": 1.0}),
    ("fra", {}),
]
every_folding = pytest.mark.parametrize(
    ("rule", "options"), FOLDING, ids=[name for name, _ in FOLDING]
)


def run(rule: str, *, fit: Fit = restless, rounds: int = 4, participation: float = 1.0,
        options: dict[str, float] | None = None, **policy: object) -> list[Round]:  # fmt: skip
    around = Policy(**policy)  # type: ignore[arg-type]
    given = simulate(
        get_rule(rule, **(options or {})), fit, START, NAMES, rounds=rounds,
        participation=participation, policy=around,
    )  # fmt: skip
    return list(given)


def folded(adapter: Adapter, name: str) -> Tensor:
    none = torch.zeros(adapter.layers[name].shape, dtype=torch.float64)
    return dense(adapter.frozen[name]) if name in adapter.frozen else none


def whole(adapter: Adapter, name: str) -> Tensor:
    """All that a model adds to the layer's weight."""
    return dense(adapter.layers[name]) + folded(adapter, name)


def mean_of(round: Round, name: str) -> Tensor:
    """The mean of the increments that came back, weighed by examples, multiplied out."""
    total = sum(result.examples for result in round.results)
    shares = [result.examples / total for result in round.results]
    return dense_mean([result.adapter.layers[name] for result in round.results], shares)


# ---------------------------------------------------------------- folding


@every_folding
@pytest.mark.parametrize("participation", [1.0, 0.6])
def test_adapter_and_frozen_are_exact_averaging_in_every_round(
    rule: str, options: dict[str, float], participation: float
) -> None:
    before = START
    for round in run(rule, options=options, participation=participation, residual="fold"):
        after = round.state.adapter
        for name in START.layers:
            want = folded(before, name) + mean_of(round, name)
            assert_near(whole(after, name), want, SINGLE)
        assert round.state.memory["merge_error"] < SINGLE
        assert round.state.memory["fold_tail"] < 1e-12
        before = after


@every_folding
def test_what_is_frozen_takes_no_more_pairs_than_it_has_directions(
    rule: str, options: dict[str, float]
) -> None:
    growth = {"fedex": 2 * R, "flora": 3 * R, "florist": 3 * R, "fedmomentum": 2 * R, "fra": 2 * R}
    for round in run(rule, options=options, rounds=6, residual="fold"):
        frozen = round.state.adapter.frozen
        for factors in frozen.values():
            assert factors.scaling == 1.0
            assert factors.rank == int(torch.linalg.matrix_rank(dense(factors), rtol=1e-7))
            assert factors.rank <= min(*factors.shape, growth[rule] * round.round)
        assert round.state.memory["frozen_rank"] == max(f.rank for f in frozen.values())
    assert frozen["y"].rank == 4  # all that fits into 4 x 6, and it stays so


def stubborn(
    client: str, round: int, plan: Plan, sent: Adapter, state: ClientState
) -> ClientResult:  # fmt: skip
    """Returns the same factors in every round, whatever it was sent."""
    seed = 50 + 10 * NAMES.index(client)
    layers = {"x": single(random_factors(seed, M, N, R, 2.0)), "y": START.layers["y"]}
    return ClientResult(client, replace(sent, layers=layers), 10)


@every_folding
def test_the_same_residual_folded_again_takes_no_more_pairs(
    rule: str, options: dict[str, float]
) -> None:
    ranks = [
        r.state.adapter.frozen["x"].rank
        for r in run(rule, fit=stubborn, options=options, residual="fold")
    ]
    assert len(set(ranks)) == 1, ranks


@every_folding
@pytest.mark.parametrize("cap", [1, 5])
def test_a_cap_keeps_the_strongest_directions_and_reports_the_true_tail(
    rule: str, options: dict[str, float], cap: int
) -> None:
    before = START
    for round in run(rule, options=options, residual="fold", fold_rank=cap):
        after = round.state.adapter
        tail = norm = missed = 0.0
        for name in START.layers:
            mean = mean_of(round, name)
            wanted = folded(before, name) + mean - dense(after.layers[name])
            assert_near(folded(after, name), nearest_of_rank(wanted, cap), 1e-5)
            assert after.frozen[name].rank <= cap
            tail += float((wanted - nearest_of_rank(wanted, cap)).norm()) ** 2
            missed += float((wanted - folded(after, name)).norm()) ** 2
            norm += float(mean.norm()) ** 2
        memory = round.state.memory
        assert memory["fold_tail"] == pytest.approx((tail / norm) ** 0.5, rel=1e-4, abs=SINGLE)
        assert memory["merge_error"] == pytest.approx((missed / norm) ** 0.5, rel=1e-4, abs=SINGLE)
        assert memory["frozen_rank"] == max(f.rank for f in after.frozen.values())
        before = after
    assert memory["fold_tail"] > 1e-3


def test_what_is_frozen_reaches_everyone_also_those_who_join_late() -> None:
    seen: list[tuple[str, int, Adapter]] = []

    def spy(client: str, round: int, plan: Plan, sent: Adapter, state: ClientState) -> ClientResult:
        seen.append((client, round, copied(sent)))
        return restless(client, round, plan, sent, state)

    rounds = run("fedex", fit=spy, rounds=6, participation=0.3)
    first: dict[str, int] = {}
    for client, round, sent in seen:
        first.setdefault(client, round)
        want = START if round == 1 else rounds[round - 2].state.adapter
        assert same_adapters(sent, want)
        assert list(sent.frozen) == list(want.frozen)
        assert all(same_bits(sent.frozen[name], want.frozen[name]) for name in want.frozen)
    assert sorted(first) == list(NAMES)
    assert max(first.values()) > 1, "nobody joined late"


@every_folding
def test_bytes_are_those_of_the_tensors_sent_the_frozen_ones_with_them(
    rule: str, options: dict[str, float]
) -> None:
    frozen = 0
    for round in run(rule, options=options, residual="fold", participation=0.6):
        adapter = 4 * (R * (M + N) + R * (4 + 6) + 3)
        assert round.bytes_up == 2 * adapter
        assert round.bytes_down == 2 * (adapter + frozen)
        frozen = 4 * sum(f.rank * sum(f.shape) for f in round.state.adapter.frozen.values())
        assert frozen == byte_count(flatten(round.state.adapter, ["frozen"])) > 0


@every_folding
def test_the_start_is_never_written_to(rule: str, options: dict[str, float]) -> None:
    kept = copied(START)
    run(rule, options=options, residual="fold")
    assert same_adapters(START, kept)
    assert START.frozen == {}


# ---------------------------------------------------------------- carrying


@pytest.mark.parametrize("cap", [0, 3])
def test_what_is_carried_is_owed_and_paid_in_the_next_round(cap: int) -> None:
    """adapter_t + carried_t = mean_t + carried_(t-1), up to the cap; nothing is frozen."""
    carried = {name: torch.zeros(f.shape, dtype=torch.float64) for name, f in START.layers.items()}
    for round in run("fra", residual="carry", fold_rank=cap, rounds=5):
        owed = norm = 0.0
        for name, layer in round.state.adapter.layers.items():
            wanted = mean_of(round, name) + carried[name]
            assert_near(dense(layer), nearest_of_rank(wanted, R), 1e-5)
            rest = wanted - nearest_of_rank(wanted, R)
            rest = nearest_of_rank(rest, cap) if cap else rest
            carried[name] = dense(round.state.carried[name])
            if float(rest.norm()) > 1e-4:
                assert_near(carried[name], rest, 1e-5)
            owed += float(rest.norm()) ** 2
            norm += float(wanted.norm()) ** 2
        assert round.state.adapter.frozen == {}
        assert round.state.memory["carried"] == pytest.approx((owed / norm) ** 0.5, rel=1e-5)


def test_carrying_loses_nothing_on_average_where_dropping_loses_the_same_every_time() -> None:
    """Clients who always want the same: the mean of the adapters tends to what they want."""
    results = stubborn_results()
    want = dense_mean([r.adapter.layers["x"] for r in results], [1 / 3] * 3)
    error = {}
    for fate in ("drop", "carry"):
        rounds = run("fra", fit=stubborn, residual=fate, rounds=40)
        mean = torch.stack([dense(r.state.adapter.layers["x"]) for r in rounds]).mean(dim=0)
        error[fate] = float((mean - want).norm() / want.norm())
    assert error["drop"] == pytest.approx(
        float((want - nearest_of_rank(want, R)).norm() / want.norm()), rel=1e-5
    )
    assert error["carry"] < error["drop"] / 8
    owed = frobenius(rounds[-1].state.carried["x"]) / float(want.norm())
    assert error["carry"] == pytest.approx(owed / 40, rel=1e-3)  # the debt, spread over the rounds


def stubborn_results() -> list[ClientResult]:
    plan = Plan(frozenset(), frozenset())
    return [stubborn(name, 1, plan, START, ClientState()) for name in NAMES]


# ---------------------------------------------------------------- which rules allow what


@pytest.mark.parametrize("name", rule_names())
def test_a_residual_that_a_rule_does_not_allow_is_refused_with_those_it_does(name: str) -> None:
    rule = get_rule(name)
    allowed = tuple(rule.residual) or ("drop",)
    assert residual_policy(rule, None) == allowed[0]
    for fate in ("drop", "fold", "carry"):
        if fate in allowed:
            assert residual_policy(rule, fate) == fate
            continue
        listed = f"it allows {', '.join(rule.residual)}" if rule.residual else "it leaves none"
        says = rf"residual = '{fate}' does not go with rule '{name}': {listed}"
        with pytest.raises(ValueError, match=says):
            residual_policy(rule, fate)
        with pytest.raises(ValueError, match=says):
            aggregate(rule, ServerState(START), stubborn_results(), 1, Policy(residual=fate))


def test_each_papers_own_way_with_the_residual_is_its_rules_first_choice() -> None:
    own = {name: residual_policy(get_rule(name), None) for name in rule_names()}
    folding = {name for name, fate in own.items() if fate == "fold"}
    assert folding == {"fedex", "flora", "fedmomentum", "florist"}
    assert set(own.values()) == {"drop", "fold"}
