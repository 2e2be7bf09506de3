"""What a person should know about a run's data before anything is trained on them.

Reads texts and counts; changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedlora.config import Config
from fedlora.data import Silos, split
from fedlora.settings import names_training_file
from fedlora.tables import Table

FEW = 10  # training rows; a client with fewer is named
SHOWN = 5  # clients in one line


def remarks(config: Config, silos: Silos) -> list[str]:
    """Lines on settings that say nothing here, on empty texts, on clients with few rows, and on
    what the scores are measured on.
    """
    rows, heldout = split(config, silos)
    found = [*_unused(config), _empty_texts(silos)]
    few = {
        client: f"{client} trains on {len(own)}"
        + ("" if len(heldout[client]) or not config.data.holdout else " and holds out none")
        for client, own in rows.items()
        if len(own) < FEW or (config.data.holdout and not len(heldout[client]))
    }
    if few:
        found.append(f"few rows: {_listed(list(few.values()))}")
    if silos.evaluation is None:
        pooled = sum(len(own) for own in heldout.values())
        found.append(
            f"without data.evaluate all scores are on the clients' own held-out rows, {pooled:,} "
            "in all"
        )
    return [line for line in found if line]


def _unused(config: Config) -> list[str]:
    """What was set about the data and is not used."""
    data, partition = config.data, config.partition
    if data.clients:
        unused = "data.train is not used: data.clients names the files"
        return [unused] if names_training_file(data) else []
    given = {"column": partition.column, "shares": partition.shares}
    return [
        f"partition.{by} is not used: partition.by is {partition.by!r}"
        for by, value in given.items()
        if value and partition.by != by
    ]


def _empty_texts(silos: Silos) -> str:
    """How many rows of each client have an empty text; they are left in."""
    empty = np.array(_empty(silos.table), dtype=np.int64)
    counts: Mapping[str, int] = {
        client: int(np.isin(own, empty).sum()) for client, own in silos.parts.items()
    }
    named = [f"{client} {count:,}" for client, count in counts.items() if count]
    if silos.evaluation is not None and (own := len(_empty(silos.evaluation))):
        named.append(f"the evaluation set {own:,}")
    if not named:
        return ""
    listed = _listed(named)
    return f"rows with an empty text, used as they are: {listed}; take out what means nothing"


def _empty(table: Table) -> list[int]:
    """The rows without a text, or without one of a pair."""
    pairs = table.pairs or table.texts
    both = zip(table.texts, pairs, strict=True)
    return [row for row, (text, pair) in enumerate(both) if not (text.strip() and pair.strip())]


def _listed(words: Sequence[str]) -> str:
    more = f" and {len(words) - SHOWN:,} more" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more
