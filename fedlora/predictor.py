"""The result of a run put to use: its model with its adapter in place, and labels for new texts."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from fedlora.config import Config
from fedlora.data import encode
from fedlora.evaluate import predict
from fedlora.hints import near
from fedlora.model import Model, configured_model, load_adapter, write_adapter
from fedlora.runlog import read_config
from fedlora.tables import Table, read_unlabelled


def load_predictor(folder: Path, client: str = "") -> tuple[Config, Model]:
    """The config of a run and its model with the final adapter (or a client's own) written in."""
    config = read_config(folder)
    model = configured_model(config, config.data.labels)
    write_adapter(model, load_adapter(model, _adapter_folder(folder, client)))
    return config, model


def predictions(config: Config, model: Model, source: str) -> str:
    """A csv text: for each row of the file its text(s), the label, and each label's probability."""
    texts, pairs = read_unlabelled(source, config.data)
    table = Table(source, texts, pairs, [""] * len(texts))
    examples = encode(table, [0] * len(texts), model.tokenizer, config.data.max_length)
    logits = predict(model, examples, np.arange(len(texts)), config.evaluate.batch)
    shares = logits.double().softmax(dim=1)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["text", *(["pair"] if pairs else []), "label", *(f"p({name})" for name in model.labels)]
    )
    for row, text in enumerate(texts):
        best = model.labels[int(shares[row].argmax())]
        given = [text, pairs[row]] if pairs else [text]
        writer.writerow([*given, best, *(f"{float(share):.6f}" for share in shares[row])])
    return buffer.getvalue()


def _adapter_folder(folder: Path, client: str) -> Path:
    place = folder / "adapter"
    own = sorted(path.name for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
    if not place.is_dir() and (folder / "common").is_dir():
        raise ValueError(
            f"{folder} has no adapter to use: its clients keep parts of theirs on their own "
            "machines, common/ is what they share"
        )
    if not client and not own:
        return place
    if client not in own:
        hint = near(client, own)
        known = f"choose one of {', '.join(own)} with --client" if own else "it has one for all"
        raise ValueError(f"{folder} has no adapter of client {client!r}{hint}: {known}")
    return place / client
