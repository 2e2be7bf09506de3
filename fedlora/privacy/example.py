"""Example-level privacy of a client's training: what a round costs, charged before it is trained.

The default unit: each example of a client is protected from everybody who sees what leaves it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from fedlora.config import Config
from fedlora.errors import PublicError
from fedlora.privacy.accounting import Mechanism, noise_for
from fedlora.privacy.ledger import Terms, intend, ledger_path, read_ledger
from fedlora.settings import steps_per_round


@dataclass(frozen=True)
class Budgets:
    """The budgets of the clients whose ledgers are in `folder`: every client has all of epsilon.

    Clients hold different rows, so that their epsilons do not add up: the run's is the largest.
    """

    config: Config
    folder: Path

    def charge(self, client: str, round: int, mechanism: Mechanism) -> None:
        """Writes what this round is to draw to the client's ledger, and syncs it.

        ValueError, with nothing charged, where the budget is spent.
        """
        intend(ledger_path(self.folder, client), terms(self.config, client), round, [mechanism])

    def spent(self, client: str) -> float:
        """The client's epsilon so far."""
        return read_ledger(ledger_path(self.folder, client)).spent


def terms(config: Config, owner: str) -> Terms:
    """What the ledger of a client, or of the server for all of them, is opened with."""
    privacy = config.privacy
    return Terms(owner, privacy.unit, privacy.epsilon, privacy.delta, privacy.accountant)


def planned_rounds(config: Config) -> int:
    """The rounds that the budget is for: those of the run, and what is in reserve."""
    return config.privacy.rounds or config.run.rounds


def sampling_rate(batch: int, rows: int) -> float:
    """batch / rows in three digits, rounded up, at most 1.

    Clients with about as many rows then share their noise, which takes seconds to find.
    """
    grid = 10.0 ** (math.floor(math.log10(batch / rows)) - 2)
    return min(1.0, float(f"{math.ceil(batch / rows / grid * (1 - 1e-12)) * grid:.3g}"))


def planned_round(config: Config, rows: int) -> Mechanism:
    """A round's training on so many rows: noise that spends epsilon in all planned rounds.

    ValueError for a delta that would let some example through: 1 / rows or more.
    """
    privacy, client = config.privacy, config.client
    if privacy.delta * rows >= 1:
        raise PublicError(
            f"privacy.delta = {privacy.delta:g} lets one of {rows} examples through unprotected: "
            f"take less than 1 / rows, such as {0.1 / rows:.1g}"
        )
    rate = sampling_rate(client.batch, rows)
    steps = steps_per_round(client, rows)
    planned = steps * planned_rounds(config)
    noise = noise_for(privacy.epsilon, privacy.delta, planned, rate, privacy.accountant)
    return Mechanism(noise, steps, rate)
