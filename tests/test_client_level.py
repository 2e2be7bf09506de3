"""Client-level privacy: whole updates clipped, a fixed denominator, noise of the right size."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import dense, dense_mean, nearest_of_rank, normal, random_adapter, random_factors
from scipy import stats

from fedlora.adapter import Adapter, ClientResult, Factors, change, flatten, frobenius
from fedlora.policy import PLAIN, Policy
from fedlora.privacy import client_level
from fedlora.privacy.accounting import Mechanism, epsilon
from fedlora.privacy.client_level import (
    CLIP,
    Clipped,
    Design,
    Noising,
    PrivateMerge,
    clip_factor,
    noising,
    update,
    update_norm,
)
from fedlora.privacy.designs import predict, spectral
from fedlora.privacy.ledger import Terms, read_ledger
from fedlora.rules import get_rule
from fedlora.server import ServerState
from fedlora.sums import EXCHANGES, summed, weighted

pytest.importorskip("dp_accounting")
TERMS = Terms("all clients", "client", 50.0, 1e-5)
each_design = pytest.mark.parametrize("design", get_args(Design))


@pytest.fixture
def noiseless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_level, "gaussian", lambda count: np.zeros(count))


def merge(folder: Path, design: str = "increment", **changes: float) -> PrivateMerge:
    settings = {"noise": 1.0, "clients": 3, "clip": 1e9} | changes
    return PrivateMerge(Noising(design, **settings), folder / "server.ledger", TERMS, 0)  # type: ignore[arg-type]


def near(start: Factors, drift: Factors, spread: float) -> Factors:
    return Factors(start.A + spread * drift.A, start.B + spread * drift.B, start.scaling)


def results(count: int = 3, spread: float = 0.1) -> tuple[Adapter, list[ClientResult]]:
    """A common start and clients that moved away from it, with unlike numbers of examples."""
    start = random_adapter(0)
    moved = []
    for k in range(count):
        drift = random_adapter(100 + k)
        layers = {
            n: Factors(
                f.A + spread * drift.layers[n].A, f.B + spread * drift.layers[n].B, f.scaling
            )
            for n, f in start.layers.items()
        }
        heads = {n: t + spread * drift.dense[n] for n, t in start.dense.items()}
        moved.append(ClientResult(f"c{k}", Adapter(layers, heads), 10 * (k + 1)))
    return start, moved


# ---------------------------------------------------------------- clipping


def test_the_norm_is_that_of_all_increments_and_heads() -> None:
    start, moved = results()
    found = update(start, moved[0].adapter)
    squares = [
        float((dense(moved[0].adapter.layers[n]) - dense(f)).square().sum())
        for n, f in start.layers.items()
    ]
    squares += [
        float((moved[0].adapter.dense[n] - t).double().square().sum())
        for n, t in start.dense.items()
    ]
    assert update_norm(found) == pytest.approx(math.sqrt(sum(squares)), rel=1e-6)


def hostile(rng: np.random.Generator, clip: float) -> tuple[Adapter, Adapter]:
    """What a client was sent and what it returns, made to hide its size in rounding."""
    m, n, r = (int(x) for x in rng.integers(2, 12, 3))
    seed, kind = int(rng.integers(1 << 30)), rng.integers(0, 7)
    start = random_factors(seed, m, n, r)
    if kind == 0:  # another gauge of the same product, and then a step at the clip's edge
        G = torch.diag(torch.tensor(10.0 ** rng.uniform(-8, 8, r)))
        after = Factors(torch.linalg.solve(G, start.A), start.B @ G, start.scaling)
        after = Factors(
            after.A, after.B + clip * normal(seed, m, r) * 10.0 ** rng.uniform(-9, 1), after.scaling
        )
    elif kind == 1:  # huge factors whose products nearly cancel
        big = 10.0 ** rng.uniform(3, 12)
        after = Factors(start.A * big, start.B / big, start.scaling)
    elif kind == 2:
        after = Factors(start.A, start.B, start.scaling)  # nothing changed
    elif kind == 3:
        odd = start.B.clone()
        odd[0, 0] = float(rng.choice([np.nan, np.inf, -np.inf]))
        after = Factors(start.A, odd, start.scaling)
    elif kind == 4:
        after = random_factors(seed + 1, m, n, r, scale=10.0 ** rng.uniform(-12, 150))
    else:
        after = random_factors(seed + 1, m, n, r, scale=10.0 ** rng.uniform(-6, 3))
    head = normal(seed + 2, 3)
    step = normal(seed + 3, 3) * 10.0 ** rng.uniform(-9, 4)
    return Adapter({"w": start}, {"h": head}), Adapter({"w": after}, {"h": head + step})


def contribution(design: str, sent: Adapter, back: Adapter, clip: float) -> float:
    """The norm of all that one client adds to the sums of one step, exactly (float64, dense)."""
    moved = update(sent, back)
    factor = clip_factor(update_norm(moved), clip)
    exchange, prev = EXCHANGES[design], sent.layers["w"]
    public, worst = exchange.begin(prev, 0), 0.0
    for _ in range(exchange.messages):
        if not factor:
            return 0.0
        message = exchange.encode(public, weighted(moved.layers["w"], factor))
        squares = sum(float(tensor.square().sum()) for tensor in message.values())
        head = moved.dense["h"] * factor
        worst = max(worst, math.sqrt(squares + float(head.square().sum())))
        found = exchange.follow(public, message)
        if isinstance(found, Factors):
            break
        public = found
    return worst


@each_design
def test_no_client_adds_more_than_the_clip(design: str) -> None:
    """300 clients that try: the sum moves by at most C (1 + 1e-9) when one is taken away."""
    rng, worst = np.random.default_rng(1), 0.0
    for trial in range(300):
        clip = float(10.0 ** rng.uniform(-4, 4))
        moved = contribution(design, *hostile(rng, clip), clip)
        assert math.isfinite(moved), trial
        worst = max(worst, moved / clip)
    assert 0.5 < worst <= 1 + 1e-9


def test_an_update_that_is_not_finite_counts_as_none(tmp_path: Path, noiseless: None) -> None:
    start, moved = results()
    broken = moved[2].adapter
    broken.layers["block.query"].B[0, 0] = math.nan
    some = merge(tmp_path)(get_rule("fra"), ServerState(start), moved, 1, PLAIN)
    less = merge(tmp_path / "b")(get_rule("fra"), ServerState(start), moved[:2], 1, PLAIN)
    for name, tensor in flatten(some.adapter).items():
        assert torch.isfinite(tensor).all()
        torch.testing.assert_close(tensor, flatten(less.adapter)[name])


# ---------------------------------------------------------------- the merge


def test_without_noise_it_is_the_uniform_mean_at_rank_r(tmp_path: Path, noiseless: None) -> None:
    start, moved = results()
    done = merge(tmp_path)(get_rule("fra"), ServerState(start), moved, 1, PLAIN)
    for name, factors in done.adapter.layers.items():
        want = dense_mean([r.adapter.layers[name] for r in moved], [1 / 3] * 3)
        torch.testing.assert_close(dense(factors), nearest_of_rank(want, 2), rtol=1e-4, atol=1e-5)
    for name, tensor in done.adapter.dense.items():
        want = torch.stack([r.adapter.dense[name] for r in moved]).mean(dim=0)
        torch.testing.assert_close(tensor, want)


def test_who_does_not_answer_adds_zero_and_divides_all_the_same(
    tmp_path: Path, noiseless: None
) -> None:
    start, moved = results()
    done = merge(tmp_path)(get_rule("fra"), ServerState(start), moved[:1], 1, PLAIN)
    for name, tensor in done.adapter.dense.items():
        want = start.dense[name] + (moved[0].adapter.dense[name] - start.dense[name]) / 3
        torch.testing.assert_close(tensor, want)


def test_rows_leave_a_as_it_is(tmp_path: Path, noiseless: None) -> None:
    """Clients that train B alone get the mean of their B, with A untouched to the bit."""
    start, moved = results()
    only_B = [
        ClientResult(r.client, Adapter({n: Factors(start.layers[n].A, f.B, f.scaling)
                                        for n, f in r.adapter.layers.items()}, r.adapter.dense), 1)
        for r in moved
    ]  # fmt: skip
    done = merge(tmp_path, "rows")(get_rule("ffa"), ServerState(start), only_B, 1, PLAIN)
    for name, factors in done.adapter.layers.items():
        assert torch.equal(factors.A, start.layers[name].A)
        want = torch.stack([r.adapter.layers[name].B for r in only_B]).mean(dim=0)
        torch.testing.assert_close(factors.B, want, rtol=1e-4, atol=1e-5)


@each_design
def test_a_round_is_charged_before_it_is_merged(tmp_path: Path, design: str) -> None:
    start, moved = results()
    run = merge(tmp_path, design, noise=4.0, clip=1.0)
    state = run(get_rule("fra"), ServerState(start), moved, 1, PLAIN)
    spent = read_ledger(run.ledger)
    assert [one.round for one in spent.intents] == [1]
    assert spent.spent == pytest.approx(epsilon([Mechanism(4.0)], 1e-5), rel=1e-3)
    assert set(state.memory) == {CLIP}
    again = run(get_rule("fra"), ServerState(start), moved, 1, PLAIN)
    first, second = flatten(state.adapter), flatten(again.adapter)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert len(read_ledger(run.ledger).intents) == 2


def test_nothing_is_merged_beyond_the_budget(tmp_path: Path) -> None:
    start, moved = results()
    with pytest.raises(ValueError, match="all clients: the privacy budget is spent"):
        merge(tmp_path, noise=0.1)(get_rule("fra"), ServerState(start), moved, 1, PLAIN)


# ---------------------------------------------------------------- noise


def test_noise_is_the_clip_times_its_multiplier_over_the_clients() -> None:
    """1.2 million numbers of a layer that nobody changed: deviation within 0.5 %, kurtosis 3."""
    prev = random_factors(0, 1200, 1000, 4)
    nobody = Clipped("", prev, [])
    noised = dense(summed(EXCHANGES["increment"], prev, nobody, 0, noising(0.37))).numpy().ravel()
    assert noised.std() == pytest.approx(0.37, rel=0.005)
    assert stats.kurtosis(noised, fisher=False) == pytest.approx(3, abs=0.05)
    assert abs(noised.mean()) < 5 * 0.37 / math.sqrt(noised.size)


def test_what_the_round_does_not_train_gets_no_noise(tmp_path: Path) -> None:
    """A frozen head stays as it is to the bit, and counts for no norm."""
    start, moved = results()
    run = merge(tmp_path, noise=6.0, clip=0.5)
    done = run(get_rule("fra"), ServerState(start), moved, 1, Policy(head="freeze"))
    for name, tensor in start.dense.items():
        assert torch.equal(done.adapter.dense[name], tensor)


def test_a_round_noises_every_head_and_layer(tmp_path: Path) -> None:
    """The spread over many rounds of one number each is sigma = noise x clip / clients."""
    start, moved = results()
    run = merge(tmp_path, noise=6.0, clip=0.5, clients=3)
    run = PrivateMerge(run.noising, run.ledger, Terms("all clients", "client", 1e6, 1e-5, "rdp"), 0)
    drawn = [run(get_rule("fra"), ServerState(start), moved, t, PLAIN).adapter for t in range(150)]
    for name in start.dense:
        values = torch.stack([adapter.dense[name].double() for adapter in drawn])
        assert float(values.std(dim=0).mean()) == pytest.approx(1.0, rel=0.1)
    for name, factors in start.layers.items():
        values = torch.stack([dense(adapter.layers[name]) for adapter in drawn])
        assert float(values.std(dim=0).min()) > 0.05
        assert values.shape[1:] == factors.shape


@each_design
def test_the_predicted_noise_is_the_noise_of_the_design(design: str) -> None:
    """A bound of the noise's expected spectral norm, and a close one but for tiny matrices."""
    prev = random_factors(0, 80, 60, 4)
    exchange, nobody = EXCHANGES[design], Clipped("", prev, [])
    norms = [
        float(torch.linalg.matrix_norm(dense(summed(exchange, prev, nobody, t, noising(1.0))), 2))
        for t in range(20)
    ]
    assert 0.6 < np.mean(norms) / spectral(design, (80, 60), 4) < 1.02


@each_design
def test_the_budget_of_a_round_says_how_much_of_it_is_noise(tmp_path: Path, design: str) -> None:
    """Nobody answered: all that is wanted beyond the last adapter is noise, of the norm it
    names.
    """
    start = random_adapter(0)
    zero = {n: Factors(f.A, torch.zeros_like(f.B), f.scaling) for n, f in start.layers.items()}
    run = merge(tmp_path, design, noise=60.0, clip=1.0)
    run = replace(run, terms=replace(run.terms, epsilon=1e6))
    rule = get_rule("ffa" if design == "rows" else "fra")
    states = [run(rule, ServerState(Adapter(zero, {})), [], t, PLAIN) for t in range(100)]
    for name in zero:
        figures = [state.budget[name] for state in states]
        drawn = math.sqrt(np.mean([one["wanted"] ** 2 for one in figures]))
        assert drawn == pytest.approx(figures[0]["noise"], rel=0.1)
        kept = dense(states[0].adapter.layers[name]).norm()
        assert math.hypot(kept, figures[0]["tail"]) == pytest.approx(figures[0]["wanted"], rel=1e-5)


def test_the_budget_is_that_of_the_noised_sum(tmp_path: Path, noiseless: None) -> None:
    """Where no noise falls: the mean of the increments, and what the SVD cut of it."""
    start, moved = results()
    state = merge(tmp_path)(get_rule("fra"), ServerState(start), moved, 1, PLAIN)
    for name, figures in state.budget.items():
        whole = sum(dense(r.adapter.layers[name]) for r in moved) / len(moved)
        lost = whole - dense(state.adapter.layers[name])
        assert figures["wanted"] == pytest.approx(float(whole.norm()), rel=1e-6)
        assert figures["tail"] == pytest.approx(float(lost.norm()), rel=1e-4)


def test_predictions_fall_with_the_clients() -> None:
    shapes = {"a": (384, 384), "b": (384, 384)}
    few = predict("increment", shapes, 8, noise=3.0, clients=3)["a"]
    many = predict("increment", shapes, 8, noise=3.0, clients=300)["a"]
    assert few.ratio == pytest.approx(100 * many.ratio)
    assert few.ratio > 1
    assert few.threshold == pytest.approx(math.sqrt(384))
    assert predict("rows", shapes, 8, noise=3.0, clients=3)["a"].ratio < few.ratio
    core = predict("core", shapes, 8, noise=3.0, clients=3)["a"]
    assert core.noise < few.noise / 5
    assert core.ratio == pytest.approx(few.ratio)  # random columns see as much less


@pytest.mark.parametrize("design", ["increment", "rows", "power", "sketch"])
def test_a_direction_is_found_where_noise_is_as_large_as_the_signal_and_lost_far_above(
    design: str,
) -> None:
    """One direction on which all agree, in the rows of the last A where the design takes them.

    The core is left out: of a direction that is not in its random columns it finds their part.
    """
    ratio = predict(design, {"a": (256, 256)}, 8, noise=1.0, clients=1)["a"].ratio
    level, drowned = (
        np.mean([cosine(design, times / ratio, seed) for seed in range(5)]) for times in (1, 8)
    )
    assert level > 0.6
    assert drowned < 0.3


def cosine(design: str, sigma: float, seed: int) -> float:
    """Of a planted left direction with the one found in a noised sum, 256 x 256, norm 1."""
    rng = torch.Generator().manual_seed(seed)
    A, left, seen = (torch.randn(rows, 256, generator=rng).double() for rows in (8, 1, 8))
    rows = A if design in ("rows", "power") else seen
    right = torch.randn(1, 8, generator=rng).double() @ rows
    one = Factors(right / right.norm(), left.mT / left.norm(), 1.0)
    last = Factors(A, torch.zeros(256, 8, dtype=torch.float64), 1.0)
    got = summed(EXCHANGES[design], last, [one], seed, noising(sigma))
    return abs(float(torch.linalg.svd(dense(got))[0][:, 0] @ one.B[:, 0]))


# ---------------------------------------------------------------- adaptive clipping


@pytest.mark.parametrize("start_clip", [0.1, 10.0])
@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_the_clip_settles_at_the_quantile(
    tmp_path: Path, start_clip: float, quantile: float
) -> None:
    """100 clients with norms 0.02 to 2: within a tenth of the quantile's norm after 150 rounds."""
    noising = Noising("core", 2.0, 100, start_clip, quantile=quantile)
    run = PrivateMerge(noising, tmp_path / "l", TERMS, 0)
    norms, clip, seen = [0.02 * k for k in range(1, 101)], start_clip, []
    for _ in range(150):
        clip = run._next_clip(clip, norms)
        seen.append(clip)
    assert np.mean(seen[-50:]) == pytest.approx(2 * quantile, rel=0.15)


def test_the_clip_in_force_is_that_of_the_last_round(tmp_path: Path, noiseless: None) -> None:
    start, moved = results()
    run = merge(tmp_path, clip=1.0, quantile=0.5, noise=8.0)
    state = run(get_rule("fra"), ServerState(start), moved, 1, PLAIN)
    assert state.memory[CLIP] > 1.0  # all norms were above it
    after = run(get_rule("fra"), state, moved, 2, PLAIN)
    clipped = update_norm(update(state.adapter, after.adapter))
    assert clipped <= state.memory[CLIP] * (1 + 1e-4)


def test_noise_follows_the_clip_in_force(tmp_path: Path) -> None:
    """A clip of 50 where the config says 1: 20,000 numbers of a head, all of them noise."""
    start = Adapter(random_adapter(0).layers, {"head": torch.zeros(20_000)})
    run = merge(tmp_path, noise=3.0, clip=1.0, clients=4)
    state = run(get_rule("fra"), ServerState(start, {CLIP: 50.0}), [], 1, PLAIN)
    assert float(state.adapter.dense["head"].std()) == pytest.approx(3.0 * 50 / 4, rel=0.05)


def test_the_count_has_its_own_charge_and_all_is_what_was_planned(tmp_path: Path) -> None:
    plain, moving = Noising("power", 3.0, 10, 1.0), Noising("power", 3.0, 10, 1.0, quantile=0.5)
    assert len(plain.mechanisms) == 1
    assert len(moving.mechanisms) == 2
    for one in (plain, moving):
        spent = epsilon(one.mechanisms, 1e-5)
        assert spent == pytest.approx(epsilon([Mechanism(3.0)], 1e-5), rel=2e-3)
    start, moved = results()
    run = merge(tmp_path, noise=8.0, clip=1.0, quantile=0.5)
    run(get_rule("fra"), ServerState(start), moved, 1, PLAIN)
    (made,) = read_ledger(run.ledger).intents
    assert len(made.mechanisms) == 2


def test_a_change_of_gauge_is_no_update() -> None:
    factors = random_factors(3, 9, 8, 2)
    turned = Factors(factors.A * 4.0, factors.B / 4.0, factors.scaling)
    moved = Adapter({"w": change(factors, turned)})
    assert update_norm(moved) <= 1e-9
    assert frobenius(factors) > 1
