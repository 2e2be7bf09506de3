"""Runs a sweep: every trial an ordinary run directory, finished ones known by their id, killed ones
resumed. What is planned, run and chosen stands in the sweep's folder (see `sweepdir`).
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from fedlora.config import Config, Flat, make_config
from fedlora.data import read_silos
from fedlora.digests import changed_data
from fedlora.errors import is_memory
from fedlora.files import locked
from fedlora.runlog import read_json
from fedlora.sweep_plan import Sweep, Trial
from fedlora.sweepdir import (
    PLAN,
    Entry,
    arrow,
    heldout_score,
    is_finished,
    run_path,
    write_plan,
    write_results,
)

Watch: TypeAlias = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Outcome:
    """A trial and what ended it early; empty where it came to its end."""

    trial: Trial
    problem: str = ""


def run_sweep(
    sweep: Sweep, folder: Path, *, jobs: int = 1, watch: Watch = lambda event, facts: None
) -> list[Outcome]:
    """Runs all that is not there yet and returns what became of every trial.

    Where a grid is tuned, its trials run first, and the values with the best mean accuracy on
    held-out training rows (ties: the lower loss, then the earlier value) are taken for that method
    and case; a value that failed on any of them is out. A run that fails is named and the others go
    on. Whatever interrupts a sweep, the same call goes on with it and loses at most a round of each
    run: an OSError in a run, and ChildProcessError where its process was killed, had too little
    memory or cannot go on from where it stopped, since these say nothing about its settings.
    ValueError, before anything runs, for bad data.
    Events: `plan` with the number of trials, `ended` for each (`known`: it was there already),
    `warning` with a `text` where finished runs were made with other data than is there now.
    """
    arrow()
    check_data(sweep)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        return _run_planned(sweep, folder, jobs, watch)


def _run_planned(sweep: Sweep, folder: Path, jobs: int, watch: Watch) -> list[Outcome]:
    """Tuning, choice, and the runs that count."""
    tuning = [sweep.tuning_trials(*group) for group in sweep.groups]
    first = [trial for trials in tuning for trial in trials]
    watch("plan", {"trials": len(first) + len(sweep.groups) * len(sweep.seeds)})
    if first and not (folder / PLAN).exists():  # what has been chosen before stays in it
        write_plan(folder, sweep.name, _entries(first))
    outcomes = _run_all(first, folder, jobs, watch)
    failed = {outcome.trial.id for outcome in outcomes if outcome.problem}
    chosen = [
        best_point(trials, folder, failed) if trials else sweep.sole_point(method)
        for (method, _), trials in zip(sweep.groups, tuning, strict=True)
    ]
    last: list[Trial] = []
    lost: list[Trial] = []
    for group, point in zip(sweep.groups, chosen, strict=True):
        if point is None:
            method, case = group
            problem = (
                f"each value tried of {method.name!r} in case {case.name!r} failed in a tuning run"
            )
            trials = sweep.trials(*group, sweep.sole_point(method))
            lost += [replace(trial, grid={}) for trial in trials]
            outcomes += [Outcome(trial, problem) for trial in trials]
        else:
            last += sweep.trials(*group, point)
    _write(sweep, folder, [*first, *last, *lost])
    outcomes += _run_all(last, folder, jobs, watch)
    _write(sweep, folder, [*first, *last, *lost])
    return outcomes


def check_data(sweep: Sweep) -> None:
    """Reads every data set that the sweep uses, once; ValueError or OSError for what is wrong."""
    seen: dict[str, Config] = {}
    for method, case in sweep.groups:
        config = sweep.trials(method, case, sweep.sole_point(method))[0].config
        seen.setdefault(repr((config.data, config.partition)), config)
    for config in seen.values():
        read_silos(config)


def best_point(
    trials: Sequence[Trial], folder: Path, failed: Collection[str] = ()
) -> Mapping[str, Any] | None:
    """The grid's values with the best mean score over the tuning seeds; None where there are none.

    Values with a run among `failed` (ids) are out: those that it survived may be the easy seeds.
    """
    out = [trial.grid for trial in trials if trial.id in failed]
    points = {str(trial.grid): trial.grid for trial in trials if trial.grid not in out}.values()

    def score(point: Mapping[str, Any]) -> tuple[float, float]:
        scores = [heldout_score(run_path(folder, t.id)) for t in trials if t.grid == point]
        count = len(scores)
        accuracy = sum(s.accuracy for s in scores) / count
        return round(accuracy, 9), -sum(s.loss for s in scores) / count  # equal up to rounding: tie

    return max(points, key=score, default=None)


def _run_all(trials: Sequence[Trial], folder: Path, jobs: int, watch: Watch) -> list[Outcome]:
    """Runs what has not ended, each trial in a worker process, and tells of each as it ends."""
    unique = list({trial.id: trial for trial in trials}.values())
    left = [trial for trial in unique if not is_finished(run_path(folder, trial.id))]
    outcomes = [Outcome(trial) for trial in unique if trial not in left]
    if text := _other_data([outcome.trial for outcome in outcomes], folder):
        watch("warning", {"text": text})
    for outcome in outcomes:
        watch("ended", {"trial": outcome.trial, "problem": "", "known": True})
    if not left:
        return outcomes
    with ProcessPoolExecutor(
        min(jobs, len(left)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_leave_with,
        initargs=(os.getpid(),),
    ) as pool:
        threads = max(1, (os.cpu_count() or 1) // jobs)
        running = {
            pool.submit(
                _work, trial.config.flat(), str(run_path(folder, trial.id)), threads, trial.code
            ): trial
            for trial in left
        }
        try:
            for future in as_completed(running):
                outcomes.append(Outcome(running[future], _problem(future)))
                facts = {"trial": running[future], "problem": outcomes[-1].problem, "known": False}
                watch("ended", facts)
        except BaseException:  # Ctrl-C: what waits is not begun, what runs is stopped
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return outcomes


def _other_data(trials: Sequence[Trial], folder: Path) -> str:
    """A line on finished runs that were made with other data than is there now; else nothing."""
    found: dict[str, str] = {}
    for trial in trials:
        known = read_json(run_path(folder, trial.id) / "versions.json")
        if changed := changed_data(trial.config.data, known):
            found[trial.id] = changed[0]
    if not found:
        return ""
    first, what = next(iter(found.items()))
    return (
        f"{len(found)} of the finished runs were made with other data than is there now: {what}; "
        f"to make them again remove their folders, such as {run_path(folder, first)}"
    )


def _leave_with(parent: int) -> None:
    """Ends this worker soon after its parent: nobody else may write the run that it is at."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def _work(flat: Flat, out: str, threads: int, code: str) -> None:
    """One trial in a worker: begun, or gone on with where it was stopped.

    ChildProcessError where the rule's file is not the code that the trial is named by, and where a
    stopped run cannot go on.
    """
    import torch

    from fedlora.own_rules import import_rule, rule_digest
    from fedlora.resume import find
    from fedlora.rules import is_file
    from fedlora.run import execute, prepare
    from fedlora.stopped import check_goes_on

    rule = str(flat["merge.rule"])
    if is_file(rule):
        import_rule(rule)
    if rule_digest(rule) != code:
        raise ChildProcessError(f"the file of rule {rule!r} was changed meanwhile: start again")
    config, resumed = make_config({**flat, "run.out": out}), None
    torch.set_num_threads(config.run.threads or threads)
    if Path(out).exists():
        try:
            config, resumed = find(Path(out), config)
            check_goes_on(Path(out))
        except ValueError as error:  # says nothing about its settings either
            remedy = f"set that right, or remove {out} to have it made anew"
            raise ChildProcessError(f"a stopped run cannot go on: {error}; {remedy}") from error
    execute(prepare(config, resumed))


def _problem(future: Future[None]) -> str:
    """What ended a trial early, in one line."""
    error = future.exception()
    if error is None:
        return ""
    again = "the same command goes on, with fewer --jobs if need be"
    if isinstance(error, BrokenProcessPool):  # says nothing about the run: choose by no such result
        raise ChildProcessError(f"a run's process was killed, perhaps for memory: {again}")
    if is_memory(error):
        raise ChildProcessError(f"a run had too little memory: {again} ({error})")
    if isinstance(error, OSError):  # nor does a full disk
        raise error
    return " ".join(str(error).split()) or type(error).__name__


def _write(sweep: Sweep, folder: Path, trials: Sequence[Trial]) -> None:
    """The plan with what was chosen, and the table of results."""
    entries = _entries(trials)
    write_plan(folder, sweep.name, entries)
    write_results(folder, entries)


def _entries(trials: Sequence[Trial]) -> list[Entry]:
    return [
        Entry(
            trial.id, trial.method, trial.case, trial.seed, trial.tuning,
            dict(trial.varied), dict(trial.grid),
        ) for trial in trials
    ]  # fmt: skip
