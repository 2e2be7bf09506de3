"""The server's half of a round: who takes part, what is refused, what a merge gives and reports."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import (
    dense,
    dense_mean,
    nearest_of_rank,
    normal,
    random_adapter,
    random_results,
    same_adapters,
)
from torch import Tensor
from torch.testing import assert_close

import fedlora.rules as registry
from fedlora.adapter import (
    PARTS,
    Adapter,
    ClientResult,
    Factors,
    flatten,
    mean_factors,
    overlay,
)
from fedlora.policy import Policy, base_weights
from fedlora.rules import Plan, Rule, get_rule, rule_names
from fedlora.server import (
    ServerState,
    aggregate,
    downlink,
    plan_round,
    receive,
    sample_clients,
)

EVERYTHING = Plan(PARTS, PARTS, PARTS)
STATE = ServerState(random_adapter(0))
SHARES = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)  # of 10, 30 and 60 examples


# ---------------------------------------------------------------- who takes part


def test_sampling_does_not_depend_on_the_order_of_the_ids() -> None:
    ids = [f"c{index}" for index in range(12)]
    drawn = sample_clients(ids, 0.5, seed=3, round=2)
    assert drawn == sorted(drawn)
    assert len(set(drawn)) == 6
    for other in (ids[::-1], ids[5:] + ids[:5]):
        assert sample_clients(other, 0.5, seed=3, round=2) == drawn


def test_sampling_depends_on_the_seed_and_the_round_alone() -> None:
    ids = [f"c{index}" for index in range(12)]
    assert sample_clients(ids, 0.5, 3, 2) == sample_clients(ids, 0.5, 3, 2)
    draws = {tuple(sample_clients(ids, 0.5, seed, round)) for seed in (0, 1) for round in (1, 2, 3)}
    assert len(draws) == 6


def test_sampling_is_pinned_and_fair() -> None:
    ids = [f"c{index}" for index in range(6)]
    assert sample_clients(ids, 0.5, 0, 1) == ["c0", "c2", "c5"]
    counts = dict.fromkeys(ids, 0)
    for round in range(300):
        for client in sample_clients(ids, 0.5, 0, round):
            counts[client] += 1
    assert min(counts.values()) > 120
    assert max(counts.values()) < 180


@pytest.mark.parametrize(
    ("share", "count"), [(1.0, 10), (0.1, 1), (0.11, 2), (0.3, 3), (0.7, 7), (1e-12, 1)]
)
def test_a_participation_gives_its_share_rounded_up_and_never_nobody(
    share: float, count: int
) -> None:
    assert len(sample_clients([f"c{index}" for index in range(10)], share, 0, 1)) == count


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, math.nan])
def test_a_participation_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"participation .* outside \(0, 1\]"):
        sample_clients(["a"], share, 0, 1)


# ---------------------------------------------------------------- what travels


@pytest.mark.parametrize("name", rule_names())
def test_an_averaged_head_is_trained_shared_and_sent_unless_the_rule_keeps_it(name: str) -> None:
    bare = get_rule(name).plan(1, {})
    if "head" in bare.trains:
        assert plan_round(get_rule(name), "average", STATE, 1) == bare
        assert name == "fedsa"
        return
    plan = plan_round(get_rule(name), "average", STATE, 1)
    assert (plan.trains, plan.shares) == (bare.trains | {"head"}, bare.shares | {"head"})
    assert plan.receives == bare.receives | {"head"}


@pytest.mark.parametrize("name", rule_names())
def test_a_frozen_head_is_neither_trained_nor_shared_nor_sent(name: str) -> None:
    plan = plan_round(get_rule(name), "freeze", STATE, 1)
    assert "head" not in plan.trains | plan.shares | plan.receives


@pytest.mark.parametrize("name", rule_names())
def test_a_local_head_is_trained_and_never_travels(name: str) -> None:
    plan = plan_round(get_rule(name), "local", STATE, 1)
    assert "head" in plan.trains
    assert "head" not in plan.shares | plan.receives


def test_a_plan_sees_the_round_and_the_figures_of_the_last_merge() -> None:
    seen = []

    def plan(round: int, memory: object) -> Plan:
        seen.append((round, memory))
        return Plan(frozenset("A"), frozenset("A"))

    state = replace(STATE, memory={"merge_error": 0.25})
    plan_round(replace(get_rule("fra"), plan=plan), "freeze", state, 4)
    assert seen == [(4, {"merge_error": 0.25})]


def test_the_downlink_holds_what_the_plan_says_and_nothing_else() -> None:
    plan = Plan(frozenset("B"), frozenset("B"), frozenset("B"))
    assert list(downlink(STATE, plan)) == ["block.query.lora_B", "block.value.lora_B"]
    assert list(downlink(STATE, EVERYTHING)) == list(flatten(STATE.adapter))


def test_what_a_client_does_not_share_is_filled_from_what_it_was_sent() -> None:
    mine = random_adapter(50)
    plan = Plan(frozenset({"A", "B", "head"}), frozenset("B"))
    got = receive("a", flatten(mine, "B"), STATE.adapter, plan)
    for name, factors in got.layers.items():
        assert torch.equal(factors.A, STATE.adapter.layers[name].A)
        assert torch.equal(factors.B, mine.layers[name].B)
    assert torch.equal(got.dense["head.bias"], STATE.adapter.dense["head.bias"])


def sent(**changes: Tensor | None) -> dict[str, Tensor]:
    """A good message with some tensors changed, added or (None) left out."""
    tensors = flatten(random_adapter(50)) | {k.replace("__", "."): v for k, v in changes.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (sent(block__query__lora_A=None), r"did not send 'block\.query\.lora_A' \(1 missing\)"),
        (sent(head__weight=None, head__bias=None), r"did not send 'head\.bias' \(2 missing\)"),
        (sent(block__key__lora_A=torch.zeros(2, 5)), r"'block\.key\.lora_A', which .* not share"),
        (sent(block__value__lora_B=torch.zeros(2, 4)), r"'block\.value\.lora_B'.*\(2, 4\).*\(4, 2"),
        (sent(block__value__lora_A=torch.zeros(3, 6)), r"'block\.value\.lora_A'.*\(3, 6\).*\(2, 6"),
        (sent(head__bias=torch.zeros(3).double()), r"'head\.bias' as torch.float64.*torch.float32"),
        (sent(head__bias=torch.zeros(3).bfloat16()), r"'head\.bias' as torch.bfloat16"),
        (
            sent(head__bias=torch.tensor([0, math.nan, 0])),
            r"'head\.bias' with NaN or Inf.*diverged",
        ),
        (sent(block__query__lora_A=torch.full((2, 5), math.inf)), r"lora_A' with NaN or Inf"),
        (sent(block__query__lora_B=torch.full((7, 2), -math.inf)), r"lora_B' with NaN or Inf"),
    ],
)
def test_a_message_that_does_not_fit_is_refused_naming_client_and_tensor(
    message: dict[str, Tensor], says: str
) -> None:
    with pytest.raises(ValueError, match=rf"client hospital-a .*{says}"):
        receive("hospital-a", message, STATE.adapter, EVERYTHING)


def test_a_tensor_that_this_round_does_not_share_is_refused_though_the_layer_has_it() -> None:
    plan = Plan(frozenset("B"), frozenset("B"))
    with pytest.raises(ValueError, match=r"client a sent 'block\.query\.lora_A'.*not share"):
        receive("a", flatten(random_adapter(50), ["A", "B"]), STATE.adapter, plan)


# ---------------------------------------------------------------- weights


def test_weights_are_the_shares_of_examples_or_all_alike() -> None:
    results = random_results(0)
    assert_close(base_weights(results, "examples"), SHARES)
    assert_close(base_weights(results, "uniform"), torch.full((3,), 1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("examples", [0, -3, True])
def test_a_client_without_examples_is_refused_by_name(examples: int) -> None:
    results = [*random_results(0), ClientResult("empty", random_adapter(9), examples)]
    for weighting in ("examples", "uniform"):
        with pytest.raises(ValueError, match=rf"client empty reports {examples!r} examples"):
            base_weights(results, weighting)


# ---------------------------------------------------------------- the merge


@pytest.mark.parametrize("name", rule_names())
def test_the_order_of_replies_does_not_change_a_bit(name: str) -> None:
    results = random_results(0, examples=(7, 13, 29, 31))
    merged = [
        aggregate(get_rule(name), STATE, order, 1) for order in itertools.permutations(results)
    ]
    assert all(same_adapters(merged[0].adapter, other.adapter) for other in merged)
    assert len({other.memory["merge_error"] for other in merged}) == 1


@pytest.mark.parametrize("name", rule_names())
def test_a_merge_comes_out_in_float32_on_the_cpu_with_every_layer_and_the_head(name: str) -> None:
    adapter = aggregate(get_rule(name), STATE, random_results(0), 1).adapter
    assert list(adapter.layers) == list(STATE.adapter.layers)
    assert list(adapter.dense) == list(STATE.adapter.dense)
    for tensor in flatten(adapter).values():
        assert (tensor.dtype, tensor.device.type) == (torch.float32, "cpu")


def test_fra_merges_each_layer_to_the_best_adapter_of_the_weighted_increments() -> None:
    results = random_results(0)
    merged = aggregate(get_rule("fra"), STATE, results, 1).adapter
    for name in STATE.adapter.layers:
        mean = dense_mean([r.adapter.layers[name] for r in results], SHARES)
        # float32 comes out: 2^-24 of the largest entries
        assert_close(dense(merged.layers[name]), nearest_of_rank(mean, 2), rtol=0, atol=1e-5)


def test_uniform_weights_ignore_the_examples() -> None:
    results = random_results(0)
    alike = [replace(result, examples=5) for result in results]
    left = aggregate(get_rule("fra"), STATE, results, 1, Policy(weighting="uniform"))
    right = aggregate(get_rule("fra"), STATE, alike, 1)
    assert same_adapters(left.adapter, right.adapter)


def test_sums_are_in_float64_so_that_many_small_clients_are_not_lost() -> None:
    """1 + 4,000 x 2^-25: float32 sums would return exactly 1 for the head and for B."""
    examples = 2**20
    one, small = torch.ones(1), torch.full((1,), 2.0**-5)
    results = [ClientResult("a", toy(one), examples)] + [
        ClientResult(f"b{index}", toy(small), 1) for index in range(4000)
    ]
    merged = aggregate(get_rule("ffa"), ServerState(toy(one)), results, 1).adapter
    want = (examples + 4000 * 2.0**-5) / (examples + 4000)
    assert float(merged.dense["h"]) == pytest.approx(want, rel=2**-24)
    assert float(merged.layers["x"].B) == pytest.approx(want, rel=2**-24)


def toy(value: Tensor) -> Adapter:
    return Adapter({"x": Factors(torch.ones(1, 1), value.reshape(1, 1), 1.0)}, {"h": value})


def test_the_head_is_the_weighted_mean_of_the_clients_heads() -> None:
    results = random_results(0)
    merged = aggregate(get_rule("fra"), STATE, results, 1).adapter
    for name, tensor in merged.dense.items():
        want = sum(w * r.adapter.dense[name].double() for w, r in zip(SHARES, results, strict=True))
        assert torch.equal(tensor, want.float())


def test_a_part_that_nobody_changed_comes_back_to_the_bit() -> None:
    """The frozen head, and A under ffa: a mean of equal tensors is that tensor."""
    start = STATE.adapter
    results = [
        replace(result, adapter=receive(result.client, flatten(result.adapter, "B"), start,
                                        get_rule("ffa").plan(1, {})))
        for result in random_results(0, examples=(7, 13, 29))
    ]  # fmt: skip
    merged = aggregate(get_rule("ffa"), STATE, results, 1).adapter
    for name in start.layers:
        assert torch.equal(merged.layers[name].A, start.layers[name].A)
    for name in start.dense:
        assert torch.equal(merged.dense[name], start.dense[name])


@pytest.mark.parametrize("name", rule_names())
def test_the_merge_error_is_the_relative_distance_over_all_layers(name: str) -> None:
    results = random_results(0)
    state = aggregate(get_rule(name), STATE, results, 1)
    reweigh = get_rule(name).reweigh
    weights = reweigh([STATE.adapter] * 3, results, SHARES) if reweigh else SHARES
    missed = norm = 0.0
    for layer, factors in state.adapter.layers.items():
        mean = dense_mean([r.adapter.layers[layer] for r in results], weights)
        folded = dense(state.adapter.frozen[layer]) if layer in state.adapter.frozen else 0.0
        missed += float((mean - dense(factors) - folded).norm()) ** 2
        norm += float(mean.norm()) ** 2
    assert math.isclose(
        state.memory["merge_error"], math.sqrt(missed / norm), rel_tol=1e-6, abs_tol=1e-6
    )


@pytest.fixture
def heaviest() -> Iterator[Rule]:
    """A rule for one test: the mean of the factors, all the weight on the last client."""
    laws = dict.fromkeys(registry.LAWS, "a toy for one test claims nothing at all")

    def reweigh(sent: list[Adapter], results: list[ClientResult], weights: Tensor) -> Tensor:
        return torch.eye(len(results), dtype=torch.float64)[-1]

    @registry.rule(reweigh=reweigh, **laws)
    def heaviest(prev: Factors, clients: list[Factors], weights: Tensor) -> Factors:
        return mean_factors(clients, weights, prev.scaling)

    yield get_rule("heaviest")
    del registry._RULES["heaviest"]


def test_reweighing_rules_layers_head_and_the_merge_error(heaviest: Rule) -> None:
    results = random_results(0)
    state = aggregate(heaviest, STATE, results, 1)
    assert same_adapters(state.adapter, results[-1].adapter)
    assert state.memory["merge_error"] < 1e-7


def test_memory_is_kept_and_its_merge_error_replaced() -> None:
    before = replace(STATE, memory={"merge_error": 9.0, "phase": 1.0})
    after = aggregate(get_rule("fra"), before, random_results(0), 1)
    assert after.memory["phase"] == 1.0
    assert after.memory["merge_error"] < 1.0
    assert before.memory == {"merge_error": 9.0, "phase": 1.0}


def test_a_merge_changes_none_of_its_arguments() -> None:
    state, results = ServerState(random_adapter(0)), random_results(0)
    aggregate(get_rule("fra"), state, results, 1)
    assert same_adapters(state.adapter, random_adapter(0))
    for result, fresh in zip(results, random_results(0), strict=True):
        assert same_adapters(result.adapter, fresh.adapter)


def test_a_round_of_zero_increments_has_no_merge_error() -> None:
    zero = Adapter({"x": Factors(normal(0, 2, 5).float(), torch.zeros(7, 2), 1.0)})
    state = aggregate(get_rule("fra"), ServerState(zero), [ClientResult("a", zero, 3)], 1)
    assert state.memory["merge_error"] == 0.0
    assert torch.equal(state.adapter.layers["x"].A, zero.layers["x"].A)


def test_a_round_without_results_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"round 5 has no results .* keep the last adapter"):
        aggregate(get_rule("fra"), STATE, [], 5)


def test_two_results_of_one_client_are_refused() -> None:
    results = random_results(0)
    with pytest.raises(ValueError, match="round 2 holds two results of one client: c0, c0, c1"):
        aggregate(get_rule("fra"), STATE, [results[0], *results], 2)


@pytest.mark.parametrize("name", rule_names())
def test_how_numbers_lie_in_memory_does_not_change_a_bit(name: str) -> None:
    """What a message or a file lays out in rows, a client may hold in columns."""

    def sideways(adapter: Adapter) -> Adapter:
        turned = {key: t.mT.contiguous().mT if t.ndim == 2 else t
                  for key, t in flatten(adapter).items()}  # fmt: skip
        return overlay(turned, adapter)

    results = random_results(0)
    want = aggregate(get_rule(name), STATE, results, 1).adapter
    turned = [replace(result, adapter=sideways(result.adapter)) for result in results]
    state = replace(STATE, adapter=sideways(STATE.adapter))
    got = aggregate(get_rule(name), state, turned, 1).adapter
    assert same_adapters(got, want)
    assert all(tensor.is_contiguous() for tensor in flatten(got).values())
