"""Robust weights against dense vectors of what clients changed, and one attacker of seven."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from clients import moved, turned, weights
from conftest import (
    assert_near,
    dense,
    nearest_of_rank,
    normal,
    orthogonal,
    random_adapter,
    random_factors,
)
from torch import Tensor
from torch.testing import assert_close

from fedlora import robust
from fedlora.adapter import Adapter, ClientResult, Factors
from fedlora.policy import Policy, Receiver, cut_for
from fedlora.robust import Robust, robust_coefficients, update_gram, warning
from fedlora.rules import get_rule
from fedlora.server import ServerState, aggregate

METHODS: tuple[Robust, ...] = get_args(Robust)
REAL = [method for method in METHODS if method != "none"]
RANKS = (1, 3, 2, 3, 2, 1, 3)
every_method = pytest.mark.parametrize("method", REAL)

GLOBAL = Adapter(
    {"x": random_factors(0, 9, 7, 3, 2.0), "y": random_factors(1, 4, 6, 3, 2.0)},
    {"h": normal(2, 5), "w": normal(3, 2, 3)},
)
CUT = {f"c{k}": Receiver(r, 6.0 / r) for k, r in enumerate(RANKS) if r < 3}
SENT = [cut_for(GLOBAL, CUT.get(f"c{k}")) for k in range(7)]


def trained(sent: Adapter, seed: int, size: float = 0.1) -> Adapter:
    """Every number moved by noise of that size."""
    layers = {n: moved(f, seed + i, size) for i, (n, f) in enumerate(sent.layers.items())}
    head = {n: t + size * normal(seed + 9, *t.shape).to(t) for n, t in sent.dense.items()}
    return replace(sent, layers=layers, dense=head)


def vector(sent: Adapter, got: Adapter) -> Tensor:
    """What changed, multiplied out: all layers, then the head."""
    parts = [dense(got.layers[name]) - dense(sent.layers[name]) for name in sent.layers]
    parts += [got.dense[name].double() - sent.dense[name].double() for name in sent.dense]
    return torch.cat([part.flatten() for part in parts])


def cloud(seed: int, count: int = 7, spread: float = 1.0) -> Tensor:
    """Updates as plain vectors of 40 numbers around a common one, one a row."""
    return normal(seed, 40) + spread * normal(seed + 1, count, 40)


def coefficients(method: Robust, updates: Tensor, w: Tensor, **settings: float) -> Tensor:
    return robust_coefficients(method, updates @ updates.mT, w, **settings)  # type: ignore[arg-type]


# ---------------------------------------------------------------- inner products of updates


def test_inner_products_of_updates_are_those_of_the_dense_changes() -> None:
    """Mixed ranks and scalings, each client against what it was sent, the head with the layers."""
    received = [trained(sent, 10 * k) for k, sent in enumerate(SENT)]
    V = torch.stack([vector(*pair) for pair in zip(SENT, received, strict=True)])
    assert_near(update_gram(SENT, received), V @ V.mT)


@pytest.mark.parametrize("block", [1, 100, 400])
def test_inner_products_do_not_depend_on_the_blocks_they_are_made_in(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """A client at a time, a few, and all: 28 rank rows of changes on either side."""
    received = [trained(sent, 10 * k) for k, sent in enumerate(SENT)]
    whole = update_gram(SENT, received)
    monkeypatch.setattr(robust, "BLOCK", block)
    assert_near(update_gram(SENT, received), whole, 1e-15)


def exact_change(before: Factors, after: Factors) -> np.ndarray:
    """The dense change with 64 bits of mantissa, where a double has 53."""
    (A, B), (A0, B0) = (
        [t.numpy().astype(np.longdouble) for t in (f.A, f.B)] for f in (after, before)
    )
    return after.scaling * (B @ A - B0 @ A0)


def test_changes_of_1e8_of_the_size_keep_their_digits() -> None:
    bare = [Adapter({"x": sent.layers["x"]}) for sent in SENT]
    received = [Adapter({"x": moved(s.layers["x"], 10 * k, 1e-8)}) for k, s in enumerate(bare)]
    pairs = zip(bare, received, strict=True)
    V = np.stack([exact_change(s.layers["x"], got.layers["x"]).ravel() for s, got in pairs])
    assert_near(update_gram(bare, received), torch.from_numpy((V @ V.T).astype(np.float64)), 1e-9)


def test_a_turn_of_the_pairs_is_no_update() -> None:
    received = [
        replace(s, layers={n: turned(f, orthogonal(k, f.rank)) for n, f in s.layers.items()})
        for k, s in enumerate(SENT)
    ]
    gram = update_gram(SENT, received)
    size = max(float(dense(f).norm()) for f in GLOBAL.layers.values())
    assert float(gram.abs().max()) < 1e-13 * size**2


# ---------------------------------------------------------------- each method, by brute force


def test_norm_clipping_shortens_what_is_longer_than_the_bound() -> None:
    V, w = cloud(0) * torch.arange(1.0, 8.0).double()[:, None], weights(0, 7)
    norms = V.norm(dim=1)
    for bound in (0.5 * float(norms.min()), float(norms[3]), 2 * float(norms.max())):
        want = [float(x) * min(1.0, bound / float(norm)) for x, norm in zip(w, norms, strict=True)]
        got = coefficients("norm_clipping", V, w, bound=bound)
        assert_close(got, torch.tensor(want, dtype=torch.float64))
    median = sorted(norms.tolist())[3]
    assert torch.equal(
        coefficients("norm_clipping", V, w), coefficients("norm_clipping", V, w, bound=median)
    )


def krum(V: Tensor, w: Tensor, faulty: int) -> Tensor:
    """The k - f clients with the least sum of squared distances to their k - f - 2 nearest."""
    count = len(V)
    scores = []
    for k in range(count):
        others = sorted(float((V[k] - V[j]).norm()) ** 2 for j in range(count) if j != k)
        scores.append((sum(others[: count - faulty - 2]), k))
    chosen = sorted(k for _, k in sorted(scores)[: count - faulty])
    kept = torch.zeros_like(w)
    kept[chosen] = w[chosen]
    return kept / kept.sum()


@pytest.mark.parametrize("count", [3, 4, 5, 7, 12])
def test_multi_krum_is_what_its_definition_says(count: int) -> None:
    for seed in range(5):
        V, w = cloud(seed, count), weights(seed, count)
        most = (count - 3) // 2
        assert_close(coefficients("multi_krum", V, w), krum(V, w, most))
        for faulty in range(1, most + 1):
            assert_close(coefficients("multi_krum", V, w, faulty=faulty), krum(V, w, faulty))


def test_multi_krum_with_ties_takes_the_first_by_name() -> None:
    V, w = cloud(0)[:1].repeat(7, 1), weights(0, 7)
    want = torch.where(torch.arange(7) < 5, w, 0.0)
    assert_close(coefficients("multi_krum", V, w), want / want.sum())


@pytest.mark.parametrize(("count", "faulty"), [(7, 5), (7, 3), (4, 2), (2, 0), (1, 0)])
def test_multi_krum_refuses_more_faulty_clients_than_it_can_bear(count: int, faulty: int) -> None:
    says = rf"with {faulty} faulty clients needs {2 * faulty + 3} in a round, got {count}"
    with pytest.raises(ValueError, match=says):
        coefficients("multi_krum", cloud(0, count), weights(0, count), faulty=faulty)


def dense_median(V: Tensor, w: Tensor) -> Tensor:
    """The minimiser of sum w_k ||x - D_k||, by L-BFGS from the mean."""
    x = (w @ V).requires_grad_()
    solver = torch.optim.LBFGS(
        [x], lr=1.0, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        solver.zero_grad()
        value = (w * (V - x).norm(dim=1)).sum()
        value.backward()
        return value

    solver.step(loss)
    return x.detach()


def test_the_geometric_median_is_the_point_of_least_distance() -> None:
    for seed in range(8):
        V, w = cloud(seed), weights(seed, 7)
        V[0] *= 100.0
        a = coefficients("geometric_median", V, w)
        assert float(a.sum()) == pytest.approx(1.0)
        assert_near(a @ V, dense_median(V, w), 1e-6)
        pulls = w[:, None] * (V - a @ V) / (V - a @ V).norm(dim=1, keepdim=True)
        assert float(pulls.sum(dim=0).norm()) < 1e-6  # in balance: the problem is convex


def test_the_geometric_median_may_be_one_of_the_clients() -> None:
    V, w = cloud(0), torch.tensor([0.6, *[0.4 / 6] * 6], dtype=torch.float64)
    assert_near(coefficients("geometric_median", V, w) @ V, V[0], 1e-6)


@pytest.mark.parametrize("bound", [0.0, 0.5, 4.0, 1e3])
def test_centred_clipping_is_its_loop_over_dense_vectors(bound: float) -> None:
    for seed in range(5):
        V, w = cloud(seed), weights(seed, 7)
        V[3] *= 50.0
        radius = bound or sorted(V.norm(dim=1).tolist())[3]
        v = torch.zeros(40, dtype=torch.float64)
        for _ in range(3):
            far = [float((d - v).norm()) for d in V]
            v = v + sum(
                x * min(1.0, radius / r) * (d - v) for x, d, r in zip(w, V, far, strict=True)
            )
        assert_near(coefficients("centred_clipping", V, w, bound=bound) @ V, v, 1e-10)


@every_method
def test_coefficients_are_no_less_than_0_and_sum_to_at_most_1(method: Robust) -> None:
    for seed in range(20):
        V, w = cloud(seed, spread=10.0 ** (seed % 5 - 2)), weights(seed, 7)
        V[seed % 7] *= 10.0 ** (seed % 4)
        a = coefficients(method, V, w)
        assert bool((a >= 0).all())
        assert float(a.sum()) <= 1 + 1e-12


@every_method
def test_clients_that_did_not_move_do_no_harm(method: Robust) -> None:
    w = weights(0, 7)
    idle = coefficients(method, torch.zeros(7, 40).double(), w)
    assert bool(torch.isfinite(idle).all())
    some = cloud(0) * torch.tensor([0.0, 0, 1, 1, 1, 0, 1], dtype=torch.float64)[:, None]
    most = cloud(0) * torch.tensor([0.0, 0, 1, 1, 0, 0, 1], dtype=torch.float64)[:, None]
    for V in (some, most):
        assert bool(torch.isfinite(coefficients(method, V, w) @ V).all())
    assert float((coefficients(method, most, w) @ most).norm()) <= float((w @ most).norm())


def test_without_a_method_the_weights_are_the_weights() -> None:
    w = weights(0, 7)
    assert torch.equal(coefficients("none", cloud(0), w), w)


def test_few_clients_are_warned_of() -> None:
    for method in REAL:
        assert warning(method, 5) == ""
        assert f"{method!r} with 4 clients a round protects nobody" in warning(method, 4)
    assert warning("none", 1) == ""


# ---------------------------------------------------------------- in a merge


def single(adapter: Adapter) -> Adapter:
    layers = {n: Factors(f.A.float(), f.B.float(), f.scaling) for n, f in adapter.layers.items()}
    return Adapter(layers, {n: t.float() for n, t in adapter.dense.items()})


STATE = ServerState(single(GLOBAL))


def round_of(sent: Sequence[Adapter], spread: float = 0.02) -> list[ClientResult]:
    """Seven clients that learn nearly the same, of 10 to 70 examples."""
    adapters = [trained(trained(s, 500, 0.1), 10 * k, spread) for k, s in enumerate(sent)]
    return [ClientResult(f"c{k}", a, 10 * (k + 1)) for k, a in enumerate(adapters)]


def attacked(results: list[ClientResult], size: float) -> list[ClientResult]:
    """The fourth client sends its update times `size` instead, in B and the head."""
    start, honest = STATE.adapter, results[3].adapter
    layers = {}
    for name, was in start.layers.items():
        B = was.B + size * (honest.layers[name].B - was.B)
        layers[name] = Factors(was.A, B, was.scaling)
    head = {n: start.dense[n] + size * (t - start.dense[n]) for n, t in honest.dense.items()}
    bad = replace(results[3], adapter=Adapter(layers, head))
    return [*results[:3], bad, *results[4:]]


@every_method
@pytest.mark.parametrize("rule", ["fra", "fedavg"])
@pytest.mark.parametrize("size", [1000.0, -10.0])
def test_one_attacker_of_seven_does_not_carry_the_merge_away(
    method: Robust, rule: str, size: float
) -> None:
    honest = round_of([STATE.adapter] * 7)
    start = STATE.adapter

    def step(results: list[ClientResult], robust: Robust) -> Tensor:
        policy = Policy(robust=robust, weighting="uniform")
        return vector(start, aggregate(get_rule(rule), STATE, results, 1, policy).adapter)

    want = step([r for k, r in enumerate(honest) if k != 3], "none")
    bad = attacked(honest, size)
    plain, robust = (float((step(bad, m) - want).norm() / want.norm()) for m in ("none", method))
    assert plain > 1.0
    assert robust < 0.4  # a clipped attacker still pulls by a seventh of the bound, or twice that
    if method in ("multi_krum", "geometric_median"):
        assert robust < 0.1


@pytest.mark.parametrize("method", ["multi_krum", "geometric_median"])
def test_a_flipped_sign_of_the_usual_length_is_found_too(method: Robust) -> None:
    V = cloud(0, spread=0.05)
    V[3] *= -1
    w = torch.full((7,), 1 / 7, dtype=torch.float64)
    honest = V[[0, 1, 2, 4, 5, 6]].mean(dim=0)
    assert_near(coefficients(method, V, w) @ V, honest, 0.03)
    assert float((w @ V - honest).norm() / honest.norm()) > 0.25


def test_what_is_clipped_off_a_client_stays_on_what_that_client_was_sent() -> None:
    """Mixed ranks: sum w_k (S_k + min(1, bound / ||D_k||) D_k), layers and head, dense."""
    sent = [cut_for(STATE.adapter, CUT.get(f"c{k}")) for k in range(7)]
    results = round_of(sent, spread=0.5)
    w = torch.arange(1.0, 8.0, dtype=torch.float64) / 28
    norms = [float(vector(s, r.adapter).norm()) for s, r in zip(sent, results, strict=True)]
    bound = 0.7 * min(norms)
    policy = Policy(robust="norm_clipping", robust_bound=bound, receivers=CUT)
    merged = aggregate(get_rule("fra"), STATE, results, 1, policy).adapter

    def clipped(part: str, name: str) -> Tensor:
        total = 0.0
        for x, s, r, norm in zip(w, sent, results, norms, strict=True):
            had, got = (getattr(adapter, part)[name] for adapter in (s, r.adapter))
            had, got = (dense(t) if part == "layers" else t.double() for t in (had, got))
            total = total + x * (had + bound / norm * (got - had))
        return total  # type: ignore[return-value]

    for name in merged.layers:
        assert_near(dense(merged.layers[name]), nearest_of_rank(clipped("layers", name), 3), 1e-6)
    for name in merged.dense:
        assert_near(merged.dense[name].double(), clipped("dense", name), 1e-6)


@every_method
def test_a_round_in_which_nobody_moved_changes_nothing(method: Robust) -> None:
    results = [ClientResult(f"c{k}", STATE.adapter, k + 1) for k in range(7)]
    merged = aggregate(get_rule("fedavg"), STATE, results, 1, Policy(robust=method)).adapter
    change = vector(STATE.adapter, merged)
    assert float(change.abs().max()) < 1e-6  # float32 at rest


def test_multi_krum_beside_weights_of_zero_keeps_what_was_sent() -> None:
    """hetlora gives no weight to those that did not move, who are the nearest to one another."""
    results = [ClientResult(f"c{k}", STATE.adapter, 10) for k in range(4)]
    results.append(ClientResult("c4", trained(STATE.adapter, 0), 10))
    policy = Policy(robust="multi_krum")
    merged = aggregate(get_rule("hetlora"), STATE, results, 1, policy).adapter
    assert_close(dense(merged.layers["x"]), dense(STATE.adapter.layers["x"]))
    assert_close(merged.dense["h"], STATE.adapter.dense["h"])


@pytest.mark.parametrize("name", ["fedrpca", "florana", "fedavg", "fra"])
def test_a_client_that_multi_krum_leaves_out_shapes_nothing(name: str) -> None:
    """Also with rules that look at more than weights."""
    start = random_adapter(0)
    each = [ClientResult(f"c{k}", trained(start, k), 10) for k in range(7)]
    wild = ClientResult("c7", trained(start, 99, 50.0), 10)
    policy = Policy(robust="multi_krum", robust_faulty=1)
    with_it = aggregate(get_rule(name), ServerState(start), [*each, wild], 1, policy)
    without = aggregate(get_rule(name), ServerState(start), each, 1, Policy())
    for layer, factors in without.adapter.layers.items():
        assert_near(dense(with_it.adapter.layers[layer]), dense(factors))
