"""The error budget of a round, held to dense float64: norms, angles, ranks; then in the log."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bench import Place, records
from clients import NAMES as CLIENTS
from clients import restless
from conftest import (
    dense,
    dense_mean,
    normal,
    orthogonal,
    random_adapter,
    random_factors,
    random_results,
)
from torch import Tensor

from fedlora.adapter import Adapter, ClientResult, Factors
from fedlora.budget import spread, totals, turn
from fedlora.policy import Policy, Receiver, cut_for
from fedlora.rules import get_rule
from fedlora.server import ServerState, aggregate
from fedlora.simulation import simulate

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]
SHAPES = [(7, 5), (5, 9), (4, 40), (300, 64), (3, 2)]
NAMES = {"update", "drift", "new", "new_drift", "cross"}


@dataclass(frozen=True, eq=False)
class Change:
    """One client: its weight, what it was sent, what came back."""

    weight: float
    sent: Factors
    got: Factors


def spread_of(before: Factors, changes: Sequence[Change]) -> dict[str, float]:
    return spread(
        before, [c.sent for c in changes], [c.got for c in changes], [c.weight for c in changes]
    )


def moved(factors: Factors, seed: int, size: float = 1.0, parts: str = "AB") -> Factors:
    """The factors after a client's training: noise of that size on A, on B or on both."""
    (m, n), r = factors.shape, factors.rank
    A = factors.A + size * normal(seed, r, n) if "A" in parts else factors.A
    B = factors.B + size * normal(seed + 1, m, r) if "B" in parts else factors.B
    return Factors(A, B, factors.scaling)


def root_mean(weights: Sequence[float], matrices: Sequence[Tensor]) -> tuple[float, float]:
    """||mean|| and sqrt(sum w ||X - mean||^2), the weights made to sum to one."""
    w = [weight / sum(weights) for weight in weights]
    mean = torch.stack([a * x for a, x in zip(w, matrices, strict=True)]).sum(dim=0)
    apart = [a * float((x - mean).norm()) ** 2 for a, x in zip(w, matrices, strict=True)]
    return float(mean.norm()), math.sqrt(sum(apart))


def projector(rows: Tensor) -> Tensor:
    """On the row space, from NumPy's pseudo-inverse."""
    return torch.from_numpy(np.linalg.pinv(rows.numpy()) @ rows.numpy())


def want(before: Factors, changes: Sequence[Change]) -> dict[str, float]:
    """The definitions, multiplied out."""
    w = [change.weight for change in changes]
    D = [dense(change.got) - dense(change.sent) for change in changes]
    new = [x - x @ projector(before.A) for x in D]
    update, drift = root_mean(w, D)
    figures = dict(zip(("update", "drift", "new", "new_drift"),
                       (update, drift, *root_mean(w, new)), strict=True))  # fmt: skip
    if len({change.got.rank for change in changes}) == 1:
        shares = [weight / sum(w) for weight in w]
        A = sum(a * c.got.A for a, c in zip(shares, changes, strict=True))
        B = sum(a * c.got.scaling * c.got.B for a, c in zip(shares, changes, strict=True))
        products = [
            a * (c.got.scaling * c.got.B - B) @ (c.got.A - A)
            for a, c in zip(shares, changes, strict=True)
        ]
        figures["cross"] = float(torch.stack(products).sum(dim=0).norm())
    return figures


def agrees(got: dict[str, float], wanted: dict[str, float], relative: float = 1e-11) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value, rel=relative, abs=1e-13), name


# ---------------------------------------------------------------- what clients changed


def hand(a: float, b: float) -> Factors:
    """W = 2 b [a, 1]: one row, two columns."""
    return Factors(torch.tensor([[a, 1.0]]).double(), torch.tensor([[b]]).double(), 2.0)


def test_a_case_by_hand() -> None:
    """Sent 2 [0, 1]; back come 2 [1, 1] and 4 [0, 1] with weights 1 and 3.

    D = [2, 0] and [0, 2], mean [.5, 1.5]; the old rows are [0, 1], so the first column is new.
    Covariance: B is 1 and 2 (twice that with s), A's first entry 1 and 0: 1/4 3/4 (2 - 4) (1 - 0).
    """
    sent = hand(0.0, 1.0)
    changes = [Change(1.0, sent, hand(1.0, 1.0)), Change(3.0, sent, hand(0.0, 2.0))]
    agrees(
        spread_of(sent, changes),
        {
            "update": math.sqrt(0.25 + 2.25),
            "drift": math.sqrt(0.25 * (1.5**2 + 1.5**2) + 0.75 * (0.5**2 + 0.5**2)),
            "new": 0.5,
            "new_drift": math.sqrt(0.25 * 1.5**2 + 0.75 * 0.5**2),
            "cross": 0.25 * 0.75 * 2,
        },
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("clients", [1, 2, 5, 70])
def test_norms_are_those_of_the_dense_changes(shape: tuple[int, int], clients: int) -> None:
    """70 clients of 300 x 64 take several piles and several strips of rows."""
    before = random_factors(0, *shape, 2, 2.0)
    changes = [Change(1.0 + k, before, moved(before, 10 * k + 5)) for k in range(clients)]
    agrees(spread_of(before, changes), want(before, changes))


@pytest.mark.parametrize("parts", ["A", "B"])
def test_where_one_factor_stood_still_there_is_no_cross_term(parts: str) -> None:
    before = random_factors(0, 30, 20, 3)
    changes = [Change(1 / 4, before, moved(before, 10 * k, parts=parts)) for k in range(4)]
    got = spread_of(before, changes)
    agrees(got, want(before, changes))
    assert got["cross"] < 1e-13
    assert (got["new"] == got["new_drift"] == 0.0) == (parts == "B")


@pytest.mark.parametrize("size", [1e-4, 1e-7])
def test_small_changes_keep_their_digits(size: float) -> None:
    """Clients 0.01 % apart, by squares of norms: all noise."""
    common = random_factors(0, 30, 20, 3)
    before = moved(common, 3)
    changes = [Change(k + 1.0, before, moved(common, 10 * k + 50, size)) for k in range(4)]
    got, wanted = spread_of(before, changes), want(before, changes)
    assert got["drift"] == pytest.approx(wanted["drift"], rel=1e-7)
    assert got["new_drift"] == pytest.approx(wanted["new_drift"], rel=1e-7)
    if size == 1e-4:
        assert got["cross"] == pytest.approx(wanted["cross"], rel=1e-5)
    little = [Change(k + 1.0, before, moved(before, 10 * k + 50, size)) for k in range(4)]
    agrees(spread_of(before, little), want(before, little), 1e-7)


def test_clients_of_other_rank_are_held_against_what_they_were_sent() -> None:
    start = Adapter({"x": random_factors(0, 9, 7, 4, 2.0)})
    receivers = [None, Receiver(2, 4.0), Receiver(1, 8.0), Receiver(2, 4.0, keep_A=True)]
    sent = [cut_for(start, receiver).layers["x"] for receiver in receivers]
    changes = [Change(k + 1.0, had, moved(had, 10 * k + 50)) for k, had in enumerate(sent)]
    got = spread_of(start.layers["x"], changes)
    assert got.keys() == NAMES - {"cross"}
    agrees(got, want(start.layers["x"], changes))


def test_a_client_that_answers_in_another_rank_is_measured_too() -> None:
    before = random_factors(0, 9, 7, 4, 2.0)
    for rank in (2, 6):
        changes = [Change(1.0, before, random_factors(k + 1, 9, 7, rank, 0.5)) for k in range(3)]
        agrees(spread_of(before, changes), want(before, changes))


def test_every_client_has_a_scaling_of_its_own() -> None:
    before = random_factors(0, 9, 7, 3, 2.0)
    changes = [Change(k + 1.0, before, random_factors(k + 1, 9, 7, 3, 0.5 * k + 0.5))
               for k in range(4)]  # fmt: skip
    agrees(spread_of(before, changes), want(before, changes))


def test_clients_without_weight_and_rounds_without_clients_count_nothing() -> None:
    before = random_factors(0, 9, 7, 3)
    changes = [Change(k + 1.0, before, moved(before, 10 * k + 50)) for k in range(3)]
    idle = Change(0.0, before, moved(before, 99, 1e6))
    assert spread_of(before, [changes[0], idle, *changes[1:]]) == spread_of(before, changes)
    assert spread_of(before, [idle]) == spread_of(before, []) == dict.fromkeys(NAMES, 0.0)


def test_rows_that_repeat_one_another_span_no_more_than_they_do() -> None:
    """A of rank 2 written with four rows, one of them zero, one far smaller: P has rank 2."""
    first = normal(0, 2, 7)
    A = torch.cat([first[:1], torch.zeros(1, 7), 1e-12 * first[1:], first[:1] + first[1:]])
    for rows in (A, torch.zeros_like(A), A.float()):
        before = Factors(rows, normal(1, 9, 4).to(rows), 2.0)
        changes = [Change(1.0, before, random_factors(k + 5, 9, 7, 4, 2.0)) for k in range(3)]
        live = first if rows.any() else rows.double()
        exact = Factors(live, torch.zeros(9, len(live)).double(), 2.0)
        got, wanted = spread_of(before, changes), want(exact, changes)
        single = 1e-6 if rows.dtype == torch.float32 else 1e-9
        assert got["new"] == pytest.approx(wanted["new"], rel=single)
        assert got["new_drift"] == pytest.approx(wanted["new_drift"], rel=single)


@pytest.mark.parametrize("n", [300, 1000])
def test_wide_layers_are_sketched_within_a_few_percent(n: int) -> None:
    ratios = []
    for seed in range(20):
        before = random_factors(seed, 200, n, 4)
        changes = [Change(1.0, before, moved(before, 100 * seed + 10 * k + 5)) for k in range(3)]
        got, wanted = spread_of(before, changes), want(before, changes)
        ratios += [[got[name] / wanted[name] for name in sorted(NAMES)]]
    assert np.abs(np.array(ratios) - 1).max() < 0.12
    assert np.abs(np.mean(ratios, axis=0) - 1).max() < 0.02
    still = [Change(1.0, before, moved(before, 10 * k, parts="B")) for k in range(3)]
    wanted = want(before, still) | {"new": 0.0, "new_drift": 0.0, "cross": 0.0}
    got = spread_of(before, still)
    agrees(got | {"cross": 0.0}, wanted)  # nothing new: exact at any width
    assert got["new"] == got["new_drift"] == 0.0


def test_a_sketch_is_the_same_in_every_call() -> None:
    before = random_factors(0, 200, 300, 4)
    changes = [Change(1.0, before, moved(before, 10 * k + 5)) for k in range(3)]
    assert spread_of(before, changes) == spread_of(before, changes)


# ---------------------------------------------------------------- what the merge made of it


def spanned(U: Tensor, S: Sequence[float], V: Tensor) -> Factors:
    return Factors(V.mT.contiguous(), U * torch.tensor(S).double(), 2.0)


def test_the_effective_rank_counts_directions_by_their_entropy() -> None:
    U, V = orthogonal(0, 9)[:, :3], orthogonal(1, 7)[:, :3]
    for S, rank in [((2.0, 2.0, 2.0), 3.0), ((5.0, 0.0, 0.0), 1.0), ((3.0, 3.0, 0.0), 2.0)]:
        assert turn(spanned(U, S, V), spanned(U, S, V))["effective_rank"] == pytest.approx(rank)
    shares = np.array([4.0, 2.0, 1.0]) / 7
    want = math.exp(-float((shares * np.log(shares)).sum()))
    got = turn(spanned(U, (4, 2, 1), V), spanned(U, (4, 2, 1), V))
    assert got["effective_rank"] == pytest.approx(want)
    assert max(got["row_angle"], got["column_angle"]) < 1e-12


@pytest.mark.parametrize("degrees", [1e-9, 0.5, 44.0, 46.0, 89.0, 90.0])
def test_angles_are_those_that_the_spaces_were_turned_by(degrees: float) -> None:
    """One of two directions turned by that much out of the old space, rows and columns apart."""
    U, V = orthogonal(0, 9), orthogonal(1, 7)
    angle = math.radians(degrees)
    side = math.cos(angle) * V[:, :1] + math.sin(angle) * V[:, 4:5]
    got = turn(spanned(U[:, :2], (3, 1), V[:, :2]),
               spanned(U[:, :2], (2, 1), torch.cat([side, V[:, 1:2]], dim=1)))  # fmt: skip
    assert got["row_angle"] == pytest.approx(degrees / math.sqrt(2), rel=1e-5)
    assert got["column_angle"] == pytest.approx(0.0, abs=1e-12)
    up = math.cos(angle) * U[:, :1] + math.sin(angle) * U[:, 4:5]
    got = turn(spanned(U[:, :1], (3,), V[:, :1]), spanned(up, (3,), V[:, :1]))
    assert got["column_angle"] == pytest.approx(degrees, rel=1e-5)
    assert got["row_angle"] == pytest.approx(0.0, abs=1e-12)


def test_a_space_within_a_larger_one_has_no_angle_with_it() -> None:
    U, V = orthogonal(0, 9), orthogonal(1, 7)
    small, large = spanned(U[:, :1], (3,), V[:, :1]), spanned(U[:, :3], (3, 2, 1), V[:, :3])
    for pair in ((small, large), (large, small)):
        assert turn(*pair)["row_angle"] == pytest.approx(0.0, abs=1e-6)


def test_there_is_no_angle_with_nothing() -> None:
    some = random_factors(0, 9, 7, 3)
    zero = replace(some, B=torch.zeros_like(some.B))
    assert turn(zero, some).keys() == {"effective_rank"}
    assert turn(some, zero) == {"effective_rank": 0.0}


def test_coordinates_do_not_matter() -> None:
    before, after = random_factors(0, 9, 7, 3), random_factors(5, 9, 7, 3)
    Q = normal(9, 3, 3)
    other = Factors(torch.linalg.solve(Q, after.A), after.B @ Q, after.scaling)
    for name, value in turn(before, after).items():
        assert turn(before, other)[name] == pytest.approx(value, rel=1e-9)


def test_totals_are_roots_of_summed_squares_and_means_of_ranks_and_angles() -> None:
    layers = {
        "a": {"drift": 3.0, "effective_rank": 1.0, "cross": 5.0, "row_angle": 30.0},
        "b": {"drift": 4.0, "effective_rank": 4.0},
    }
    assert totals(layers) == {
        "drift": 5.0, "effective_rank": 2.5, "cross": 5.0, "row_angle": 30.0,
    }  # fmt: skip
    assert totals({}) == {}


# ---------------------------------------------------------------- in a round


def norms_of(state: ServerState) -> dict[str, float]:
    return totals(state.budget)


def test_a_round_has_the_budget_of_its_weights_and_of_what_was_sent() -> None:
    state, results = ServerState(random_adapter(0)), random_results(50)
    after = aggregate(get_rule("fra"), state, results, 1)
    assert state.budget == {}
    assert list(after.budget) == list(state.adapter.layers)
    for name, layer in state.adapter.layers.items():
        got = after.budget[name]
        back = [result.adapter.layers[name] for result in results]
        mean = dense_mean(back, [0.1, 0.3, 0.6])
        merged = after.adapter.layers[name]
        assert got["wanted"] == pytest.approx(float(mean.norm()), rel=1e-9)
        assert got["tail"] == pytest.approx(float((mean - dense(merged)).norm()), rel=1e-6)
        changes = [Change(w, layer, x) for w, x in zip((10.0, 30.0, 60.0), back, strict=True)]
        exact = [replace(c, sent=double(c.sent), got=double(c.got)) for c in changes]
        wanted = want(double(layer), exact) | turn(layer, merged)
        agrees({k: v for k, v in got.items() if k not in ("wanted", "tail")}, wanted, 1e-6)


def double(factors: Factors) -> Factors:
    return Factors(factors.A.double(), factors.B.double(), factors.scaling)


def test_clients_of_any_rank_that_changed_nothing_have_changed_nothing() -> None:
    state = ServerState(random_adapter(0, r=4))
    receivers = {"c0": Receiver(1, 16.0), "c2": Receiver(2, 8.0)}
    results = [
        replace(result, adapter=cut_for(state.adapter, receivers.get(result.client)))
        for result in random_results(50)
    ]
    after = aggregate(get_rule("fra"), state, results, 1, Policy(receivers=receivers))
    for layer in after.budget.values():
        assert {name: layer[name] for name in NAMES - {"cross"}} == dict.fromkeys(
            NAMES - {"cross"}, 0.0
        )
        assert "cross" not in layer


def test_the_cross_term_is_what_fedavg_loses_and_fra_does_not() -> None:
    state, results = ServerState(random_adapter(0)), random_results(50)
    found = {rule: norms_of(aggregate(get_rule(rule), state, results, 1))
             for rule in ("fedavg", "fra")}  # fmt: skip
    assert found["fedavg"]["tail"] == pytest.approx(found["fedavg"]["cross"], rel=1e-5)
    assert found["fra"]["tail"] < found["fra"]["cross"] == found["fedavg"]["cross"]


@pytest.mark.parametrize("policy", [Policy(server_lr=0.5), Policy(server_lr=1.5)], ids=str)
def test_how_far_the_server_steps_changes_nothing_in_what_clients_did(policy: Policy) -> None:
    state, results = ServerState(random_adapter(0)), random_results(50)
    plain = norms_of(aggregate(get_rule("fra"), state, results, 1))
    other = norms_of(aggregate(get_rule("fra"), state, results, 1, policy))
    agrees({k: other[k] for k in NAMES}, {k: plain[k] for k in NAMES})
    assert other["tail"] != plain["tail"]


def test_a_client_that_a_robust_method_leaves_out_is_not_in_the_budget() -> None:
    state, results = ServerState(random_adapter(0)), random_results(50, [10] * 6)
    wild = random_adapter(7)
    wild = replace(wild, layers={k: replace(f, B=1e6 * f.B) for k, f in wild.layers.items()})
    policy = Policy(robust="multi_krum", robust_faulty=1)
    with_it = [*results, ClientResult("wild", wild, 10)]
    without = norms_of(aggregate(get_rule("fra"), state, results, 1))
    got = norms_of(aggregate(get_rule("fra"), state, with_it, 1, policy))
    agrees({k: got[k] for k in NAMES}, {k: without[k] for k in NAMES}, 1e-9)


def test_what_is_folded_and_what_is_owed_are_in_the_budget() -> None:
    state, results = ServerState(random_adapter(0)), random_results(50)
    for rule, fate in (("fra", "fold"), ("fedex", "fold"), ("fra", "carry")):
        after = aggregate(get_rule(rule), state, results, 1, Policy(residual=fate))
        name = "folded" if fate == "fold" else "carried"
        kept = after.adapter.frozen if fate == "fold" else after.carried
        for layer in state.adapter.layers:
            norm = float(dense(kept[layer]).norm()) if layer in kept else 0.0
            assert after.budget[layer][name] == pytest.approx(norm, rel=1e-6, abs=1e-12)
    cut = aggregate(get_rule("fedex"), state, results, 1, Policy(fold_rank=1))
    assert 0 < norms_of(cut)["cut"] < norms_of(cut)["folded"]
    assert "folded" not in norms_of(aggregate(get_rule("fra"), state, results, 1))


@pytest.mark.parametrize("rule", ["fra", "ffa", "fedex", "flora", "rolora", "fedsa"])
def test_the_log_has_the_budget_of_every_round(tiny: Tiny, tmp_path: Path, rule: str) -> None:
    log = records(Place(tiny("bert"), tmp_path).run(merge__rule=rule, run__rounds=2))
    assert log[0]["budget"] == {}
    for record in log[1:]:
        budget = dict(record["budget"])
        layers = budget.pop("layers")
        assert len(layers) == 4
        assert budget == pytest.approx(totals(layers))
        assert NAMES | {"wanted", "tail", "effective_rank"} <= budget.keys()
        assert budget["tail"] == pytest.approx(record["merge_error"] * budget["wanted"])
        assert (budget["drift"] > 0) == (rule != "fedsa")
    turned = rule not in ("flora", "fedsa")  # there the server's B is zero
    assert ("row_angle" in log[2]["budget"]) == turned
    assert "row_angle" not in log[1]["budget"]
    if rule == "ffa":
        assert log[2]["budget"]["row_angle"] == pytest.approx(0.0, abs=1e-4)


def test_a_round_that_too_few_answered_has_no_budget() -> None:
    def fit(client: str, round: int, *rest: object) -> ClientResult:
        if (client, round) == ("a", 2):
            raise ValueError("out of memory")
        return restless(client, round, *rest)  # type: ignore[arg-type]

    policy = Policy(max_failed_rounds=2)
    rounds = list(
        simulate(get_rule("fra"), fit, random_adapter(0), CLIENTS, rounds=3, policy=policy)
    )
    assert [bool(round.state.budget) for round in rounds] == [True, False, True]


def test_references_have_no_budget(tiny: Tiny, tmp_path: Path) -> None:
    log = records(Place(tiny("bert"), tmp_path).run(run__mode="local", run__rounds=1))
    assert [record["budget"] for record in log] == [{}, {}]
