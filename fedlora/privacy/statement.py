"""A run's privacy statement: what is protected from whom, by what, at which epsilon, and what is
not.

Made from the config, the ledgers and the log of a run directory, or from one ledger.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedlora.config import Config
from fedlora.files import write_text
from fedlora.privacy.ledger import (
    LEDGERS,
    Ledger,
    check_heads,
    ledger_path,
    opened_ledgers,
    read_ledger,
)
from fedlora.rundir import Run, read_run
from fedlora.runlog import FLOWER, read_engine

STATEMENT = "privacy.txt"  # in the run directory
ROUNDING = 1e-6  # relative: a smaller difference of two epsilons is none
NEIGHBOURS = {
    "example": (
        "a client's rows with one row more or less, the number of rows itself taken as public; "
        "what is held out is decided for each row by itself. A person with several rows is "
        "protected less, by more than their number (docs/privacy.md)"
    ),
    "client": ("a federation with one client's answers left out; who is asked is public"),
}
MECHANISMS = {
    "example": (
        "DP-SGD on the client: the gradient of each example is cut to the norm {clip:g} over all "
        "trained tensors, the sum over a batch gets Gaussian noise, before anything leaves"
    ),
    "client": (
        "on a trusted server: each client's update is cut to the norm {clip:g} over all layers and "
        "the head, the sum gets Gaussian noise (design {design}), over a fixed number of clients"
    ),
}
SAMPLING = {
    "example": (
        "Poisson: each step draws each example by itself, with randomness of the client's "
        "operating system; the amplification by it is in epsilon. That only some clients are asked "
        "in a round is not used"
    ),
    "client": "none; that only some clients are asked in a round is not used",
}
COVERED = {
    "example": (
        "everything that a client's training puts into what it sends, over all rounds, and all "
        "that is made of it: merges, the SVD, the final adapter, its scores on public data"
    ),
    "client": (
        "every global adapter that leaves the server, over all rounds, and all that is made of it"
    ),
}
SETTINGS = "the choice of settings: every other run on the same data has a budget of its own"
OPEN = {
    "example": [
        "how many rows each client has: the log, every message and the weights tell it, and the "
        "sampling rate is made of it",
        "a person with rows at several clients: what these rows cost adds up over the clients",
        "the set of labels and the clients' names, where the config did not list them",
        SETTINGS,
        "how long an answer takes (a long row takes longer), sizes and who took part",
    ],
    "client": [
        "clients from the server: it sees every update as it is",
        "what the server keeps of single clients, without noise (metrics.jsonl, summary.json: who "
        "answered, rows, scores on held-out rows): the adapter's README.md has none of it",
        "the set of labels, where the config did not list them: the head and the card tell it",
        SETTINGS,
        "timing, sizes and who took part",
    ],
}
SHARED = (
    "training loss, held-out scores and seconds of training: they were let out as they are, and "
    "whatever was chosen by them (tuning, run.save_best)"
)
ARITHMETIC = (
    "attacks on floating-point arithmetic: noise has 53 random bits from the operating system and "
    "is added in float64, its sum rounded to float32; gradients have the rounding of the base's "
    "precision; the analysis is in real numbers"
)


DEALT = (
    "how a single file was dealt to clients: one row more in it deals others anew, so that this "
    "epsilon is of a simulated split, of the rows as they were dealt"
)


def statement(path: Path) -> list[str]:
    """The lines of the statement of a run directory or of one ledger file.

    ValueError where there is no privacy to speak of, or a ledger was edited, cut or is missing.
    """
    if path.is_file():
        ledger = read_ledger(path)
        title = f"Ledger of {ledger.terms.owner}: each {ledger.terms.unit} is protected."
        return [title, *_table([ledger])]
    run = read_run(path)
    privacy = run.config.get("privacy", {})
    unit = privacy.get("unit", "none")
    if unit == "none":
        raise ValueError(
            f"{path} was trained without privacy (privacy.unit = 'none'): nothing bounds what "
            "its adapter tells about the data"
        )
    ledgers = _ledgers(run, unit)
    mechanism = MECHANISMS[unit].format(clip=privacy["clip"], design=privacy["design"])
    lines = [
        f"Privacy of {run.name}",
        f"Unit: each {unit}" + (" of a client" if unit == "example" else " as a whole"),
        f"Neighbours: {NEIGHBOURS[unit]}",
        f"Mechanism: {mechanism}",
        f"Sampling: {SAMPLING[unit]}",
        f"Composition: {privacy['accountant'].upper()} accountant (dp-accounting), all rounds "
        "together, every intent counted",
        *(_table(ledgers) if ledgers else _reported(run, privacy)),
        f"Covered: {COVERED[unit]}",
        "Not covered:",
        *(f"  - {line}" for line in [*_not_covered(run.config), ARITHMETIC]),
    ]
    if unit == "client" and privacy["quantile"]:
        lines.append(
            f"The clip moves towards the {privacy['quantile']:g} quantile of the norms, by a "
            "noised count that is charged by itself; noise follows the clip in force."
        )
    return lines


def _ledgers(run: Run, unit: str) -> list[Ledger]:
    """All ledgers of a run; none where nodes keep their own. ValueError for one that is missing or
    has less in it than its client reported.

    Who must have one is in the log: each client that reported its epsilon, or the server.
    """
    if unit == "example" and read_engine(run.path) == FLOWER:
        return []
    folder = run.path / LEDGERS
    check_heads(folder, {})
    ledgers = [read_ledger(file) for file in opened_ledgers(folder)]
    trained = {line["round"] for line in run.rounds if line["round"] > 0}
    told = _told_epsilons(run) if unit == "example" else {}
    owners = set(told) if unit == "example" else {"server"} if trained else set()
    for owner in sorted(owners - {ledger.path.stem for ledger in ledgers}):
        raise ValueError(
            f"{'the' if unit == 'client' else 'client'} {owner} drew noise in this run, its ledger "
            f"{ledger_path(folder, owner)} is missing: restore it; without it nobody knows what "
            "was spent, and no epsilon is told"
        )
    for ledger in ledgers:
        owner = ledger.path.stem
        made = {intent.round for intent in ledger.intents}
        if unit == "client" and (free := sorted(trained - made)):
            raise ValueError(
                f"round {free[0]} was merged and its noise is not in {ledger.path}: an older one "
                "took its place; restore the last one, without it no epsilon is told"
            )
        if told.get(owner, 0.0) > ledger.spent * (1 + ROUNDING):
            raise ValueError(
                f"client {owner} reported epsilon {_rounded_up(told[owner])}, its ledger "
                f"{ledger.path} has {_rounded_up(ledger.spent)}: an older one took its place; "
                "restore the last one, without it no epsilon is told"
            )
    return ledgers


def _not_covered(config: Mapping[str, Any]) -> list[str]:
    """What the privacy of a config leaves open, but for arithmetic."""
    privacy, found = config["privacy"], list(OPEN[config["privacy"]["unit"]])
    if privacy["unit"] == "example" and privacy["share_metrics"]:
        found.append(SHARED)
    if privacy["unit"] == "example" and _is_dealt(config):
        found.append(DEALT)
    return found


def _is_dealt(config: Mapping[str, Any]) -> bool:
    """Whether who has which row was drawn over all rows, as no real federation does."""
    tables = {table: config.get(table, {}) for table in ("data", "flower", "partition")}
    if tables["data"].get("clients") or tables["flower"].get("clients"):
        return False
    return tables["partition"].get("by") != "column" or bool(tables["data"].get("limit"))


def write_statement(folder: Path) -> None:
    """Writes the statement of a run that has privacy into its directory; or why there is none."""
    try:
        lines = statement(folder)
    except ValueError as error:  # an edited ledger: what else the run has is still to be saved
        lines = [f"No statement can be made: {error}"]
    write_text(folder / STATEMENT, "\n".join(lines) + "\n")


def card_section(config: Config) -> str:
    """What an adapter's card says of its privacy: the budget; empty where there is none."""
    privacy = config.privacy
    if privacy.unit == "none":
        return ""
    whose = "each training row of a client" if privacy.unit == "example" else "each client"
    left_open = "; ".join(_not_covered(asdict(config)))
    return (
        f"\n## Privacy\n\nProtected: {whose}, by a budget of epsilon {privacy.epsilon:g} at delta "
        f"{privacy.delta:g} over all rounds. Not covered: {left_open}. What was spent, "
        f"and the whole statement, is in the run directory's `{STATEMENT}`.\n"
    )


def _table(ledgers: Sequence[Ledger]) -> list[str]:
    """One line for each ledger, and the largest epsilon."""
    lines = []
    for ledger in ledgers:
        terms, made = ledger.terms, [one for intent in ledger.intents for one in intent.mechanisms]
        lost = sum(not one.closed for one in ledger.intents)
        noise = ", ".join(f"{noise:.4g}" for noise in sorted({one.noise for one in made}))
        rate = ", ".join(f"{100 * q:.3g} %" for q in sorted({one.sampling for one in made}))
        lines.append(
            f"  {terms.owner}: epsilon {_rounded_up(ledger.spent)} of {terms.epsilon:g} at delta "
            f"{terms.delta:g}; {len(ledger.intents)} intents"
            + (f", {lost} of them not closed (charged all the same)" if lost else "")
            + f", {sum(one.steps for one in made)} steps, noise {noise or '-'}, sampling "
            + (rate or "-")
        )
    most = max(ledger.spent for ledger in ledgers)
    delta = max(ledger.terms.delta for ledger in ledgers)
    return [*lines, f"Epsilon: {_rounded_up(most)} at delta {delta:g} (the largest of all)"]


def _reported(run: Run, privacy: Mapping[str, Any]) -> list[str]:
    """What is known without ledgers: what clients that keep their own said of them, and the budget
    that each ledger holds its client to.
    """
    if read_engine(run.path) != FLOWER:
        return ["Epsilon: nothing was spent yet"]
    budget, delta = privacy["epsilon"], privacy["delta"]
    most = f"at most {budget:g} at delta {delta:g}, the budget that no node's ledger goes beyond"
    told = _told_series(run)
    if not told:
        return [f"Epsilon: {most}; no client has reported one, rounds may have been charged"]
    lines = []
    spent, lost = {client: _spent(series) for client, series in told.items()}, []
    for client, ledgers in spent.items():
        line = f"  {client}: epsilon {_rounded_up(sum(ledgers))}, as it says"
        if len(ledgers) > 1:
            lost.append(client)
            line += (
                f"; its reports fell: its ledger was lost and its budget begun anew, so that "
                f"{len(ledgers)} of them add up, with delta {len(ledgers) * delta:g}"
            )
        lines.append(line)
    if lost:
        most = f"no bound is known, since {', '.join(lost)} lost ledgers"
    least = _rounded_up(max(sum(ledgers) for ledgers in spent.values()))
    last = (
        f"Epsilon: {most}; at least {least} is spent (the largest of what clients reported; the "
        "ledgers are on the clients, with the rounds whose replies were lost)"
    )
    return [*lines, last]


def _spent(series: Sequence[float]) -> list[float]:
    """What each ledger of a client came to: one that is charged on reports more every round."""
    ends = [before for before, after in pairwise(series) if 0 < before >= after]
    return [*ends, series[-1]]


def _told_epsilons(run: Run) -> dict[str, float]:
    """The largest epsilon that each client reported."""
    return {client: max(series) for client, series in _told_series(run).items()}


def _told_series(run: Run) -> dict[str, list[float]]:
    """What each client reported of its epsilon, round by round."""
    found: dict[str, list[float]] = {}
    for line in run.rounds:
        for client, told in line["clients"].items():
            if "epsilon" in told:
                found.setdefault(client, []).append(float(told["epsilon"]))
    return found


def _rounded_up(epsilon: float) -> str:
    return f"{math.ceil(epsilon * 1e4) / 1e4:g}" if math.isfinite(epsilon) else "infinite"
