"""A client's half of a round, against a plain loop; what it depends on and what it leaves alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench import ALL, Bench, plan_of
from conftest import same_adapters
from tiny import drawn_like, load_tiny
from torch import Tensor

from fedlora.adapter import PARTS, Adapter, ClientState, Part, flatten, overlay
from fedlora.client import learning_rate, make_fit
from fedlora.evaluate import evaluate
from fedlora.model import write_adapter
from fedlora.policy import Policy
from fedlora.rules import get_rule
from fedlora.simulation import simulate

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]


def assert_same(got: Adapter, want: dict[str, Tensor]) -> None:
    for name, tensor in flatten(got).items():
        torch.testing.assert_close(
            tensor, want[name], rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )  # float32: other order of products, amplified where Adam meets a tiny gradient


def bits(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- what training is


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"client__clip": 0.0},
        {"client__clip": 0.05, "client__schedule": "constant"},
        {"client__weight_decay": 0.3, "client__warmup": 0.5},
        {"client__schedule": "cosine", "client__round_warmup": 2, "client__batch": 7},
    ],
    ids=lambda changes: "+".join(changes).replace("client__", "") or "as set",
)
def test_training_is_a_plain_loop_of_adamw(
    tiny: Tiny, tmp_path: Path, changes: dict[str, Any]
) -> None:
    bench = Bench(tiny("bert"), tmp_path, client__steps=5, **changes)
    result = bench.fit()
    want, losses = bench.reference()
    assert_same(result.adapter, want)
    assert result.metrics["train_loss"] == pytest.approx(sum(losses) / 5, rel=1e-6)
    moved = max(float((t - want[n]).abs().max()) for n, t in flatten(bench.start).items())
    assert moved > 0.005


def test_clipping_matters(tiny: Tiny, tmp_path: Path) -> None:
    """Adam forgives a common factor, so that clipping shows once its size differs by step."""
    tensors = [
        flatten(Bench(tiny("bert"), tmp_path, client__clip=clip).fit().adapter)
        for clip in (0.0, 0.05)
    ]
    assert (
        max(float((tensors[0][name] - tensors[1][name]).abs().max()) for name in tensors[0]) > 1e-4
    )


@pytest.mark.parametrize(
    "parts",
    [{"B"}, {"B", "head"}, {"A"}, {"head"}, {"A", "B"}],
    ids=lambda parts: "".join(sorted(parts)),
)
def test_only_the_parts_of_the_plan_move(
    tiny: Tiny, tmp_path: Path, parts: frozenset[Part]
) -> None:
    bench = Bench(tiny("bert"), tmp_path)
    adapter = bench.fit(plan=plan_of(parts)).adapter
    still, moving = (flatten(bench.start, chosen) for chosen in (PARTS - parts, parts))
    got = flatten(adapter)
    assert all(torch.equal(got[name], tensor) for name, tensor in still.items())
    assert not any(torch.equal(got[name], tensor) for name, tensor in moving.items())
    assert_same(adapter, bench.reference(parts=parts)[0])


@pytest.mark.parametrize("kind", ["bert", "gpt2", "distilbert"])
def test_training_leaves_the_base_as_it_was(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    bench = Bench(tiny(kind), tmp_path, client__weight_decay=0.5)
    own = {id(parameter) for parameter in bench.model.parameters.values()}
    network = bench.model.network
    rest = [
        tensor for tensor in [*network.parameters(), *network.buffers()] if id(tensor) not in own
    ]
    before = bits(rest)
    bench.fit()
    assert bits(rest) == before
    assert len(rest) > 20


def test_what_comes_back_says_how_much_was_done(tiny: Tiny, tmp_path: Path) -> None:
    bench = Bench(tiny("bert"), tmp_path, client__warmup=0.5)
    result = bench.fit("2", round=2)
    assert result.client == "2"
    assert result.examples == len(bench.data.rows["2"]) < 15  # without what is held out
    assert result.metrics["steps"] == 3
    rates = [learning_rate(bench.config.client, 2, 2, step, 3) for step in (0, 2)]
    assert result.metrics["learning_rate_first"] == rates[0]
    assert result.metrics["learning_rate_last"] == rates[1]
    assert result.metrics["seconds_compute"] > 0


# ---------------------------------------------------------------- what it depends on


def test_a_client_does_not_notice_who_ran_before(tiny: Tiny, tmp_path: Path) -> None:
    """With dropout in base and adapter, kept moments, and another client's head in the model."""
    settings = {"model__dropout": 0.3, "client__optimiser": "keep"}
    bench = Bench(tiny("bert"), tmp_path, {"dropout": 0.3}, **settings)
    alone = bench.fit("1")
    bench.fit("0", round=2, adapter=drawn_like(bench.start, seed=8), plan=plan_of({"B"}))
    bench.model.network.eval()
    torch.manual_seed(123)
    after = bench.fit("1")
    fresh = Bench(tiny("bert"), tmp_path, {"dropout": 0.3, "seed": 5}, **settings)
    elsewhere = fresh.fit("1", adapter=bench.start)
    for other in (after, elsewhere):
        assert same_adapters(alone.adapter, other.adapter)
        assert alone.state.optimiser.keys() == other.state.optimiser.keys()
        for name, tensor in alone.state.optimiser.items():
            assert torch.equal(tensor, other.state.optimiser[name])
        assert alone.metrics["train_loss"] == other.metrics["train_loss"]


def test_training_leaves_the_global_random_state_alone(tiny: Tiny, tmp_path: Path) -> None:
    bench = Bench(tiny("bert"), tmp_path, {"dropout": 0.3})
    before = torch.get_rng_state()
    bench.fit()
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_drawn_anew_for_each_client_and_round(tiny: Tiny, tmp_path: Path) -> None:
    """Llama has no dropout of its own and each client one row: only the adapter's mask differs."""

    def trained(dropout: float) -> list[Adapter]:
        bench = Bench(tiny("llama"), tmp_path, {"dropout": dropout}, client__schedule="constant")
        row = bench.data.rows["0"][:1]
        bench.data = replace(bench.data, rows={"a": row, "b": row}, heldout={"a": row, "b": row})
        return [
            bench.fit(client, round).adapter for client, round in (("a", 1), ("b", 1), ("a", 2))
        ]

    first, other_client, other_round = trained(0.0)
    assert same_adapters(first, other_client)
    assert same_adapters(first, other_round)
    first, other_client, other_round = trained(0.4)
    assert not same_adapters(first, other_client)
    assert not same_adapters(first, other_round)
    assert not same_adapters(other_client, other_round)


def test_rows_of_others_and_held_out_rows_are_not_trained_on(tiny: Tiny, tmp_path: Path) -> None:
    bench = Bench(tiny("bert"), tmp_path)
    first = bench.fit("0")
    labels = bench.data.train.labels.copy()
    others = np.setdiff1d(np.arange(45), bench.data.rows["0"])
    labels[others] = 1 - labels[others]
    bench.data = replace(bench.data, train=replace(bench.data.train, labels=labels))
    assert same_adapters(bench.fit("0").adapter, first.adapter)
    assert bench.fit("0").metrics["heldout.accuracy"] == 1 - first.metrics["heldout.accuracy"]


def test_evaluation_does_not_change_training(tiny: Tiny, tmp_path: Path) -> None:
    watched, plain = (
        Bench(tiny("bert"), tmp_path, evaluate__clients=choice) for choice in (True, False)
    )
    result = watched.fit()
    assert same_adapters(result.adapter, plain.fit().adapter)
    assert not any("accuracy" in name for name in plain.fit().metrics)
    write_adapter(watched.model, result.adapter)
    data = watched.data
    for kind, examples, rows in (
        ("evaluation", data.evaluation, data.evaluation_rows),
        ("heldout", data.train, data.heldout["0"]),
    ):
        for name, value in evaluate(watched.model, examples, rows).record().items():
            assert result.metrics[f"{kind}.{name}"] == value


# ---------------------------------------------------------------- what a client keeps


@pytest.mark.parametrize("optimiser", ["keep", "reset"])
def test_two_rounds_are_one_long_run_if_the_optimiser_is_kept(
    tiny: Tiny, tmp_path: Path, optimiser: str
) -> None:
    bench = Bench(tiny("bert"), tmp_path, client__optimiser=optimiser, client__steps=4)
    first = bench.fit(round=1)
    kept = {name: tensor.clone() for name, tensor in first.state.optimiser.items()}
    bench.fit("1", state=ClientState())
    second = bench.fit(round=2, adapter=first.adapter, state=first.state)
    assert_same(second.adapter, bench.reference(rounds=2, keep=optimiser == "keep")[0])
    assert bool(kept) == (optimiser == "keep")
    for name, tensor in first.state.optimiser.items():
        assert torch.equal(tensor, kept[name]), "the state that was handed in has changed"
    wrong = bench.reference(rounds=2, keep=optimiser == "reset")[0]
    assert max(float((t - wrong[n]).abs().max()) for n, t in flatten(second.adapter).items()) > 1e-4


def test_a_local_head_is_kept_by_its_client_and_by_no_other(tiny: Tiny, tmp_path: Path) -> None:
    bench = Bench(tiny("bert"), tmp_path)
    plan = plan_of(PARTS, {"A", "B"})
    first = bench.fit("0", 1, plan)
    assert first.state.adapter is not None
    assert same_adapters(first.state.adapter, first.adapter)
    sent = drawn_like(bench.start, seed=4)
    own = overlay(flatten(first.adapter, {"head"}), sent)
    again = bench.fit("0", 2, plan, sent, first.state)
    assert same_adapters(again.adapter, bench.fit("0", 2, ALL, own).adapter)
    other = bench.fit("1", 2, plan, sent)
    assert same_adapters(other.adapter, bench.fit("1", 2, ALL, sent).adapter)
    assert bench.fit("0").state.adapter is None


def test_a_federation_with_local_heads_shares_none(tiny: Tiny, tmp_path: Path) -> None:
    """Client 1's head after a round is what it would be without client 0's head anywhere."""
    bench = Bench(tiny("bert"), tmp_path)
    fit = make_fit(bench.model, bench.data, bench.config)
    rule = get_rule("fra")
    together = [
        *simulate(rule, fit, bench.start, ["0", "1", "2"], rounds=2, policy=Policy(head="local"))
    ]
    alone = bench.fit("1", 1, plan_of(PARTS, {"A", "B"}))
    heads = [round.personal["1"].dense for round in together]
    assert torch.equal(heads[0]["classifier.weight"], alone.adapter.dense["classifier.weight"])
    last = {c: adapter.dense["classifier.weight"] for c, adapter in together[1].personal.items()}
    assert not torch.equal(last["0"], last["1"])
    for name, tensor in bench.start.dense.items():
        assert torch.equal(together[1].state.adapter.dense[name], tensor)


# ---------------------------------------------------------------- what goes wrong


def test_a_loss_that_diverges_names_client_round_and_rate(tiny: Tiny, tmp_path: Path) -> None:
    bench = Bench(tiny("bert"), tmp_path, client__lr=1e38, client__clip=0.0)
    with pytest.raises(
        ValueError, match=r"client 1: .*diverged in round 2 .*client.lr, now 1e\+38"
    ):
        bench.fit("1", round=2)


def test_weights_that_diverge_in_the_last_step_name_the_client(tiny: Tiny, tmp_path: Path) -> None:
    """The loss of a step is that of the weights before it."""
    bench = Bench(
        tiny("bert"), tmp_path, client__lr=3e38, client__steps=1, client__weight_decay=2.0,
        run__rounds=1, client__schedule="constant", evaluate__clients=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="client 1: training diverged in round 1"):
        bench.fit("1")


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_bfloat16_base_trains_a_float32_adapter(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    bench = Bench(tiny(kind), tmp_path)
    bench.model = load_tiny(tiny(kind), precision="bfloat16")
    first, again = bench.fit(), bench.fit()
    assert same_adapters(first.adapter, again.adapter)
    for name, tensor in flatten(first.adapter).items():
        assert tensor.dtype is torch.float32
        assert not torch.equal(tensor, flatten(bench.start)[name])
    head = first.adapter.dense["classifier.weight" if kind == "bert" else "score.weight"]
    assert not torch.equal(head.bfloat16().float(), head)
