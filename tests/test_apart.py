"""A private run takes no model in which one row of a batch changes what another adds to the sum."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from bench import Place
from tiny import (
    BERT_TOKENS,
    GOOD,
    KINDS,
    LABELS,
    NEEDED,
    NEUTRAL,
    SIZES,
    load_tiny,
    make_tokenizer,
    saved_base,
)
from tokenizers import Tokenizer
from torch import nn
from torch.nn.functional import cross_entropy

from fedlora.adapter import PARTS
from fedlora.data import Examples, encode
from fedlora.model import Model, load_model, train_only
from fedlora.privacy.apart import SLACK, check_rows_apart, made_up, rows_move
from fedlora.privacy.dpsgd import private_steps
from fedlora.run import execute
from fedlora.settings import ModelSettings
from fedlora.tables import Table

pytest.importorskip("opacus")
pytest.importorskip("dp_accounting")
LONGEST = 30
APART = [*KINDS, "deberta", "modernbert"]
TOGETHER = ["convbert", "fnet"]
TARGETS = {
    "convbert": ["query", "value"], "fnet": ["intermediate.dense"], "deberta": ["value_proj"],
    "modernbert": ["Wqkv"],
}  # fmt: skip


def saved(root: Path, kind: str) -> Path:
    """The folder of a tiny base of any of the kinds above."""
    if kind in KINDS:
        return saved_base(root, kind)
    tokenizer = make_tokenizer("bert")
    size = {"vocab_size": len(tokenizer)}
    long = {**size, **SIZES, "max_position_embeddings": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        if kind == "convbert":
            config = transformers.ConvBertConfig(embedding_size=32, head_ratio=1, **long)
            base = transformers.ConvBertModel(config)
        elif kind == "fnet":
            del long["num_attention_heads"]
            base = transformers.FNetModel(transformers.FNetConfig(**long))
        elif kind == "deberta":
            config = transformers.DebertaV2Config(
                conv_kernel_size=3, relative_attention=True, position_buckets=8,
                pos_att_type=["c2p", "p2c"], **long,
            )  # fmt: skip
            base = transformers.DebertaV2Model(config)
        elif kind == "bart":
            tokenizer = make_tokenizer("roberta")
            halves = {
                f"{half}_{name}": value for half in ("encoder", "decoder")
                for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))
            }  # fmt: skip
            ends = {f"{name}_token_id": tokenizer.sep_token_id for name in ("eos", "decoder_start")}
            config = transformers.BartConfig(
                vocab_size=len(tokenizer), d_model=32, pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.cls_token_id, **halves, **ends,
            )  # fmt: skip
            base = transformers.BartModel(config)
        else:
            names = ("pad", "cls", "sep", "bos", "eos")
            config = transformers.ModernBertConfig(
                **size, **SIZES, **{f"{name}_token_id": at for at, name in enumerate(names)}
            )
            base = transformers.ModernBertModel(config)
        for name, parameter in base.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                nn.init.normal_(parameter, std=0.3)
    transformers.utils.logging.disable_progress_bar()
    base.save_pretrained(root / kind)
    tokenizer.save_pretrained(root / kind)
    return root / kind


def loaded(root: Path, kind: str, precision: str = "float32") -> Model:
    settings = {"targets": TARGETS[kind]} if kind in TARGETS else NEEDED.get(kind, {})
    named = ModelSettings(name=str(saved(root, kind)), rank=3, alpha=6.0, **settings)
    return load_model(named, LABELS, device="cpu", precision=precision)


def moved_by_a_long_row(model: Model, clip: float, piece: int = 13) -> float:
    """In clips, by how much one long row more moves the clipped sum of short ones, so many taken in
    one pass; no dropout.
    """
    short = [f"the film is {word}" for word in GOOD * 3]
    table = Table("rows", [*short, " ".join(NEUTRAL * 2)], None, ["pos"] * 13)
    rows = encode(table, [1] * 13, model.tokenizer, LONGEST)
    for module in model.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    parameters = train_only(model, PARTS)
    for name, parameter in parameters.items():
        drawn = torch.Generator().manual_seed(len(name))
        parameter.data.normal_(std=0.1, generator=drawn)
    both = [summed(model, parameters, rows, count, clip, piece) for count in (12, 13)]
    return float((both[1] - both[0]).norm()) / clip


def summed(
    model: Model, parameters: dict[str, nn.Parameter], rows: Examples, count: int, clip: float,
    piece: int,
) -> torch.Tensor:  # fmt: skip
    network = model.network.train()
    with private_steps(network, parameters, clip=clip, noise=0.0, expected=1.0) as steps:
        for at in range(0, count, piece):
            own = np.arange(at, min(at + piece, count))
            inputs, labels = rows.batch(own, model.device)
            steps.begin(len(own))
            cross_entropy(steps.module(**inputs).logits, labels, reduction="sum").backward()
        steps.finish()
        return torch.cat([p.grad.double().flatten() for p in parameters.values()])


def test_a_head_of_zeros_does_not_stand_in_the_way_and_stays(tmp_path: Path) -> None:
    """All its scores are zero, so that nothing would be seen to move, or to stay."""
    model = loaded(tmp_path, "bert")
    head = [p for n, p in model.parameters.items() if not n.endswith(("lora_A", "lora_B"))]
    for parameter in head:
        parameter.data.zero_()
    check_rows_apart(model, LONGEST)
    assert head
    assert not any(bool(parameter.any()) for parameter in head)


@pytest.mark.parametrize("kind", ["bert", "fnet", "convbert"])
def test_the_sum_moves_by_more_than_the_clip_where_padding_is_read(
    tmp_path: Path, kind: str
) -> None:
    """What the check is for, measured on the sum itself."""
    moved = moved_by_a_long_row(loaded(tmp_path, kind), clip=0.01)
    assert moved > 1.01 if kind in TOGETHER else moved <= 1 + 1e-5


@pytest.mark.parametrize("kind", ["bert", "fnet", "convbert"])
def test_alone_no_row_reaches_another(tmp_path: Path, kind: str) -> None:
    """Whatever the weights are: what padding does to others needs others in the pass."""
    assert moved_by_a_long_row(loaded(tmp_path, kind), clip=0.01, piece=1) <= 1 + 1e-6


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", APART)
def test_models_that_mask_padding_are_taken(tmp_path: Path, kind: str, precision: str) -> None:
    """In float32, whatever the base is held in: to rounding, far below what is allowed."""
    model = loaded(tmp_path, kind, precision)
    assert rows_move(model, made_up(model.tokenizer, LONGEST)) < SLACK / 20
    check_rows_apart(model, LONGEST)
    check_rows_apart(model, 10**6)  # of a node that was not asked how much its model reads


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", TOGETHER)
def test_models_that_read_padding_are_refused(tmp_path: Path, kind: str, precision: str) -> None:
    model = loaded(tmp_path, kind, precision)
    with pytest.raises(ValueError, match=rf"\({kind}\): a row's scores move by .* mask padding"):
        check_rows_apart(model, LONGEST)


def test_a_private_run_of_such_a_model_ends_before_it_begins(tmp_path: Path) -> None:
    place = Place(saved(tmp_path, "fnet"), tmp_path)
    settings = {"model__targets": TARGETS["fnet"], "privacy__delta": 1e-3}
    with pytest.raises(ValueError, match=r"fnet.* no epsilon would hold; take one that does"):
        execute(place.job("private", privacy__unit="example", **settings))
    assert not (tmp_path / "private").exists()
    execute(place.job("open", model__targets=TARGETS["fnet"]))


def test_a_model_that_fails_on_a_special_token_in_a_text_is_refused(tmp_path: Path) -> None:
    """BART's head wants as many </s> in each row of a batch: a row with one more ends the round."""
    with pytest.raises(ValueError, match=r"\(bart\) fails on made-up rows.*show itself"):
        check_rows_apart(loaded(tmp_path, "bart"), LONGEST)


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(3), nn.SyncBatchNorm(3), nn.InstanceNorm1d(3, track_running_stats=True)],
)
def test_layers_that_mix_rows_are_refused(tmp_path: Path, layer: nn.Module) -> None:
    """In evaluation mode they do not: their kind is looked at."""
    model = load_tiny(saved_base(tmp_path, "bert"))
    model.network.base_model.model.bert.encoder.extra = layer
    with pytest.raises(ValueError, match=rf"encoder\.extra \({type(layer).__name__}\) mixes"):
        check_rows_apart(model, LONGEST)
    model.network.base_model.model.bert.encoder.extra = nn.InstanceNorm1d(3)
    check_rows_apart(model, LONGEST)


def test_a_head_of_zeros_hides_nothing(tmp_path: Path) -> None:
    model = loaded(tmp_path, "fnet")
    for name, parameter in model.parameters.items():
        if "lora" not in name:
            nn.init.zeros_(parameter)
    with pytest.raises(ValueError, match="mask padding"):
        check_rows_apart(model, LONGEST)


def test_a_model_without_a_number_is_refused(tmp_path: Path) -> None:
    model = load_tiny(saved_base(tmp_path, "bert"))
    model.network.get_input_embeddings().weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="move by nan"):
        check_rows_apart(model, LONGEST)


@pytest.mark.parametrize("kind", ["bert", "fnet"])
def test_the_model_stays_as_it_was(tmp_path: Path, kind: str) -> None:
    model = loaded(tmp_path, kind, "bfloat16")
    model.network.train()
    before = {n: t.clone() for n, t in model.network.state_dict().items()}
    rows_move(model, made_up(model.tokenizer, LONGEST))
    after = model.network.state_dict()
    assert all(t.dtype == before[n].dtype and torch.equal(t, before[n]) for n, t in after.items())
    assert model.network.training


def test_no_tokenizer_hides_that_padding_is_read(tmp_path: Path) -> None:
    """One that makes a single token of whatever it is given; rows of ids are not its work."""
    model = loaded(tmp_path, "fnet")
    made = json.loads(model.tokenizer.backend_tokenizer.to_str())
    made["normalizer"] = {"type": "Replace", "pattern": {"Regex": ".+"}, "content": "good"}
    odd = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(made)), **BERT_TOKENS
    )
    assert {len(ids) for ids in odd(["the film", "good", "a very long film"])["input_ids"]} == {3}
    with pytest.raises(ValueError, match="does not mask padding"):
        check_rows_apart(replace(model, tokenizer=odd), LONGEST)


def test_want_of_memory_is_not_blamed_on_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> float:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B")

    monkeypatch.setattr("fedlora.privacy.apart.rows_move", full)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        check_rows_apart(loaded(tmp_path, "bert"), LONGEST)


def test_made_up_rows_are_short_and_as_long_as_they_can_be(tmp_path: Path) -> None:
    rows = made_up(make_tokenizer("bert"), LONGEST)
    assert rows.lengths.max() == LONGEST
    assert rows.lengths.min() <= 4
    assert rows.lengths[-1] == LONGEST


def test_made_up_rows_hold_each_special_token_within_a_text(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("bert")
    rows = made_up(tokenizer, LONGEST)
    inner = {int(number) for row in rows.inputs["input_ids"] for number in row[1:-1]}
    assert inner >= set(tokenizer.all_special_ids)
