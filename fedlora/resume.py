"""Taking up a run that stopped: which round it goes on from, and whether it is still the same run.

Reads the run directory; trains nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.checkpoint import Checkpoint, latest_checkpoint
from fedlora.config import Config
from fedlora.digests import changed_data
from fedlora.files import check_free, write_text
from fedlora.own_rules import rule_file
from fedlora.privacy.ledger import LEDGERS, check_heads
from fedlora.runlog import (
    CHECKPOINTS,
    FLOWER,
    PROCESS,
    RULE_COPY,
    engine_of,
    has_ended,
    read_config,
    read_json,
)

FREE = ("run.out", "run.name")  # may differ: say where and under which name, not what


@dataclass(frozen=True, eq=False)
class Resumed:
    """A stopped run: its last whole checkpoint (None: it had none yet) and its log up to there."""

    checkpoint: Checkpoint | None
    records: Sequence[dict[str, Any]]
    problems: Sequence[str]
    versions: Mapping[str, Any]
    size: int  # of metrics.jsonl as it was read, in bytes

    def take_up(self, folder: Path) -> None:
        """Cuts the log back to the checkpoint: what came after it is made again.

        ValueError where another process went on with the run since it was read.
        """
        if _log_size(folder) != self.size:
            raise ValueError(f"{folder} went on in another process just now: see its `status`")
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in self.records]
        write_text(folder / "metrics.jsonl", "".join(lines))

    def notes(self, now: Mapping[str, Any]) -> list[str]:
        """What the user should know: where it goes on, damage, and other versions than before."""
        round = self.checkpoint.round if self.checkpoint else 0
        notes = [f"resumed after round {round}", *self.problems]
        keys = sorted(set(now) | set(self.versions))
        other = [
            f"{key} {self.versions.get(key)} then, {now.get(key)} now"
            for key in keys
            if not key.startswith(("data.", "engine")) and now.get(key) != self.versions.get(key)
        ]
        if other:
            notes.append(f"not on the same ground, the bits may differ: {'; '.join(other)}")
        return notes


def find(
    folder: Path, config: Config | None = None, engine: str = PROCESS
) -> tuple[Config, Resumed]:
    """The config and the state of a stopped run; `config` is one that claims to be the same.

    ValueError where the run goes on in another process or has ended, another config is meant (with
    each difference), a data file or the file of the user's own rule is another one now, the
    clients' ledgers are where this `engine` does not look, or nothing whole is there to go on from.
    """
    own = read_config(folder)
    check_free(folder)
    if has_ended(folder):
        raise ValueError(f"{folder} has ended: there is nothing to resume")
    if config is not None:
        refuse_changes(folder, own, config)
    versions = read_json(folder / "versions.json")
    refuse_other_ledgers(folder, own, engine_of(versions), engine)
    refuse_other_rule(folder, own)
    refuse_other_data(folder, own, versions)
    checkpoint: Checkpoint | None = None
    problems: list[str] = []
    size, log = _log_size(folder), records(folder)
    check_heads(folder / LEDGERS, {})
    if any((folder / CHECKPOINTS).glob("round-*.ckpt")):
        checkpoint, problems = latest_checkpoint(folder / CHECKPOINTS)
        check_heads(folder / LEDGERS, checkpoint.notes.get("ledgers", {}))
        log = log[: checkpoint.round + 1]
        if len(log) != checkpoint.round + 1:
            raise ValueError(
                f"{folder}: metrics.jsonl has {len(log)} whole lines, the checkpoint is of round "
                f"{checkpoint.round}: lines are missing, and with them what the run measured"
            )
    elif len(log) > 2:  # a run may stop between the line of round 1 and its checkpoint
        raise ValueError(f"{folder} has rounds in its log and no checkpoint to resume from")
    else:
        log = []
    return own, Resumed(checkpoint, log, problems, versions, size)


def refuse_changes(folder: Path, own: Config, other: Config) -> None:
    """ValueError that shows every setting in which a config differs from the run's own."""
    mine, theirs = own.flat(), other.flat()
    if theirs["data.labels"] == "[]":
        theirs["data.labels"] = mine["data.labels"]  # the run wrote down what it found
    changed = [
        f"{key} = {mine[key]!r} in the run, {theirs[key]!r} now"
        for key in mine
        if key not in FREE and mine[key] != theirs[key]
    ]
    if changed:
        raise ValueError(
            f"{folder} was run with another config; resume it without one, or start a new run: "
            + "; ".join(changed)
        )


def refuse_other_ledgers(folder: Path, own: Config, begun: str, engine: str) -> None:
    """ValueError where the other engine would begin a new budget for each client: on Flower the
    ledgers of example-level privacy are with the nodes, in one process in the run directory.
    """
    if own.privacy.unit != "example" or begun == engine:
        return
    if begun == FLOWER:
        raise ValueError(
            f"{folder} was begun on Flower, its clients' ledgers are with their nodes: the same "
            "`flwr run` goes on with it; in one process each would begin a new budget"
        )
    raise ValueError(
        f"{folder} was begun in one process and has its clients' ledgers: `fedlora run --resume` "
        "goes on with it; on Flower each would begin a new budget"
    )


def refuse_other_rule(folder: Path, own: Config) -> None:
    """ValueError unless the user's own rule is still the code that the run began with."""
    source, kept = rule_file(own.merge.rule), folder / RULE_COPY
    if source is None:
        return
    now, then = (
        path.read_bytes().splitlines() if path.is_file() else None for path in (source, kept)
    )
    if then is None or now != then:
        raise ValueError(
            f"{source} {'is gone' if now is None else 'was changed'} since {folder} was begun with "
            f"it: copy {kept} back to resume, or start a new run"
        )


def refuse_other_data(folder: Path, own: Config, versions: Mapping[str, Any]) -> None:
    """ValueError that names every data file whose bytes are not those that the run began with."""
    if changed := changed_data(own.data, versions):
        raise ValueError(
            f"{folder} was begun with other data: {'; '.join(changed)}: put back the file as it "
            "was, or start a new run"
        )


def records(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl in order; a last line that was cut off is left out."""
    path = folder / "metrics.jsonl"
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record.get("round") != len(found):
            break
        found.append(record)
    return found


def _log_size(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.stat().st_size if path.is_file() else 0
