"""Who has which rows: counted by hand, and on the labels of real text."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fedlora.partition import (
    Parts,
    by_column,
    by_shares,
    dirichlet,
    iid,
    label_counts,
    split_off,
)

CLIENTS = ("a", "b", "c")
FFA_BINARY = {"a": [0.1, 0.9], "b": [0.9, 0.1], "c": [0.5, 0.5]}
FFA_THREE = {"a": [0.9, 0.05, 0.05], "b": [0.05, 0.9, 0.05], "c": [0.05, 0.05, 0.9]}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def labels_of(*counts: int, seed: int = 1) -> list[int]:
    """So many rows of label 0, 1, ..., shuffled."""
    known = np.repeat(np.arange(len(counts)), counts)
    return [int(label) for label in rng(seed).permutation(known)]


def given(parts: Parts) -> list[int]:
    return [int(row) for rows in parts.values() for row in rows]


def every_way(labels: list[int], seed: int = 0) -> list[Parts]:
    return [
        iid(labels, CLIENTS, rng(seed)),
        by_shares(labels, FFA_THREE, rng(seed)),
        dirichlet(labels, CLIENTS, 0.5, rng(seed)),
        by_column([f"shop {row % 3}" for row in range(len(labels))]),
    ]


def test_no_row_is_given_twice_and_rows_come_in_rising_order() -> None:
    labels = labels_of(40, 30, 17)
    for seed in range(5):
        for parts in every_way(labels, seed):
            rows = given(parts)
            assert len(rows) == len(set(rows))
            assert set(rows) <= set(range(len(labels)))
            for own in parts.values():
                assert own.size > 0
                assert own.tolist() == sorted(own.tolist())
                assert own.dtype == np.int64


@pytest.mark.parametrize("counts", [(40, 30, 17), (1, 1, 1), (5, 2), (100,)])
def test_iid_dirichlet_and_column_give_away_every_row(counts: tuple[int, ...]) -> None:
    labels = labels_of(*counts)
    everything = list(range(len(labels)))
    assert sorted(given(iid(labels, CLIENTS, rng()))) == everything
    if len(labels) > 5:
        assert sorted(given(dirichlet(labels, CLIENTS, 5.0, rng()))) == everything
    assert sorted(given(by_column(labels))) == everything


@pytest.mark.parametrize("seed", range(4))
def test_iid_balances_size_and_every_label_to_one_row(seed: int) -> None:
    labels = labels_of(41, 30, 17, 5)
    counts = label_counts(iid(labels, ["a", "b", "c", "d"], rng(seed)), labels, 4)
    table = np.array(list(counts.values()))
    assert np.ptp(table.sum(axis=1)) <= 1
    assert (np.ptp(table, axis=0) <= 1).all()


def test_iid_draws_which_rows_and_the_seed_decides() -> None:
    labels = labels_of(40, 30)
    first = iid(labels, CLIENTS, rng(0))
    again, other = iid(labels, CLIENTS, rng(0)), iid(labels, CLIENTS, rng(1))
    assert all((first[client] == again[client]).all() for client in CLIENTS)
    assert any(set(first[client]) != set(other[client]) for client in CLIENTS)


@pytest.mark.parametrize("shares", [FFA_BINARY, FFA_THREE])
def test_shares_come_out_as_asked_and_clients_are_of_one_size(
    shares: dict[str, list[float]],
) -> None:
    classes = len(shares["a"])
    labels = labels_of(*[1000] * classes)
    counts = label_counts(by_shares(labels, shares, rng()), labels, classes)
    sizes = [sum(own) for own in counts.values()]
    assert max(sizes) - min(sizes) <= classes
    for client, own in counts.items():
        assert np.abs(np.array(own) - np.array(shares[client]) * sizes[0]).max() <= 1


def test_the_papers_split_of_balanced_binary_data_by_hand() -> None:
    """1,500 rows of each label: [.1, .9], [.9, .1], [.5, .5] of 1,000 each."""
    labels = labels_of(1500, 1500)
    counts = label_counts(by_shares(labels, FFA_BINARY, rng()), labels, 2)
    assert counts == {"a": [100, 900], "b": [900, 100], "c": [500, 500]}


def test_shares_are_the_largest_that_fit_and_leave_out_the_rest() -> None:
    """60 rows of label 0 are the bottleneck of two halves: 60 a client, 40 of label 1 left over."""
    labels = labels_of(60, 100)
    counts = label_counts(by_shares(labels, {"a": [0.5, 0.5], "b": [0.5, 0.5]}, rng()), labels, 2)
    assert counts == {"a": [30, 30], "b": [30, 30]}
    counts = label_counts(by_shares(labels, {"a": [1.0, 0.0], "b": [0.0, 1.0]}, rng()), labels, 2)
    assert counts == {"a": [60, 0], "b": [0, 60]}


def test_shares_lose_no_row_to_rounding() -> None:
    """Thirds and tenths do not add up in floating point; the supply is used up all the same."""
    for rows in (3, 30, 99, 3000):
        third = {client: [1.0] for client in CLIENTS}
        assert len(given(by_shares(labels_of(rows), third, rng()))) == rows
        tenths = {f"c{k}": [0.1, 0.2, 0.7] for k in range(10)}
        labels = labels_of(rows, 2 * rows, 7 * rows)
        assert len(given(by_shares(labels, tenths, rng()))) == 10 * rows


@pytest.mark.parametrize(
    ("share", "says"),
    [
        ([0.5, 0.4], r"client b: shares \[0\.5, 0\.4\] must be >= 0 with sum 1"),
        ([1.5, -0.5], r"client b: shares .* must be >= 0"),
        ([math.nan, 1.0], r"client b: shares"),
        ([1.0], "client b has 1 label shares, the data has 2 labels"),
        ([0.2, 0.3, 0.5], "client b has 3 label shares, the data has 2 labels"),
    ],
)
def test_shares_that_are_none_are_refused_by_client(share: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        by_shares(labels_of(10, 10), {"a": [0.5, 0.5], "b": share}, rng())


def test_dirichlet_is_pinned() -> None:
    """The same seed gives the same federation on every machine."""
    labels = [0, 1] * 15
    parts = dirichlet(labels, CLIENTS, 0.5, rng(7))
    assert {client: rows.tolist() for client, rows in parts.items()} == {
        "a": [1, 3, 5, 6, 7, 8, 9, 13, 15, 17, 19, 21, 22, 23, 24, 25, 26, 27, 29],
        "b": [2, 4, 10, 11, 12, 14, 16, 18, 20, 28],
        "c": [0],
    }


def test_dirichlet_favours_no_client_where_labels_are_rare() -> None:
    """60 labels of five rows: what rounding leaves over must not go to the last client."""
    labels = list(range(60)) * 5
    shares = [
        [rows.size / 300 for rows in dirichlet(labels, CLIENTS, 0.5, rng(seed)).values()]
        for seed in range(40)
    ]
    np.testing.assert_allclose(np.mean(shares, axis=0), 1 / 3, atol=0.03)


def test_a_small_alpha_is_skewed_and_a_large_one_is_not() -> None:
    labels = labels_of(600, 600)

    def skew(alpha: float) -> float:
        """The mean distance of the clients' share of label 0 from one half."""
        found = []
        for seed in range(20):
            counts = label_counts(dirichlet(labels, CLIENTS, alpha, rng(seed)), labels, 2)
            found += [abs(own[0] / sum(own) - 0.5) for own in counts.values()]
        return float(np.mean(found))

    assert skew(0.1) > 0.3
    assert skew(1000.0) < 0.03


def test_dirichlet_shares_each_label_by_its_own_draw() -> None:
    """A client may hold much of one label and little of another."""
    labels = labels_of(300, 300)
    apart = []
    for seed in range(10):
        counts = label_counts(dirichlet(labels, CLIENTS, 0.3, rng(seed)), labels, 2)
        first, second = np.array(list(counts.values())).T
        apart.append(np.abs(first / 300 - second / 300).max())
    assert np.mean(apart) > 0.2


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_an_alpha_that_is_no_positive_number_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be a positive number"):
        dirichlet(labels_of(10, 10), CLIENTS, alpha, rng())


def test_a_client_without_rows_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match="client c would hold no rows: take fewer clients"):
        iid([0, 1], CLIENTS, rng())
    with pytest.raises(ValueError, match=r"client a would hold no rows"):
        by_shares([0, 1], FFA_BINARY, rng())
    with pytest.raises(ValueError, match=r"Dirichlet\(0\.5\) in 100 gave each of 3 .* larger"):
        dirichlet([0, 1], CLIENTS, 0.5, rng())


@pytest.mark.parametrize("count", [0, 1, 500])
def test_clients_of_a_column_are_those_of_one_comparison_each(count: int) -> None:
    values = rng(count).integers(0, 60, count).tolist()
    names = np.array([str(value) for value in values])
    want = {str(name): np.flatnonzero(names == name).tolist() for name in np.unique(names)}
    got = by_column(values)
    assert {client: rows.tolist() for client, rows in got.items()} == want
    assert list(got) == list(want)


def test_clients_of_a_column_are_its_values_in_sorted_order() -> None:
    parts = by_column(["b", "a", "b", 10, 9, None])
    assert {client: rows.tolist() for client, rows in parts.items()} == {
        "10": [3], "9": [4], "None": [5], "a": [1], "b": [0, 2],
    }  # fmt: skip
    assert list(parts) == sorted(parts)
    assert all(type(client) is str for client in parts)


def test_held_out_rows_are_apart_from_the_kept_ones_and_nothing_is_lost() -> None:
    labels = labels_of(50, 30, 20)
    rows = np.arange(10, 90)
    kept, held = split_off(rows, labels, 0.25, rng())
    assert not set(kept) & set(held)
    assert sorted([*kept.tolist(), *held.tolist()]) == rows.tolist()
    assert held.tolist() == sorted(held.tolist())


def test_held_out_rows_have_the_label_mix_of_the_client() -> None:
    labels = labels_of(500, 300, 100)
    rows = np.flatnonzero(rng(5).random(900) < 0.5)
    kept, held = split_off(rows, labels, 0.2, rng())
    own, out = Counter(labels[row] for row in rows), Counter(labels[row] for row in held)
    assert {label: out[label] for label in own} == {
        label: math.floor(0.2 * count + 0.5) for label, count in own.items()
    }
    assert kept.size == rows.size - held.size


@pytest.mark.parametrize(("share", "held"), [(0.0, []), (0.4, []), (0.9, [7])])
def test_splitting_off_keeps_at_least_one_row(share: float, held: list[int]) -> None:
    labels = [0] * 5 + [1] * 5
    kept, out = split_off(np.array([3, 7]), labels, share, rng())
    assert out.tolist() == held
    assert sorted([*kept.tolist(), *held]) == [3, 7]
    one, none = split_off(np.array([3]), labels, share, rng())
    assert (one.tolist(), none.tolist()) == ([3], [])


def test_splitting_off_from_nothing_gives_nothing() -> None:
    kept, held = split_off(np.array([], dtype=np.int64), labels_of(5, 5), 0.5, rng())
    assert kept.size == held.size == 0


def test_which_rows_are_held_out_is_drawn_by_the_seed() -> None:
    labels, rows = labels_of(50, 50), np.arange(100)
    draws = {tuple(split_off(rows, labels, 0.2, rng(seed))[1]) for seed in (0, 0, 1, 2)}
    assert len(draws) == 3


def test_labels_are_counted_by_hand() -> None:
    parts = {"a": np.array([0, 1, 4]), "b": np.array([2, 3])}
    assert label_counts(parts, [0, 1, 1, 1, 1], 3) == {"a": [1, 2, 0], "b": [0, 2, 0]}


def test_the_papers_splits_hold_on_sst2_and_mnli(data_folder: Path) -> None:
    with (data_folder / "sst2" / "dev.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    with (data_folder / "mnli" / "train_10k.jsonl").open(encoding="utf-8") as file:
        names = [json.loads(line)["label"] for line in file]
    sst2 = [int(row["label"]) for row in rows]
    mnli = [sorted(set(names)).index(name) for name in names]
    for labels, shares in ((sst2, FFA_BINARY), (mnli, FFA_THREE)):
        classes = len(shares["a"])
        counts = label_counts(iid(labels, CLIENTS, rng()), labels, classes)
        assert (np.ptp(np.array(list(counts.values())), axis=0) <= 1).all()
        counts = label_counts(by_shares(labels, shares, rng()), labels, classes)
        for client, own in counts.items():
            np.testing.assert_allclose(np.array(own) / sum(own), shares[client], atol=0.002)
