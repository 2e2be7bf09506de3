"""HetLoRA and FedRot, which average factors: by hand, with turned clients, against dense norms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from clients import NAMES, SCALINGS, SHAPE, around, missed, moved, restless, turned, written
from conftest import (
    assert_near,
    dense,
    dense_mean,
    merged_factors,
    normal,
    orthogonal,
    random_factors,
    same_bits,
)
from torch import Tensor
from torch.testing import assert_close

from fedlora.adapter import Adapter, ClientResult, Factors
from fedlora.rules import get_rule
from fedlora.simulation import Round, simulate

# ---------------------------------------------------------------- hetlora


def hetero(seed: int = 0) -> list[Factors]:
    """Clients of ranks 1, 2, 3 with alpha = 4."""
    return [random_factors(seed + 10 * r, *SHAPE, r, 4.0 / r) for r in (1, 2, 3)]


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_hetlora_pads_with_zeros_averages_apart_and_cuts_to_the_global_rank(rank: int) -> None:
    clients, prev = hetero(), random_factors(5, *SHAPE, rank, 0.5)
    w = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    A, B = torch.zeros(4, 7, dtype=torch.float64), torch.zeros(9, 4, dtype=torch.float64)
    for weight, client in zip(w.tolist(), clients, strict=True):
        for row in range(client.rank):
            A[row] += weight * client.A[row]
            B[:, row] += weight * client.scaling / 0.5 * client.B[:, row]
    if rank > 3:  # pairs that nobody has stay as they were
        A[3:], B[:, 3:] = prev.A[3:], prev.B[:, 3:]
    got = get_rule("hetlora")(prev, clients, w)
    assert_close(got.A, A[:rank])
    assert_close(got.B, B[:, :rank])


def test_hetlora_keeps_pairs_that_only_clients_without_weight_have() -> None:
    """`by_norm` gives none to those who did not move: their pairs would die, A and B both zero."""
    clients, prev = hetero(), random_factors(5, *SHAPE, 3, 0.5)
    got = get_rule("hetlora")(prev, clients, torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64))
    assert torch.equal(got.A[2:], prev.A[2:])
    assert torch.equal(got.B[:, 2:], prev.B[:, 2:])


def results(sent: list[Adapter], layers: Sequence[dict[str, Factors]]) -> list[ClientResult]:
    return [ClientResult(f"c{k}", replace(s, layers=x), 1)
            for k, (s, x) in enumerate(zip(sent, layers, strict=True))]  # fmt: skip


def test_hetlora_weighs_clients_by_what_they_changed_in_what_they_were_sent() -> None:
    """Over all layers, each against its own rank and scaling; the head does not count."""
    sent = [
        Adapter({"x": f, "y": random_factors(40 + k, 4, 6, f.rank, f.scaling)}, {"h": normal(k, 3)})
        for k, f in enumerate(hetero())
    ]
    after = [
        {name: moved(f, 7 * k, 10.0**-k) for name, f in adapter.layers.items()}
        for k, adapter in enumerate(sent)
    ]
    w = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    norms = [
        math.sqrt(sum(float((dense(got[n]) - dense(had.layers[n])).norm()) ** 2 for n in got))
        for had, got in zip(sent, after, strict=True)
    ]
    want = w * torch.tensor(norms, dtype=torch.float64)
    reweigh = get_rule("hetlora").reweigh
    assert reweigh is not None
    assert_close(reweigh(sent, results(sent, after), w), want / want.sum())


def test_hetlora_leaves_the_weights_where_nobody_moved() -> None:
    sent = [Adapter({"x": factors}) for factors in hetero()]
    w = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    reweigh = get_rule("hetlora").reweigh
    assert reweigh is not None
    assert torch.equal(reweigh(sent, results(sent, [dict(a.layers) for a in sent]), w), w)


def test_hetlora_weighs_small_updates_of_float32_factors_to_six_digits() -> None:
    """The factors move far, by a turn of the pairs that the increment never sees."""
    before, turn = random_factors(0, 40, 30, 3, 2.0), orthogonal(3, 3)
    sent, after = [], []
    for k, size in enumerate((1e-4, 3e-4)):
        own = moved(Factors(turn.mT @ before.A, before.B @ turn, 2.0), 9 + k, size)
        sent.append(Adapter({"x": replace(before, A=before.A.float(), B=before.B.float())}))
        after.append({"x": replace(own, A=own.A.float(), B=own.B.float())})
    w = torch.tensor([0.5, 0.5], dtype=torch.float64)
    norms = torch.stack([(dense(x["x"]) - dense(s.layers["x"])).norm()
                         for s, x in zip(sent, after, strict=True)])  # fmt: skip
    reweigh = get_rule("hetlora").reweigh
    assert reweigh is not None
    assert_close(reweigh(sent, results(sent, after), w), norms / norms.sum(), rtol=1e-6, atol=0)


# ---------------------------------------------------------------- fedrot


def proper(seed: int, size: int, angle: float | None = None) -> Tensor:
    """A rotation (determinant 1), of about the given angle."""
    skew = normal(seed, size, size)
    skew = skew - skew.mT
    turn: Tensor = torch.linalg.matrix_exp(skew * (angle / skew.norm() if angle else 1.0))
    return turn


def test_fedrot_at_full_strength_averages_clients_that_are_turns_of_one_another_exactly() -> None:
    for seed in range(10):
        common, prev = random_factors(seed, *SHAPE, 3), random_factors(seed + 50, *SHAPE, 3)
        clients = [written(turned(common, proper(seed + k, 3)), s) for k, s in enumerate(SCALINGS)]
        w = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
        for round in (1, 2):
            merged = get_rule("fedrot", strength=1.0)(prev, clients, w, round)
            assert_near(dense(merged), dense(common), 1e-11)
        assert missed("fedavg", prev, clients, w) > 0.1 * float(dense(common).norm())


def test_fedrot_half_of_the_way_errs_less_than_fedavg() -> None:
    for seed in range(20):
        common = random_factors(seed, *SHAPE, 3)
        clients = [
            turned(moved(common, 7 * seed + k, 0.02), proper(seed + k, 3, 1.0)) for k in range(4)
        ]
        w = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
        assert missed("fedrot", common, clients, w) < 0.6 * missed("fedavg", common, clients, w)


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 1.0])
def test_fedrot_leaves_every_clients_increment_alone(strength: float) -> None:
    prev, client = random_factors(0, *SHAPE, 3), random_factors(1, *SHAPE, 3, 0.5)
    for round in (1, 2):
        merged = get_rule("fedrot", strength=strength)(prev, [client], [1.0], round)
        assert_near(dense(merged), dense(client))
        lengths = torch.linalg.svdvals(merged.A)
        assert_close(lengths, torch.linalg.svdvals(client.A))  # a turn, nothing else


def test_fedrot_looks_at_a_in_odd_rounds_and_at_b_in_even_ones() -> None:
    clients, w = around(0)
    prev, rule = random_factors(1, *SHAPE, 3), get_rule("fedrot")
    for round in (1, 2, 3, 4):
        seen, unseen = ("A", "B") if round % 2 else ("B", "A")
        want = rule(prev, clients, w, round)
        other = replace(prev, **{unseen: torch.randn_like(getattr(prev, unseen))})
        assert same_bits(rule(other, clients, w, round), want)
        other = replace(prev, **{seen: -getattr(prev, seen).flip(0)})
        assert not same_bits(rule(other, clients, w, round), want)


def test_fedrot_without_strength_is_fedavg() -> None:
    clients, w = around(0)
    prev = random_factors(1, *SHAPE, 3)
    want = get_rule("fedavg")(prev, clients, w)
    got = get_rule("fedrot", strength=0.0)(prev, clients, w)
    assert_close(got.A, want.A)
    assert_close(got.B, want.B)


@pytest.mark.parametrize("signs", [(-1.0, 1.0, 1.0), (1.0, -1.0, 1.0), (-1.0, -1.0, -1.0)])
def test_fedrot_meets_reflections_without_nan_or_jumps(signs: tuple[float, ...]) -> None:
    """Half of the way to a reflection there is no orthogonal matrix: a proper rotation is taken."""
    prev = random_factors(0, *SHAPE, 3)
    client = turned(prev, torch.diag(torch.tensor(signs, dtype=torch.float64)))
    for step in range(21):
        rule = get_rule("fedrot", strength=step / 20)
        for round in (1, 2):
            assert bool(torch.isfinite(dense(rule(prev, [prev, client], [0.5, 0.5], round))).all())
            assert_near(dense(rule(prev, [client], [1.0], round)), dense(prev))
    if sum(signs) > 0:  # half of a half turn, which -1 in two directions is, is not unique
        near = moved(client, 3, 1e-9)
        pairs = ([prev, client], [prev, near])
        left, right = (dense(get_rule("fedrot")(prev, pair, [0.5, 0.5])) for pair in pairs)
        assert_near(left, right, 1e-6)
        rules = (get_rule("fedrot", strength=0.5 + step) for step in (-1e-9, 1e-9))
        left, right = (dense(rule(prev, pairs[0], [0.5, 0.5])) for rule in rules)
        assert_near(left, right, 1e-6)


@pytest.mark.parametrize("strength", [-0.1, 1.5])
def test_a_strength_outside_0_to_1_is_refused(strength: float) -> None:
    clients, w = around(0)
    with pytest.raises(ValueError, match=rf"strength {strength} is outside 0\.\.1"):
        get_rule("fedrot", strength=strength)(random_factors(1, *SHAPE, 3), clients, w)


# ---------------------------------------------------------------- what stays where it is

START = Adapter(
    {"x": Factors(normal(0, 2, 5).float(), normal(1, 7, 2).float(), 0.5)}, {"h": torch.zeros(3)}
)


def rounds_of(name: str, **settings: float) -> list[Round]:
    return list(simulate(get_rule(name), restless, START, NAMES, rounds=5, **settings))


def test_rolora_leaves_the_factor_whose_turn_it_is_not_unchanged_to_the_bit() -> None:
    before = START.layers["x"]
    for round in rounds_of("rolora"):
        after = round.state.adapter.layers["x"]
        still, turn = ("A", "B") if round.round % 2 else ("B", "A")
        assert torch.equal(getattr(after, still), getattr(before, still))
        clients = [getattr(r.adapter.layers["x"], turn).double() for r in round.results]
        want = (clients[0] + 2 * clients[1] + 3 * clients[2]) / 6
        assert_close(getattr(after, turn), want.float())
        assert not torch.equal(getattr(after, turn), getattr(before, turn))
        mean = dense_mean([r.adapter.layers["x"] for r in round.results], [1 / 6, 2 / 6, 3 / 6])
        assert_near(dense(after), mean, 1e-6)  # exact, to float32
        before = after


def test_rolora_moves_what_nobody_trained_not_even_by_float64_rounding() -> None:
    prev = random_factors(0, *SHAPE, 3, 2.0)
    clients, w = around(1, count=4)
    by_B = [replace(client, A=prev.A) for client in clients]
    by_A = [replace(client, B=prev.B * (2.0 / client.scaling)) for client in clients]
    assert torch.equal(merged_factors(get_rule("rolora")(prev, by_B, w, 1)).A, prev.A)
    assert torch.equal(merged_factors(get_rule("rolora")(prev, by_A, w, 2)).B, prev.B)
    assert not torch.equal(sum(x * prev.A for x in w), prev.A), "the mean would do here"


@pytest.mark.parametrize("participation", [1.0, 0.6])
def test_fedsas_b_and_head_never_leave_their_client(participation: float) -> None:
    own: dict[str, Adapter] = {}
    for round in rounds_of("fedsa", participation=participation):
        merged = round.state.adapter
        assert torch.equal(merged.layers["x"].B, START.layers["x"].B)
        assert torch.equal(merged.dense["h"], START.dense["h"])
        assert round.bytes_up == round.bytes_down == 4 * 2 * 5 * len(round.results)
        for result in round.results:
            assert torch.equal(result.adapter.layers["x"].B, START.layers["x"].B)
            assert torch.equal(result.adapter.dense["h"], START.dense["h"])
            assert result.state.adapter is not None
            own[result.client] = result.state.adapter
        assert sorted(round.personal) == sorted(own)
        for client, adapter in round.personal.items():
            assert torch.equal(adapter.layers["x"].A, merged.layers["x"].A)
            assert torch.equal(adapter.layers["x"].B, own[client].layers["x"].B)
            assert torch.equal(adapter.dense["h"], own[client].dense["h"])
    Bs = [adapter.layers["x"].B for adapter in round.personal.values()]
    assert not any(torch.equal(left, right) for left, right in itertools.combinations(Bs, 2))
