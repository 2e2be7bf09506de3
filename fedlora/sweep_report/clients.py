"""What each client gets, measured on its own held-out rows: the scores, and the gain over training
alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from fedlora.rundir import Run, by_number, own_heldout, plain
from fedlora.significance import Paired, estimate, paired
from fedlora.sweep_report.cases import Arm, Case
from fedlora.sweep_report.content import Table
from fedlora.sweep_report.tables import with_half

MOST = 12  # more clients than this get no columns of their own

Scores: TypeAlias = Mapping[int, Mapping[str, float]]  # seed -> client -> accuracy


def own_scores(run: Run) -> dict[str, float]:
    """Accuracy after the last round, by client, on rows held out of the client's training."""
    return {client: own["accuracy"] for client, own in own_heldout(run.rounds[-1]).items()}


def clients_tables(case: Case) -> list[Table]:
    """Each method's score for each client, and its gain over the first method in mode `local`."""
    scores = {arm.method: _scores(arm) for arm in case.there}
    arms = [arm for arm in case.there if any(scores[arm.method].values())]
    names = _names(arms)
    if len(names) < 2:
        return []
    alone = next((arm for arm in arms if arm.mode == "local"), None)
    tables = [_scores_table(arms, names, scores)]
    others = [arm for arm in arms if arm.mode == "federated"]
    if alone is not None and others:
        tables.append(_gains_table(alone, others, names, scores))
    return tables


def gain(mine: Scores, alone: Scores, client: str) -> Paired:
    """A client's scores in a method against those of training alone, paired by seed."""
    common = [s for s in mine if client in mine[s] and client in alone.get(s, {})]
    return paired([mine[s][client] for s in common], [alone[s][client] for s in common])


def _scores(arm: Arm) -> Scores:
    return {seed: own_scores(run) for seed, run in arm.runs.items()}


def _names(arms: Sequence[Arm]) -> list[str]:
    """The clients of all runs but the pooled ones, numbers before names."""
    apart = [run for arm in arms if arm.mode != "central" for run in arm.all]
    found = {client for run in apart for client in own_scores(run)}
    return sorted(found, key=by_number)


def _scores_table(arms: Sequence[Arm], names: Sequence[str], scores: Mapping[str, Scores]) -> Table:
    shown = names if len(names) <= MOST else []
    rows = []
    for arm in arms:
        own = scores[arm.method]
        each = [estimate([of[client] for of in own.values() if client in of]) for client in names]
        known = [one.mean for one in each if one.n]
        mean = estimate([sum(of.values()) / len(of) for of in own.values() if of])
        spread = [min(known), max(known)] if known else [math.nan, math.nan]
        cells = [plain(100 * one.mean, ".1f") for one in each] if shown else []
        rows.append([
            arm.method, with_half(mean, 100.0, 1), *[plain(100 * one, ".1f") for one in spread],
            *cells,
        ])  # fmt: skip
    head = ["method", "mean of clients, %", "lowest", "highest", *shown]
    notes = [
        "Each client's held-out training rows, after the last round, with the adapter that it "
        "would use: the merged one, its personal one where the rule makes such, its own where it "
        "trained alone. Clients are means over seeds; the mean counts every client alike, and "
        "pooled training has no clients apart."
    ]
    return Table("Accuracy on each client's own rows", head, rows, notes)


def _gains_table(
    alone: Arm, arms: Sequence[Arm], names: Sequence[str], scores: Mapping[str, Scores]
) -> Table:
    shown = names if len(names) <= MOST else []
    rows = []
    for arm in arms:
        found = [gain(scores[arm.method], scores[alone.method], client) for client in names]
        differences = [one.difference for one in found if one.n]
        better = sum(one.mean > 0 for one in differences)
        lowest = min((one.mean for one in differences), default=math.nan)
        cells = [with_half(one.difference, 100.0, 1, "+") for one in found] if shown else []
        rows.append([
            arm.method, f"{better} of {len(differences)}", plain(100 * lowest, "+.1f"), *cells
        ])  # fmt: skip
    head = ["method", "clients that gain", "lowest gain", *shown]
    notes = [
        f"Points of accuracy above {alone.method} on the same rows, mean over the seeds of both; ± "
        "is half the 95 % interval of the paired difference. A gain whose interval spans 0 is not "
        "told from noise."
    ]
    return Table("What each client gains over training alone", head, rows, notes)
