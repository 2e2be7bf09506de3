"""Moments turned along with the factors, against autograd in the turned coordinates; FedProx."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench import Bench, plan_of
from clients import turned
from conftest import assert_near, normal, orthogonal, random_factors, same_adapters
from torch import Tensor, nn
from torch.testing import assert_close

from fedlora.adapter import Adapter, Factors, flatten
from fedlora.client import _pull, make_fit
from fedlora.moments import transported
from fedlora.rules import get_rule
from fedlora.simulation import simulate

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]
M, N, R = 9, 7, 3
TARGET = normal(77, M, N)


def gradients(factors: Factors) -> dict[str, Tensor]:
    """Of ||s B A - T||^2 / 2, by autograd, under the names of first moments."""
    A, B = factors.A.clone().requires_grad_(), factors.B.clone().requires_grad_()
    (0.5 * (factors.scaling * B @ A - TARGET).square().sum()).backward()
    assert A.grad is not None
    assert B.grad is not None
    return {"x.lora_A.exp_avg": A.grad, "x.lora_B.exp_avg": B.grad}


def single_layer(factors: Factors) -> Adapter:
    return Adapter({"x": factors})


def pushed(kept: dict[str, Tensor], old: Factors, new: Factors) -> dict[str, Tensor]:
    return transported(kept, single_layer(old), single_layer(new))


# ---------------------------------------------------------------- moments


def test_first_moments_turn_as_the_gradient_of_the_turned_factors_does() -> None:
    """Rotations and reflections of ranks 1 to 4; the loss sees the product alone."""
    for seed in range(10):
        old = random_factors(seed, M, N, 1 + seed % 4, 0.5)
        new = turned(old, orthogonal(seed + 1, old.rank))
        got, want = pushed(gradients(old), old, new), gradients(new)
        for name, tensor in want.items():
            assert_near(got[name], tensor, 1e-10)
            if old.rank > 1:
                assert float((gradients(old)[name] - tensor).norm() / tensor.norm()) > 0.1


def test_first_moments_are_right_near_a_turn_after_a_small_step() -> None:
    old = random_factors(0, M, N, R, 0.5)
    step = turned(old, orthogonal(1, R))
    new = Factors(step.A + 1e-4 * normal(2, R, N), step.B + 1e-4 * normal(3, M, R), 0.5)
    got, want = pushed(gradients(old), old, new), gradients(new)
    for name, tensor in want.items():
        assert_near(got[name], tensor, 1e-2)


def test_second_moments_turn_by_the_squares_of_qs_entries() -> None:
    """Exactly those of the turned gradient where Q reorders pairs and flips signs."""
    old = random_factors(0, M, N, R, 0.5)
    kept = {f"{n}_sq": g.square() for n, g in gradients(old).items()}
    Q = torch.eye(R).double()[:, [2, 0, 1]] * torch.tensor([1.0, -1.0, -1.0]).double()
    new = turned(old, Q)
    for name, tensor in gradients(new).items():
        assert_near(pushed(kept, old, new)[f"{name}_sq"], tensor.square(), 1e-10)
    Q = orthogonal(1, R)
    got = pushed(kept, old, turned(old, Q))
    A, B = kept["x.lora_A.exp_avg_sq"], kept["x.lora_B.exp_avg_sq"]
    for pair in range(R):
        rows = sum(float(Q[other, pair]) ** 2 * A[other] for other in range(R))
        columns = sum(float(Q[other, pair]) ** 2 * B[:, other] for other in range(R))
        assert_close(got["x.lora_A.exp_avg_sq"][pair], rows)
        assert_close(got["x.lora_B.exp_avg_sq"][:, pair], columns)
    assert bool((got["x.lora_A.exp_avg_sq"] >= 0).all())


def test_a_turn_there_and_back_gives_the_first_moments_back() -> None:
    old = random_factors(0, M, N, R, 0.5)
    new, kept = turned(old, orthogonal(1, R)), gradients(old)
    back = pushed(pushed(kept, old, new), new, old)
    for name, tensor in kept.items():
        assert_near(back[name], tensor, 1e-10)


def test_nothing_changes_where_the_factors_are_where_they_were() -> None:
    old = random_factors(0, M, N, R, 0.5)
    kept = gradients(old) | {f"{n}_sq": g.square() for n, g in gradients(old).items()}
    for name, tensor in pushed(kept, old, replace(old)).items():
        assert_close(tensor, kept[name])


@pytest.mark.parametrize("still", ["A", "B"])
def test_coordinates_stay_where_one_factor_stands_still(still: str) -> None:
    """ffa, rolora, fedsa: the other factor was averaged, and no pair was turned."""
    old = random_factors(0, M, N, R, 0.5)
    new = replace(random_factors(1, M, N, R, 0.5), **{still: getattr(old, still)})
    kept = gradients(old)
    for name, tensor in pushed(kept, old, new).items():
        assert torch.equal(tensor, kept[name])


def test_padded_moments_of_a_smaller_rank_stay_zero_beyond_it() -> None:
    """The model's tensors have its own rank; a smaller client trains the first pairs."""
    old = random_factors(0, M, N, 2, 0.5)
    new = turned(old, orthogonal(1, 2))
    small = gradients(old)
    wide = {
        "x.lora_A.exp_avg": torch.cat([small["x.lora_A.exp_avg"], torch.zeros(3, N).double()]),
        "x.lora_B.exp_avg": torch.cat([small["x.lora_B.exp_avg"], torch.zeros(M, 3).double()], 1),
    }
    got = pushed(wide, old, new)
    want = gradients(new)
    assert_near(got["x.lora_A.exp_avg"][:2], want["x.lora_A.exp_avg"], 1e-10)
    assert_near(got["x.lora_B.exp_avg"][:, :2], want["x.lora_B.exp_avg"], 1e-10)
    assert not bool(got["x.lora_A.exp_avg"][2:].any())
    assert not bool(got["x.lora_B.exp_avg"][:, 2:].any())


def test_other_tensors_steps_and_layers_of_another_rank_are_left_alone() -> None:
    old = random_factors(0, M, N, R, 0.5)
    new = turned(old, orthogonal(1, R))
    before = Adapter({"x": old, "y": random_factors(2, 5, 8, 2)})
    after = Adapter({"x": new, "y": random_factors(3, 5, 8, 3)})
    kept = {
        "x.lora_A.step": torch.tensor(7.0),
        "x.lora_A.exp_avg": normal(1, R, N, dtype=torch.float32),
        "y.lora_A.exp_avg": normal(2, 3, 8),
        "head.weight.exp_avg": normal(3, 2, 4),
    }
    fresh = {name: tensor.clone() for name, tensor in kept.items()}
    got = transported(kept, before, after)
    assert list(got) == list(kept)
    for name in set(kept) - {"x.lora_A.exp_avg"}:
        assert torch.equal(got[name], kept[name])
    assert got["x.lora_A.exp_avg"].dtype == torch.float32
    assert not torch.equal(got["x.lora_A.exp_avg"], kept["x.lora_A.exp_avg"])
    assert all(torch.equal(kept[name], fresh[name]) for name in kept), "an argument was changed"


# ---------------------------------------------------------------- in training


def test_a_federation_transports_only_where_a_rule_turns_the_coordinates(
    tiny: Tiny, tmp_path: Path
) -> None:
    """ffa keeps A, so that transport is keep; fra's SVD turns the pairs every round."""
    ends: dict[str, dict[str, dict[str, Tensor]]] = {}
    for rule in ("ffa", "fra"):
        for optimiser in ("keep", "transport"):
            bench = Bench(tiny("bert"), tmp_path, client__optimiser=optimiser, client__steps=3)
            fit = make_fit(bench.model, bench.data, bench.config)
            rounds = list(simulate(get_rule(rule), fit, bench.start, ["0", "1", "2"], rounds=2))
            ends.setdefault(rule, {})[optimiser] = flatten(rounds[-1].state.adapter)
    for name, tensor in ends["ffa"]["keep"].items():
        assert_close(ends["ffa"]["transport"][name], tensor)
    gaps = [float((ends["fra"]["transport"][n] - t).norm()) for n, t in ends["fra"]["keep"].items()]
    assert max(gaps) > 1e-3


def test_a_transported_optimiser_trains_on_in_the_turned_coordinates(
    tiny: Tiny, tmp_path: Path
) -> None:
    """A signed permutation, with which Adam commutes: the same training, written otherwise."""
    bench = Bench(tiny("bert"), tmp_path, client__optimiser="transport", client__steps=3)
    first = bench.fit()
    Q = torch.eye(3)[:, [2, 0, 1]] * torch.tensor([1.0, -1.0, -1.0])

    def turn(adapter: Adapter) -> Adapter:
        return replace(adapter, layers={n: turned(f, Q) for n, f in adapter.layers.items()})

    plain = bench.fit(round=2, adapter=first.adapter, state=first.state).adapter
    other = bench.fit(round=2, adapter=turn(first.adapter), state=first.state).adapter
    for name, tensor in flatten(turn(plain)).items():
        assert_close(flatten(other)[name], tensor, rtol=0, atol=1e-5)  # float32, through Adam


def test_moments_of_what_a_round_does_not_train_are_kept_for_the_next_that_does(
    tiny: Tiny, tmp_path: Path
) -> None:
    """rolora trains B and A by turns: B's moments of round 1 are there again in round 3."""
    bench = Bench(tiny("bert"), tmp_path, client__optimiser="keep")
    first = bench.fit(round=1, plan=plan_of({"B"}))
    second = bench.fit(round=2, plan=plan_of({"A"}), adapter=first.adapter, state=first.state)
    assert any(".lora_A." in name for name in second.state.optimiser)
    for name, tensor in first.state.optimiser.items():
        assert torch.equal(second.state.optimiser[name], tensor)


# ---------------------------------------------------------------- FedProx


def test_the_pull_is_the_gradient_of_half_mu_times_the_squared_distance() -> None:
    anchors = {"a": normal(0, 3, 5), "b": normal(1, 4)}
    parameters = {name: nn.Parameter(normal(9, *t.shape)) for name, t in anchors.items()}
    loss = sum(p.pow(3).sum() for p in parameters.values())
    distance = sum((p - anchors[name]).square().sum() for name, p in parameters.items())
    names, values = list(parameters), list(parameters.values())
    want = torch.autograd.grad(loss + 0.7 / 2 * distance, values, retain_graph=True)
    loss.backward()
    _pull(parameters, anchors, 0.7)
    for name, gradient in zip(names, want, strict=True):
        assert_close(parameters[name].grad, gradient)


def test_a_parameter_without_a_gradient_is_not_pulled() -> None:
    parameters = {"a": nn.Parameter(normal(0, 3))}
    _pull(parameters, {"a": normal(1, 3)}, 0.7)
    assert parameters["a"].grad is None


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_training_with_prox_is_a_loop_over_the_loss_with_the_squared_distance(
    tiny: Tiny, tmp_path: Path, clip: float
) -> None:
    """The reported loss is the task's own; clipping sees the sum."""
    bench = Bench(tiny("bert"), tmp_path, client__prox=20.0, client__steps=5, client__clip=clip)
    result = bench.fit()
    want, losses = bench.reference()
    for name, tensor in flatten(result.adapter).items():
        assert_close(tensor, want[name], rtol=0, atol=1e-6)  # float32, as in test_client
    assert result.metrics["train_loss"] == pytest.approx(sum(losses) / 5, rel=1e-6)


def test_prox_holds_clients_nearer_to_what_they_were_sent_and_0_changes_no_bit(
    tiny: Tiny, tmp_path: Path
) -> None:
    far: list[float] = []
    for prox in (0.0, 1.0, 100.0):
        bench = Bench(tiny("bert"), tmp_path, client__prox=prox, client__steps=6)
        adapter = bench.fit().adapter
        start = flatten(bench.start)
        far.append(sum(float((t - start[n]).norm()) ** 2 for n, t in flatten(adapter).items()))
        if prox == 0:
            plain = Bench(tiny("bert"), tmp_path, client__steps=6)
            assert same_adapters(plain.fit().adapter, adapter)
    assert far[0] > 1.05 * far[1] > 1.1 * far[2]
