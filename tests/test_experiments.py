"""The experiments that are written down: every config is valid, every kept figure can be redone."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from made_sweeps import make_sweep, rising

from fedlora.config import load_config
from fedlora.privacy.plan import check
from fedlora.sweep_plan import load_sweep
from fedlora.sweep_report.findings import tied

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
FILES = sorted(EXPERIMENTS.glob("*.toml"))
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


def test_the_table_of_exactness_is_that_of_the_results_that_are_kept(tmp_path: Path) -> None:
    done = ran("exactness.py", "--out", tmp_path / "figure.png")
    page = (EXPERIMENTS.parent / "docs/experiments.md").read_text()
    table = [line for line in done.splitlines() if line.startswith("|")]
    assert "\n".join(table) in page
    assert len(table) == 2 + 7
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_ties_of_made_up_runs(tmp_path: Path) -> None:
    """Accuracy falls as the error grows; seeds differ by more than methods do."""
    runs = [
        (f"m{method}", seed, 10.0**-method, 0.5 + 0.01 * method + 0.1 * seed)
        for method in range(5)
        for seed in range(3)
    ]
    found = tied(runs)
    assert (found.runs, found.methods) == (15, 5)
    assert (found.rho, found.rho_methods, found.p_methods) == pytest.approx((-1, -1, 2 / 120))


def test_a_sweeps_table_is_kept_as_it_stands_without_what_has_not_ended(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "sweep", {"fra": {"merge.rule": "fra"}}, ended, cases=("", "x"))
    assert "4 of 6 runs" in ran("collect.py", folder, tmp_path / "kept.csv")
    with (tmp_path / "kept.csv").open(newline="") as stream:
        kept = list(csv.DictReader(stream))
    assert [(row["case"], row["seed"]) for row in kept] == [
        ("", "0"),
        ("", "2"),
        ("x", "0"),
        ("x", "2"),
    ]
    assert {row["accuracy"] for row in kept} == {"0.812346"}
    assert not {"finished", "path"} & set(kept[0])


def ended(method: str, case: str, seed: int) -> list[dict[str, Any]] | None:
    return None if seed == 1 else rising(0.81234567)


def ran(script: str, *arguments: object) -> str:
    words = [sys.executable, str(EXPERIMENTS / script), *map(str, arguments)]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout
