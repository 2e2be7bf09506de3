"""Private training: gradients example by example, clipped, noised, and nothing left outside."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bench import ALL, Bench
from scipy import stats
from tiny import toy_config
from torch import nn
from torch.nn.functional import cross_entropy

from fedlora.adapter import PARTS, ClientState, flatten
from fedlora.client import make_fit
from fedlora.model import longest_input, read_adapter, train_only, write_adapter
from fedlora.privacy import dpsgd
from fedlora.privacy.dpsgd import PrivateSteps, poisson_batch, private_steps
from fedlora.privacy.ledger import ledger_path, read_ledger
from fedlora.privacy.noise import gaussian, uniform

pytest.importorskip("opacus")
pytest.importorskip("dp_accounting")
pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]
PRIVATE = {"privacy__unit": "example", "privacy__delta": 1e-3}


@pytest.fixture
def noiseless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpsgd, "gaussian", lambda count: np.zeros(count))


def summed(
    bench: Bench, rows: np.ndarray, clip: float, piece: int = 100
) -> dict[str, torch.Tensor]:
    """Private gradients without noise of one batch, times the expected batch: the clipped sum."""
    parameters = train_only(bench.model, PARTS)
    network = bench.model.network.train()
    with private_steps(network, parameters, clip=clip, noise=1.0, expected=1.0) as steps:
        for at in range(0, len(rows), piece):
            inputs, labels = bench.data.train.batch(rows[at : at + piece], bench.model.device)
            steps.begin(len(labels))
            logits = steps.module(**inputs).logits
            cross_entropy(logits, labels, reduction="sum").backward()
        steps.finish()
        return {name: p.grad.clone() for name, p in parameters.items()}


def one_by_one(bench: Bench, rows: np.ndarray, clip: float) -> dict[str, torch.Tensor]:
    """The same by a plain backward pass for each example."""
    parameters = train_only(bench.model, PARTS)
    network = bench.model.network.train()
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in rows:
        network.zero_grad(set_to_none=True)
        inputs, labels = bench.data.train.batch(np.array([row]), bench.model.device)
        cross_entropy(network(**inputs).logits, labels).backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters.values()))
        for name, p in parameters.items():
            total[name] += p.grad * min(1.0, clip / norm)
    return total


@pytest.mark.parametrize("clip", [0.05, 1e6])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_gradients_are_those_of_one_example_at_a_time(
    tiny: Tiny, tmp_path: Path, noiseless: None, kind: str, clip: float
) -> None:
    bench = Bench(tiny(kind), tmp_path)
    for module in bench.model.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    write_adapter(bench.model, bench.start)
    rows = bench.data.rows["0"][:7]
    got, want = summed(bench, rows, clip), one_by_one(bench, rows, clip)
    assert set(got) == set(want)
    scale = max(float(g.abs().max()) for g in want.values())
    for name in want:
        assert float((got[name] - want[name]).abs().max()) <= 1e-5 * scale, name
    pieces = summed(bench, rows, clip, piece=3)
    for name in want:
        assert float((pieces[name] - want[name]).abs().max()) <= 1e-5 * scale, name


def test_a_bfloat16_base_has_gradients_of_its_examples_too(
    tiny: Tiny, tmp_path: Path, noiseless: None
) -> None:
    """To the three digits of bfloat16, in mixed precision as it trains."""
    bench = Bench(tiny("bert"), tmp_path)
    write_adapter(bench.model, bench.start)
    for module in bench.model.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    want = summed(bench, bench.data.rows["0"][:7], 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = summed(bench, bench.data.rows["0"][:7], 1.0)
    both = [torch.cat([g.flatten() for g in found.values()]) for found in (got, want)]
    assert float((both[0] - both[1]).norm() / both[1].norm()) < 0.05


def test_an_example_moves_the_sum_by_at_most_the_clip(tmp_path: Path, noiseless: None) -> None:
    """300 neighbouring batches of wild gradients: sizes from 1e-30 to 1e18, ties, NaN, Inf."""
    rng = np.random.default_rng(0)
    layers = {"a": nn.Parameter(torch.zeros(3, 5)), "b": nn.Parameter(torch.zeros(4))}
    worst = 0.0
    for trial in range(300):
        clip = float(10.0 ** rng.uniform(-3, 3))
        count = int(rng.integers(1, 6))
        each = {n: wild(rng, count, p.shape, clip) for n, p in layers.items()}
        with_all = released(layers, each, clip, count)
        with_less = released(layers, {n: g[1:] for n, g in each.items()}, clip, count - 1)
        moved = math.sqrt(sum(float((with_all[n] - with_less[n]).square().sum()) for n in layers))
        assert math.isfinite(moved), trial
        worst = max(worst, moved / clip)
    assert 0.9 < worst <= 1 + 1e-9


def wild(rng: np.random.Generator, count: int, shape: torch.Size, clip: float) -> torch.Tensor:
    size = 10.0 ** rng.uniform(-30, 18, (count, *[1] * len(shape)))
    drawn = rng.standard_normal((count, *shape)) * size
    kind = rng.integers(0, 6)
    if kind == 0:
        drawn.reshape(count, -1)[0, 0] = rng.choice([np.nan, np.inf, -np.inf])
    if kind == 1:
        drawn[:] = clip / math.sqrt(np.prod(shape))  # right on the edge, all the same way
    if kind == 2:
        drawn[0] = 0.0
    return torch.from_numpy(drawn.astype(np.float32))


def released(
    layers: dict[str, nn.Parameter], each: dict[str, torch.Tensor], clip: float, count: int
) -> dict[str, torch.Tensor]:
    """The sum that the noise is put on, of a batch in two pieces."""
    steps = PrivateSteps(nn.Identity(), layers, clip, 0.0, 1.0, {})
    half = count // 2
    for piece in (slice(0, half), slice(half, count)):
        steps.begin(len(range(count)[piece]))
        for name, layer in layers.items():
            layer.grad_sample = each[name][piece].clone()
    steps.begin(0)
    return steps.total or steps._zeros()


def test_noise_is_gaussian_of_the_size_that_was_asked_for() -> None:
    """Two million numbers: deviation within 0.5 %, kurtosis 3 +- 0.05, and the normal law."""
    layer = {"w": nn.Parameter(torch.zeros(2000, 1000))}
    steps = PrivateSteps(nn.Identity(), layer, 0.3, 1.7, 8.0, {})
    steps.finish()
    drawn = layer["w"].grad.double().flatten().numpy() * 8.0
    assert drawn.std() == pytest.approx(0.3 * 1.7, rel=0.005)
    assert stats.kurtosis(drawn, fisher=False) == pytest.approx(3, abs=0.05)
    assert abs(drawn.mean()) < 4 * 0.51 / math.sqrt(2e6)
    assert stats.kstest(drawn[:200_000] / 0.51, "norm").pvalue > 1e-6
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 5 / math.sqrt(2e6)


def test_batches_are_poisson_samples() -> None:
    rows = np.arange(500)
    sizes = [len(poisson_batch(rows, 0.1)) for _ in range(2000)]
    assert np.mean(sizes) == pytest.approx(50, abs=5 * math.sqrt(45 / 2000))
    assert np.var(sizes) == pytest.approx(45, rel=0.2)
    assert len(poisson_batch(rows, 1.0)) == 500
    assert uniform(100_000).max() < 1.0
    assert np.unique(gaussian(10_000)).size == 10_000


def test_an_empty_batch_is_a_step_of_noise_alone(tiny: Tiny, tmp_path: Path) -> None:
    bench = Bench(tiny("bert"), tmp_path, **PRIVATE)
    layers = train_only(bench.model, PARTS)
    with private_steps(
        bench.model.network, layers, clip=1.0, noise=1.0, expected=0.1
    ) as steps:  # fmt: skip
        for _ in range(5):
            steps.finish()
            drawn = torch.cat([p.grad.flatten() for p in layers.values()])
            assert float(drawn.std()) == pytest.approx(10.0, rel=0.2)
    assert steps.steps == 5


def private_bench(tiny: Tiny, tmp_path: Path, **changes: object) -> Bench:
    return Bench(tiny("bert"), tmp_path, **(PRIVATE | changes))


def test_every_trained_tensor_moves_and_epsilon_is_reported(tiny: Tiny, tmp_path: Path) -> None:
    bench = private_bench(tiny, tmp_path)
    result = bench.fit(ledgers=tmp_path)
    before, after = flatten(bench.start), flatten(result.adapter)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    ledger = read_ledger(ledger_path(tmp_path, "0"))
    assert result.metrics["epsilon"] == pytest.approx(ledger.spent)
    assert 0 < ledger.spent < 8
    assert [intent.round for intent in ledger.intents] == [1]
    assert "train_loss" not in result.metrics
    assert not any(name.startswith("heldout") for name in result.metrics)
    assert not any(name.startswith("evaluation") for name in result.metrics)  # of its own rows


def without_dropout(bench: Bench) -> Bench:
    for module in bench.model.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return bench


def two_rounds_of_one_seed(bench: Bench, folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    first = flatten(bench.fit(ledgers=folder / "a").adapter)
    second = flatten(bench.fit(ledgers=folder / "b").adapter)
    return [(first[name], second[name]) for name in first]


@pytest.mark.real_noise
def test_the_same_seed_draws_other_noise(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With whole batches and without dropout, noise alone tells two rounds of one seed apart."""
    monkeypatch.setattr(dpsgd, "poisson_batch", lambda rows, rate: rows)
    bench = without_dropout(private_bench(tiny, tmp_path))
    assert all(not torch.equal(*pair) for pair in two_rounds_of_one_seed(bench, tmp_path))


@pytest.mark.real_noise
def test_the_same_seed_draws_other_batches(tiny: Tiny, tmp_path: Path, noiseless: None) -> None:
    bench = without_dropout(private_bench(tiny, tmp_path))
    assert any(not torch.equal(*pair) for pair in two_rounds_of_one_seed(bench, tmp_path))


def test_the_planned_rounds_fit_the_budget_and_no_more(tiny: Tiny, tmp_path: Path) -> None:
    bench = private_bench(tiny, tmp_path, privacy__epsilon=2.0, run__rounds=3)
    spent = [bench.fit(round=t, ledgers=tmp_path).metrics["epsilon"] for t in (1, 2, 3)]
    assert spent[0] < spent[1] < spent[2] <= 2.0
    assert spent[2] > 1.99
    before = ledger_path(tmp_path, "0").read_bytes()
    with pytest.raises(ValueError, match=r"0: the privacy budget is spent: round 3 .* 2"):
        bench.fit(round=3, ledgers=tmp_path)
    assert ledger_path(tmp_path, "0").read_bytes() == before


def test_a_tensor_without_gradients_of_its_own_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """A parameter that Opacus does not hook would be trained without privacy."""
    bench = private_bench(tiny, tmp_path)
    parameters = dict(train_only(bench.model, PARTS))
    parameters["odd.weight"] = nn.Parameter(torch.ones(2))
    network = bench.model.network.train()
    with private_steps(network, parameters, clip=1.0, noise=1.0, expected=1.0) as steps:
        inputs, labels = bench.data.train.batch(bench.data.rows["0"][:2], bench.model.device)
        steps.begin(2)
        cross_entropy(steps.module(**inputs).logits, labels, reduction="sum").backward()
        with pytest.raises(ValueError, match=r"odd\.weight has 0 per-example gradients for 2"):
            steps.finish()


class Shared(nn.Module):
    """Reads what all examples share through a layer that is trained, as DeBERTa its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 3)
        self.positions = nn.Parameter(torch.randn(1, 2, 4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.query(x).sum(dim=(1, 2)) + self.query(self.positions).sum()


def test_a_layer_that_examples_share_is_refused() -> None:
    network = Shared().train()
    parameters = dict(network.query.named_parameters())
    with private_steps(network, parameters, clip=1.0, noise=1.0, expected=1.0) as steps:
        steps.begin(5)
        with pytest.raises(ValueError, match="layer query sees 1 rows for 5 examples"):
            steps.module(torch.randn(5, 2, 4))


def test_dropout_is_not_drawn_from_the_runs_seed(
    tiny: Tiny, tmp_path: Path, noiseless: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without noise and with whole batches, dropout alone tells two rounds of one seed apart."""
    monkeypatch.setattr(dpsgd, "poisson_batch", lambda rows, rate: rows)
    bench = private_bench(tiny, tmp_path)
    assert any(isinstance(m, nn.Dropout) and m.p > 0 for m in bench.model.network.modules())
    assert any(not torch.equal(*pair) for pair in two_rounds_of_one_seed(bench, tmp_path))


def test_nothing_of_a_batch_that_failed_is_left(tiny: Tiny, tmp_path: Path) -> None:
    """Gradients of an aborted batch must not be added to those of the next one."""
    bench = private_bench(tiny, tmp_path)
    parameters = train_only(bench.model, PARTS)
    network, rows = bench.model.network.train(), bench.data.rows["0"][:3]
    inputs, labels = bench.data.train.batch(rows, bench.model.device)

    def half_a_batch() -> None:
        with private_steps(network, parameters, clip=1.0, noise=1.0, expected=1.0) as steps:
            steps.begin(3)
            cross_entropy(steps.module(**inputs).logits, labels, reduction="sum").backward()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_a_batch()
    odd = ("activations", "max_batch_len")
    assert not [m for m in network.modules() if any(name in vars(m) for name in odd)]
    assert not [p for p in network.parameters() if vars(p).get("grad_sample") is not None]
    assert not [p for p in network.parameters() if "_current_grad_sample" in vars(p)]


def test_a_round_that_cannot_be_private_is_not_charged(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(steps: PrivateSteps) -> None:
        raise ValueError("a layer")

    monkeypatch.setattr(PrivateSteps, "rehearse", refused)
    with pytest.raises(ValueError, match="a layer"):
        private_bench(tiny, tmp_path).fit(ledgers=tmp_path / "l")
    assert not (tmp_path / "l").exists()


@pytest.mark.parametrize(("alone", "most"), [(True, 1), (False, 12)])
def test_rows_are_taken_alone_where_asked(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool, most: int
) -> None:
    """And what is tried before the round is charged is no client's row, as long as one can be."""
    monkeypatch.setattr(dpsgd, "poisson_batch", lambda rows, rate: rows)
    bench = private_bench(tiny, tmp_path, client__steps=1)
    seen: list[tuple[int, ...]] = []
    bench.model.network.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(tuple(inputs["input_ids"].shape)),
        with_kwargs=True,
    )
    fit = make_fit(bench.model, bench.data, bench.config, tmp_path / "l", alone=alone)
    seen.clear()
    fit("0", 1, ALL, bench.start, ClientState())
    trial, *taken = seen
    longest = min(bench.config.data.max_length, longest_input(bench.model))
    assert trial == (2, longest)
    assert longest > max(width for _, width in taken)
    assert max(rows for rows, _ in taken) == most
    assert sum(rows for rows, _ in taken) == len(bench.data.rows["0"]) == 12


def test_a_tensor_that_did_not_move_is_told(tiny: Tiny, tmp_path: Path) -> None:
    bench = private_bench(tiny, tmp_path)
    parameters = train_only(bench.model, PARTS)
    network = bench.model.network
    with private_steps(network, parameters, clip=1.0, noise=1.0, expected=1.0) as steps:
        steps.finish()  # and no optimiser step
        with pytest.raises(ValueError, match="did not move in 1 private steps"):
            steps.check()


def test_the_network_is_as_it_was_afterwards(tiny: Tiny, tmp_path: Path) -> None:
    bench = private_bench(tiny, tmp_path)
    hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in bench.model.network.modules()]
    bench.fit(ledgers=tmp_path)
    after = [len(m._forward_hooks) + len(m._backward_hooks) for m in bench.model.network.modules()]
    assert after == hooks
    assert not any(getattr(p, "grad_sample", None) is not None
                   for p in bench.model.network.parameters())  # fmt: skip
    bench.fit(round=2, ledgers=tmp_path)
    assert read_adapter(bench.model)


def test_a_delta_of_one_in_rows_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    bench = private_bench(tiny, tmp_path, privacy__delta=0.1)
    with pytest.raises(ValueError, match=r"privacy\.delta = 0\.1 lets one of 1\d examples through"):
        bench.fit(ledgers=tmp_path)


def test_private_training_needs_a_place_for_its_ledgers(tiny: Tiny, tmp_path: Path) -> None:
    bench = private_bench(tiny, tmp_path)
    with pytest.raises(ValueError, match="folder for the clients' ledgers"):
        bench.fit()


def test_the_settings_are_checked(tiny: Tiny, tmp_path: Path) -> None:
    for name, value in (("epsilon", 0), ("delta", 0), ("clip", -1), ("unit", "row")):
        with pytest.raises(ValueError, match=rf"privacy\.{name}"):
            toy_config(tmp_path, "x.csv", **{f"privacy__{name}": value})
