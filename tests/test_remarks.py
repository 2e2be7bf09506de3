"""What a person is told of the data before anything is trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import toy_rows, write_csv

from fedlora.config import make_config
from fedlora.data import read_silos, split
from fedlora.remarks import remarks


def told(**changes: Any) -> list[str]:
    named = {name.replace("__", ".", 1): value for name, value in changes.items()}
    config = make_config({"data.holdout": 0.25} | named)
    return remarks(config, read_silos(config))


@pytest.fixture
def dev(tmp_path: Path) -> str:
    return str(write_csv(tmp_path / "dev.csv", toy_rows(20, seed=9)))


def test_data_without_a_flaw_are_passed_over_in_silence(tmp_path: Path, dev: str) -> None:
    file = write_csv(tmp_path / "a.csv", toy_rows(60))
    assert told(data__train=str(file), data__evaluate=dev) == []


def test_empty_texts_are_counted_for_every_client(tmp_path: Path) -> None:
    """They stay in: to leave rows out is for whoever knows what they mean."""
    good = toy_rows(40)
    north = write_csv(tmp_path / "n.csv", [("", "neg"), ("  ", "pos"), *good])
    south = write_csv(tmp_path / "s.csv", good)
    west = write_csv(tmp_path / "w.csv", [*good, ("\t", "pos")])
    dev = write_csv(tmp_path / "dev.csv", [*toy_rows(20), ("", "pos")])
    clients = {"north": str(north), "south": str(south), "west": str(west)}
    labels = {"data__labels": ["neg", "pos"], "data__evaluate": str(dev)}
    (line,) = told(data__clients=clients, **labels)
    assert "an empty text, used as they are: north 2, west 1, the evaluation set 1;" in line


def test_an_empty_half_of_a_pair_counts(tmp_path: Path, dev: str) -> None:
    rows = [(f"a {n}", "" if n == 7 else "b", ("x", "y")[n % 2]) for n in range(60)]
    file = write_csv(tmp_path / "a.csv", rows, ["premise", "hypothesis", "label"])
    lines = told(data__train=str(file), partition__clients=1)
    assert any("an empty text, used as they are: 0 1;" in line for line in lines)


def test_clients_with_few_rows_are_named(tmp_path: Path, dev: str) -> None:
    rows = toy_rows(30)
    files = {
        name: str(write_csv(tmp_path / f"{name}.csv", rows[:count]))
        for name, count in {"few": 8, "tiny": 3, "plenty": 30}.items()
    }
    settings = {"data__clients": files, "data__labels": ["neg", "pos"], "data__evaluate": dev}
    (line,) = told(**settings, data__holdout=0.2)
    assert line == "few rows: few trains on 6, tiny trains on 3 and holds out none"
    (line,) = told(**settings, data__holdout=0.0)
    assert line == "few rows: few trains on 8, tiny trains on 3"


def test_many_clients_with_few_rows_are_one_line(tmp_path: Path, dev: str) -> None:
    file = write_csv(tmp_path / "a.csv", toy_rows(60))
    (line,) = told(data__train=str(file), data__evaluate=dev, partition__clients=12)
    assert line.endswith("trains on 3 and 7 more")


def test_scores_on_held_out_rows_are_announced(tmp_path: Path) -> None:
    file = str(write_csv(tmp_path / "a.csv", toy_rows(60)))
    (line,) = told(data__train=file)
    config = make_config({"data.train": file, "data.holdout": 0.25})
    pooled = sum(len(rows) for rows in split(config, read_silos(config))[1].values())
    assert f"on the clients' own held-out rows, {pooled} in all" in line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"partition__column": "site"}, "partition.column is not used: partition.by is 'iid'"),
        ({"partition__shares": [[1, 0]] * 3}, "partition.shares is not used: partition.by is"),
        ({"partition__by": "shares", "partition__shares": [[0.5, 0.5]] * 3}, ""),
    ],
)
def test_settings_of_another_partition_are_named(
    tmp_path: Path, dev: str, changes: dict[str, Any], says: str
) -> None:
    file = write_csv(tmp_path / "a.csv", toy_rows(60))
    lines = told(data__train=str(file), data__evaluate=dev, data__labels=["neg", "pos"], **changes)
    unused = [line for line in lines if "not used" in line]
    assert len(unused) == bool(says)
    assert says in "".join(unused)


def test_a_training_file_beside_those_of_clients_is_named(tmp_path: Path, dev: str) -> None:
    file = str(write_csv(tmp_path / "a.csv", toy_rows(60)))
    files = {
        name: str(write_csv(tmp_path / f"{name}.csv", toy_rows(60))) for name in ("north", "south")
    }
    both = {"data__clients": files, "data__evaluate": dev, "data__labels": ["neg", "pos"]}
    assert told(**both) == []
    assert told(**both, data__train=file) == [
        "data.train is not used: data.clients names the files"
    ]
