"""From a config to tokenised data: who trains on which rows, what is held out, what evaluates.

Tokenises once. Knows tables, partitions and a tokenizer; no model and no rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlora import partition
from fedlora.config import Config
from fedlora.partition import Parts, Rows
from fedlora.seeding import numpy_generator
from fedlora.settings import DataSettings
from fedlora.sources import check_apart
from fedlora.tables import (
    UNKNOWN,
    Table,
    evaluation_source,
    label_ids,
    read_table,
    sorted_labels,
)


@dataclass(frozen=True, eq=False)
class Silos:
    """The texts of a run and who holds which: all that is known before a model is loaded."""

    table: Table
    label_ids: list[int]
    labels: list[str]
    parts: Parts
    evaluation: Table | None

    @property
    def counts(self) -> dict[str, list[int]]:
        """Rows per label of every client."""
        return partition.label_counts(self.parts, self.label_ids, len(self.labels))


@dataclass(frozen=True, eq=False)
class Examples:
    """Tokenised rows: for each model input one array of token numbers a row, and the label ids."""

    inputs: Mapping[str, Sequence[Rows]]
    labels: Rows
    lengths: Rows
    padding: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Rows, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """(model inputs, labels) of these rows, padded on the right to the longest of them."""
        lengths = self.lengths[rows]
        width = int(lengths.max())
        mask = np.arange(width) < lengths[:, None]
        inputs = {"attention_mask": torch.from_numpy(mask.astype(np.int64)).to(device)}
        for name, values in self.inputs.items():
            padded = np.full((len(rows), width), self.padding[name], dtype=np.int64)
            padded[mask] = np.concatenate([values[row] for row in rows])
            inputs[name] = torch.from_numpy(padded).to(device)
        return inputs, torch.from_numpy(self.labels[rows]).to(device)


@dataclass(frozen=True, eq=False)
class Data:
    """Everything that training and evaluation read, tokenised; rows are numbers into `train`.

    `own_evaluation`: the evaluation set is made of clients' rows, so that scores on it are private.
    """

    train: Examples
    rows: Parts
    heldout: Parts
    evaluation: Examples
    evaluation_rows: Rows
    own_evaluation: bool = False


def read_silos(config: Config) -> Silos:
    """Reads the tables, fixes the labels and deals the rows to clients; nothing is tokenised yet.

    ValueError for anything that would make the run meaningless: see `fedlora.tables` and
    `fedlora.partition`, and a client that holds a single class (unless that is allowed).
    """
    settings = config.data
    check_apart(settings.train, settings.evaluate, settings.clients)
    if settings.clients:
        table, parts = _client_tables(settings)
    else:
        column = config.partition.column if config.partition.by == "column" else ""
        table, parts = read_table(settings.train, settings, column), {}
    labels = list(settings.labels) or sorted_labels(table.labels)
    if settings.clients and not settings.labels:
        raise ValueError(
            "data.labels must list the labels when each client has its own file, so that all "
            f"agree on their order; found: labels = {_quoted(labels)}"
        )
    if len(labels) < 2:
        raise ValueError(f"{table.source} has the single label {labels[0]!r}: nothing to learn")
    ids = label_ids(table, labels)
    if not settings.clients:
        parts = _dealt(config, table, ids)
    column = config.partition.column
    partition.check_names(f"column {column!r}" if column else "data.clients", parts)
    _check_classes(config, parts, ids, labels)
    source = evaluation_source(settings)
    evaluation = _evaluation(source, settings) if source else None
    if evaluation is not None:
        label_ids(evaluation, labels)
        if (evaluation.pairs is None) != (table.pairs is None):
            raise ValueError(
                f"{source} and {table.source} differ: one has pairs, the other has not"
            )
    elif settings.holdout == 0:
        raise ValueError("nothing to evaluate on: set data.evaluate, or data.holdout above 0")
    elif config.run.save_best:
        raise ValueError("run.save_best needs data.evaluate, a set apart from the held-out rows")
    return Silos(table, ids, labels, parts, evaluation)


def tokenised(config: Config, silos: Silos, tokenizer: Any, secret: int | None = None) -> Data:
    """Tokenises every text once and splits off what each client holds out (seeded, by label; under
    example-level privacy each row by itself).

    `secret` takes the seed's place where somebody who chooses the config must not learn, from how
    many rows are left or from a failure, whether a row is there: a text without a token is then
    kept as one unknown token. ValueError where there is nothing to train or to evaluate on.
    """
    rows, heldout = split(config, silos, secret)
    empty = secret is not None
    train = encode(silos.table, silos.label_ids, tokenizer, config.data.max_length, empty)
    if silos.evaluation is None:
        pooled = np.sort(np.concatenate(list(heldout.values())))
        if pooled.size == 0:
            raise ValueError(
                f"data.holdout = {config.data.holdout} of so few rows holds out none, and there "
                "is no data.evaluate: set it, or hold out more"
            )
        return Data(train, rows, heldout, train, pooled, own_evaluation=True)
    ids = label_ids(silos.evaluation, silos.labels)
    evaluation = encode(silos.evaluation, ids, tokenizer, config.data.max_length, empty)
    return Data(train, rows, heldout, evaluation, np.arange(len(evaluation)))


def split(config: Config, silos: Silos, secret: int | None = None) -> tuple[Parts, Parts]:
    """(what each client trains on, what it holds out), drawn by the seed or by a `secret`."""
    seed = config.run.seed if secret is None else secret
    rows: Parts = {}
    heldout: Parts = {}
    for client, own in sorted(silos.parts.items()):
        rows[client], heldout[client] = _split(config, silos, client, own, seed)
    return rows, heldout


def encode(
    table: Table, ids: Sequence[int], tokenizer: Any, max_length: int, empty: bool = False
) -> Examples:
    """The table's texts as token numbers, cut to `max_length`, not padded.

    ValueError, with its place, for a text without a single token, unless `empty` ones are to be
    one unknown token.
    """
    encoded = tokenizer(table.texts, table.pairs, truncation=True, max_length=max_length)
    padding = {
        "input_ids": tokenizer.pad_token_id,
        "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
    }
    inputs = {
        name: [np.array(row, dtype=np.int64) for row in encoded[name]]
        for name in padding
        if name in encoded
    }
    if empty:
        inputs = {name: _filled(tokenizer, name, rows) for name, rows in inputs.items()}
    lengths = np.array([row.size for row in inputs["input_ids"]], dtype=np.int64)
    if not lengths.all():
        row = int(np.argmin(lengths))
        raise ValueError(f"{table.place(row)}: the text is empty, it has no token to read")
    return Examples(inputs, np.array(ids, dtype=np.int64), lengths, padding)


def _filled(tokenizer: Any, name: str, rows: Sequence[Rows]) -> list[Rows]:
    """The rows, those without a token as one that stands for nothing known."""
    unknown = tokenizer.pad_token_id if tokenizer.unk_token_id is None else tokenizer.unk_token_id
    filler = np.array([unknown if name == "input_ids" else 0], dtype=np.int64)
    return [row if row.size else filler for row in rows]


def _split(config: Config, silos: Silos, client: str, own: Rows, seed: int) -> tuple[Rows, Rows]:
    """What a client trains on and what it holds out."""
    share = config.data.holdout
    if config.privacy.unit != "example":
        stream = numpy_generator(seed, "holdout", client)
        return partition.split_off(own, silos.label_ids, share, stream)
    table = silos.table
    contents = list(zip(table.texts, table.pairs or table.texts, table.labels, strict=True))
    kept, held = partition.split_each(own, contents, share, seed, client)
    if kept.size == 0:
        raise ValueError(
            f"client {client} would hold out each of its {own.size} rows (data.holdout = {share}): "
            "hold out less, or give it more rows"
        )
    return kept, held


def _evaluation(source: str, settings: DataSettings) -> Table:
    """The shared evaluation set; ValueError says how to name another than the usual one."""
    try:
        return read_table(source, settings)
    except ValueError as error:
        if settings.evaluate:
            raise
        raise ValueError(
            f"{error}; set data.evaluate to another split (NAME:SPLIT) or a file, or to 'none' to "
            "score held-out rows"
        ) from error


def _client_tables(settings: DataSettings) -> tuple[Table, Parts]:
    """One table of all clients' files, and each client's rows in it."""
    tables = {
        client: read_table(file, settings) for client, file in sorted(settings.clients.items())
    }
    paired = {client for client, table in tables.items() if table.pairs is not None}
    if paired and len(paired) != len(tables):
        odd = sorted(set(tables) - paired)[0]
        raise ValueError(f"{tables[odd].source} has single texts where other clients have pairs")
    edges = np.cumsum([0, *(len(table) for table in tables.values())])
    parts = {
        client: np.arange(first, last)
        for client, first, last in zip(tables, edges[:-1], edges[1:], strict=True)
    }
    if settings.labels:
        for table in tables.values():
            label_ids(table, settings.labels)
    joined = Table(
        ", ".join(table.source for table in tables.values()),
        [text for table in tables.values() for text in table.texts],
        [pair for table in tables.values() for pair in table.pairs or []] if paired else None,
        [label for table in tables.values() for label in table.labels],
        members=list(tables.values()),
        columns=columns.pop()
        if len(columns := {own.columns for own in tables.values()}) == 1
        else UNKNOWN,
    )
    return joined, parts


def _dealt(config: Config, table: Table, ids: list[int]) -> Parts:
    """The rows of a single file, dealt to clients as [partition] says."""
    settings, seed = config.partition, config.run.seed
    chosen = np.arange(len(table))
    if 0 < config.data.limit < len(table):
        drawn = numpy_generator(seed, "limit").permutation(len(table))
        chosen = np.sort(drawn[: config.data.limit])
    known = [ids[row] for row in chosen]
    names = [str(number) for number in range(settings.clients)]
    stream = numpy_generator(seed, "partition")
    if settings.by == "column":
        parts = partition.by_column([table.column[row] for row in chosen])
    elif settings.by == "shares":
        parts = partition.by_shares(known, dict(zip(names, settings.shares, strict=True)), stream)
    elif settings.by == "dirichlet":
        parts = partition.dirichlet(known, names, settings.alpha, stream)
    else:
        parts = partition.iid(known, names, stream)
    return {client: chosen[rows] for client, rows in parts.items()}


def _check_classes(config: Config, parts: Parts, ids: list[int], labels: list[str]) -> None:
    for client, counts in partition.label_counts(parts, ids, len(labels)).items():
        held = [label for label, count in zip(labels, counts, strict=True) if count]
        if len(held) == 1 and config.partition.single_class == "refuse":
            file = config.data.clients.get(client)
            where = f"{file} (client {client})" if file else f"client {client}"
            remedy = "bring rows of another one" if file else "change the partition"
            raise ValueError(
                f"{where} holds the single label {held[0]!r}: {remedy}, or allow it with "
                "partition.single_class = 'allow'"
            )


def _quoted(values: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{value}"' for value in values) + "]"
