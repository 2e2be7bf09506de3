"""What `fedlora status` tells a person: how far, what failed, what can be done."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench import Place

from fedlora.files import locked
from fedlora.run import execute
from fedlora.status import status_lines

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]


@pytest.fixture
def place(tiny: Tiny, tmp_path: Path) -> Place:
    return Place(tiny("bert"), tmp_path)


def test_a_run_that_has_ended_says_so_with_its_last_rounds(place: Place) -> None:
    lines = status_lines(place.run(run__rounds=4, merge__rule="fedavg"))
    assert lines[0].endswith("run: rule fedavg, seed 0, ended")
    assert lines[1] == "round 4 of 4"
    assert [line.split(":")[0].strip() for line in lines[2:]] == ["round 2", "round 3", "round 4"]


def test_a_run_that_stopped_says_by_what_and_how_it_goes_on(place: Place) -> None:
    job = place.job(run__rounds=4)

    def watch(event: str, facts: Any) -> None:
        if event == "fit" and facts["round"] == 3:
            raise ValueError("client 1: training diverged: lower client.lr")

    with pytest.raises(ValueError, match=r"3 are wanted, for the 1\. round in a row"):
        execute(job, watch)
    text = "\n".join(status_lines(job.folder))
    assert "not ended, last sign" in text
    assert "checkpoint round-000002" in text
    assert f"fedlora run --resume {job.folder}" in text
    assert "round 2 of 4" in text
    assert "stopped by: round 3: 0 of 3 clients" in text
    assert "lower client.lr" in text


def test_a_run_that_goes_on_is_told_from_one_that_stopped(place: Place) -> None:
    """By the lock that the process holds, not by a guess from when it last wrote."""
    job, told = place.job(run__rounds=2), []

    def watch(event: str, facts: Any) -> None:
        if event == "round" and facts["round"] == 1:
            told.append("\n".join(status_lines(job.folder)))
        if event == "fit" and facts["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(job, watch)
    assert f"running now (process {os.getpid()} on " in told[0]
    assert "--resume" not in told[0]
    after = "\n".join(status_lines(job.folder))
    assert "running now" not in after
    assert f"stopped after round 1: go on with `fedlora run --resume {job.folder}`" in after
    assert "stopped by: Ctrl-C" in after
    with locked(job.folder):
        assert "running now" in status_lines(job.folder)[0]


def test_failures_are_shown_with_their_reasons(place: Place) -> None:
    job = place.job(run__rounds=2, run__min_clients=2)

    def watch(event: str, facts: Any) -> None:
        if event == "fit" and facts["client"] == "1":
            raise ValueError("its disk is full")

    lines = status_lines(execute(job, watch))
    assert "replies not used in 2 of 2 rounds; the last time:" in lines
    assert "  round 2: 1 (raised)" in lines
    assert "    its disk is full" in lines


def test_without_leave_to_do_so_a_round_is_not_made_of_fewer_than_all(place: Place) -> None:
    job = place.job(run__rounds=2)

    def watch(event: str, facts: Any) -> None:
        if event == "fit" and facts["client"] == "1":
            raise ValueError("its disk is full")

    with pytest.raises(ValueError, match=r"round 1: 2 of 3 clients .*its disk is full"):
        execute(job, watch)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run directory"):
        status_lines(tmp_path)
