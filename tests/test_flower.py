"""Flower's own strategy loop gives the bytes of the plain loop, whatever the order of replies."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench import Place, adapter_bytes, records
from flower_grid import LocalGrid

from fedlora.config import Config
from fedlora.flower.app import client
from fedlora.flower.serving import serve
from fedlora.rules import rule_names

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]
NODES = [{"partition-id": number, "num-partitions": 3} for number in (2, 0, 1)]


@pytest.fixture
def place(tiny: Tiny, tmp_path: Path) -> Place:
    return Place(tiny("bert"), tmp_path)


def flower_run(config: Config, **grid: Any) -> Path:
    return serve(LocalGrid(client, config.flat(), NODES, **grid), config.flat())


def both(place: Place, **changes: Any) -> tuple[Path, Path]:
    plain = place.run("plain", **changes)
    mixed = random.Random(1)

    def shuffled(messages: list[Any]) -> list[Any]:
        mixed.shuffle(messages)
        return messages

    return plain, flower_run(place.config("flower", **changes), shuffle=shuffled)


@pytest.mark.parametrize("participation", [1.0, 0.6])
@pytest.mark.parametrize("rule", rule_names())
def test_both_engines_give_the_same_bytes(place: Place, rule: str, participation: float) -> None:
    rounds = 4 if participation < 1 else 3
    plain, flower = both(
        place, merge__rule=rule, merge__participation=participation, run__rounds=rounds
    )
    kind = "adapter"
    if rule == "fedsa":  # the server has the common part; B and head are with the nodes
        assert [r["merge"] for r in records(plain)] == [r["merge"] for r in records(flower)]
        return
    assert adapter_bytes(plain, kind) == adapter_bytes(flower, kind)
    left, right = records(plain), records(flower)
    for record in [*left, *right]:
        del record["seconds"]
    assert left == right


@pytest.mark.parametrize(
    "changes",
    [
        {"client__ranks": [1, 2, 3]},
        {"client__ranks": [1, 3], "merge__rule": "flora"},
        {"client__ranks": [3, 1, 2], "client__optimiser": "transport"},
        {"client__optimiser": "keep", "merge__participation": 0.6, "run__rounds": 4},
        {"merge__residual": "fold", "merge__fold_rank": 2},
        {"merge__residual": "carry"},
        {"merge__rule": "hybrid", "merge__options": {"switch": 1}, "run__rounds": 3},
        {"merge__rule": "hybrid", "merge__options": {"patience": 1}, "run__rounds": 4},
        {"merge__head": "freeze"},
        {"merge__server_lr": 0.5, "merge__robust": "norm_clipping"},
        {"client__prox": 0.1, "model__dropout": 0.2},
    ],
    ids=lambda changes: "-".join(f"{k.partition('__')[2]}={v}" for k, v in changes.items()),
)
def test_every_policy_gives_the_same_bytes_in_both_engines(
    place: Place, changes: dict[str, Any]
) -> None:
    plain, flower = both(place, **changes)
    assert adapter_bytes(plain) == adapter_bytes(flower)
