"""The result of a run put to use: its model with its adapter in place, and labels for new texts."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fedlora.config import Config
from fedlora.data import encode
from fedlora.evaluate import predict
from fedlora.files import check_free
from fedlora.hints import near
from fedlora.model import Model, configured_model, load_adapter, write_adapter
from fedlora.runlog import has_ended, read_config
from fedlora.stopped import stopped_line
from fedlora.tables import Table


def load_predictor(folder: Path, client: str = "") -> tuple[Config, Model]:
    """The config of a run and its model with the final adapter (or a client's own) written in.

    ValueError, before the base is loaded, where there is no such adapter.
    """
    config = read_config(folder)
    place = _adapter_folder(folder, client)
    model = configured_model(config, config.data.labels)
    write_adapter(model, load_adapter(model, place))
    return config, model


def predictions(
    config: Config, model: Model, table: Table, others: Mapping[str, Sequence[str]]
) -> str:
    """A csv text: for each row its text(s), the label, each label's probability, and the file's
    `others` columns; one of these that is called as one of ours becomes `input NAME`.
    """
    examples = encode(table, [0] * len(table), model.tokenizer, config.data.max_length)
    logits = predict(model, examples, np.arange(len(table)), config.evaluate.batch)
    shares = logits.double().softmax(dim=1)
    texts = [table.texts, table.pairs] if table.pairs else [table.texts]
    names = [*("text", "pair")[: len(texts)], "label", *(f"p({name})" for name in model.labels)]
    kept = [f"input {name}" if name in names else name for name in others]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    quoting = csv.writer(buffer, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow([*names, *kept])
    for row in range(len(table)):
        best = model.labels[int(shares[row].argmax())]
        given, rest = [own[row] for own in texts], [own[row] for own in others.values()]
        values = [*given, best, *(f"{float(share):.6f}" for share in shares[row]), *rest]
        (quoting if any("\r" in value for value in values) else writer).writerow(values)
    return buffer.getvalue()


def _adapter_folder(folder: Path, client: str) -> Path:
    place = folder / "adapter"
    if not place.is_dir() and not has_ended(folder):
        check_free(folder)
        raise ValueError(f"{folder} has no adapter yet: {stopped_line(folder)}")
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
