"""The command line of sweeps: many runs, their progress, and what came out."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedlora.terminal import plain_console

if TYPE_CHECKING:
    from fedlora.sweep import Outcome
    from fedlora.sweep_plan import Sweep, Trial


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.toml", help="What to vary.")],
    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a shared setting. Repeatable."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The sweep's folder; else sweeps/NAME.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Runs at the same time.")] = 1,
    plan: Annotated[bool, typer.Option("--plan", help="Show what would run; run nothing.")] = False,
) -> None:
    """Run methods x cases x seeds, each at its own best settings; go on where it stopped."""
    from fedlora.cli_rules import import_own_rule
    from fedlora.sweep_plan import load_sweep

    console = plain_console()
    planned = load_sweep(file, set or [], own_rule=import_own_rule)
    folder = out or Path("sweeps") / planned.name
    console.print(_planned(planned))
    from fedlora.sweep import check_data, run_sweep

    if plan:
        check_data(planned)
        return

    try:
        with Bar(console, folder) as bar:
            outcomes = run_sweep(planned, folder, jobs=jobs, watch=bar)
    except KeyboardInterrupt:
        again = "the same command goes on with it"
        sys.stderr.write(f"fedlora: interrupted; {folder} holds what was finished: {again}\n")
        raise SystemExit(130) from None
    _show(console, planned, folder, outcomes)


class Bar:
    """A bar with the time left on a terminal; there and elsewhere a line for each run."""

    def __init__(self, console: Console, folder: Path) -> None:
        from fedlora.display import progress_bar

        self.console, self.folder = console, folder
        self.progress = progress_bar(console)
        self.task = self.progress.add_task("runs", total=None)

    def __enter__(self) -> Bar:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, event: str, facts: Mapping[str, Any]) -> None:
        """Takes an event of the sweep up."""
        if event == "plan":
            self.progress.update(self.task, total=facts["trials"])
            self.progress.advance(self.task, 0)  # the pace is measured from here
        elif event == "warning":
            self._print(facts["text"])
        elif facts["known"]:
            self.progress.tasks[0].completed += 1  # tells nothing of the pace
        else:
            self.progress.advance(self.task)
            self._print(self._line(facts["trial"], facts["problem"]))

    def _line(self, trial: Trial, problem: str) -> str:
        """How far the sweep is, what a run came to, and how long the rest will take."""
        from fedlora.display import time_left

        task = self.progress.tasks[0]
        words = f"{described(trial)}: {problem or _outcome(self.folder, trial)}"
        parts = [f"{task.completed:.0f}/{task.total:.0f}", words, time_left(self.progress)]
        return "  ".join(part for part in parts if part)

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _outcome(folder: Path, trial: Trial) -> str:
    """A finished run's accuracy: of its last round's held-out rows where it is for tuning."""
    from fedlora.rundir import number
    from fedlora.runlog import read_json
    from fedlora.sweepdir import heldout_score, run_path

    path = run_path(folder, trial.id)
    if trial.tuning:
        return f"held-out accuracy {heldout_score(path).accuracy:.1%}"
    accuracy = number(read_json(path / "summary.json"), ("final", "accuracy"))
    return f"accuracy {accuracy:.1%}" if math.isfinite(accuracy) else "ended"


def described(trial: Trial) -> str:
    """A run in words."""
    chosen = ", ".join(f"{key} {value}" for key, value in trial.grid.items())
    words = [trial.method, trial.case, chosen, f"seed {trial.seed}"]
    return ", ".join(word for word in [*words, "tuning" if trial.tuning else ""] if word)


def _planned(sweep: Sweep) -> Table:
    table = Table("method", "case", "tuning runs", "runs", "steps", box=None, pad_edge=False)
    for method, case in sweep.groups:
        tuning = sweep.tuning_trials(method, case)
        runs = sweep.trials(method, case, sweep.sole_point(method))
        counted = [_steps(trial) for trial in [*tuning, *runs]]
        steps = "-" if None in counted else f"{sum(filter(None, counted)):,}"
        table.add_row(method.name, case.name, str(len(tuning)), str(len(runs)), steps)
    return table


def _steps(trial: Trial) -> int | None:
    """Optimiser steps of all clients that take part; None where they are counted in passes or the
    data say how many clients there are.

    Those of `central` are as many batches of a client's size as the clients would take.
    """
    from fedlora.modes import fits_per_round

    run, client = trial.config.run, trial.config.client
    if client.epochs:
        return None
    named, partition = len(trial.config.data.clients), trial.config.partition
    if not named and partition.by == "column":
        return None
    return run.rounds * client.steps * fits_per_round(trial.config, named or partition.clients)


def _show(console: Console, sweep: Sweep, folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Mean final accuracy of each method and case, and where the runs are."""
    from fedlora.rundir import number
    from fedlora.sweepdir import RESULTS, read_sweep

    found = read_sweep(folder)
    table = Table("method", "case", "chosen", "accuracy", "runs", box=None, pad_edge=False)
    for method, case in sweep.groups:
        runs = found.counted(method.name, case.name)
        point = found.chosen(method.name, case.name)
        chosen = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in point.items())
        found_scores = [number(run.summary, ("final", "accuracy")) for run in runs]
        scores = [score for score in found_scores if math.isfinite(score)]
        mean = f"{sum(scores) / len(scores):.2%}" if scores else "-"
        table.add_row(method.name, case.name, chosen, mean, f"{len(runs)}/{len(sweep.seeds)}")
    console.print(table)
    console.print(f"a row a run  {folder / RESULTS}", soft_wrap=True)
    console.print(f"report       fedlora report {folder}", soft_wrap=True)
    if failed := [outcome for outcome in outcomes if outcome.problem]:
        last = {(one.trial.method, one.trial.case): one.problem for one in failed}
        sys.stderr.write(f"fedlora: {len(failed)} runs did not end: {'; '.join(last.values())}\n")
        raise SystemExit(1)
