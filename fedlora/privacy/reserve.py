"""Whether a round can be paid for, read off the ledgers before anybody is charged for it.

A round that cannot have the replies it needs would spend the budgets of those who can answer for
nothing. For runs in one process: their ledgers are all in the run directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedlora.config import Config
from fedlora.modes import CENTRAL
from fedlora.privacy.ledger import LEDGERS, SUFFIX, is_opened, ledger_path, read_ledger
from fedlora.privacy.plan import SERVER
from fedlora.server import sample_clients


def check_payable(config: Config, clients: Sequence[str], folder: Path, round: int) -> None:
    """ValueError, before anything is charged, where too few of those asked can pay for the round.

    `clients` are all clients of the run, `folder` is its directory. A client whose ledger is not
    opened yet can pay; the others are taken to need what their last round took.
    """
    if reason := shortage(config, clients, folder, round):
        left = f"the result of round {round - 1} is in {folder / 'adapter'}"
        raise ValueError(f"{reason}; {left if round > 1 else 'no round was finished'}")


def shortage(config: Config, clients: Sequence[str], folder: Path, round: int) -> str:
    """Why the round cannot have as many replies as it needs, and the remedy; empty where it can."""
    owners, needed = _payers(config, clients, round)
    paths = {owner: ledger_path(folder / LEDGERS, owner) for owner in owners}
    short = [owner for owner, path in paths.items() if not _can_pay(path)]
    if len(owners) - len(short) >= needed:
        return ""
    intents = max(len(read_ledger(paths[owner]).intents) for owner in short)
    return (
        f"round {round} is not begun and nothing is charged: {', '.join(short)} cannot pay for it "
        f"any more, {needed} of {len(owners)} are needed ({intents} rounds are charged; one that a "
        "crash cut short counts). A new run has a budget of its own: privacy.rounds = "
        f"{intents + config.run.rounds - round + 1} would have been reserve enough"
    )


def configured_clients(config: Config, folder: Path) -> list[str] | None:
    """The names of a run's clients as far as its directory tells them; None where it does not."""
    if config.run.mode == "central":
        return [CENTRAL]
    if config.data.clients:
        return sorted(config.data.clients)
    if config.partition.by != "column":
        return [str(number) for number in range(config.partition.clients)]
    if config.merge.participation < 1 or config.run.min_clients:
        return None
    return sorted(path.stem for path in (folder / LEDGERS).glob(f"*{SUFFIX}"))


def _payers(config: Config, clients: Sequence[str], round: int) -> tuple[Sequence[str], int]:
    """Whose ledgers a round is charged to, and how many of them must be able to pay."""
    if config.privacy.unit == "none":
        return [], 0
    if config.privacy.unit == "client":
        return [SERVER], 1
    if config.run.mode != "federated":
        return clients, len(clients)
    asked = sample_clients(clients, config.merge.participation, config.run.seed, round)
    return asked, config.run.min_clients or len(asked)


def _can_pay(path: Path) -> bool:
    """Whether a ledger has room for one round more like its last."""
    ledger = read_ledger(path) if is_opened(path) else None
    if ledger is None or not ledger.intents:
        return True
    return ledger.after(ledger.intents[-1].mechanisms) <= ledger.terms.epsilon
