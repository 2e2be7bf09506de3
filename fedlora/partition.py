"""Who has which data: labels or columns in, one array of row numbers per client out; NumPy only.

Every function takes its own random generator and returns rising rows, none of them twice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora.seeding import derive

Rows: TypeAlias = NDArray[np.int64]
Parts: TypeAlias = dict[str, Rows]


def check_names(place: str, clients: Iterable[str]) -> None:
    """ValueError for a client's name that cannot be that of its folder and of its ledger.

    `place` is where the names were given, for the message.
    """
    folders = dict[str, str]()
    for client in clients:
        if client in ("", ".", "..") or any(mark in client for mark in "/\\\0"):
            raise ValueError(
                f"{place} names a client {client!r}: a name is a folder of the run directory too, "
                "so it must not be empty or hold a slash"
            )
        other = folders.setdefault(client.strip().casefold(), client)
        if other != client:
            raise ValueError(
                f"{place} names clients {other!r} and {client!r}: some disks take them for one "
                "folder; rename one, or give both one name if they are the same"
            )


def iid(labels: Sequence[int], clients: Sequence[str], rng: np.random.Generator) -> Parts:
    """Every client gets the same mix of labels and the same number of rows, up to rounding."""
    order = np.concatenate([rng.permutation(rows) for rows in _rows_by_label(labels).values()])
    return _given(clients, [order[start :: len(clients)] for start in range(len(clients))])


def by_shares(
    labels: Sequence[int], shares: Mapping[str, Sequence[float]], rng: np.random.Generator
) -> Parts:
    """Client k's rows have the label mix shares[k]; clients are of one size, the largest that fits.

    For 3 clients FFA-LoRA (2403.12313) takes [.1, .9], [.9, .1], [.5, .5]. Rows that do not fit the
    shares are left out. ValueError unless each client's shares are >= 0, one per label, of sum one.
    """
    by_label = _rows_by_label(labels)
    for client, share in shares.items():
        if len(share) != len(by_label):
            raise ValueError(
                f"client {client} has {len(share)} label shares, "
                f"the data has {len(by_label)} labels"
            )
        if min(share) < 0 or not math.isclose(math.fsum(share), 1.0, abs_tol=1e-6):
            raise ValueError(f"client {client}: shares {list(share)} must be >= 0 with sum 1")
    wanted = np.array(list(shares.values()), dtype=np.float64)
    supply = np.array([rows.size for rows in by_label.values()], dtype=np.float64)
    demand = wanted.sum(axis=0)
    size = (supply[demand > 0] / demand[demand > 0]).min()
    edges = np.floor(wanted.cumsum(axis=0) * size + 1e-9).astype(np.int64)
    pieces: list[list[Rows]] = [[] for _ in shares]
    for column, rows in enumerate(by_label.values()):
        shuffled = rng.permutation(rows)
        for index, piece in enumerate(np.split(shuffled, edges[:, column])[: len(shares)]):
            pieces[index].append(piece)
    return _given(list(shares), [np.concatenate(piece) for piece in pieces])


def dirichlet(
    labels: Sequence[int],
    clients: Sequence[str],
    alpha: float,
    rng: np.random.Generator,
    tries: int = 100,
) -> Parts:
    """Each label's rows are dealt by shares drawn from Dirichlet(alpha); small alpha, strong skew.

    Drawn anew until no client is empty; ValueError after `tries` draws.
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be a positive number, got {alpha!r}")
    by_label = _rows_by_label(labels)
    for _ in range(tries):
        pieces: list[list[Rows]] = [[] for _ in clients]
        for rows in by_label.values():
            edges = np.rint(np.cumsum(rng.dirichlet([alpha] * len(clients)))[:-1] * rows.size)
            parts = np.split(rng.permutation(rows), edges.astype(np.int64))
            for piece, part in zip(pieces, parts, strict=True):
                piece.append(part)
        dealt = [np.concatenate(piece) for piece in pieces]
        if all(rows.size for rows in dealt):
            return _given(clients, dealt)
    raise ValueError(
        f"no draw of Dirichlet({alpha}) in {tries} gave each of {len(clients)} clients a row: "
        "take a larger alpha or fewer clients"
    )


def by_column(values: Sequence[Any]) -> Parts:
    """Natural clients: one per value of a column, in sorted order."""
    names, place = np.unique(np.array([str(value) for value in values]), return_inverse=True)
    order, ends = np.argsort(place, kind="stable"), np.cumsum(np.bincount(place))
    rows = np.split(order, ends)[:-1]
    return {str(name): own for name, own in zip(names, rows, strict=True)}


def split_off(
    rows: Rows, labels: Sequence[int], share: float, rng: np.random.Generator
) -> tuple[Rows, Rows]:
    """(kept, held out): about `share` of the rows of each label apart; one row at least is kept."""
    own = np.asarray(labels)[rows]
    held = [
        rng.permutation(rows[own == label])[: int(share * int((own == label).sum()) + 0.5)]
        for label in np.unique(own)
    ]
    apart = np.sort(np.concatenate(held)) if held else rows[:0]
    if apart.size == rows.size:
        apart = apart[1:]
    return np.setdiff1d(rows, apart), apart


def split_each(
    rows: Rows, contents: Sequence[Sequence[str]], share: float, seed: int, client: str
) -> tuple[Rows, Rows]:
    """(kept, held out): each row by itself with probability `share`, whatever the others are.

    By a hash of seed, client, the row's `contents` (its texts and its label) and how often they
    came before: files that differ in one row are split alike but for that row, as privacy asks.
    Either side may be empty.
    """
    copies = Counter[tuple[str, ...]]()
    drawn = []
    for row in rows:
        own = tuple(contents[row])
        drawn.append(derive(seed, "holdout", client, *own, copies[own]))
        copies[own] += 1
    held = np.array(drawn, dtype=np.float64) < share * 2.0**63
    return rows[~held], rows[held]


def label_counts(parts: Parts, labels: Sequence[int], classes: int) -> dict[str, list[int]]:
    """How many rows of each label every client holds."""
    known = np.asarray(labels)
    return {
        client: np.bincount(known[rows], minlength=classes).tolist()
        for client, rows in parts.items()
    }


def _rows_by_label(labels: Sequence[int]) -> dict[int, Rows]:
    known = np.asarray(labels)
    return {int(label): np.flatnonzero(known == label) for label in np.unique(known)}


def _given(clients: Sequence[str], dealt: Sequence[Rows]) -> Parts:
    for client, rows in zip(clients, dealt, strict=True):
        if rows.size == 0:
            raise ValueError(f"client {client} would hold no rows: take fewer clients or more data")
    return {client: np.sort(rows) for client, rows in zip(clients, dealt, strict=True)}
