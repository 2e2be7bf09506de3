"""What is shown while runs go on: how far they are, and how long it will take."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from bench import Place
from rich.console import Console

from fedlora.cli_sweep import Bar
from fedlora.display import LiveTable, time_left
from fedlora.resume import find
from fedlora.run import execute, prepare

pytest_plugins = ["tiny"]


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def place(tiny: Callable[[str], Path], tmp_path: Path) -> Place:
    return Place(tiny("bert"), tmp_path)


def started(rounds: int, fits: int) -> dict[str, Any]:
    sizes = {str(client): {"train": 10} for client in range(fits)}
    return {"folder": "run", "clients": sizes, "notes": [], "rounds": rounds, "fits": fits,
            "done": 0}  # fmt: skip


def test_the_time_left_is_known_where_clients_take_minutes() -> None:
    """rich's own estimate looks at the last 30 seconds."""
    screen, clock = LiveTable(), Clock()
    screen.bar.get_time = clock
    screen("start", started(rounds=10, fits=3))
    assert time_left(screen.bar) == ""
    for _ in range(2):
        clock.now += 120
        screen("fitted", {})
    assert screen.bar.tasks[0].time_remaining == 28 * 120
    assert time_left(screen.bar) == "about 56 min left"


def test_hours_are_told_as_hours() -> None:
    screen, clock = LiveTable(), Clock()
    screen.bar.get_time = clock
    screen("start", started(rounds=40, fits=2))
    clock.now += 120
    screen("fitted", {})
    assert time_left(screen.bar) == "about 2 h 38 min left"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, 3),
        ({"merge__participation": 0.6}, 2),
        ({"run__mode": "central"}, 1),
        ({"run__mode": "local"}, 3),
    ],
)
def test_the_bar_counts_the_clients_that_train(
    place: Place, changes: Mapping[str, Any], fits: int
) -> None:
    screen, seen = LiveTable(), []

    def watch(event: str, facts: Mapping[str, Any]) -> None:
        if event == "round":  # before the bar is set right by it
            seen.append(screen.bar.tasks[0].completed)
        screen(event, facts)

    execute(place.job(run__rounds=2, **changes), watch)
    assert seen == [0, fits, 2 * fits]
    assert screen.bar.tasks[0].total == 2 * fits


@pytest.mark.slow
def test_a_resumed_run_begins_where_it_was(place: Place) -> None:
    job, screen = place.job(run__rounds=3), LiveTable()

    def stop(event: str, facts: Mapping[str, Any]) -> None:
        if event == "fit" and facts["round"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(job, stop)
    config, resumed = find(job.folder, None)
    seen = []

    def watch(event: str, facts: Mapping[str, Any]) -> None:
        screen(event, facts)
        seen.append(screen.bar.tasks[0].completed)

    execute(prepare(config, resumed), watch)
    assert seen[0] == 6
    assert seen[-1] == screen.bar.tasks[0].total == 9


def test_a_failed_client_does_not_hold_the_bar_back() -> None:
    screen = LiveTable()
    screen("start", started(rounds=4, fits=3))
    screen("fitted", {})
    screen("round", {"round": 2})
    assert screen.bar.tasks[0].completed == 6


def test_runs_that_were_there_tell_nothing_of_the_pace(tmp_path: Path) -> None:
    text, clock = io.StringIO(), Clock()
    bar = Bar(Console(file=text, width=200), tmp_path)
    bar.progress.get_time = clock
    bar("plan", {"trials": 20})
    for _ in range(9):
        bar("ended", {"known": True, "trial": None, "problem": ""})
    assert text.getvalue() == ""
    assert time_left(bar.progress) == ""
    clock.now += 90
    bar.progress.advance(bar.task)
    assert time_left(bar.progress) == "about 15 min left"
    assert bar.progress.tasks[0].completed == 10
