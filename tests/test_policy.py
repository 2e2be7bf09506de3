"""The server's learning rate, the order of results under every policy, and what a config says."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clients import NAMES
from conftest import (
    assert_near,
    dense,
    nearest_of_rank,
    random_adapter,
    random_results,
    same_adapters,
    same_bits,
)
from torch.testing import assert_close

from fedlora.adapter import flatten
from fedlora.config import load_config, make_config
from fedlora.modes import merge_policy
from fedlora.policy import Policy, Receiver
from fedlora.rules import get_rule, rule_names
from fedlora.server import ServerState, aggregate

SINGLE = 1e-6  # float32 at rest
STATE = ServerState(random_adapter(0))
TENTHS = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)  # of 10, 30 and 60 examples


@pytest.mark.parametrize("rate", [0.25, 0.5, 1.5, 2.0])
def test_fedavg_goes_that_share_of_the_way_factor_by_factor(rate: float) -> None:
    """x + rate (mean - x) for A, B and the head; 2 goes as far again."""
    results = random_results(50)
    got = flatten(aggregate(get_rule("fedavg"), STATE, results, 1, Policy(server_lr=rate)).adapter)
    for name, before in flatten(STATE.adapter).items():
        sent = [flatten(result.adapter)[name].double() for result in results]
        mean = sum(w * tensor for w, tensor in zip(TENTHS, sent, strict=True))
        assert_near(got[name].double(), before.double() + rate * (mean - before.double()), SINGLE)


@pytest.mark.parametrize("rate", [0.25, 0.5, 1.5, 2.0])
@pytest.mark.parametrize("receivers", [{}, {"c0": 1, "c2": 1}], ids=["equal", "mixed"])
def test_fra_goes_that_share_of_the_way_between_increments(
    rate: float, receivers: dict[str, int]
) -> None:
    """sum w_k ((1 - rate) S_k + rate dW_k), with S_k what client k itself was sent."""
    rank_one = {client: Receiver(r, 8.0) for client, r in receivers.items()}
    results, sent = random_results(50), {}
    for index, result in enumerate(results):
        small = result.client in rank_one
        sent[result.client] = 1 if small else 2
        if small:
            results[index] = replace(
                result, adapter=random_adapter(50 + 100 * index, r=1, scaling=8.0)
            )
    policy = Policy(server_lr=rate, receivers=rank_one)
    merged = aggregate(get_rule("fra"), STATE, results, 1, policy).adapter
    for name, layer in STATE.adapter.layers.items():
        wanted = torch.zeros(layer.shape, dtype=torch.float64)
        for w, result in zip(TENTHS, results, strict=True):
            r = sent[result.client]
            had = layer.scaling * layer.B[:, :r].double() @ layer.A[:r].double()
            wanted += w * ((1 - rate) * had + rate * dense(result.adapter.layers[name]))
        assert_near(dense(merged.layers[name]), nearest_of_rank(wanted, 2), SINGLE)
    for name, before in STATE.adapter.dense.items():
        mean = sum(w * r.adapter.dense[name].double() for w, r in zip(TENTHS, results, strict=True))
        want = (1 - rate) * before.double() + rate * mean
        assert_close(merged.dense[name], want.float())


@pytest.mark.parametrize("name", rule_names())
def test_a_rate_of_1_changes_no_bit_and_one_of_0_5_does(name: str) -> None:
    plain, one, half = (
        aggregate(get_rule(name), STATE, random_results(50), 1, policy).adapter
        for policy in (Policy(), Policy(server_lr=1.0), Policy(server_lr=0.5))
    )
    assert same_adapters(plain, one)
    assert not same_adapters(plain, half)


# ---------------------------------------------------------------- with every policy

POLICIES = [
    Policy(weighting="uniform"),
    Policy(server_lr=0.5),
    Policy(server_lr=1.7, robust="norm_clipping", robust_bound=5.0),
    Policy(robust="multi_krum"),
    Policy(robust="geometric_median", residual="carry"),
    Policy(robust="centred_clipping", residual="fold", fold_rank=2),
    Policy(residual="fold"),
    Policy(residual="carry", fold_rank=1, server_lr=0.5),
]


@pytest.mark.parametrize("policy", POLICIES, ids=range(len(POLICIES)))
def test_the_order_of_results_changes_no_bit_with_any_policy(policy: Policy) -> None:
    first = aggregate(get_rule("fra"), STATE, random_results(7), 1, policy)
    results = random_results(50, examples=(7, 13, 29, 31, 37))
    want = aggregate(get_rule("fra"), first, results, 2, policy)
    for order in itertools.islice(itertools.permutations(results), 5, 120, 23):
        got = aggregate(get_rule("fra"), first, order, 2, policy)
        assert same_adapters(got.adapter, want.adapter)
        assert got.memory == want.memory
        for left, right in ((got.carried, want.carried), (got.adapter.frozen, want.adapter.frozen)):
            assert all(same_bits(left[name], right[name]) for name in right)
            assert list(left) == list(right)


# ---------------------------------------------------------------- from the config


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"client.ranks": [2, 16], "model.rank": 8}, r"client\.ranks = \[2, 16\] .* 1\.\.8"),
        ({"client.ranks": [0]}, r"client\.ranks = \[0\] must lie in 1\.\."),
        (
            {"client.ranks": [2, 4], "merge.rule": "fedavg"},
            r"\[2, 4\] do not go with rule 'fedavg': means of factors .*; fra takes them",
        ),
        (
            {"client.ranks": [2, 4], "merge.options": {"gauge": "aligned"}},
            "gauge 'aligned' mixes the pairs.* 'balanced'",
        ),
        (
            {"merge.rule": "flora", "merge.residual": "drop"},
            "merge.rule: residual = 'drop' does not go with rule 'flora': it allows fold",
        ),
        (
            {"merge.rule": "fedavg", "merge.residual": "carry"},
            "'carry' does not go with rule 'fedavg': it leaves none",
        ),
        ({"merge.server_lr": 2.5}, r"server_lr = 2\.5 is out of range"),
        ({"merge.robust": "krum"}, "merge.robust = 'krum' is not one of none, norm_clipping"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_settings_of_the_merge_that_do_not_go_together_are_refused(
    settings: dict[str, object], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        make_config(settings)


def test_ranks_that_are_all_the_models_go_with_every_rule_and_gauge() -> None:
    for name in rule_names():
        make_config({"merge.rule": name, "model.rank": 8, "client.ranks": [8, 8]})
    make_config({"model.rank": 8, "client.ranks": [8], "merge.options": {"gauge": "aligned"}})


def test_ranks_survive_toml_and_are_read_from_an_override(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    config = make_config({"client.ranks": [2, 4, 8], "model.rank": 8, "merge.residual": "carry"})
    file.write_text(config.toml())
    assert load_config(file) == config
    assert config.client.ranks == [2, 4, 8]
    file.write_text("[model]\nrank = 8\n")
    assert load_config(file, ["client.ranks=2,4,8"]).client.ranks == [2, 4, 8]
    with pytest.raises(ValueError, match=r"client\.ranks = '2,x' is not a list"):
        load_config(file, ["client.ranks=2,x"])


def test_a_configs_policy_deals_ranks_by_name_with_the_scaling_of_each() -> None:
    settings = {"client.ranks": [2, 8, 4], "model.rank": 8, "model.alpha": 16.0}
    names = ["d", "b", "a", "c"]
    policy = merge_policy(make_config(settings), names)
    assert policy.receivers == {"a": Receiver(2, 8.0), "c": Receiver(4, 4.0), "d": Receiver(2, 8.0)}
    settings |= {"model.rslora": True, "merge.options": {"gauge": "orthonormal"}}
    policy = merge_policy(make_config(settings), names)
    assert policy.receivers["c"] == Receiver(4, 8.0, keep_A=True)
    assert merge_policy(make_config({}), names).receivers == {}


def test_every_setting_of_the_merge_reaches_the_policy() -> None:
    changed = {
        "weights": "uniform", "head": "local", "residual": "carry", "fold_rank": 3,
        "server_lr": 0.5, "robust": "multi_krum", "robust_bound": 2.0, "robust_faulty": 1,
    }  # fmt: skip
    config = make_config({f"merge.{k}": v for k, v in changed.items()})
    policy = merge_policy(config, [*NAMES, "d", "e"])
    want = Policy("uniform", "local", "carry", 3, 0.5, "multi_krum", 2.0, 1)
    assert policy == want
    assert merge_policy(make_config({}), list(NAMES)) == Policy()
