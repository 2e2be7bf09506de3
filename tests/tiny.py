"""Tiny random models with their tokenizers, and small tables of text: all made here.

A test file says `pytest_plugins = ["tiny"]` to get the fixture `tiny`, which makes each model once.
(PYTEST_DONT_REWRITE: the names below are imported before the plugin is.)
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from fedlora.adapter import Adapter, flatten, overlay
from fedlora.config import Config, make_config
from fedlora.model import Model, load_model
from fedlora.settings import ModelSettings

NEUTRAL = ["a", "the", "film", "food", "was", "is", "not", "very", "but", "and", "so"]
GOOD, BAD = ["good", "great", "fine", "warm"], ["bad", "poor", "awful", "cold"]
WORDS = [*NEUTRAL, *GOOD, *BAD]
LABELS = ("neg", "pos")
KINDS = ("bert", "gpt2", "roberta", "distilbert", "llama")
NEEDED = {  # what a user has to set for these
    "gpt2": {"pad_token": "<eos>"},
    "llama": {"pad_token": "</s>"},
    "distilbert": {"targets": ["q_lin", "v_lin"]},
}
BERT_TOKENS = {
    "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"
}  # fmt: skip
TOKENS: dict[str, dict[str, Any]] = {
    "bert": BERT_TOKENS | {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]},
    "distilbert": BERT_TOKENS,
    "roberta": {
        "cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"
    },
    "gpt2": {"unk_token": "<unk>", "eos_token": "<eos>"},
    "llama": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
}  # fmt: skip
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny base without a head, with its tokenizer, by architecture."""
    root = tmp_path_factory.mktemp("tiny")

    return lambda kind: saved_base(root, kind)


def saved_base(root: Path, kind: str) -> Path:
    """The folder in `root` of a tiny base and its tokenizer, made where it is not there yet."""
    if not (root / kind).is_dir():
        transformers.utils.logging.disable_progress_bar()
        make_base(kind).save_pretrained(root / kind)
        make_tokenizer(kind).save_pretrained(root / kind)
    return root / kind


def make_tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    """One token a word; where the kind has them, [CLS] a [SEP] or [CLS] a [SEP] b [SEP]."""
    names = TOKENS[kind]
    specials = [token for token in names.values() if isinstance(token, str)]
    vocabulary = {token: number for number, token in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=names["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if "cls_token" in names:
        cls, sep = names["cls_token"], names["sep_token"]
        second = int(kind == "bert")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:{second} {sep}:{second}",
            special_tokens=[(cls, vocabulary[cls]), (sep, vocabulary[sep])],
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_base(kind: str, seed: int = 7) -> transformers.PreTrainedModel:
    """A random base of two layers with weights large enough for logits to differ."""
    size = len(make_tokenizer(kind))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "bert":
            config = transformers.BertConfig(vocab_size=size, max_position_embeddings=32, **SIZES)
            base = transformers.BertModel(config)
        elif kind == "roberta":
            config = transformers.RobertaConfig(
                vocab_size=size, max_position_embeddings=34, pad_token_id=1, **SIZES
            )
            base = transformers.RobertaModel(config)
        elif kind == "distilbert":
            config = transformers.DistilBertConfig(
                vocab_size=size,
                max_position_embeddings=32,
                n_layers=2,
                n_heads=2,
                dim=32,
                hidden_dim=48,
            )
            base = transformers.DistilBertModel(config)
        elif kind == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=size, n_positions=32, n_embd=32, n_layer=2, n_head=2, n_inner=48,
                bos_token_id=1, eos_token_id=1,
            )  # fmt: skip
            base = transformers.GPT2Model(config)
        else:
            config = transformers.LlamaConfig(
                vocab_size=size, max_position_embeddings=32, num_key_value_heads=1, **SIZES
            )
            base = transformers.LlamaModel(config)
        for name, parameter in base.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "wte" not in name:
                nn.init.normal_(parameter, std=0.3)
    return base


def load_tiny(
    folder: Path,
    labels: Sequence[str] = LABELS,
    *,
    seed: int = 0,
    precision: str = "float32",
    **settings: Any,
) -> Model:
    """The model of a tiny base on the CPU: rank 3, scaling 2 unless told."""
    chosen = {"rank": 3, "alpha": 6.0} | NEEDED.get(folder.name, {}) | settings
    wanted = ModelSettings(name=str(folder), **chosen)
    return load_model(wanted, labels, seed=seed, device="cpu", precision=precision)


def plain_base(folder: Path, adapter: Adapter, labels: int = 2) -> transformers.PreTrainedModel:
    """The base with the adapter's head, loaded by transformers alone; no LoRA."""
    with torch.random.fork_rng(devices=[]):
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=labels, dtype=torch.float32
        )
    base.config.pad_token_id = base.config.pad_token_id or base.config.eos_token_id
    tensors = base.state_dict()
    for name, tensor in adapter.dense.items():
        tensors[name].copy_(tensor)
    return base.eval()


def drawn_like(adapter: Adapter, seed: int = 1, size: float = 0.2) -> Adapter:
    """An adapter of the same layout with every number drawn: as if it had been trained."""
    stream = torch.Generator().manual_seed(seed)
    tensors = {
        name: size * torch.randn(tensor.shape, generator=stream)
        for name, tensor in flatten(adapter).items()
    }
    return overlay(tensors, adapter)


def tokens(model: Model, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Any:
    """Model inputs of some texts, padded on the right by the tokenizer itself."""
    return model.tokenizer(list(texts), pairs, padding=True, return_tensors="pt")


@torch.no_grad()
def logits(network: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return network.eval()(**inputs).logits


def toy_rows(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of 3 to 12 words and their label, `neg` and `pos` by turns; one word tells which."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        words = list(rng.choice(NEUTRAL, rng.integers(2, 12)))
        words.insert(rng.integers(len(words) + 1), rng.choice((BAD, GOOD)[index % 2]))
        rows.append((" ".join(words), LABELS[index % 2]))
    return rows


def write_csv(
    path: Path, rows: Iterable[Sequence[object]], header: Sequence[str] = ("text", "label")
) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def toy_config(base: Path, train: Path | str, **changes: object) -> Config:
    """Two rounds of three clients on a tiny model; `section__key` changes a setting."""
    flat: dict[str, Any] = {
        "run.rounds": 2,
        "run.device": "cpu",
        "run.threads": 1,
        "model.name": str(base),
        "model.rank": 3,
        "model.alpha": 6.0,
        "data.train": str(train),
        "data.max_length": 24,
        "data.holdout": 0.25,
        "client.steps": 3,
        "client.batch": 4,
        "client.lr": 0.01,
    }
    needed = {f"model.{key}": value for key, value in NEEDED.get(base.name, {}).items()}
    named = {name.replace("__", ".", 1): value for name, value in changes.items()}
    return make_config(flat | needed | named)
