"""The rule hybrid: its two phases, when it changes over by itself, and plans that see options."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from clients import EXAMPLES, NAMES, restless
from conftest import assert_near, dense, normal, random_adapter, random_factors, same_adapters
from torch import Tensor

import fedlora.rules as registry
from fedlora.adapter import Adapter, ClientResult, ClientState, Factors, flatten, overlay
from fedlora.budget import settled
from fedlora.policy import PLAIN, Policy
from fedlora.rules import SETTLED, Plan, get_rule, traffic, trained
from fedlora.server import ServerState, aggregate
from fedlora.simulation import Fit, Round, simulate

START = random_adapter(0)
W = [0.1, 0.2, 0.7]


def run(
    rounds: int, fit: Fit = restless, rule: str = "hybrid", *, names: Sequence[str] = NAMES,
    participation: float = 1.0, policy: Policy = PLAIN, **options: Any,
) -> list[Round]:  # fmt: skip
    federation = simulate(
        get_rule(rule, **options), fit, START, names, rounds=rounds, participation=participation,
        policy=policy,
    )  # fmt: skip
    return list(federation)


def counts(rounds: list[Round]) -> list[float]:
    return [round.state.memory[SETTLED] for round in rounds]


# ---------------------------------------------------------------- two phases


def test_while_a_moves_it_is_fra_to_the_bit() -> None:
    for mine, theirs in zip(run(3, switch=3), run(3, rule="fra"), strict=True):
        assert same_adapters(mine.state.adapter, theirs.state.adapter)


def test_after_the_switch_a_stays_to_the_bit_and_b_is_the_weighted_mean() -> None:
    before = START
    for round in run(5, switch=2):
        for name, layer in round.state.adapter.layers.items():
            back = [result.adapter.layers[name] for result in round.results]
            w = [EXAMPLES[result.client] / 60 for result in round.results]
            assert torch.equal(layer.A, before.layers[name].A) == (round.round > 2)
            if round.round > 2:
                assert all(torch.equal(client.A, layer.A) for client in back)
                mean = sum(a * client.B.double() for a, client in zip(w, back, strict=True))
                assert torch.equal(layer.B, mean.float())  # type: ignore[union-attr]
        before = round.state.adapter


def test_a_case_by_hand_in_both_phases() -> None:
    """Scaling 2. Frozen: B = (1 + 3 x 5) / 4 = 4. Before: W = 2 ([1 1] + 3 [5 0]) / 4 = [8, .5]."""
    A, one = torch.tensor([[1.0, 0.0]]).double(), torch.ones(1, 1).double()
    prev, w = Factors(A, one, 2.0), [0.25, 0.75]
    frozen = get_rule("hybrid")(prev, [prev, Factors(A, 5 * one, 2.0)], w)
    assert isinstance(frozen, Factors)
    assert torch.equal(frozen.A, A)
    assert frozen.B.item() == 4.0
    other = Factors(torch.tensor([[1.0, 1.0]]).double(), one, 2.0)
    moving = get_rule("hybrid")(prev, [other, Factors(A, 5 * one, 2.0)], w)
    assert isinstance(moving, Factors)
    assert_near(dense(moving), torch.tensor([[8.0, 0.5]]).double())
    assert moving.A.norm() == pytest.approx(dense(moving).norm().sqrt() / math.sqrt(2))  # balanced


def test_a_mean_of_equal_rows_does_not_move_by_rounding() -> None:
    prev = random_factors(0)
    clients = [Factors(prev.A, normal(k, 7, 3), 2.0) for k in range(3)]
    merged = get_rule("hybrid")(prev, clients, W)
    assert isinstance(merged, Factors)
    assert torch.equal(merged.A, prev.A)


def test_where_nobody_trained_nothing_moves_also_in_the_first_round() -> None:
    for B in (normal(5, 7, 3), torch.zeros(7, 3).double()):
        prev = Factors(normal(4, 3, 5), B, 2.0)
        merged = get_rule("hybrid")(prev, [prev] * 3, W)
        assert isinstance(merged, Factors)
        assert torch.equal(merged.A, prev.A)
        assert_near(merged.B, prev.B, 1e-15)


@pytest.mark.parametrize("policy", [Policy(server_lr=0.5), Policy(robust="norm_clipping")], ids=str)
def test_what_the_server_adds_does_not_thaw_a(policy: Policy) -> None:
    rounds = run(4, switch=1, policy=policy)
    for name in START.layers:
        kept = {tuple(r.state.adapter.layers[name].A.flatten().tolist()) for r in rounds}
        assert len(kept) == 1


def test_clients_that_come_late_are_sent_the_frozen_a() -> None:
    seen: list[tuple[str, int, Adapter]] = []

    def spy(client: str, round: int, plan: Plan, sent: Adapter, state: ClientState) -> ClientResult:
        seen.append((client, round, sent))
        assert plan.receives >= {"A", "B"}
        assert ("A" in plan.trains & plan.shares) == (round == 1)
        assert ("A" in plan.trains | plan.shares) == (round == 1)
        return restless(client, round, plan, sent, state)

    rounds = run(5, spy, participation=0.3, switch=1)
    assert {client for client, round, _ in seen if round > 1} - {seen[0][0]}
    for _, round, sent in seen[1:]:
        assert same_adapters(sent, rounds[round - 2].state.adapter)


def test_after_the_switch_b_alone_goes_up() -> None:
    rounds = run(3, switch=2)
    numbers = [round.bytes_up / 4 / 3 for round in rounds]
    head, A, B = 21, 2 * 5 + 2 * 6, 7 * 2 + 4 * 2
    assert numbers == [A + B + head, A + B + head, B + head]
    assert len({round.bytes_down for round in rounds}) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [({"switch": -1}, r"switch -1 is below 0"), ({"patience": 0}, r"patience 0 is below 1"),
     ({"switch": "never"}, r"'never', expected int or 'auto'"),
     ({"switch": True}, r"True, expected int or 'auto'"), ({"switch": 1.5}, r"1.5, expected int")],
)  # fmt: skip
def test_options_out_of_range_are_refused(options: dict[str, Any], says: str) -> None:
    prev = random_factors(0)
    with pytest.raises(ValueError, match=says):
        get_rule("hybrid", **options)(prev, [prev], [1.0])


# ---------------------------------------------------------------- when new directions are noise


def layer(new: float, apart: float) -> Mapping[str, float]:
    return {"update": 1.0, "new": new, "new_drift": apart}


def test_the_criterion_by_hand() -> None:
    """Weights .5, .5: q = .5, noise^2 = new_drift^2; weights .75, .25: q = 10/16, 10/6 of it."""
    even, odd = [0.5, 0.5], [3.0, 1.0]
    for w, noise in ((even, 1.0), (odd, 10 / 6)):
        limit = math.sqrt(2 * noise)
        assert settled({"x": layer(0.999 * limit, 1.0)}, w, 3.0) == 4.0
        assert settled({"x": layer(1.001 * limit, 1.0)}, w, 3.0) == 0.0
    two = {"x": layer(3.0, 2.0), "y": layer(1.0, 1.1)}  # 10 against 2 x 5.21: over both layers
    assert settled(two, even, 0.0) == 1.0
    assert settled(two | {"z": layer(1.0, 0.0)}, even, 1.0) == 0.0


def test_what_tells_nothing_leaves_the_count_as_it_is() -> None:
    assert settled({"x": layer(5.0, 0.0)}, [1.0], 1.0) == 1.0
    assert settled({"x": layer(5.0, 0.0)}, [1.0, 0.0], 1.0) == 1.0
    assert settled({"x": {"update": 0.0, "new": 0.0, "new_drift": 0.0}}, [0.5, 0.5], 1.0) == 1.0
    assert settled({}, [], 2.0) == 2.0
    assert settled({"x": layer(0.0, 0.0)}, [0.5, 0.5], 1.0) == 2.0  # A stood still


def test_the_spread_of_clients_estimates_the_noise_of_their_mean() -> None:
    """N_k = noise alone, unequal weights: new^2 is new_drift^2 q / (1 - q) on average."""
    w = torch.tensor(W).double()
    q = float(w.square().sum())
    noise = normal(0, 4000, 3, 6)
    mean = torch.tensordot(noise, w, dims=([1], [0]))
    apart = ((noise - mean[:, None]).square().sum(dim=2) @ w).mean()
    estimate = float(apart) * q / (1 - q)
    assert estimate == pytest.approx(float(mean.square().sum(dim=1).mean()), rel=0.03)


def ahead(shared: float, own: float) -> Fit:
    """Clients that move by a common draw of the round and by one of their own."""

    def fit(client: str, round: int, plan: Plan, sent: Adapter, state: ClientState) -> ClientResult:
        moved = {}
        for index, (name, tensor) in enumerate(flatten(sent, plan.trains).items()):
            common = normal(1000 * round + index, *tensor.shape).float()
            noise = normal(1000 * round + 100 * (ord(client) - 90) + index, *tensor.shape).float()
            moved[name] = tensor + shared * common + own * noise
        return ClientResult(client, overlay(moved, sent), 10)

    return fit


def moves(rounds: Sequence[Round]) -> list[bool]:
    """Whether A moved, round by round."""
    states = [START, *(round.state.adapter for round in rounds)]
    return [
        not torch.equal(x.layers["block.query"].A, y.layers["block.query"].A)
        for x, y in pairwise(states)
    ]


def test_noise_freezes_a_after_patience_rounds_not_counting_the_first() -> None:
    for patience, moving in ((1, 2), (2, 3), (3, 4)):
        rounds = run(6, ahead(0.0, 0.1), patience=patience)
        assert counts(rounds) == [0, 1, 2, 3, 4, 5]
        assert moves(rounds) == [True] * moving + [False] * (6 - moving)


def test_what_clients_have_in_common_keeps_a_moving() -> None:
    rounds = run(6, ahead(0.1, 0.02))
    assert counts(rounds) == [0] * 6
    assert all(moves(rounds))


def test_one_client_never_freezes_a() -> None:
    rounds = run(6, ahead(0.0, 0.1), names=("a",), patience=1)
    assert counts(rounds) == [0] * 6
    assert all(moves(rounds))


def test_a_round_with_something_in_common_starts_the_count_again() -> None:
    def fit(client: str, round: int, *rest: Any) -> ClientResult:
        return (ahead(0.3, 0.01) if round == 3 else ahead(0.0, 0.1))(client, round, *rest)

    rounds = run(6, fit)
    assert counts(rounds) == [0, 1, 0, 1, 2, 3]
    assert moves(rounds) == [True] * 5 + [False]


def test_once_frozen_a_stays_so_whoever_takes_part() -> None:
    """Rounds of one client, and of clients that agree on everything, after noise."""

    def fit(client: str, round: int, *rest: Any) -> ClientResult:
        if round > 4 and client != "a":
            raise ValueError("not today")
        return (ahead(0.0, 0.1) if round < 4 else ahead(0.3, 0.0))(client, round, *rest)

    rounds = run(7, fit, policy=Policy(min_clients=1))
    assert [len(round.results) for round in rounds] == [3] * 4 + [1] * 3
    assert counts(rounds) == [0, 1, 2, 3, 3, 3, 3]
    assert moves(rounds) == [True] * 3 + [False] * 4


def test_failed_rounds_do_not_count_nor_start_again() -> None:
    def fit(client: str, round: int, *rest: Any) -> ClientResult:
        if round in (1, 3):
            raise ValueError("no power")
        return ahead(0.0, 0.1)(client, round, *rest)

    rounds = run(6, fit, policy=Policy(max_failed_rounds=2))
    assert [round.state.memory.get(SETTLED) for round in rounds] == [None, 0, 0, 1, 2, 3]
    assert moves(rounds) == [False, True, False, True, True, False]


def test_a_merge_counts_from_its_own_budget() -> None:
    """Two clients, A = [0, 1], B = 1: new parts [c + d, 0] and [c - d, 0]; c^2 against 2 d^2."""
    one = torch.ones(1, 1)
    state = ServerState(
        Adapter({"x": Factors(torch.tensor([[0.0, 1.0]]), one, 2.0)}), {"merge_error": 0.0}
    )
    for c, want in ((1.40, 1.0), (1.43, 0.0)):
        results = [
            ClientResult(name, Adapter({"x": Factors(torch.tensor([[c + d, 1.0]]), one, 2.0)}), 10)
            for name, d in (("a", 1.0), ("b", -1.0))
        ]
        assert aggregate(get_rule("fra"), state, results, 2).memory[SETTLED] == want


# ---------------------------------------------------------------- plans that see options


def test_a_plan_sees_the_options_of_its_rule_or_their_defaults() -> None:
    both, alone = {"A", "B"}, {"B"}
    assert get_rule("hybrid").plan(9, {SETTLED: 1.0}).trains == both
    assert get_rule("hybrid").plan(9, {SETTLED: 2.0}).trains == alone
    assert get_rule("hybrid", patience=3).plan(9, {SETTLED: 2.0}).trains == both
    three = get_rule("hybrid", switch=3)
    assert [three.plan(round, {SETTLED: 9.0}).trains for round in (3, 4)] == [both, alone]


@pytest.mark.parametrize(
    ("switch", "trains", "up"),
    [("auto", "A and B, then B", "r (m + n), then r m"), (5, "A and B, then B",
     "r (m + n), then r m"), (1, "A and B, then B", "r (m + n), then r m"), (0, "B", "r m")],
)  # fmt: skip
def test_both_phases_are_described(switch: int | str, trains: str, up: str) -> None:
    rule = get_rule("hybrid", switch=switch)
    assert trained(rule) == trains
    assert traffic(rule) == (up, "r (m + n)")


def test_rules_without_phases_are_described_as_before() -> None:
    assert trained(get_rule("rolora")) == "B, A in turn"
    assert traffic(get_rule("rolora")) == ("r m, r n in turn", "r (m + n)")
    assert trained(get_rule("fra")) == "A and B"


def test_a_plan_that_asks_for_what_is_no_option_is_refused() -> None:
    def plan(round: int, memory: Mapping[str, float], *, swich: int) -> Plan:
        return Plan(frozenset(), frozenset())

    laws = dict.fromkeys(registry.LAWS, "a toy for one test claims nothing at all")
    with pytest.raises(TypeError, match="the plan of rule 'toy' wants 'swich', which is no option"):

        @registry.rule(plan=plan, **laws)
        def toy(prev: Factors, clients: list[Factors], w: Tensor, *, switch: int = 1) -> Factors:
            return prev

    assert "toy" not in registry._RULES
