"""What tests of runs with privacy share: settings, runs, and what was charged.

A test file says `pytest_plugins = ["tiny", "private"]` to get the fixture `place` of whole runs.
(PYTEST_DONT_REWRITE: the names below are imported before the plugin is.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench import Place

from fedlora.privacy.ledger import LEDGERS, Intent, read_ledger
from fedlora.privacy.statement import statement
from fedlora.resume import find
from fedlora.run import execute, prepare

Tiny = Callable[[str], Path]
PRIVATE: dict[str, Any] = {"privacy__unit": "example", "privacy__delta": 1e-3, "run__rounds": 2}
TRUSTED: dict[str, Any] = {
    "privacy__unit": "client", "merge__weights": "uniform", "privacy__accept_noise": True,
    "run__rounds": 2,
}  # fmt: skip


@pytest.fixture
def place(tiny: Tiny, tmp_path: Path) -> Place:
    return Place(tiny("bert"), tmp_path)


def started(place: Place, watch: Any = None, **settings: Any) -> Path:
    config = place.config("run", **settings)
    return execute(prepare(config), *([watch] if watch else []))


def started_as(place: Place, name: str, **settings: Any) -> Path:
    config = place.config(name, **{"run__name": "run", **settings})
    return execute(prepare(config))


def resumed(folder: Path, config: Any) -> Path:
    config, found = find(folder, config)
    return execute(prepare(config, found))


def told(folder: Path) -> str:
    return "\n".join(statement(folder))


def charged(folder: Path) -> dict[str, list[Intent]]:
    found = sorted((folder / LEDGERS).glob("*.ledger"))
    return {path.stem: list(read_ledger(path).intents) for path in found}


def killed_in_round(number: int) -> Callable[[str, Any], None]:
    def watch(event: str, facts: Any) -> None:
        if event == "fitted" and facts["round"] == number and facts["client"] == "1":
            raise KeyboardInterrupt

    return watch


def stopped_at(event: str, round: int) -> Callable[[str, Any], None]:
    def watch(heard: str, facts: Any) -> None:
        if heard == event and facts["round"] == round:
            raise KeyboardInterrupt

    return watch


def remove_ledger(folder: Path, owner: str) -> None:
    """With its head, so that nothing beside it tells."""
    for suffix in (".ledger", ".head"):
        (folder / LEDGERS / f"{owner}{suffix}").unlink()
