"""Adapters merged from disk: the model that PEFT loads is the base with the averaged increments."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import (
    assert_near,
    dense,
    dense_mean,
    nearest_of_rank,
    normal,
    random_adapter,
    random_factors,
)
from peft_adapters import (
    CONFIG,
    FILE,
    change,
    loaded,
    make_adapter,
    reconfigure,
    scores,
    written_into_base,
)
from safetensors.torch import load_file
from torch import Tensor

from fedlora.adapter import Adapter, Factors, Merged, mix
from fedlora.adapter_folder import open_folder, write_folder
from fedlora.merging import merge_folders
from fedlora.rules import LAWS, Plan, Rule, get_rule

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]
WEIGHTS = (3, 1, 1)
SHARES = (0.6, 0.2, 0.2)
PLAIN = {"peft_type": "LORA", "target_modules": ["query", "value"], "r": 1, "lora_alpha": 1}
CASES = {
    "BERT, mixed everything": (
        "bert",
        [
            {"r": 4, "lora_alpha": 8, "dtype": torch.bfloat16},
            {"r": 2, "lora_alpha": 3, "use_rslora": True},
            {
                "r": 5,
                "lora_alpha": 5,
                "rank_pattern": {"layer.0.attention.self.query": 3},
                "alpha_pattern": {"intermediate.dense": 7},
                "dtype": torch.float16,
            },
        ],
        {"target_modules": ["query", "intermediate.dense"]},
    ),
    "BERT, biases": (
        "bert",
        [{"r": 2}, {"r": 3, "lora_alpha": 5}, {"r": 1}],
        {"target_modules": ["value"], "bias": "all"},
    ),
    "GPT-2, Conv1D and an embedding": (
        "gpt2",
        [{"r": 4, "use_rslora": True}, {"r": 3, "lora_alpha": 9}, {"rank_pattern": {"c_fc": 1}}],
        {"target_modules": ["c_attn", "c_fc", "wte"]},
    ),
    "Llama, all linear layers": (
        "llama",
        [{"r": 4}, {"r": 2, "lora_alpha": 16}, {"use_rslora": True}],
        {"target_modules": "all-linear"},
    ),
    "Llama, an embedding": (
        "llama",
        [{"r": 4}, {"r": 2, "lora_alpha": 16}, {"r": 3, "dtype": torch.bfloat16}],
        {"target_modules": ["embed_tokens", "k_proj"]},
    ),
}


def plain_folder(path: Path, seed: int, r: int = 2, scaling: float = 4.0) -> Path:
    write_folder(path, random_adapter(seed, r, scaling), PLAIN | {"base_model_name_or_path": "b"})
    return path


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Adapters of two layers and a head, of ranks 2, 3 and 1 and three scalings."""
    made = [(1, 2, 4.0), (2, 3, 0.5), (3, 1, 1.0)]
    return [plain_folder(tmp_path / f"a{seed}", seed, r, s) for seed, r, s in made]


def increments(folder: Path) -> dict[str, Tensor]:
    """Each layer's increment, multiplied out in float64."""
    opened = open_folder(folder)
    return {name: dense(opened.factors(name)) for name in opened.layers}


def ruled(
    merge: Callable[..., Factors | Merged],
    residual: Sequence[str] = (),
    plan: Callable[..., Plan] | None = None,
    **changes: object,
) -> Rule:
    """A rule that the registry does not know: as one added tomorrow."""
    both = frozenset({"A", "B"})
    laws = dict.fromkeys(LAWS, True) | {k: v for k, v in changes.items() if k in LAWS}
    others = {key: value for key, value in changes.items() if key not in LAWS}

    def always(round: int, memory: object) -> Plan:
        return Plan(both, both)

    return Rule("mine", merge, plan or always, laws, residual=tuple(residual), **others)


# ---------------------------------------------------------------- the model that comes out


@pytest.mark.parametrize("case", CASES)
def test_the_merged_adapter_is_the_base_with_the_averaged_increments(
    tiny: Tiny, tmp_path: Path, case: str
) -> None:
    kind, adapters, common = CASES[case]
    folders = [
        make_adapter(tiny(kind), tmp_path / f"a{index}", index, **common, **settings)
        for index, settings in enumerate(adapters)
    ]
    whole = 12
    outcome = merge_folders(folders, get_rule("fra"), tmp_path / "out", rank=whole, weights=WEIGHTS)
    want = scores(written_into_base(tiny(kind), folders, SHARES))
    got = scores(loaded(tiny(kind), tmp_path / "out"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # float32 at rest
    assert not torch.allclose(scores(loaded(tiny(kind), folders[0])), want, atol=1e-2)
    assert outcome.kept > 1 - 1e-10
    assert max(layer.rank for layer in outcome.layers) <= whole


def test_a_head_is_the_weighted_mean_in_float64(three: list[Path], tmp_path: Path) -> None:
    merge_folders(three, get_rule("fra"), tmp_path / "out", weights=WEIGHTS)
    heads = [load_file(folder / FILE)["base_model.model.head.weight"].double() for folder in three]
    want = sum(share * head for share, head in zip(SHARES, heads, strict=True)).float()
    assert torch.equal(load_file(tmp_path / "out" / FILE)["base_model.model.head.weight"], want)


def test_below_the_full_rank_it_is_the_best_approximation(
    three: list[Path], tmp_path: Path
) -> None:
    outcome = merge_folders(three, get_rule("fra"), tmp_path / "out", rank=2, weights=WEIGHTS)
    got = increments(tmp_path / "out")
    energy = lost = 0.0
    for layer in outcome.layers:
        mean = sum(s * increments(f)[layer.name] for s, f in zip(SHARES, three, strict=True))
        best = nearest_of_rank(mean, 2)
        assert_near(got[layer.name], best, 1e-6)
        missed = float((mean - best).norm() ** 2)
        assert layer.kept == pytest.approx(1 - missed / float(mean.norm() ** 2), abs=1e-6)
        torch.testing.assert_close(
            layer.values, torch.linalg.svdvals(mean)[: len(layer.values)], rtol=1e-9, atol=1e-9
        )
        energy, lost = energy + float(mean.norm() ** 2), lost + missed
    assert outcome.kept == pytest.approx(1 - lost / energy, abs=1e-6)


def test_one_adapter_alone_is_brought_to_a_smaller_rank(three: list[Path], tmp_path: Path) -> None:
    merge_folders([three[1]], get_rule("fra"), tmp_path / "out", rank=1)
    want = {name: nearest_of_rank(d, 1) for name, d in increments(three[1]).items()}
    for name, got in increments(tmp_path / "out").items():
        assert_near(got, want[name], 1e-6)


def test_the_order_of_the_adapters_does_not_matter(three: list[Path], tmp_path: Path) -> None:
    merge_folders(three, get_rule("fra"), tmp_path / "one", rank=2, weights=[3, 1, 2])
    turned = [three[2], three[0], three[1]]
    merge_folders(turned, get_rule("fra"), tmp_path / "two", rank=2, weights=[2, 3, 1])
    for name, got in increments(tmp_path / "two").items():
        assert_near(got, increments(tmp_path / "one")[name], 1e-6)


def test_two_merges_give_the_same_bytes(three: list[Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        merge_folders(three, get_rule("fra"), tmp_path / name, rank=2, weights=WEIGHTS)
    for file in (FILE, CONFIG):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_equal_scalings_stay_and_unlike_ones_become_one(tmp_path: Path) -> None:
    a, b = (plain_folder(tmp_path / name, seed, 2, 4.0) for name, seed in (("a", 1), ("b", 2)))
    c = plain_folder(tmp_path / "c", 3, 2, 1.5)
    merge_folders([a, b], get_rule("fedavg"), tmp_path / "same")
    merge_folders([a, c], get_rule("fedavg"), tmp_path / "unlike")
    assert {e.scaling for e in open_folder(tmp_path / "same").layers.values()} == {4.0}
    assert {e.scaling for e in open_folder(tmp_path / "unlike").layers.values()} == {1.0}
    A = [open_folder(f).factors("block.query").A for f in (a, b, tmp_path / "same")]
    torch.testing.assert_close(A[2], (A[0] + A[1]) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_dtype_is_written_and_its_rounding_counted(
    three: list[Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    pair = [three[0], three[2]]  # of ranks 2 and 1
    outcome = merge_folders(pair, get_rule("fra"), tmp_path / "out", rank=3, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / FILE).values()} == {dtype}
    assert 1e-9 < 1 - outcome.kept < 1e-4
    reread = increments(tmp_path / "out")
    for layer in outcome.layers:
        mean = sum(increments(folder)[layer.name] / 2 for folder in pair)
        missed = float((mean - reread[layer.name]).norm() ** 2 / mean.norm() ** 2)
        assert 1 - layer.kept == pytest.approx(missed, rel=1e-3)


def test_a_number_too_large_for_the_dtype_is_refused(three: list[Path], tmp_path: Path) -> None:
    tensors = load_file(three[0] / FILE)
    tensors["base_model.model.head.bias"] += 1e6
    change(three[0], tensors)
    message = r"tensor 'head.bias' .* up to 3.33e\+05, beyond torch.float16.*bfloat16 or float32"
    for out in (tmp_path / "out", None):  # None: a dry run
        with pytest.raises(ValueError, match=message):
            merge_folders(three, get_rule("fra"), out, dtype=torch.float16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rule", ["fra", "flora"])
def test_a_layer_too_large_for_the_dtype_is_refused_in_a_dry_run_too(
    three: list[Path], tmp_path: Path, rule: str
) -> None:
    """NaN is no loss of 0: such a merge would keep nothing."""
    for folder in three:
        tensors = load_file(folder / FILE)
        change(folder, {k: t * (1e12 if "lora_" in k else 1) for k, t in tensors.items()})
    message = r"layer 'block.query' .* up to .* beyond torch.float16"
    for out in (tmp_path / "out", None):
        with pytest.raises(ValueError, match=message):
            merge_folders(three, get_rule(rule), out, dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_whole_numbers_in_a_head_must_agree_and_stay(three: list[Path], tmp_path: Path) -> None:
    count = {"base_model.model.head.seen": torch.tensor(7)}
    for folder in three:
        change(folder, load_file(folder / FILE) | count)
    merge_folders(three, get_rule("fra"), tmp_path / "out")
    kept = load_file(tmp_path / "out" / FILE)["base_model.model.head.seen"]
    assert torch.equal(kept, torch.tensor(7))
    change(three[2], load_file(three[2] / FILE) | {"base_model.model.head.seen": torch.tensor(8)})
    with pytest.raises(ValueError, match=r"a3: tensor 'head.seen' holds other whole numbers"):
        merge_folders(three, get_rule("fra"), tmp_path / "other")


# ---------------------------------------------------------------- ranks


def test_without_a_rank_each_layer_takes_the_largest_of_its_inputs(
    three: list[Path], tmp_path: Path
) -> None:
    outcome = merge_folders(three, get_rule("fra"), tmp_path / "out")
    assert [layer.rank for layer in outcome.layers] == [3, 3]


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_a_share_of_energy_chooses_the_smallest_rank_of_each_layer(
    three: list[Path], tmp_path: Path, share: float
) -> None:
    outcome = merge_folders(three, get_rule("fra"), tmp_path / "out", rank=f"auto:{share}")
    written = open_folder(tmp_path / "out").layers
    for layer in outcome.layers:
        mean = sum(increments(folder)[layer.name] / 3 for folder in three)
        squares = torch.linalg.svdvals(mean).square()
        held = squares.cumsum(0) / squares.sum()
        smallest = int((held < share - 1e-12).sum()) + 1
        assert written[layer.name].rank == layer.rank == smallest
        assert layer.kept >= share - 1e-9


def test_the_suggested_rank_holds_the_share_over_all_layers_and_one_less_does_not(
    three: list[Path],
) -> None:
    outcome = merge_folders(three, get_rule("fra"))
    rank = outcome.rank_for(0.95)
    assert 1 < rank < 6
    kept = [merge_folders(three, get_rule("fra"), rank=r).kept for r in (rank - 1, rank)]
    assert kept[0] < 0.95 <= kept[1]


def test_the_worst_layers_come_first(three: list[Path]) -> None:
    outcome = merge_folders(three, get_rule("fra"), rank=1)
    worst = outcome.worst(5)
    assert [layer.kept for layer in worst] == sorted(layer.kept for layer in outcome.layers)
    assert outcome.worst(1) == worst[:1]


@pytest.mark.parametrize(
    ("m", "n", "k", "r"), [(40, 30, 5, 4), (1300, 20, 90, 4), (20, 1300, 90, 4)]
)
def test_the_spectrum_of_many_adapters_is_that_of_the_dense_mean(
    tmp_path: Path, m: int, n: int, k: int, r: int
) -> None:
    """Above 256 rank rows another route is taken, and above the layer's own size a third."""
    factors = [random_factors(seed, m, n, r) for seed in range(k)]
    folders = []
    for index, each in enumerate(factors):
        folders.append(tmp_path / f"a{index}")
        write_folder(folders[-1], Adapter({"query": each}), PLAIN)
    outcome = merge_folders(folders, get_rule("fra"), rank=10)
    want = torch.linalg.svdvals(dense_mean(factors, [1 / k] * k))
    torch.testing.assert_close(outcome.layers[0].values, want[: min(m, n, k * r)])
    assert outcome.kept == pytest.approx(float(want[:10].square().sum() / want.square().sum()))


def test_between_small_stacks_and_full_ones_the_core_gives_the_spectrum(tmp_path: Path) -> None:
    factors = [random_factors(seed, 330, 310, 30) for seed in range(10)]
    factors[3] = factors[2]  # and a Gram matrix without a Cholesky factor
    folders = [tmp_path / f"a{index}" for index in range(10)]
    for folder, each in zip(folders, factors, strict=True):
        write_folder(folder, Adapter({"query": each}), PLAIN)
    values = merge_folders(folders, get_rule("fra"), rank=1).layers[0].values
    want = torch.linalg.svdvals(dense_mean(factors, [0.1] * 10))
    torch.testing.assert_close(values[:270], want[:270])
    assert len(values) <= 300


def test_a_zero_increment_keeps_one_pair_in_each_layer(tmp_path: Path) -> None:
    start = random_adapter(1)
    untrained = {
        name: Factors(factors.A, torch.zeros_like(factors.B), factors.scaling)
        for name, factors in start.layers.items()
    }
    write_folder(tmp_path / "a", Adapter(untrained), PLAIN)
    for rank in (2, "auto:0.99", None):
        outcome = merge_folders([tmp_path / "a"], get_rule("fra"), tmp_path / f"{rank}", rank=rank)
        assert [layer.rank for layer in outcome.layers] == [1, 1]
        assert outcome.kept == 1.0
        assert outcome.rank_for(0.99) == 1
        assert all(not d.any() for d in increments(tmp_path / f"{rank}").values())


# ---------------------------------------------------------------- rules of all kinds


def stack_in_the_residual(
    prev: Factors, clients: Sequence[Factors], weights: Tensor
) -> Factors | Merged:
    """All in the residual, the factors with B = 0."""
    zero = Factors(normal(1, *prev.A.shape), torch.zeros_like(prev.B), prev.scaling)
    return Merged(zero, mix(clients, weights, 1.0))


def means_and_rest(prev: Factors, clients: Sequence[Factors], weights: Tensor) -> Merged:
    """The first pair of the mixed increments, the rest as residual, in another scaling."""
    mixed = mix(clients, weights, 3.0)
    return Merged(
        Factors(mixed.A[:1], mixed.B[:, :1], 3.0), Factors(mixed.A[1:], mixed.B[:, 1:], 3.0)
    )


@pytest.mark.parametrize("merge", [stack_in_the_residual, means_and_rest])
def test_a_rule_that_folds_gives_the_exact_mean_as_one_adapter(
    three: list[Path], tmp_path: Path, merge: Callable[..., Merged]
) -> None:
    rule = ruled(merge, residual=["fold", "drop"])
    outcome = merge_folders(three, rule, tmp_path / "out", weights=WEIGHTS)
    assert outcome.kept > 1 - 1e-12
    for name, got in increments(tmp_path / "out").items():
        mean = sum(s * increments(f)[name] for s, f in zip(SHARES, three, strict=True))
        assert_near(got, mean, 1e-6)
    ranks = {layer.name: layer.rank for layer in outcome.layers}
    assert ranks == {"block.query": 5, "block.value": 4}  # 2 + 3 + 1 pairs, min(m, n) at most


def test_a_rule_that_drops_loses_its_residual(three: list[Path], tmp_path: Path) -> None:
    rule = ruled(means_and_rest, residual=["drop", "fold"])
    outcome = merge_folders(three, rule, tmp_path / "out")
    assert [layer.rank for layer in outcome.layers] == [1, 1]
    assert {entry.scaling for entry in open_folder(tmp_path / "out").layers.values()} == {1.0}
    assert outcome.kept < 0.99


def test_a_rule_sees_a_zero_increment_of_the_wanted_rank_before(three: list[Path]) -> None:
    seen = []

    def watching(prev: Factors, clients: Sequence[Factors], weights: Tensor) -> Factors:
        seen.append((prev.rank, bool(prev.B.any()), [c.rank for c in clients], weights.tolist()))
        assert all(client.A.dtype == torch.float64 for client in (prev, *clients))
        return clients[0]

    merge_folders(three, ruled(watching), rank=4, weights=WEIGHTS)
    assert seen == [(4, False, [2, 3, 1], pytest.approx(SHARES))] * 2


def test_a_rule_may_choose_the_weights_from_all_layers_and_the_head(
    three: list[Path], tmp_path: Path
) -> None:
    def reweigh(sent: Sequence[Adapter], results: Sequence, weights: Tensor) -> Tensor:
        norms = []
        for before, result in zip(sent, results, strict=True):
            assert not any(bool(f.B.any()) for f in before.layers.values())
            assert list(before.dense) == ["head.bias", "head.weight"]
            norms.append(sum(float(dense(f).norm()) for f in result.adapter.layers.values()))
        assert len(norms) == 3
        return torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)

    rule = ruled(lambda prev, clients, weights: mix(clients, weights, 1.0), reweigh=reweigh)
    outcome = merge_folders(three, rule, tmp_path / "out")
    assert outcome.weights == [0.0, 1.0, 0.0]
    for name, got in increments(tmp_path / "out").items():
        assert_near(got, increments(three[1])[name], 1e-6)


@pytest.mark.parametrize("parts", [{"B"}, {"A"}])
def test_a_rule_of_one_trained_factor_cannot_merge_finished_adapters(
    three: list[Path], tmp_path: Path, parts: set
) -> None:
    both = frozenset({"A", "B"})

    def by_turns(round: int, memory: object) -> Plan:
        return Plan(both, both) if round == 1 else Plan(both, frozenset(parts))

    with pytest.raises(ValueError, match=r"in its round 2 clients share no [AB].*take 'fra'"):
        merge_folders(three, ruled(means_and_rest, plan=by_turns), tmp_path / "out")
    with pytest.raises(ValueError, match=r"'ffa' cannot merge .* clients train no A"):
        merge_folders(three, get_rule("ffa"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_rule_of_one_rank_says_which_adapters_differ_and_which_rule_mixes(
    three: list[Path],
) -> None:
    message = r"'fedavg' takes one rank only .*rank 2 in .*a1 and 3 in .*a2: take .*'fra'"
    with pytest.raises(ValueError, match=message):
        merge_folders(three, get_rule("fedavg"))


def test_a_rule_that_does_not_cut_refuses_a_smaller_rank(tmp_path: Path) -> None:
    folders = [plain_folder(tmp_path / f"a{seed}", seed, 3) for seed in (1, 2)]
    with pytest.raises(ValueError, match=r"'fedavg' gives layer 'block.query' rank 3, not 2"):
        merge_folders(folders, get_rule("fedavg"), tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["flora", "fedmomentum", "fedex"])
def test_a_rule_that_folds_is_cut_to_the_wanted_rank_and_the_loss_counted(
    tmp_path: Path, name: str
) -> None:
    """The exact stack at its best rank 2: what `fra` makes of the same adapters."""
    folders = [plain_folder(tmp_path / f"a{seed}", seed, 2) for seed in (1, 2, 3)]
    best = merge_folders(folders, get_rule("fra"), rank=2)
    outcome = merge_folders(folders, get_rule(name), tmp_path / "out", rank=2)
    assert {entry.rank for entry in open_folder(tmp_path / "out").layers.values()} == {2}
    assert outcome.kept < 0.99
    for layer, other in zip(outcome.layers, best.layers, strict=True):
        assert layer.rank == 2
        assert layer.kept == pytest.approx(other.kept, abs=1e-7)  # written in float32
        mean = sum(increments(folder)[layer.name] / 3 for folder in folders)
        missed = float((mean - increments(tmp_path / "out")[layer.name]).norm() / mean.norm())
        assert 1 - layer.kept == pytest.approx(missed**2, abs=1e-7)


@pytest.mark.parametrize("name", ["flora", "fedmomentum", "fedex"])
def test_a_share_of_energy_is_the_smallest_rank_for_rules_that_fold_too(
    tmp_path: Path, name: str
) -> None:
    folders = [plain_folder(tmp_path / f"a{seed}", seed, 2) for seed in (1, 2, 3)]
    best = merge_folders(folders, get_rule("fra"), rank="auto:0.8")
    outcome = merge_folders(folders, get_rule(name), rank="auto:0.8")
    assert [layer.rank for layer in outcome.layers] == [layer.rank for layer in best.layers]
    assert all(layer.kept >= 0.8 for layer in outcome.layers)


def test_what_a_rule_cut_by_its_own_threshold_is_cut_to_the_rank_as_well(
    three: list[Path],
) -> None:
    ranks = [
        [layer.rank for layer in merge_folders(three, get_rule("florist", tau=0.99), rank=r).layers]
        for r in (None, 1)
    ]
    assert min(ranks[0]) > 1
    assert ranks[1] == [1, 1]


def test_the_rank_is_given_once(three: list[Path]) -> None:
    with pytest.raises(ValueError, match="given twice"):
        merge_folders(three, get_rule("fra", rank=2), rank=3)
    assert [la.rank for la in merge_folders(three, get_rule("fra", rank=1)).layers] == [1, 1]


# ---------------------------------------------------------------- bad input


def without(folder: Path, *names: str) -> None:
    tensors = load_file(folder / FILE)
    change(folder, {k: v for k, v in tensors.items() if not any(name in k for name in names)})


def with_nan(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    tensors["base_model.model.block.value.lora_A.weight"][0, 2] = torch.nan
    change(folder, tensors)


def with_shape(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    change(folder, load_file(folder / FILE) | {f"base_model.model.{name}": torch.ones(shape)})


BAD = [
    (lambda f: reconfigure(f, base_model_name_or_path="c"), "a2 is an adapter of another base"),
    (lambda f: reconfigure(f, base_model_name_or_path=None), "another base"),
    (lambda f: reconfigure(f, revision="v2"), "another base: revision = 'v2'"),
    (lambda f: reconfigure(f, task_type="CAUSAL_LM"), "a2 has task_type = 'CAUSAL_LM'"),
    (lambda f: reconfigure(f, layer_replication=[[0, 1]]), "layer_replication"),
    (lambda f: without(f, "block.value"), "a2 lacks layer 'block.value'"),
    (lambda f: without(f, "head.bias"), "a2 lacks tensor 'head.bias'"),
    (lambda f: without(f, "block.query.lora_B"), "a2: layer 'block.query' has no lora_B"),
    (with_nan, "a2: layer 'block.value', lora_A holds NaN or Inf"),
    (lambda f: with_shape(f, "head.weight", (1, 6)), "tensor 'head.weight' has shape"),
    (lambda f: with_shape(f, "head.extra", (3,)), "a2 has tensor 'head.extra'"),
    (lambda f: with_shape(f, "block.query.lora_B.weight", (1, 3)), "'block.query' is 1 x 5, in"),
    (lambda f: with_shape(f, "block.query.lora_A.weight", (3, 1)), "'block.query' is 7 x 1, in"),
    (lambda f: reconfigure(f, r=2, lora_alpha=1), "not of the rank 2"),
    (lambda f: reconfigure(f, use_dora=True), "use_dora"),
    (lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:-3]), "cut"),
    (lambda f: shutil.rmtree(f), "there is no adapter folder"),
    (lambda f: (f / FILE).rename(f / "adapter_model.bin"), "a pickle"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=[text for _, text in BAD])
def test_a_bad_adapter_is_refused_and_nothing_is_written(
    three: list[Path], tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(three[1])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        merge_folders(three, get_rule("fra"), tmp_path / "out", rank=2)
    assert sorted(tmp_path.rglob("*")) == before


def test_another_name_of_the_base_can_be_allowed_but_not_another_base(
    three: list[Path], tmp_path: Path
) -> None:
    reconfigure(three[1], base_model_name_or_path="/models/b", revision="main")
    merge_folders(three, get_rule("fra"), tmp_path / "out", other_base=True)
    assert open_folder(tmp_path / "out").settings["base_model_name_or_path"] == "b"
    with_shape(three[1], "block.query.lora_A.weight", (3, 6))
    with pytest.raises(ValueError, match="another base model"):
        merge_folders(three, get_rule("fra"), tmp_path / "two", other_base=True)


def test_no_revision_is_the_hubs_main(three: list[Path], tmp_path: Path) -> None:
    reconfigure(three[0], revision=None)
    reconfigure(three[1], revision="main")
    merge_folders(three, get_rule("fra"), tmp_path / "out")
    assert (tmp_path / "out").is_dir()


def test_an_embedding_and_a_linear_layer_of_one_name_are_not_mixed(tmp_path: Path) -> None:
    layers = Adapter({"query": random_factors(1)})
    write_folder(tmp_path / "a", layers, PLAIN)
    write_folder(tmp_path / "b", layers, PLAIN, embeddings=["query"])
    with pytest.raises(ValueError, match=r"b: layer 'query' is 7 x 5 \(embedding\)"):
        merge_folders([tmp_path / "a", tmp_path / "b"], get_rule("fra"))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 1], "2 weights for 3 adapters: give one per adapter"),
        ([1, 1, 1, 1], "4 weights for 3 adapters"),
        ([], "0 weights for 3 adapters"),
        ([1, float("nan"), 1], "weight nan is not a finite number"),
        ([1, float("inf"), 1], "weight inf is not"),
        ([1, -0.1, 1], "weight -0.1 is not a finite number >= 0"),
        ([0, 0, 0], "the weights sum to 0: give a finite sum above 0"),
        ([1e308, 1e308, 1e308], "the weights sum to inf"),
        ([True, 1, 1], "weight True is not a number"),
        (["3", 1, 1], "weight '3' is not a number"),
        ([None, 1, 1], "weight None is not a number"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_bad_weights_are_refused(
    three: list[Path], tmp_path: Path, weights: list, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        merge_folders(three, get_rule("fra"), tmp_path / "out", weights=weights)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank 0 is neither"),
        (-1, "rank -1 is neither"),
        (True, "rank True is neither"),
        (2.0, "rank 2.0 is neither"),
        ("auto", "rank 'auto' is neither"),
        ("auto:", "rank 'auto:' is neither"),
        ("auto:0", "rank 'auto:0' is neither"),
        ("auto:1.1", "neither a whole number above 0 nor auto:SHARE"),
        ("auto:nan", "neither"),
        ("8.5", "neither"),
        ("", "neither"),
        (5, r"rank 5 is above what layer 'block.value' of shape 4 x 6 can have: take at most 4"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_a_rank_that_is_none_is_refused(
    three: list[Path], tmp_path: Path, rank: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        merge_folders(three, get_rule("fra"), tmp_path / "out", rank=rank)
    assert not (tmp_path / "out").exists()


def test_nothing_to_merge_and_a_folder_that_exists_are_refused(three: list[Path]) -> None:
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_folders([], get_rule("fra"))
    with pytest.raises(ValueError, match=r"a1 exists already; nothing was written"):
        merge_folders(three, get_rule("fra"), three[0])
    assert len(list(three[0].iterdir())) == 2


def test_without_a_place_to_write_all_is_computed_and_nothing_written(
    three: list[Path], tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    dry = merge_folders(three, get_rule("fra"), rank=2)
    assert sorted(tmp_path.rglob("*")) == before
    wet = merge_folders(three, get_rule("fra"), tmp_path / "out", rank=2)
    assert (dry.kept, dry.folder, wet.folder) == (wet.kept, None, tmp_path / "out")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of `re`, for patterns that flips make
def test_files_flipped_or_cut_end_in_a_merge_or_a_value_error(
    three: list[Path], tmp_path: Path
) -> None:
    """200 files, most of them hit in header or settings; what is refused leaves nothing."""
    rng = random.Random(4)
    refused = 0
    kept = {name: (three[1] / name).read_bytes() for name in (FILE, CONFIG)}
    for trial in range(200):
        name = CONFIG if trial % 4 == 3 else FILE
        data = bytearray(kept[name])
        if trial % 5 == 0:
            data = data[: rng.randrange(len(data))]
        reach = len(data) if trial % 3 == 0 else min(len(data), 700)
        for _ in range(rng.randrange(1, 4) if data else 0):
            data[rng.randrange(max(1, reach))] = rng.randrange(256)
        (three[1] / name).write_bytes(data)
        try:
            merge_folders(three, get_rule("fra"), tmp_path / "out", rank=2)
        except ValueError:
            refused += 1
            assert {path.name for path in tmp_path.iterdir()} == {"a1", "a2", "a3"}
        else:
            shutil.rmtree(tmp_path / "out")
        (three[1] / name).write_bytes(kept[name])
    assert 100 < refused < 200


# ---------------------------------------------------------------- many and large ones


def run_python(code: str, *arguments: object) -> str:
    import fedlora

    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(fedlora.__file__).parent.parent,
    ).stdout


MANY = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from fedlora.merging import merge_folders
from fedlora.rules import get_rule
folders = sorted(Path(sys.argv[1]).iterdir())
outcome = merge_folders(folders, get_rule("fra"), sys.argv[2], rank=2)
print(len(outcome.adapters))
"""


@pytest.mark.slow
def test_a_thousand_adapters_merge_with_few_files_open(tmp_path: Path) -> None:
    first = [plain_folder(tmp_path / f"a{seed}", seed, 1) for seed in (1, 2)]
    (tmp_path / "many").mkdir()
    for index in range(1000):
        shutil.copytree(first[index % 2], tmp_path / "many" / f"{index}")
    assert run_python(MANY, tmp_path / "many", tmp_path / "out").strip() == "1000"
    for name, got in increments(tmp_path / "out").items():
        mean = (increments(first[0])[name] + increments(first[1])[name]) / 2
        assert_near(got, mean, 1e-6)


PEAK = """
import sys
from pathlib import Path
from fedlora.merging import merge_folders
from fedlora.rules import get_rule
merge_folders(sys.argv[2:], get_rule("fra"), sys.argv[1], rank=64)
status = Path("/proc/self/status").read_text()  # ru_maxrss would begin at the parent's size
print(status.partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_is_that_of_one_layer_however_many_there_are(tmp_path: Path) -> None:
    """80 layers hold 84 MB in two adapters and 42 MB in the result: twice those of 40 layers."""
    factors = random_factors(1, 1024, 1024, 64)
    factors = Factors(factors.A.float(), factors.B.float(), 1.0)
    peaks = []
    for layers in (40, 80):
        adapter = Adapter({f"layers.{index}.query": factors for index in range(layers)})
        folders = [tmp_path / f"{layers}-{index}" for index in range(2)]
        for folder in folders:
            write_folder(folder, adapter, PLAIN)
        peaks.append(1024 * int(run_python(PEAK, tmp_path / f"out{layers}", *folders)))
    sizes = [sum(f.stat().st_size for f in tmp_path.glob(f"*{n}*/{FILE}")) for n in (40, 80)]
    assert sizes[1] - sizes[0] > 60e6
    assert peaks[1] - peaks[0] < 15e6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_a_saved_tensor_is_averaged_in_little_more_memory_than_it_takes(tmp_path: Path) -> None:
    """The output layer of a large vocabulary is the largest tensor of an adapter: here 32 MB."""
    factors = random_factors(1, 64, 64, 64)
    peaks, head = [], torch.randn(8000, 1000)
    for name, dense_part in (("none", {}), ("head", {"head.weight": head})):
        folders = [tmp_path / f"{name}-{index}" for index in range(3)]
        for index, folder in enumerate(folders):
            given = {key: tensor + index for key, tensor in dense_part.items()}
            write_folder(folder, Adapter({"query": factors}, given), PLAIN)
        peaks.append(1024 * int(run_python(PEAK, tmp_path / name, *folders)))
    merged = load_file(tmp_path / "head" / FILE)["base_model.model.head.weight"]
    torch.testing.assert_close(merged, head + 1)
    assert peaks[1] - peaks[0] < 2 * 4 * head.numel()
