"""Scores against counts by hand and scikit-learn, whatever the batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import KINDS, drawn_like, load_tiny, logits, toy_config, toy_rows, write_csv

from fedlora.adapter import overlay
from fedlora.client import evaluation_rows
from fedlora.config import Config
from fedlora.data import Data, Examples, encode, read_silos, tokenised
from fedlora.evaluate import Scores, evaluate, predict
from fedlora.model import Model, longest_input, read_adapter, write_adapter
from fedlora.tables import Table

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]
LABELS = ("bad", "good", "so-so")


def scored(confusion: list[list[int]]) -> Scores:
    return Scores(0.0, np.array(confusion, dtype=np.int64))


def test_scores_by_hand() -> None:
    scores = scored([[3, 1, 0], [2, 2, 0], [0, 1, 1]])
    assert scores.examples == 10
    assert scores.accuracy == 6 / 10
    f1 = [2 * 3 / (4 + 5), 2 * 2 / (4 + 4), 2 * 1 / (2 + 1)]  # 2 TP / (row + column)
    assert scores.macro_f1 == pytest.approx(sum(f1) / 3, rel=1e-15)


def test_a_label_that_never_comes_scores_zero() -> None:
    assert scored([[5, 0], [0, 0]]).macro_f1 == 0.5
    assert scored([[0, 5], [0, 0]]).macro_f1 == 0.0
    assert scored([[0, 5], [0, 0]]).accuracy == 0.0


def model_and_examples(tiny: Tiny, kind: str = "bert") -> tuple[Model, Examples]:
    """A model that guesses each of three labels now and then, and 37 texts."""
    model = load_tiny(tiny(kind), LABELS)
    texts = [text for text, _ in toy_rows(37, seed=5)]
    ids = [n % 3 for n in range(37)]
    table = Table("toy", texts, None, [LABELS[id] for id in ids])
    examples = encode(table, ids, model.tokenizer, 24)
    adapter = drawn_like(read_adapter(model), seed=2)
    write_adapter(model, adapter)
    bias = {name: tensor for name, tensor in adapter.dense.items() if tensor.shape == (3,)}
    middle = predict(model, examples, np.arange(37)).mean(dim=0)
    write_adapter(model, overlay({n: tensor - middle for n, tensor in bias.items()}, adapter))
    return model, examples


@pytest.mark.parametrize("kind", ["bert", "gpt2", "roberta"])
def test_scores_agree_with_scikit_learn_on_logits_one_by_one(tiny: Tiny, kind: str) -> None:
    """No padding and no batch on the reference's side."""
    metrics = pytest.importorskip("sklearn.metrics")
    model, examples = model_and_examples(tiny, kind)
    singles = torch.cat([
        logits(model.network, {
            name: torch.from_numpy(values[row])[None] for name, values in examples.inputs.items()
        })
        for row in range(len(examples))
    ])  # fmt: skip
    guesses = singles.argmax(dim=1).numpy()
    assert len(set(guesses)) == 3, "all alike would hide a transposed matrix"
    got = evaluate(model, examples, np.arange(37), 8)
    np.testing.assert_array_equal(
        got.confusion, metrics.confusion_matrix(examples.labels, guesses, labels=range(3))
    )
    assert got.accuracy == pytest.approx(metrics.accuracy_score(examples.labels, guesses))
    f1 = metrics.f1_score(
        examples.labels, guesses, average="macro", labels=range(3), zero_division=0
    )
    assert got.macro_f1 == pytest.approx(f1)
    shares = singles.double().softmax(dim=1).numpy()
    loss = metrics.log_loss(examples.labels, shares, labels=range(3))
    assert got.loss == pytest.approx(loss, rel=1e-5)  # float32 logits, other widths


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_neither_batch_size_nor_order_changes_the_scores(tiny: Tiny, kind: str) -> None:
    model, examples = model_and_examples(tiny, kind)
    rows = np.arange(37)
    want = evaluate(model, examples, rows, 64)
    for batch, order in ((1, rows), (5, rows), (8, rows[::-1].copy()), (37, rows[::3].copy())):
        got = evaluate(model, examples, order, batch)
        if order.size == 37:
            np.testing.assert_array_equal(got.confusion, want.confusion)
            assert got.loss == pytest.approx(want.loss, rel=1e-5)  # float32, other padding
        else:
            assert got.examples == order.size


def test_predictions_come_in_the_order_of_the_rows(tiny: Tiny) -> None:
    model, examples = model_and_examples(tiny)
    rows = np.array([30, 2, 17, 5, 36, 11])
    got = predict(model, examples, rows, 2)
    assert got.shape == (6, 3)
    assert got.dtype is torch.float32
    for index, row in enumerate(rows):
        alone = predict(model, examples, np.array([row]))
        torch.testing.assert_close(got[index], alone[0])  # float32, other padding


def test_evaluation_has_no_dropout_and_draws_nothing(tiny: Tiny) -> None:
    model, examples = model_and_examples(tiny)
    model.network.train()
    before = torch.get_rng_state()
    first, second = (predict(model, examples, np.arange(37), 8) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_input_that_a_model_is_said_to_read_is_read(tiny: Tiny, kind: str) -> None:
    """RoBERTa counts its positions from two on, so two of them are no token's."""
    model = load_tiny(tiny(kind))
    most = longest_input(model)
    table = Table("toy", ["good " * 50], None, ["neg"])
    examples = encode(table, [0], model.tokenizer, most)
    assert examples.lengths.tolist() == [most] == [32]
    assert bool(torch.isfinite(predict(model, examples, np.arange(1))).all())


def test_there_is_no_score_of_no_rows(tiny: Tiny) -> None:
    model, examples = model_and_examples(tiny)
    with pytest.raises(ValueError, match="no rows to evaluate on"):
        evaluate(model, examples, np.arange(0))


# ---------------------------------------------------------------- when, and on which rows


def read(tiny: Tiny, folder: Path, **changes: object) -> tuple[Config, Data]:
    train = write_csv(folder / "train.csv", toy_rows(40))
    dev = write_csv(folder / "dev.csv", toy_rows(30, seed=9))
    config = toy_config(
        tiny("bert"), train, data__evaluate=str(dev), run__rounds=7, **changes
    )  # fmt: skip
    return config, tokenised(config, read_silos(config), load_tiny(tiny("bert")).tokenizer)


def test_evaluation_is_every_so_many_rounds_and_always_in_the_last(
    tiny: Tiny, tmp_path: Path
) -> None:
    config, data = read(tiny, tmp_path, evaluate__every=3)
    when = [round for round in range(8) if evaluation_rows(config, data, round) is not None]
    assert when == [0, 3, 6, 7]


def test_a_limit_takes_one_seeded_subset_in_every_round(tiny: Tiny, tmp_path: Path) -> None:
    config, data = read(tiny, tmp_path, evaluate__limit=10)
    chosen = [evaluation_rows(config, data, round) for round in range(8)]
    for rows in chosen:
        assert rows is not None
        assert rows.tolist() == chosen[0].tolist()
        assert sorted(set(rows.tolist())) == rows.tolist()
        assert len(rows) == 10
    assert chosen[0].tolist() != list(range(10))
    other, _ = read(tiny, tmp_path, evaluate__limit=10, run__seed=1)
    assert evaluation_rows(other, data, 1).tolist() != chosen[0].tolist()


@pytest.mark.parametrize("limit", [0, 30, 31])
def test_a_limit_of_nothing_or_of_more_than_there_is_takes_all(
    tiny: Tiny, tmp_path: Path, limit: int
) -> None:
    config, data = read(tiny, tmp_path, evaluate__limit=limit)
    assert evaluation_rows(config, data, 2).tolist() == list(range(30))


def test_a_loss_of_chance_is_log_of_the_number_of_labels(tiny: Tiny) -> None:
    model, examples = model_and_examples(tiny)
    flat = {name: torch.zeros_like(t) for name, t in read_adapter(model).dense.items()}
    adapter = read_adapter(model)
    write_adapter(model, type(adapter)(adapter.layers, flat))
    assert evaluate(model, examples, np.arange(36)).loss == pytest.approx(math.log(3), rel=1e-7)
