"""What fedlora saves, PEFT and transformers load: the same logits, whole files, no local paths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import same_adapters
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import drawn_like, load_tiny, logits, plain_base, tokens
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel

from fedlora.adapter import Adapter, flatten, overlay
from fedlora.files import new_folder, write_text
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
CASES = [
    ("bert", {}),
    ("bert", {"rslora": True, "rank": 4}),
    ("bert", {"targets": ["query", "intermediate.dense"]}),
    ("gpt2", {}),
    ("gpt2", {"targets": ["c_attn", "c_fc"], "rslora": True}),
    ("roberta", {}),
    ("distilbert", {}),
    ("llama", {}),
]
each_case = pytest.mark.parametrize(
    ("kind", "settings"), CASES, ids=lambda part: part if isinstance(part, str) else "+".join(part)
)


def trained(folder: Path, **settings: object) -> tuple[Model, Adapter]:
    """A model with an adapter and head that training could have left."""
    model = load_tiny(folder, **settings)
    adapter = drawn_like(read_adapter(model))
    write_adapter(model, adapter)
    return model, adapter


# PEFT asks transformers 5 for `is_gradient_checkpointing` while it loads; nothing of ours
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@each_case
def test_a_saved_adapter_loads_in_peft_with_the_same_bits(
    tiny: Tiny, tmp_path: Path, kind: str, settings: dict
) -> None:
    model, adapter = trained(tiny(kind), **settings)
    save_adapter(model, adapter, tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny(kind), num_labels=2, dtype=torch.float32, pad_token_id=model.tokenizer.pad_token_id
    )
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    inputs = tokens(model, TEXTS)
    want = logits(model.network, inputs)
    assert torch.equal(logits(loaded, inputs), want)
    assert not torch.equal(logits(plain_base(tiny(kind), adapter), inputs), want)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@each_case
def test_an_adapter_on_a_bfloat16_base_gives_pefts_bits_and_exports_those_of_float32(
    tiny: Tiny, tmp_path: Path, kind: str, settings: dict
) -> None:
    """In mixed precision, on the base as transformers itself loads it in bfloat16."""
    for precision in ("bfloat16", "float32"):
        model, adapter = trained(tiny(kind), precision=precision, **settings)
        save_adapter(model, adapter, tmp_path / precision)
        save_merged(model, adapter, tmp_path / f"merged-{precision}")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        both = [(tmp_path / name / file).read_bytes() for name in ("bfloat16", "float32")]
        assert both[0] == both[1]
    merged = [
        (tmp_path / f"merged-{name}" / "model.safetensors").read_bytes()
        for name in ("bfloat16", "float32")
    ]
    assert merged[0] == merged[1]
    model, adapter = trained(tiny(kind), precision="bfloat16", **settings)
    base = AutoModelForSequenceClassification.from_pretrained(
        tiny(kind), num_labels=2, dtype=torch.bfloat16, pad_token_id=model.tokenizer.pad_token_id
    )
    loaded = PeftModel.from_pretrained(base, tmp_path / "bfloat16")
    inputs = tokens(model, TEXTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(loaded, inputs), logits(model.network, inputs))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_what_the_base_lacked_is_saved_with_the_adapter(tiny: Tiny, tmp_path: Path) -> None:
    """Each load draws another pooler for this BERT, which has none."""
    base = tmp_path / "base"
    BertModel.from_pretrained(tiny("bert"), add_pooling_layer=False).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny("bert")).save_pretrained(base)
    model, adapter = trained(base)
    save_adapter(model, adapter, tmp_path / "adapter")
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    inputs = tokens(model, TEXTS)
    assert torch.equal(logits(loaded, inputs), logits(model.network, inputs))


@each_case
def test_a_saved_merged_model_needs_no_peft_and_agrees(
    tiny: Tiny, tmp_path: Path, kind: str, settings: dict
) -> None:
    model, adapter = trained(tiny(kind), **settings)
    save_merged(model, adapter, tmp_path / "merged")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    inputs = AutoTokenizer.from_pretrained(tmp_path / "merged")(
        TEXTS, padding=True, return_tensors="pt"
    )
    got, want = logits(loaded, inputs), logits(model.network, inputs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # float32, other order of sums
    assert loaded.config.id2label == {0: "neg", 1: "pos"}
    assert loaded.config.pad_token_id == model.tokenizer.pad_token_id


def test_merging_for_export_leaves_model_and_adapter_as_they_were(
    tiny: Tiny, tmp_path: Path
) -> None:
    model, adapter = trained(tiny("gpt2"))
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    kept = {name: tensor.clone() for name, tensor in flatten(adapter).items()}
    save_merged(model, adapter, tmp_path / "merged")
    after = model.network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(flatten(adapter)[name], tensor) for name, tensor in kept.items())


def test_saving_names_the_base_without_its_path(tiny: Tiny, tmp_path: Path) -> None:
    model, adapter = trained(tiny("bert"))
    save_adapter(model, adapter, tmp_path / "adapter")
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["base_model_name_or_path"] == "bert"
    assert (config["r"], config["lora_alpha"]) == (3, 6.0)
    assert set(config["target_modules"]) == {"query", "value"}
    assert str(tiny("bert").parent) not in text
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_saved_adapter_is_readable_by_others_than_its_owner(tiny: Tiny, tmp_path: Path) -> None:
    model, adapter = trained(tiny("bert"))
    save_adapter(model, adapter, tmp_path / "adapter")
    assert (tmp_path / "adapter").stat().st_mode & 0o777 == 0o755


def test_the_same_adapter_gives_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        model, adapter = trained(tiny("bert"))
        save_adapter(model, adapter, tmp_path / name)
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


# ---------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("save", [save_adapter, save_merged])
def test_a_folder_that_exists_is_refused_and_untouched(
    tiny: Tiny, tmp_path: Path, save: Callable[[Model, Adapter, Path], None]
) -> None:
    model, adapter = trained(tiny("bert"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already; nothing was written"):
        save(model, adapter, tmp_path / "there")
    assert [file.name for file in tmp_path.rglob("*")] == ["there", "mine.txt"]


def test_an_adapter_that_does_not_fit_leaves_no_file(tiny: Tiny, tmp_path: Path) -> None:
    model, adapter = trained(tiny("bert"))
    with pytest.raises(ValueError, match="NaN or Inf"):
        save_adapter(
            model,
            overlay({"classifier.bias": torch.full((2,), torch.nan)}, adapter),
            tmp_path / "a",
        )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_writing_stops_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    def stopped(folder: Path) -> None:
        with new_folder(folder) as temporary:
            (temporary / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_seen_whole_or_not_at_all(tmp_path: Path) -> None:
    with new_folder(tmp_path / "adapter") as temporary:
        (temporary / "one").write_text("1")
        assert not (tmp_path / "adapter").exists()
        assert temporary.parent == tmp_path  # one file system: the rename is one step
    assert [file.name for file in tmp_path.rglob("*")] == ["adapter", "one"]


def test_a_text_takes_the_place_of_an_older_one_in_one_step(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with (tmp_path / "a.txt").open() as old:
        write_text(tmp_path / "a.txt", "newer")
        assert old.read() == "old"  # a reader keeps a whole file
    assert (tmp_path / "a.txt").read_text() == "newer"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


# ---------------------------------------------------------------- reading back


@pytest.mark.parametrize("kind", ["bert", "gpt2", "roberta", "distilbert"])
def test_a_saved_adapter_is_read_back_bit_for_bit(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    model, adapter = trained(tiny(kind))
    save_adapter(model, adapter, tmp_path / "adapter")
    fresh = load_tiny(tiny(kind), seed=99)
    start = read_adapter(fresh)
    assert same_adapters(load_adapter(fresh, tmp_path / "adapter"), adapter)
    assert same_adapters(read_adapter(fresh), start)  # reading a folder writes nothing


def test_an_adapter_that_peft_saved_is_read(tiny: Tiny, tmp_path: Path) -> None:
    model, adapter = trained(tiny("bert"))
    model.network.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert same_adapters(load_adapter(load_tiny(tiny("bert")), tmp_path / "adapter"), adapter)


def saved(tiny: Tiny, folder: Path, **settings: object) -> Path:
    model, adapter = trained(tiny("bert"), **settings)
    save_adapter(model, adapter, folder)
    return folder / "adapter_model.safetensors"


def test_a_folder_without_an_adapter_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no adapter in PEFT's form"):
        load_adapter(load_tiny(tiny("bert")), tmp_path)


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_truncated_adapter_is_refused(tiny: Tiny, tmp_path: Path, size: int) -> None:
    file = saved(tiny, tmp_path / "adapter")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"is no whole safetensors file|was cut or added to"):
        load_adapter(load_tiny(tiny("bert")), tmp_path / "adapter")


@pytest.mark.parametrize("name", ["lora_A.weight", "lora_B.weight", "classifier.bias"])
def test_an_adapter_that_lacks_a_tensor_is_refused(tiny: Tiny, tmp_path: Path, name: str) -> None:
    file = saved(tiny, tmp_path / "adapter")
    tensors = load_file(file)
    missing = next(key for key in tensors if key.endswith(name))
    del tensors[missing]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"has no {name[:6]}|lacks tensor '{name}'"):
        load_adapter(load_tiny(tiny("bert")), tmp_path / "adapter")


def test_an_adapter_with_a_tensor_too_many_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    file = saved(tiny, tmp_path / "adapter")
    save_file(load_file(file) | {"base_model.model.extra": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="has no place in this model for tensor 'extra'"):
        load_adapter(load_tiny(tiny("bert")), tmp_path / "adapter")


def test_an_adapter_of_other_layers_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    saved(tiny, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"lacks layer 'bert.encoder.layer.0.attention.self.key"):
        load_adapter(load_tiny(tiny("bert"), targets=["key"]), tmp_path / "adapter")


@pytest.mark.parametrize(("rank", "alpha"), [(2, 4.0), (5, 50.0)])
def test_an_adapter_of_another_rank_means_the_same_in_this_model(
    tiny: Tiny, tmp_path: Path, rank: int, alpha: float
) -> None:
    """Pairs beyond the model's rank are frozen, missing ones are not there.

    The scaling is its own.
    """
    model, adapter = trained(tiny("bert"))
    save_adapter(model, adapter, tmp_path / "adapter")
    other = load_tiny(tiny("bert"), rank=rank, alpha=alpha)
    write_adapter(other, load_adapter(other, tmp_path / "adapter"))
    write_adapter(model, adapter)
    inputs = tokens(model, TEXTS)
    torch.testing.assert_close(logits(other.network, inputs), logits(model.network, inputs))


def test_an_adapter_with_nan_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    file = saved(tiny, tmp_path / "adapter")
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.classifier.bias": torch.full((2,), torch.nan)}, file)
    with pytest.raises(ValueError, match="NaN"):
        load_adapter(load_tiny(tiny("bert")), tmp_path / "adapter")
