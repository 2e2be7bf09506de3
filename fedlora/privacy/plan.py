"""What a run's privacy settings come to, before anything is trained: checks, noise, what it costs.

Nothing here draws noise or charges a ledger.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from fedlora.adapter import PARTS, Adapter, flatten
from fedlora.config import Config
from fedlora.data import Data
from fedlora.privacy.accounting import Mechanism, noise_for
from fedlora.privacy.client_level import Design, Noising, PrivateMerge
from fedlora.privacy.designs import Prediction, clients_needed, predict
from fedlora.privacy.example import planned_round, planned_rounds, terms
from fedlora.privacy.ledger import ledger_path
from fedlora.rounds import Merge
from fedlora.rules import get_rule
from fedlora.server import ServerState, aggregate, plan_round, sample_clients
from fedlora.settings import PrivacySettings, round_size, shares_metrics

SERVER = "server"  # whose ledger it is, in client-level privacy
NEEDED = {  # what client-level privacy needs, for the reason that stands behind it
    "merge.weights": ("uniform", "a client's weight must not depend on its data"),
    "merge.robust": ("none", "clipping is part of the mechanism"),
    "merge.residual": ("rule", "what is dropped, folded or carried is decided by the design"),
    "merge.server_lr": (1.0, "the noise is planned for whole steps"),
    "client.ranks": ([], "all clients share one space"),
    "run.mode": ("federated", "a reference has no server"),
    "run.min_clients": (0, "whether a round counts would tell who answered"),
    "run.save_best": (False, "it chooses on held-out rows, without noise"),
}


def check(config: Config) -> None:
    """ValueError, with the remedy, where the settings do not go together."""
    privacy, rounds = config.privacy, config.run.rounds
    if privacy.unit == "example":
        _check_example(config)
    if privacy.unit != "client":
        return
    if 0 < privacy.rounds < rounds:
        raise ValueError(
            f"privacy.rounds = {privacy.rounds} are fewer than run.rounds = {rounds}: take as many "
            "at least, or 0 for just these"
        )
    if config.merge.head == "local":
        raise ValueError(
            "privacy.unit = 'client' does not go with merge.head = 'local': each client's head "
            "would be saved as it was trained, without noise; take 'average' or 'freeze'"
        )
    flat = {
        f"{section}.{key}": value
        for section in ("merge", "client", "run")
        for key, value in vars(getattr(config, section)).items()
    }
    for key, (wanted, reason) in NEEDED.items():
        if flat[key] != wanted:
            raise ValueError(
                f"privacy.unit = 'client' needs {key} = {wanted!r}, it is {flat[key]!r}: {reason}"
            )
    rule = "ffa" if config.privacy.design == "rows" else "fra"
    if config.merge.rule != rule:
        raise ValueError(
            f"privacy.design = {config.privacy.design!r} goes with merge.rule = {rule!r}, it is "
            f"{config.merge.rule!r}: the design says how the noised sum becomes an adapter"
        )


def _check_example(config: Config) -> None:
    privacy, plain = config.privacy, PrivacySettings()
    for key in ("design", "quantile"):
        if getattr(privacy, key) != getattr(plain, key):
            raise ValueError(
                f"privacy.{key} is for privacy.unit = 'client', this run has unit = 'example', "
                "where it would do nothing: leave it out"
            )
    if config.client.ranks:
        raise ValueError(
            "privacy.unit = 'example' does not go with client.ranks: noise would train the pairs "
            "that a smaller client does not have"
        )
    if config.run.save_best and not privacy.share_metrics:
        raise ValueError(
            "run.save_best chooses on held-out rows, without noise: leave it out, or set "
            "privacy.share_metrics"
        )


def merge_for(config: Config, clients: int, folder: Path) -> Merge:
    """The server's merge: `aggregate`, or the one of client-level privacy with its ledger."""
    if config.privacy.unit != "client":
        return aggregate
    return PrivateMerge(
        noising(config, clients),
        ledger_path(folder, SERVER),
        terms(config, SERVER),
        config.run.seed,
    )


def noising(config: Config, clients: int) -> Noising:
    """Clip and noise of a round of client-level privacy, for all planned rounds.

    No amplification is taken for clients that sit a round out: who takes part is public.
    """
    privacy = config.privacy
    rounds = planned_rounds(config)
    noise = noise_for(privacy.epsilon, privacy.delta, rounds, 1.0, privacy.accountant)
    asked = round_size(clients, config.merge.participation)
    return Noising(privacy.design, noise, asked, privacy.clip, privacy.quantile)


def forecast(config: Config, clients: int, start: Adapter) -> dict[str, dict[str, Prediction]]:
    """For every design, each layer's prediction under the run's budget."""
    made = noising(config, clients)
    shapes = {name: factors.shape for name, factors in start.layers.items()}
    found: dict[str, dict[str, Prediction]] = {}
    for design in get_args(Design):
        noise = replace(made, design=design).message_noise
        found[design] = predict(design, shapes, config.model.rank, noise, made.clients)
    return found


def hides_evaluation(config: Config, data: Data) -> bool:
    """Whether all that could be scored is made of private rows that are not let out."""
    return data.own_evaluation and not shares_metrics(config.privacy)


def announce(config: Config, rows: Mapping[str, int], start: Adapter) -> list[str]:
    """What the run's privacy costs, in words, before it is paid; `rows` of every client, 0 unknown.

    ValueError where the noise of client-level privacy drowns what it is to protect, unless
    `privacy.accept_noise` is set.
    """
    privacy = config.privacy
    if privacy.unit == "none":
        return []
    rounds = planned_rounds(config)
    budget = f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g} over {rounds} rounds"
    if privacy.unit == "example":
        return [_announce_example(config, rows, start, budget)]
    if privacy.delta * len(rows) >= 1:
        raise ValueError(
            f"privacy.delta = {privacy.delta:g} lets one of {len(rows)} clients through "
            f"unprotected: take less than 1 / clients, such as {0.1 / len(rows):.1g}"
        )
    return _announce_clients(config, len(rows), start, budget)


def step_noise(mechanism: Mechanism, rows: int, numbers: int) -> float:
    """Length of a step's noise over the clip, the longest that the gradient beside it can be.

    sigma sqrt(numbers) / (expected batch), for so many trained numbers.
    """
    return mechanism.noise * math.sqrt(numbers) / (mechanism.sampling * rows)


def trained_numbers(config: Config, start: Adapter) -> int:
    """How many numbers a client trains in the first round."""
    parts = PARTS
    if config.run.mode == "federated":
        rule = get_rule(config.merge.rule, **config.merge.options)
        parts = plan_round(rule, config.merge.head, ServerState(start), 1).trains
    return sum(tensor.numel() for tensor in flatten(start, parts).values())


def _announce_example(config: Config, rows: Mapping[str, int], start: Adapter, budget: str) -> str:
    privacy, most = config.privacy, most_rounds(config, list(rows))
    if 0 < privacy.rounds < most:
        raise ValueError(
            f"privacy.rounds = {privacy.rounds} is not enough: a client takes part in {most} "
            "rounds, its budget would end before the run"
        )
    line = f"privacy: every example of a client, {budget}; "
    sizes = sorted(set(rows.values()) - {0})
    planned = {count: planned_round(config, count) for count in sizes}
    if planned:
        noises = _span([one.noise for one in planned.values()], "{:.3g}")
        rates = _span([100 * one.sampling for one in planned.values()], "{:.3g}")
        numbers = trained_numbers(config, start)
        longs = [step_noise(one, count, numbers) for count, one in planned.items()]
        long = _span(longs, "{:.2g}")
        line += (
            f"noise {noises} times the clip {privacy.clip:g}, on Poisson batches of {rates} % of "
            f"its rows; on {numbers:,} trained numbers a step's noise is {long} times as long as "
            "its gradient can be" + _verdict(config, min(longs), len(rows))
        )
    else:
        line += "noise is set by each node"
    if most < config.run.rounds and not privacy.rounds:
        line += (
            f"; no client takes part in more than {most} of them: privacy.rounds = {most} would "
            "take less noise"
        )
    return line + (_reserve_note(most) if planned_rounds(config) <= most else "")


def _verdict(config: Config, long: float, clients: int) -> str:
    """What noise `long` times a gradient's longest means, once a round's clients are averaged."""
    together = round_size(clients, config.merge.participation)
    if config.run.mode != "federated":
        together = 1
    if long <= math.sqrt(together):
        return ""
    return (
        ": little can be learned; take more rows, larger batches or fewer trained numbers "
        "(docs/privacy.md)"
    )


def _reserve_note(rounds: int) -> str:
    """What a crash does to a run without a reserve, and what one costs, for `rounds` planned."""
    more = math.sqrt((rounds + 1) / rounds) - 1
    return (
        "; nothing is in reserve: a crash after a round was charged ends the run, privacy.rounds "
        f"= {rounds + 1} would let one round be made again, for up to {100 * more:.2g} % more noise"
    )


def _announce_clients(config: Config, clients: int, start: Adapter, budget: str) -> list[str]:
    designs = forecast(config, clients, start)
    made, chosen = noising(config, clients), list(designs[config.privacy.design].values())
    rounds = planned_rounds(config)
    note = _reserve_note(rounds) if rounds <= config.run.rounds else ""
    lines = [f"privacy: every client as a whole, {budget}; noise {made.noise:.3g} a round{note}"]
    for design, layers in designs.items():
        groups = Counter(one.shape for one in layers.values())
        first = {one.shape: one for one in layers.values()}
        for (m, n), count in groups.items():
            one = first[m, n]
            mark = "*" if design == config.privacy.design else " "
            lines.append(
                f"{mark} {design:9} {count} layers of {m} x {n}: noise {one.noise:.3g} C, a "
                f"direction shows above {one.threshold:.3g} C, signal at most {one.signal:.3g} C: "
                f"noise / signal {one.ratio:.3g}"
            )
    worst = max((one.ratio for one in chosen), default=0.0)
    if worst > 1 and not config.privacy.accept_noise:
        shown = "\n".join(lines)
        raise ValueError(
            f"client-level noise drowns the update: noise over signal is {worst:.3g} with "
            f"{made.clients} clients a round, where every client agrees; about "
            f"{clients_needed(chosen, made.clients):,} would bring it to 1. Take more clients, "
            "a smaller design, unit = 'example', or privacy.accept_noise = true to see for "
            f"yourself\n{shown}"
        )
    return lines


def most_rounds(config: Config, clients: Sequence[str]) -> int:
    """The rounds of the client that takes part most often: the draw is public, and known before."""
    rounds = config.run.rounds
    if config.run.mode != "federated":
        return rounds
    share, seed = config.merge.participation, config.run.seed
    drawn = (sample_clients(clients, share, seed, round) for round in range(1, rounds + 1))
    return max(Counter(client for asked in drawn for client in asked).values())


def _span(values: list[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"
