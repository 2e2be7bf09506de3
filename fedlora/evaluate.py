"""Scores of the adapter that is now in the model: accuracy, macro-F1, loss, confusion matrix.

Knows a model and tokenised examples; no round, no client, no rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora.data import Examples
from fedlora.model import Model
from fedlora.partition import Rows


@dataclass(frozen=True, eq=False)
class Scores:
    """How well a set of examples is told apart; `confusion[i, j]` counts label i predicted as j."""

    loss: float
    confusion: NDArray[np.int64]

    @property
    def examples(self) -> int:
        """How many examples were scored."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """The share of examples that got their label."""
        return float(np.trace(self.confusion)) / self.examples

    @property
    def macro_f1(self) -> float:
        """The mean over labels of 2 TP / (2 TP + FP + FN).

        0 for a label neither there nor predicted.
        """
        hits = np.diag(self.confusion).astype(np.float64)
        present = self.confusion.sum(axis=0) + self.confusion.sum(axis=1)
        return float(np.mean(2 * hits / np.maximum(present, 1)))

    def record(self) -> dict[str, float]:
        """The figures as plain numbers, for a log."""
        return {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "loss": self.loss,
            "examples": self.examples,
        }


def evaluate(model: Model, examples: Examples, rows: Rows, batch: int = 64) -> Scores:
    """Scores these rows; ValueError for none. Loss is the mean cross-entropy in nats."""
    return evaluate_with_part(model, examples, rows, rows, batch)[0]


def evaluate_with_part(
    model: Model, examples: Examples, rows: Rows, part: Rows, batch: int = 64
) -> tuple[Scores, Scores]:
    """Scores these rows, and the `part` of them apart, in one pass; ValueError for none."""
    if rows.size == 0:
        raise ValueError("there are no rows to evaluate on")
    logits = predict(model, examples, rows, batch)
    labels = torch.from_numpy(examples.labels[rows])
    within = torch.from_numpy(np.isin(rows, part))
    return _scores(logits, labels), _scores(logits[within], labels[within])


def predict(model: Model, examples: Examples, rows: Rows, batch: int = 64) -> Tensor:
    """The logits of these rows, in their order, as float32 on the CPU.

    Batches are sorted by length.
    """
    network = model.network.eval()
    order = np.argsort(examples.lengths[rows], kind="stable")
    pieces = []
    with torch.inference_mode(), autocast(model):
        for start in range(0, len(order), batch):
            inputs, _ = examples.batch(rows[order[start : start + batch]], model.device)
            pieces.append(network(**inputs).logits.float())
    logits = torch.cat(pieces).cpu()
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.from_numpy(order)] = torch.arange(len(order))
    return logits[back]


def _scores(logits: Tensor, labels: Tensor) -> Scores:
    loss = float(cross_entropy(logits.double(), labels))
    classes = logits.shape[1]
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (labels.numpy(), logits.argmax(dim=1).numpy()), 1)
    return Scores(loss, confusion)


def autocast(model: Model) -> torch.autocast:
    """Mixed precision where the base is bfloat16 (the adapter stays float32); else nothing."""
    return torch.autocast(
        model.device.type, dtype=torch.bfloat16, enabled=model.dtype is torch.bfloat16
    )
