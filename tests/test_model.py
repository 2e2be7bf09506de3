"""Models as transformers and PEFT make them: what is loaded, what is trained, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path

import pytest
import torch
from conftest import same_adapters
from tiny import (
    KINDS,
    drawn_like,
    load_tiny,
    logits,
    make_tokenizer,
    plain_base,
    tokens,
)
from transformers import AutoModelForSequenceClassification, BertModel

from fedlora.adapter import PARTS, Adapter, Factors, flatten, overlay
from fedlora.model import (
    base_count,
    read_adapter,
    train_only,
    write_adapter,
)

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]
TEXTS = ["the film was very good", "cold food", "a bad film but great food and so warm"]
SUBSETS = list(chain.from_iterable(combinations(sorted(PARTS), size) for size in range(4)))


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_draws_the_same_adapter_and_another_seed_another(tiny: Tiny, kind: str) -> None:
    first, again = (read_adapter(load_tiny(tiny(kind), seed=3)) for _ in range(2))
    other = read_adapter(load_tiny(tiny(kind), seed=4))
    assert same_adapters(first, again)
    for name, factors in first.layers.items():
        assert not torch.equal(factors.A, other.layers[name].A)
    weights = [name for name in first.dense if name.endswith("weight")]
    assert weights
    for name in weights:
        assert not torch.equal(first.dense[name], other.dense[name])


def test_the_draw_does_not_depend_on_the_global_random_state(tiny: Tiny) -> None:
    torch.manual_seed(1)
    first = read_adapter(load_tiny(tiny("bert")))
    torch.manual_seed(2)
    assert same_adapters(first, read_adapter(load_tiny(tiny("bert"))))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_loading_leaves_the_global_random_state_alone(tiny: Tiny, kind: str) -> None:
    before = torch.get_rng_state()
    load_tiny(tiny(kind))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_no_logit_of_the_base(tiny: Tiny, kind: str) -> None:
    model = load_tiny(tiny(kind))
    start, inputs = read_adapter(model), tokens(model, TEXTS)
    assert not any(factors.B.any() for factors in start.layers.values())
    assert all(factors.A.any() for factors in start.layers.values())
    assert torch.equal(logits(model.network, inputs), logits(plain_base(tiny(kind), start), inputs))


def test_a_head_that_fits_is_kept_as_loaded(tiny: Tiny, tmp_path: Path) -> None:
    whole = AutoModelForSequenceClassification.from_pretrained(tiny("bert"), num_labels=2)
    whole.save_pretrained(tmp_path / "bert")
    load_tiny(tiny("bert")).tokenizer.save_pretrained(tmp_path / "bert")
    found = read_adapter(load_tiny(tmp_path / "bert")).dense
    assert torch.equal(found["classifier.weight"], whole.classifier.weight)
    assert torch.equal(found["classifier.bias"], whole.classifier.bias)


@pytest.mark.parametrize(
    ("kind", "targets", "shapes"),
    [
        ("bert", {"query", "value"}, {(32, 32)}),
        ("roberta", {"query", "value"}, {(32, 32)}),
        ("gpt2", {"c_attn"}, {(96, 32)}),
        ("llama", {"q_proj", "v_proj"}, {(32, 32), (16, 32)}),
        ("distilbert", {"q_lin", "v_lin"}, {(32, 32)}),
    ],
)
def test_targets_are_pefts_defaults_in_both_layers(
    tiny: Tiny, kind: str, targets: set[str], shapes: set[tuple[int, int]]
) -> None:
    layers = read_adapter(load_tiny(tiny(kind))).layers
    assert {name.rpartition(".")[2] for name in layers} == targets
    assert len(layers) == 2 * len(targets)
    assert {factors.shape for factors in layers.values()} == shapes


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 6 / 4), (True, 6 / 2)])
def test_the_scaling_is_alpha_over_r_or_its_root(tiny: Tiny, rslora: bool, scaling: float) -> None:
    model = load_tiny(tiny("bert"), rank=4, alpha=6.0, rslora=rslora)
    adapter = drawn_like(read_adapter(model))
    assert {factors.scaling for factors in adapter.layers.values()} == {scaling}
    write_adapter(model, adapter)
    inputs = tokens(model, TEXTS)
    torch.testing.assert_close(
        logits(model.network, inputs), dense_logits(tiny("bert"), adapter, scaling, inputs)
    )  # float32 against float64: the defaults of float32


def dense_logits(folder: Path, adapter: Adapter, scaling: float, inputs) -> torch.Tensor:
    """Logits of the base with W + scaling B A in place of each W, all in float64."""
    base = plain_base(folder, adapter).double()
    tensors = base.state_dict()
    for name, factors in adapter.layers.items():
        delta = scaling * (factors.B.double() @ factors.A.double())
        tensors[f"{name}.weight"] += delta.T if "gpt2" in str(folder) else delta
    return logits(base, inputs).float()


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("gpt2", ["c_attn", "c_fc"]),
        ("gpt2", ["mlp.c_proj"]),
        ("bert", ["intermediate.dense", "query"]),
        ("llama", ["down_proj", "k_proj"]),
        ("roberta", ["output.dense"]),
    ],
)
def test_an_adapter_adds_its_increment_to_the_weights(
    tiny: Tiny, kind: str, targets: list[str]
) -> None:
    model = load_tiny(tiny(kind), targets=targets)
    adapter = drawn_like(read_adapter(model))
    assert any(factors.shape[0] != factors.shape[1] for factors in adapter.layers.values())
    write_adapter(model, adapter)
    inputs = tokens(model, TEXTS)
    got, want = logits(model.network, inputs), dense_logits(tiny(kind), adapter, 2.0, inputs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # float32 against float64
    assert float((got - logits(plain_base(tiny(kind), adapter), inputs)).abs().max()) > 0.01


def test_pre_classifiers_are_trained_and_travel_with_the_head(tiny: Tiny) -> None:
    """DistilBERT's is drawn anew with the classifier."""
    model = load_tiny(tiny("distilbert"))
    names = {f"{module}.{kind}" for module in ("classifier", "pre_classifier")
             for kind in ("bias", "weight")}  # fmt: skip
    assert set(read_adapter(model).dense) == names
    assert set(train_only(model, ["head"])) == names


def test_modules_that_the_base_lacks_are_trained_and_travel_with_the_head(
    tiny: Tiny, tmp_path: Path
) -> None:
    """This BERT comes without a pooler, which PEFT does not take for a head."""
    BertModel.from_pretrained(tiny("bert"), add_pooling_layer=False).save_pretrained(tmp_path)
    make_tokenizer("bert").save_pretrained(tmp_path)
    model = load_tiny(tmp_path)
    names = {f"{module}.{kind}" for module in ("classifier", "bert.pooler.dense")
             for kind in ("bias", "weight")}  # fmt: skip
    assert set(read_adapter(model).dense) == names
    assert set(train_only(model, ["head"])) == names
    adapter = drawn_like(read_adapter(model))
    write_adapter(model, adapter)
    inputs = tokens(model, TEXTS)
    torch.testing.assert_close(
        logits(model.network, inputs), dense_logits(tmp_path, adapter, 2.0, inputs)
    )  # float32 against float64: the defaults of float32


def test_the_base_is_counted_without_adapter_and_trained_head(tiny: Tiny) -> None:
    model = load_tiny(tiny("bert"))
    base = AutoModelForSequenceClassification.from_pretrained(tiny("bert"), num_labels=2)
    assert base_count(model) == sum(parameter.numel() for parameter in base.parameters())


def test_a_bfloat16_base_keeps_a_float32_adapter(tiny: Tiny) -> None:
    model = load_tiny(tiny("bert"), precision="bfloat16")
    adapter = drawn_like(read_adapter(model))
    write_adapter(model, adapter)
    assert same_adapters(read_adapter(model), adapter)
    embeddings = model.network.base_model.model.bert.embeddings.word_embeddings.weight
    assert embeddings.dtype is torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters.values()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_the_precision_of_the_base_rounds_neither_adapter_nor_head(tiny: Tiny, kind: str) -> None:
    exact, half = (
        read_adapter(load_tiny(tiny(kind), precision=precision))
        for precision in ("float32", "bfloat16")
    )
    assert same_adapters(exact, half)


def test_a_trained_head_is_not_rounded_to_the_precision_of_the_base(
    tiny: Tiny, tmp_path: Path
) -> None:
    whole = AutoModelForSequenceClassification.from_pretrained(tiny("bert"), num_labels=2)
    whole.save_pretrained(tmp_path)
    make_tokenizer("bert").save_pretrained(tmp_path)
    model = load_tiny(tmp_path, precision="bfloat16")
    assert torch.equal(read_adapter(model).dense["classifier.weight"], whole.classifier.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_base_is_that_of_transformers(tiny: Tiny, kind: str) -> None:
    """Its buffers too: rounded frequencies of rotary positions are another model."""
    model = load_tiny(tiny(kind), precision="bfloat16")
    plain = AutoModelForSequenceClassification.from_pretrained(tiny(kind), dtype=torch.bfloat16)
    ours = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in chain(
            model.network.base_model.model.named_parameters(),
            model.network.base_model.model.named_buffers(),
        )
    }
    heads = ("classifier", "pre_classifier", "score")  # drawn anew, and float32
    base = {
        name: tensor
        for name, tensor in chain(plain.named_parameters(), plain.named_buffers())
        if name.split(".")[0] not in heads
    }
    assert base
    for name, tensor in base.items():
        assert (name, ours[name].dtype) == (name, tensor.dtype)
        assert torch.equal(ours[name], tensor)


def test_rotary_positions_turn_as_in_float32_under_a_bfloat16_base(tiny: Tiny) -> None:
    turned = []
    for precision in ("float32", "bfloat16"):
        model = load_tiny(tiny("llama"), precision=precision)
        turn = model.network.base_model.model.model.rotary_emb
        turned.append(turn(torch.zeros(1), torch.arange(512)[None]))
    torch.testing.assert_close(turned[1], turned[0], rtol=0, atol=0)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_asks_for_a_gradient_after_loading(tiny: Tiny, kind: str) -> None:
    assert not any(p.requires_grad for p in load_tiny(tiny(kind)).network.parameters())


@pytest.mark.parametrize("parts", SUBSETS, ids=lambda parts: "+".join(parts) or "nothing")
def test_gradients_reach_exactly_the_wanted_parts(tiny: Tiny, parts: tuple[str, ...]) -> None:
    model = load_tiny(tiny("distilbert"))
    train_only(model, PARTS)  # what was wanted before must not stay
    chosen = train_only(model, parts)
    want = set(flatten(read_adapter(model), parts))
    assert set(chosen) == want
    by_identity = {id(parameter): name for name, parameter in model.parameters.items()}
    asking = {by_identity.get(id(p), "base") for p in model.network.parameters() if p.requires_grad}
    assert asking == want


# ---------------------------------------------------------------- adapters in and out


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_back_bit_for_bit(tiny: Tiny, kind: str) -> None:
    model = load_tiny(tiny(kind))
    adapter = drawn_like(read_adapter(model))
    write_adapter(model, adapter)
    assert same_adapters(read_adapter(model), adapter)


def test_an_adapter_that_was_read_does_not_follow_the_model(tiny: Tiny) -> None:
    model = load_tiny(tiny("bert"))
    read = read_adapter(model)
    kept = {name: tensor.clone() for name, tensor in flatten(read).items()}
    write_adapter(model, drawn_like(read))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in flatten(read).items())
    assert not any(tensor.requires_grad for tensor in flatten(read).values())


def test_the_model_does_not_follow_an_adapter_that_was_written(tiny: Tiny) -> None:
    model = load_tiny(tiny("bert"))
    adapter = drawn_like(read_adapter(model))
    write_adapter(model, adapter)
    kept = read_adapter(model)
    for tensor in flatten(adapter).values():
        tensor.zero_()
    assert same_adapters(read_adapter(model), kept)


QUERY = "bert.encoder.layer.0.attention.self.query"


def without_a_layer(adapter: Adapter) -> Adapter:
    layers = {name: factors for name, factors in adapter.layers.items() if name != QUERY}
    return replace(adapter, layers=layers)


def with_a_layer_too_many(adapter: Adapter) -> Adapter:
    return replace(adapter, layers={**adapter.layers, "bert.extra": adapter.layers[QUERY]})


def without_head(adapter: Adapter) -> Adapter:
    return replace(adapter, dense={})


def of_another_rank(adapter: Adapter) -> Adapter:
    factors = Factors(torch.ones(4, 32), torch.ones(32, 4), adapter.layers[QUERY].scaling)
    return replace(adapter, layers={**adapter.layers, QUERY: factors})


def with_another_head(adapter: Adapter) -> Adapter:
    return overlay({"classifier.bias": torch.zeros(3)}, adapter)


def with_nan(adapter: Adapter) -> Adapter:
    return overlay({f"{QUERY}.lora_B": torch.full((32, 3), torch.nan)}, adapter)


def with_inf_in_the_last_tensor(adapter: Adapter) -> Adapter:
    return overlay({"classifier.weight": torch.full((2, 32), torch.inf)}, adapter)


def with_a_frozen_part_of_another_shape(adapter: Adapter) -> Adapter:
    return replace(adapter, frozen={QUERY: Factors(torch.ones(2, 16), torch.ones(32, 2), 1.0)})


def with_nan_in_what_is_frozen(adapter: Adapter) -> Adapter:
    broken = Factors(torch.ones(2, 32), torch.full((32, 2), torch.nan), 1.0)
    return replace(adapter, frozen={QUERY: broken})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_a_layer, f"lacks '{QUERY}.lora_A'"),
        (with_a_layer_too_many, "no place for 'bert.extra.lora_A'"),
        (without_head, "lacks 'classifier.bias'"),
        (of_another_rank, r"lora_A' has shape \(4, 32\), the model holds \(3, 32\)"),
        (with_another_head, r"'classifier.bias' has shape \(3,\), the model holds \(2,\)"),
        (with_nan, f"'{QUERY}.lora_B' holds NaN or Inf"),
        (with_inf_in_the_last_tensor, "'classifier.weight' holds NaN or Inf"),
        (with_a_frozen_part_of_another_shape, "frozen increment of shape .* fits no layer"),
        (with_nan_in_what_is_frozen, "frozen_B' holds NaN or Inf"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_written(
    tiny: Tiny, spoil: Callable[[Adapter], Adapter], words: str
) -> None:
    model = load_tiny(tiny("bert"))
    before = read_adapter(model)
    with pytest.raises(ValueError, match=words):
        write_adapter(model, spoil(drawn_like(before)))
    assert same_adapters(read_adapter(model), before)
