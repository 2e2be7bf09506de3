"""The experiments that are written down can be read: every config of every one is valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.config import load_config
from fedlora.privacy.plan import check
from fedlora.sweep_plan import load_sweep

FILES = sorted((Path(__file__).parents[1] / "experiments").glob("*.toml"))
RUNS = ("public",)  # single runs that a sweep begins with


@pytest.mark.parametrize("name", RUNS)
def test_every_single_run_is_valid_and_names_its_command(name: str) -> None:
    (file,) = [file for file in FILES if file.stem == name]
    check(load_config(file))
    assert f"fedlora run experiments/{file.name}" in file.read_text()


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.stem not in RUNS], ids=lambda path: path.stem
)
def test_every_config_of_an_experiment_is_valid(file: Path) -> None:
    sweep = load_sweep(file)
    trials = [
        trial
        for method, case in sweep.groups
        for trial in [
            *sweep.tuning_trials(method, case),
            *sweep.trials(method, case, sweep.sole_point(method)),
        ]
    ]
    assert len({trial.id for trial in trials}) == len(trials)
    for trial in trials:
        check(trial.config)


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.stem not in RUNS], ids=lambda path: path.stem
)
def test_an_experiment_names_its_command_and_its_cost(file: Path) -> None:
    head = file.read_text().partition("[run]")[0]
    assert f"fedlora sweep experiments/{file.name}" in head
    assert "CPU-hours" in head
