"""A federation in one process: toy clients pull a small layer and a head towards their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from conftest import (
    assert_near,
    dense,
    nearest_of_rank,
    normal,
    random_adapter,
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
    flatten,
    overlay,
)
from fedlora.policy import Policy
from fedlora.rules import Plan, get_rule, rule_names
from fedlora.server import ServerState, aggregate, sample_clients
from fedlora.simulation import Fit, Round, simulate

CLIENTS = ("a", "b", "c")
M, N, R = 7, 5, 2
START = Adapter(
    {"x": Factors(normal(0, R, N, dtype=torch.float32), torch.zeros(M, R), 0.5)},
    {"head": torch.zeros(3)},
)
COMMON = normal(1, M, R).float() @ normal(2, R, N).float()
TARGETS = {c: COMMON + 0.1 * normal(k, M, N).float() for k, c in enumerate(CLIENTS, start=10)}
POLICIES = {entry.name for entry in fields(Policy)}
HEADS = {c: normal(k, 3, dtype=torch.float32) for k, c in enumerate(CLIENTS, start=20)}


def whole(adapter: Adapter) -> Tensor:
    """All that the model adds to the weight of x."""
    folded = dense(adapter.frozen["x"]) if "x" in adapter.frozen else 0.0
    return dense(adapter.layers["x"]) + folded


def loss(adapter: Adapter, client: str) -> float:
    return float((whole(adapter) - TARGETS[client].double()).norm()) ** 2


def fit(client: str, round: int, plan: Plan, sent: Adapter, state: ClientState) -> ClientResult:
    """Thirty steps of plain gradient descent on ||s B A - T_k||^2 / 2; the head moves half-way."""
    own = plan.trains - plan.shares
    held = sent if state.adapter is None else overlay(flatten(state.adapter, own), sent)
    factors = held.layers["x"]
    A, B, s = factors.A, factors.B, factors.scaling
    target = TARGETS[client]
    if "x" in sent.frozen:
        target = target - dense(sent.frozen["x"]).float()
    for _ in range(30):
        error = s * B @ A - target
        step_A = s * B.mT @ error if "A" in plan.trains else torch.zeros_like(A)
        step_B = s * error @ A.mT if "B" in plan.trains else torch.zeros_like(B)
        A, B = A - 0.05 * step_A, B - 0.05 * step_B
    head = held.dense["head"]
    if "head" in plan.trains:
        head = head + 0.5 * (HEADS[client] - head)
    adapter = Adapter({"x": Factors(A, B, s)}, {"head": head})
    personal = adapter if own else None
    return ClientResult(client, adapter, 10, {}, ClientState(personal))


def run(rule: str = "fra", fit: Fit = fit, rounds: int = 4, **settings: object) -> list[Round]:
    around = {key: settings.pop(key) for key in POLICIES & settings.keys()}
    chosen: dict[str, object] = {"clients": CLIENTS, "policy": Policy(**around), **settings}
    return list(simulate(get_rule(rule), fit, START, rounds=rounds, **chosen))  # type: ignore[arg-type]


def spied(seen: list[tuple[str, int, Plan, Adapter, ClientState]]) -> Fit:
    def spy(client: str, round: int, plan: Plan, sent: Adapter, state: ClientState) -> ClientResult:
        seen.append((client, round, plan, sent, state))
        return fit(client, round, plan, sent, state)

    return spy


@pytest.mark.parametrize("rule", rule_names())
def test_a_federation_learns_what_its_clients_have_in_common(rule: str) -> None:
    last = run(rule, rounds=6)[-1]
    for client in CLIENTS:
        mine = last.personal.get(client, last.state.adapter)
        assert loss(mine, client) < 0.85 * loss(START, client)


def test_fra_comes_near_the_best_adapter_for_the_mean_of_the_targets() -> None:
    best = nearest_of_rank(torch.stack(list(TARGETS.values())).mean(dim=0).double(), R)
    last = run("fra", rounds=25)[-1].state.adapter.layers["x"]
    assert_near(dense(last), best, 0.02)  # 30 local steps a round stop short of the optimum


@pytest.mark.parametrize("rule", rule_names())
def test_two_runs_give_the_same_bits(rule: str) -> None:
    for left, right in zip(run(rule, participation=0.6), run(rule, participation=0.6), strict=True):
        assert same_adapters(left.state.adapter, right.state.adapter)
        assert left.state.memory == right.state.memory


@pytest.mark.parametrize("rule", rule_names())
def test_the_order_of_the_clients_does_not_change_a_bit(rule: str) -> None:
    want = run(rule, participation=0.6)
    for clients in (("c", "a", "b"), ("b", "c", "a")):
        got = run(rule, participation=0.6, clients=clients)
        for left, right in zip(want, got, strict=True):
            assert same_adapters(left.state.adapter, right.state.adapter)


def test_one_client_under_fedavg_is_plain_training() -> None:
    adapter = START
    plan = Plan(*[frozenset({"A", "B", "head"})] * 3)
    for round in run("fedavg", clients=["a"]):
        adapter = fit("a", round.round, plan, adapter, ClientState()).adapter
        assert same_adapters(round.state.adapter, adapter)


def test_a_round_is_aggregate_over_what_every_client_makes_of_the_last_adapter() -> None:
    """The loop by hand: nothing happens between `fit` and `aggregate`."""
    state, plan = ServerState(START), Plan(*[frozenset({"A", "B", "head"})] * 3)
    for round in run("fra"):
        results = [fit(c, round.round, plan, state.adapter, ClientState()) for c in CLIENTS]
        state = aggregate(get_rule("fra"), state, results, round.round)
        assert same_adapters(round.state.adapter, state.adapter)
        assert [result.client for result in round.results] == list(CLIENTS)


def test_rounds_are_numbered_from_one_and_come_as_they_end() -> None:
    seen: list[tuple[str, int, Plan, Adapter, ClientState]] = []
    rounds = simulate(get_rule("fra"), spied(seen), START, CLIENTS, rounds=3)
    assert seen == []
    assert next(rounds).round == 1
    assert [call[:2] for call in seen] == [("a", 1), ("b", 1), ("c", 1)]
    assert [round.round for round in rounds] == [2, 3]
    assert run(rounds=0) == []


def test_only_the_sampled_clients_train_and_are_merged() -> None:
    seen: list[tuple[str, int, Plan, Adapter, ClientState]] = []
    for round in run("fra", spied(seen), rounds=5, participation=0.5, seed=4):
        want = sample_clients(CLIENTS, 0.5, 4, round.round)
        assert [call[0] for call in seen if call[1] == round.round] == want
        assert [result.client for result in round.results] == want


def test_examples_weigh_the_clients_unless_weights_are_uniform() -> None:
    def skewed(client: str, *rest: object) -> ClientResult:
        return replace(fit(client, *rest), examples=1000 if client == "a" else 1)  # type: ignore[arg-type]

    weighed = run("fra", skewed, rounds=1)[-1].state.adapter
    alone = run("fra", clients=["a"], rounds=1)[-1].state.adapter
    assert_near(dense(weighed.layers["x"]), dense(alone.layers["x"]), 0.01)
    uniform = run("fra", skewed, rounds=1, weighting="uniform")[-1].state.adapter
    assert same_adapters(uniform, run("fra", rounds=1)[-1].state.adapter)


# ---------------------------------------------------------------- what stays where it is


def test_each_client_gets_its_own_state_back_and_nobody_elses() -> None:
    seen: list[tuple[str, int, Plan, Adapter, ClientState]] = []

    def counting(
        client: str, round: int, plan: Plan, sent: Adapter, state: ClientState
    ) -> ClientResult:
        seen.append((client, round, plan, sent, state))
        count = state.optimiser.get(client, torch.zeros(1)) + 1
        return replace(fit(client, round, plan, sent, state),
                       state=ClientState(None, {client: count}))  # fmt: skip

    run("fra", counting, rounds=6, participation=0.5, seed=1)
    times = dict.fromkeys(CLIENTS, 0)
    for client, _, _, _, state in seen:
        want = {client: float(times[client])} if times[client] else {}
        assert {name: float(count) for name, count in state.optimiser.items()} == want
        times[client] += 1
    assert min(times.values()) > 1


def test_an_averaged_head_goes_to_everybody() -> None:
    first, second = run("fra", rounds=2)
    want = torch.stack([0.5 * HEADS[c] for c in CLIENTS]).double().mean(dim=0).float()
    torch.testing.assert_close(first.state.adapter.dense["head"], want)
    assert not torch.equal(second.state.adapter.dense["head"], want)


def test_a_frozen_head_stays_at_its_start() -> None:
    for round in run("fra", head="freeze"):
        assert torch.equal(round.state.adapter.dense["head"], START.dense["head"])


def test_a_local_head_never_leaks_and_is_kept_by_its_owner() -> None:
    seen: list[tuple[str, int, Plan, Adapter, ClientState]] = []
    for round in run("fra", spied(seen), head="local"):
        assert torch.equal(round.state.adapter.dense["head"], START.dense["head"])
        for result in round.results:
            assert torch.equal(result.adapter.dense["head"], START.dense["head"])
            assert result.state.adapter is not None
            share = 1 - 0.5**round.round  # half of what is left, every round, towards its own
            torch.testing.assert_close(
                result.state.adapter.dense["head"], share * HEADS[result.client]
            )
    assert all(torch.equal(call[3].dense["head"], START.dense["head"]) for call in seen)


def test_a_personal_adapter_is_the_merged_one_with_the_clients_own_head() -> None:
    """Also for a client that sat this round out: its head is the one it last trained."""
    heads: dict[str, torch.Tensor] = {}
    for round in run("fra", head="local", participation=0.5, rounds=6, seed=1):
        heads |= {r.client: r.state.adapter.dense["head"] for r in round.results if r.state.adapter}
        assert list(round.personal) == sorted(heads)
        for client, own in round.personal.items():
            assert same_bits(own.layers["x"], round.state.adapter.layers["x"])
            assert torch.equal(own.dense["head"], heads[client])
    assert len(heads) == 3


@pytest.mark.parametrize("head", ["average", "freeze"])
def test_nothing_is_personal_where_everything_trained_is_shared(head: str) -> None:
    assert all(round.personal == {} for round in run("fra", head=head))


def test_ffa_never_moves_a_not_even_where_a_client_trains_it() -> None:
    def cheating(
        client: str, round: int, plan: Plan, sent: Adapter, state: ClientState
    ) -> ClientResult:
        return fit(client, round, replace(plan, trains=plan.trains | {"A"}), sent, state)

    for dishonest in (fit, cheating):
        for round in run("ffa", dishonest):
            assert torch.equal(round.state.adapter.layers["x"].A, START.layers["x"].A)
    assert float(round.state.adapter.layers["x"].B.norm()) > 0


def test_what_was_sent_is_the_same_for_all_and_the_last_adapter() -> None:
    seen: list[tuple[str, int, Plan, Adapter, ClientState]] = []
    rounds = run("ffa", spied(seen))
    for _, round, _, sent, _ in seen:
        want = START if round == 1 else rounds[round - 2].state.adapter
        assert same_adapters(sent, want)


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize(
    ("rule", "numbers"), [("fedavg", R * (M + N)), ("fra", R * (M + N)), ("ffa", R * M)]
)
@pytest.mark.parametrize(("head", "extra"), [("average", 3), ("freeze", 0), ("local", 0)])
def test_bytes_are_four_for_every_number_that_travels(
    rule: str, numbers: int, head: str, extra: int
) -> None:
    for round in run(rule, head=head, participation=0.6):
        assert len(round.results) == 2
        assert round.bytes_up == round.bytes_down == 2 * 4 * (numbers + extra)


def test_the_seconds_of_the_merge_are_measured() -> None:
    assert 0 < run("ffa", rounds=1)[0].seconds_aggregate < 10


# ---------------------------------------------------------------- clients that misbehave


@pytest.mark.parametrize("harm", ["input", "output"])
def test_a_fit_that_writes_into_tensors_in_place_reaches_nobody_else(harm: str) -> None:
    """In other engines a message is a copy; here too, or the two would not give the same bits."""
    live = {name: tensor.clone() for name, tensor in flatten(START).items()}

    def careless(
        client: str, round: int, plan: Plan, sent: Adapter, state: ClientState
    ) -> ClientResult:
        result = fit(client, round, plan, sent, state)
        if harm == "input":
            for tensor in flatten(sent).values():
                tensor.add_(1.0)
            return result
        for name, tensor in flatten(result.adapter).items():
            live[name].copy_(tensor)  # one model for all clients, whose tensors are not cloned
        x = Factors(live["x.lora_A"], live["x.lora_B"], 0.5)
        return replace(result, adapter=Adapter({"x": x}, {"head": live["head"]}))

    start = Adapter(
        {"x": Factors(START.layers["x"].A.clone(), START.layers["x"].B.clone(), 0.5)},
        {"head": START.dense["head"].clone()},
    )
    got = list(simulate(get_rule("fra"), careless, start, CLIENTS, rounds=2))
    for left, right in zip(run("fra", rounds=2), got, strict=True):
        assert same_adapters(left.state.adapter, right.state.adapter)
    assert same_adapters(start, START)


def broken(change: Callable[[ClientResult], ClientResult]) -> Fit:
    def fails(
        client: str, round: int, plan: Plan, sent: Adapter, state: ClientState
    ) -> ClientResult:
        result = fit(client, round, plan, sent, state)
        return change(result) if client == "b" else result

    return fails


def test_a_client_that_diverged_is_named() -> None:
    def nan(result: ClientResult) -> ClientResult:
        return replace(
            result, adapter=replace(result.adapter, dense={"head": torch.full((3,), math.nan)})
        )

    with pytest.raises(ValueError, match=r"client b sent 'head' with NaN or Inf"):
        run(fit=broken(nan))


def test_a_client_that_sends_another_rank_or_layer_is_named() -> None:
    wide = Factors(torch.zeros(3, N), torch.zeros(M, 3), 0.5)
    with pytest.raises(ValueError, match=r"client b sent 'x\.lora_A' with shape \(3, 5\)"):
        run(fit=broken(lambda r: replace(r, adapter=Adapter({"x": wide}, r.adapter.dense))))
    with pytest.raises(ValueError, match=r"client b did not send 'head' \(3 missing\)"):
        run(fit=broken(lambda r: replace(r, adapter=random_adapter(0))))


def test_the_start_itself_is_never_written_to() -> None:
    before = byte_count(flatten(START)), START.layers["x"].A.clone()
    run("fra")
    assert (byte_count(flatten(START)), True) == (
        before[0], torch.equal(START.layers["x"].A, before[1])
    )  # fmt: skip
