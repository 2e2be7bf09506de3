"""Folded increments and smaller ranks in real models: a second, frozen increment beside the
adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench import Bench, plan_of
from conftest import normal, same_adapters
from peft import PeftModel
from tiny import KINDS, drawn_like, load_tiny, logits, plain_base, tokens
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from fedlora.adapter import Adapter, Factors, cut, flatten
from fedlora.model import (
    Model,
    load_adapter,
    read_adapter,
    save_adapter,
    save_merged,
    write_adapter,
)

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]
TEXTS = ["the film was very good", "cold food", "a bad film but great food and so warm"]


def with_frozen(adapter: Adapter, rank: int = 5) -> Adapter:
    """A frozen increment of another rank on every second layer."""
    frozen = {}
    for seed, (name, factors) in enumerate(sorted(adapter.layers.items())):
        m, n = factors.shape
        if seed % 2 == 0:
            A, B = normal(seed, rank, n).float() * 0.2, normal(seed + 50, m, rank).float() * 0.2
            frozen[name] = Factors(A, B, 1.0)
    return replace(adapter, frozen=frozen)


def dense_logits(folder: Path, adapter: Adapter, inputs: dict[str, Tensor]) -> Tensor:
    """The base with every increment multiplied out into its weights, in float64."""
    base = plain_base(folder, adapter).double()
    tensors = base.state_dict()
    for name, factors in [*adapter.layers.items(), *adapter.frozen.items()]:
        delta = factors.scaling * (factors.B.double() @ factors.A.double())
        tensors[f"{name}.weight"] += delta.T if "gpt2" in str(folder) else delta
    return logits(base, inputs).float()


def ready(folder: Path) -> tuple[Model, Adapter]:
    model = load_tiny(folder)
    return model, with_frozen(drawn_like(read_adapter(model)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_increment_is_added_to_the_weight_and_leaves_with_the_adapter(
    tiny: Tiny, kind: str
) -> None:
    model, adapter = ready(tiny(kind))
    inputs = tokens(model, TEXTS)
    write_adapter(model, replace(adapter, frozen={}))
    bare = logits(model.network, inputs)
    write_adapter(model, adapter)
    got = logits(model.network, inputs)
    want = dense_logits(tiny(kind), adapter, inputs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # float32 against float64
    assert float((got - bare).abs().max()) > 0.01
    assert same_adapters(read_adapter(model, adapter), adapter)
    write_adapter(model, replace(adapter, frozen={}))
    assert torch.equal(logits(model.network, inputs), bare)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_result_is_saved_as_one_adapter_of_the_summed_rank(
    tiny: Tiny, tmp_path: Path, kind: str
) -> None:
    model, adapter = ready(tiny(kind))
    save_adapter(model, adapter, tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(tiny(kind), num_labels=2)
    base.config.pad_token_id = model.network.config.pad_token_id
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    inputs = tokens(model, TEXTS)
    want = dense_logits(tiny(kind), adapter, inputs)
    torch.testing.assert_close(logits(loaded, inputs), want, rtol=1e-5, atol=1e-5)
    ranks = {module.r["default"] for module in loaded.modules() if hasattr(module, "lora_A")}
    assert ranks == {3, 8}
    again = load_adapter(model, tmp_path / "adapter")
    assert same_adapters(replace(again, frozen={}), replace(adapter, frozen={}))
    for name, factors in adapter.frozen.items():
        got = again.frozen[name]
        torch.testing.assert_close(got.B @ got.A, factors.B @ factors.A, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_merged_model_holds_the_frozen_increment_too(
    tiny: Tiny, tmp_path: Path, kind: str
) -> None:
    model, adapter = ready(tiny(kind))
    save_merged(model, adapter, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    inputs = tokens(model, TEXTS)
    want = dense_logits(tiny(kind), adapter, inputs)
    torch.testing.assert_close(logits(merged, inputs), want, rtol=1e-4, atol=1e-5)


def smaller(adapter: Adapter, rank: int, scaling: float) -> Adapter:
    layers = {name: cut(factors, rank, scaling) for name, factors in adapter.layers.items()}
    return replace(adapter, layers=layers)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_smaller_rank_computes_with_its_own_scaling(tiny: Tiny, kind: str) -> None:
    model, adapter = ready(tiny(kind))
    adapter = smaller(adapter, 2, 3.0)
    write_adapter(model, adapter)
    inputs = tokens(model, TEXTS)
    want = dense_logits(tiny(kind), adapter, inputs)
    torch.testing.assert_close(logits(model.network, inputs), want, rtol=1e-5, atol=1e-5)
    assert same_adapters(read_adapter(model, adapter), adapter)


def test_a_client_of_smaller_rank_trains_its_own_pairs_and_no_other(
    tiny: Tiny, tmp_path: Path
) -> None:
    bench = Bench(tiny("bert"), tmp_path, client__weight_decay=0.1, client__steps=5)
    sent = smaller(with_frozen(bench.start), 2, 3.0)
    back = bench.fit(adapter=sent).adapter
    for name, factors in back.layers.items():
        assert (factors.rank, factors.scaling) == (2, 3.0)
        assert not torch.equal(factors.A, sent.layers[name].A)
        assert not torch.equal(factors.B, sent.layers[name].B)
        module = bench.model.lora_layers[name]
        assert not bool(module.lora_A["default"].weight[2:].any())
        assert not bool(module.lora_B["default"].weight[:, 2:].any())
    assert same_adapters(replace(back, layers={}, dense={}), replace(sent, layers={}, dense={}))
    for name, factors in sent.frozen.items():
        assert back.frozen[name] is factors or torch.equal(back.frozen[name].A, factors.A)


def test_training_sees_what_is_frozen(tiny: Tiny, tmp_path: Path) -> None:
    bench = Bench(tiny("bert"), tmp_path)
    plain = bench.fit(plan=plan_of())
    other = bench.fit(plan=plan_of(), adapter=with_frozen(bench.start))
    names = flatten(plain.adapter)
    assert any(not torch.equal(flatten(other.adapter)[name], names[name]) for name in names)
