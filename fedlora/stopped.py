"""A run that stopped: what there is of it, and whether and how it can go on."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from fedlora.files import check_free
from fedlora.privacy.reserve import configured_clients, shortage
from fedlora.runlog import CHECKPOINTS, FLOWER, has_ended, read_config, read_engine


def stopped_line(folder: Path) -> str:
    """After which round a run stopped, and what can be done: the command that goes on with it, or
    why a private run has nothing left to spend, and where its result is.
    """
    done, again = _rounds_done(folder), f"fedlora run --resume {shlex.quote(str(folder))}"
    stopped = f"{folder} stopped after round {done}"
    config = read_config(folder)
    private = config.privacy.unit == "example"
    if read_engine(folder) == FLOWER and (private or config.flower.clients):
        return (
            f"{stopped}: the same `flwr run` goes on with it, its nodes have the "
            f"{'ledgers' if private else 'data'} (after "
            f"--engine flower: `fedlora flower init DIR {shlex.quote(str(folder / 'config.toml'))}`"
            ", then `flwr run DIR`)"
        )
    reason = _unpayable(folder, done + 1)
    if not reason:
        return f"{stopped}: go on with `{again}`"
    if (folder / "adapter").is_dir():
        return f"{stopped} and cannot go on: {reason}; what there is is in {folder / 'adapter'}"
    saved = f"; `{again}` would only save the result of round {done}" if done else ""
    return f"{stopped} and cannot go on: {reason}{saved}"


def check_new(folder: Path) -> None:
    """ValueError if the run directory exists: a run never writes over another."""
    if folder.exists():
        check_free(folder)
        another = "choose another folder with --set run.out=DIR or --set run.name=NAME"
        if (folder / "config.toml").is_file() and not has_ended(folder):
            raise ValueError(f"{stopped_line(folder)}; for a new run {another}")
        raise ValueError(f"run directory {folder} exists already and was not touched: {another}")
    there = next(parent for parent in folder.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"run directory {folder} cannot be made: {there} takes no new folder")


def check_goes_on(folder: Path) -> None:
    """ValueError where a stopped private run has nothing left to spend on its next round."""
    if reason := _unpayable(folder, _rounds_done(folder) + 1):
        raise ValueError(reason)


def _rounds_done(folder: Path) -> int:
    kept = [int(path.stem[6:]) for path in (folder / CHECKPOINTS).glob("round-*.ckpt")]
    return max(kept, default=0)


def _unpayable(folder: Path, round: int) -> str:
    """Why the round of a private run cannot be paid for; empty where it can, or nobody can tell."""
    config = read_config(folder)
    clients = configured_clients(config, folder)
    try:
        return shortage(config, clients, folder, round) if clients else ""
    except ValueError as error:  # a damaged ledger
        return str(error)
