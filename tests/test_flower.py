"""Flower's own strategy loop gives the bytes of the plain loop, whatever the order of replies."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench import Place, records, summary
from flower_grid import LocalGrid

from fedlora.config import Config
from fedlora.flower.app import client
from fedlora.flower.serving import serve
from fedlora.predictor import load_predictor
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
    assert saved(plain) == saved(flower)
    assert figures(plain) == figures(flower)


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
        {"merge__head": "local"},
        {"merge__head": "local", "merge__participation": 0.6, "run__save_best": True},
        {"merge__head": "local", "client__optimiser": "keep", "client__ranks": [1, 2, 3]},
        {"merge__server_lr": 0.5, "merge__robust": "norm_clipping"},
        {"client__prox": 0.1, "model__dropout": 0.2},
    ],
    ids=lambda changes: "-".join(f"{k.partition('__')[2]}={v}" for k, v in changes.items()),
)
def test_every_policy_gives_the_same_bytes_in_both_engines(
    place: Place, changes: dict[str, Any]
) -> None:
    plain, flower = both(place, **changes)
    assert saved(plain) == saved(flower)
    assert figures(plain) == figures(flower)
    left, right = summary(plain), summary(flower)
    assert [left[key] for key in ("final", "gap")] == [right[key] for key in ("final", "gap")]


LOCAL = [{"merge__rule": "fedsa"}, {"merge__head": "local"}]


@pytest.mark.parametrize("here", [0, 1])
@pytest.mark.parametrize("changes", LOCAL, ids=["fedsa", "head"])
def test_what_nobody_uses_is_neither_scored_nor_saved_as_the_result(
    place: Place, changes: dict[str, Any], here: int
) -> None:
    """Nodes on other machines keep their parts there: the final score is of what they say."""
    config = place.config("far", **changes)
    far = [node | {"state": str(place.folder / "nodes")} for node in NODES[here:]]
    folder = serve(LocalGrid(client, config.flat(), NODES[:here] + far), config.flat())
    log = records(folder)
    for record in log[1:]:
        assert record["global"] is None
        assert record["heldout"] is None
        own = [each["evaluation"]["accuracy"] for each in record["clients"].values()]
        assert record["personal"]["accuracy"] == pytest.approx(sum(own) / 3)
        assert record["personal"]["before_merge"] is True
    assert summary(folder)["final"] == log[-1]["personal"]
    assert not (folder / "adapter").exists()
    assert "as they were before training" in (folder / "common" / "README.md").read_text()
    want = records(place.run("plain", **changes))
    assert [r["merge"] for r in log] == [r["merge"] for r in want]
    with pytest.raises(ValueError, match="common/ is what they share"):
        load_predictor(folder)


@pytest.mark.parametrize("far", [True, False])
def test_personal_parts_are_there_again_after_a_stop(place: Place, far: bool) -> None:
    """Also where the checkpoint says no more than that they are on other machines."""
    changes = {"merge__head": "local", "run__rounds": 3}
    nodes = [node | ({"state": str(place.folder / "nodes")} if far else {}) for node in NODES]
    told: list[int] = []

    def dies(reply: Any) -> Any:
        told.append(int(reply.content.config_records["reply"].get("round") or 0))
        if told.count(3) == 2:
            raise KeyboardInterrupt
        return reply

    config = place.config("stopped", **changes)
    with pytest.raises(KeyboardInterrupt):
        serve(LocalGrid(client, config.flat(), nodes, change=dies), config.flat())
    kind = "common" if far else "adapter"
    assert [path.name for path in config_folder(config).iterdir() if path.name == kind] == [kind]
    folder = serve(LocalGrid(client, config.flat(), nodes), config.flat())
    if far:
        assert [r["global"] for r in records(folder)[1:]] == [None, None, None]
    else:
        plain = place.run("plain", **changes)
        assert saved(folder) == saved(plain)
        assert figures(folder) == figures(plain)


def config_folder(config: Config) -> Path:
    return Path(config.run.out)


def saved(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor file of the results."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for kind in ("adapter", "best", "common")
        for path in (folder / kind).rglob("*.safetensors")
    }
    assert found
    return found


def figures(folder: Path) -> list[dict[str, Any]]:
    """The log without its seconds."""
    return [{key: v for key, v in line.items() if key != "seconds"} for line in records(folder)]
