"""What is done to runs and clients for the tables of docs/reliability.md, row by row.

A row breaks something and gives back what happened, and two hashes that must be equal.
"""

from __future__ import annotations

import errno
import itertools
import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from bad_replies import (
    FAULTS,
    FAULTY,
    LENIENT,
    Fault,
    Options,
    on_flower,
    run_without,
    trained_by,
    unasked,
)
from bench import Place, adapter_bytes, records
from crashes import SETTINGS, failing_sync, finished, killed_after, killed_at
from flwr.app import Message
from tiny import saved_base

from fedlora.recording import Job
from fedlora.resume import CHECKPOINTS, find
from fedlora.run import execute

NEWEST = "round-000002.ckpt"
SYNC = 12  # the number of its fsync, counted from the first one of the run


class UnexpectedError(Exception):
    """What should have happened did not."""


@dataclass(frozen=True)
class Outcome:
    """What happened, and the two hashes that must be equal."""

    happened: str
    before: str
    after: str


@dataclass(frozen=True)
class Row:
    done: str
    do: Callable[[Ground], Outcome]


class Ground:
    """A place for runs, and what they come to when nothing happens to them."""

    def __init__(self, folder: Path, random_kills: int = 20) -> None:
        self.place = Place(saved_base(folder, "bert"), folder)
        self.random_kills = random_kills
        self.numbers = itertools.count(1)

    def name(self) -> str:
        return f"run-{next(self.numbers)}"

    def job(self) -> Job:
        return self.place.job(self.name(), **SETTINGS)

    @cached_property
    def whole(self) -> tuple[str, float]:
        """The hash of an undisturbed run, and its seconds."""
        job = self.job()
        began = time.perf_counter()
        return adapter_hash(execute(job)), time.perf_counter() - began

    @cached_property
    def others(self) -> str:
        """The hash of the plain loop over the clients that are not faulty."""
        return adapter_hash(run_without(self.place, self.name(), FAULTY, **LENIENT))

    def resumed(self, folder: Path, after: int) -> Outcome:
        """Resumes a run, which must go on from this round, to its end."""
        checkpoint = find(folder)[1].checkpoint
        reached = checkpoint.round if checkpoint else 0
        expect(reached == after, f"it would go on after round {reached}, not {after}")
        adapter = shortened(finished(self.place, folder))
        return Outcome(f"resumed after round {after}", self.whole[0], adapter)

    def stopped(self) -> Path:
        """The directory of a run that was killed after round 2 of 3: two checkpoints are there."""
        return killed_at(self.job(), "round:3")


# ---------------------------------------------------------------- runs


def killed(ground: Ground, point: str, after: int, left: int = 0) -> Outcome:
    """Killed at a point; `left` temporary files must lie about then."""
    folder = killed_at(ground.job(), point)
    found = len(list((folder / CHECKPOINTS).glob(".*.tmp")))
    expect(found == left, f"{found} temporary files were left, not {left}")
    return ground.resumed(folder, after)


def killed_at_random(ground: Ground) -> Outcome:
    want, seconds = ground.whole
    rng = random.Random(5)
    found = [
        shortened(finished(ground.place, killed_after(ground.job(), rng.random() * seconds)))
        for _ in range(ground.random_kills)
    ]
    told = f"{found.count(want)} of {len(found)} resumed to the same bytes"
    return Outcome(told, want, " ".join(sorted(set(found))))


def full_disk(ground: Ground) -> Outcome:
    """The temporary file is a link to /dev/full: the system itself finds no space left."""
    job = ground.job()
    link = job.folder / CHECKPOINTS / f".{NEWEST}.tmp"
    return failed_write(ground, job, nullcontext(), lambda: link.symlink_to("/dev/full"))


def broken_disk(ground: Ground) -> Outcome:
    return failed_write(ground, ground.job(), failing_sync(errno.EIO, SYNC), lambda: None)


def failed_write(
    ground: Ground, job: Job, disk: AbstractContextManager[None], spoil: Callable[[], None]
) -> Outcome:
    """Ends in round 2 with an error that says why, round 1's checkpoint as it was."""
    kept = job.folder / CHECKPOINTS / "round-000001.ckpt"
    found: list[bytes] = []

    def watch(event: str, facts: Mapping[str, Any]) -> None:
        if event == "round" and facts["round"] == 1:
            found.append(kept.read_bytes())
            spoil()

    with disk:
        said = refused(partial(execute, job, watch), OSError, "cannot write", job.folder)
    expect(found == [kept.read_bytes()], "round 1's checkpoint is not what it was")
    return said_first(f"{said}; round 1's checkpoint untouched", ground.resumed(job.folder, 1))


def damaged(ground: Ground, damage: Callable[[bytes], bytes]) -> Outcome:
    folder = ground.stopped()
    newest = folder / CHECKPOINTS / NEWEST
    newest.write_bytes(damage(newest.read_bytes()))
    problems = " ".join(find(folder)[1].problems)
    expect(f"{NEWEST} is damaged" in problems, f"the damage was not noticed: {problems}")
    return said_first(quoted(problems, folder), ground.resumed(folder, 1))


def all_damaged(ground: Ground) -> Outcome:
    folder = ground.stopped()
    for path in (folder / CHECKPOINTS).iterdir():
        path.write_bytes(cut(path.read_bytes()))
    return untouched(folder, partial(find, folder), "no whole checkpoint to resume from")


def other_config(ground: Ground) -> Outcome:
    folder = ground.stopped()
    other = ground.place.config(folder.name, **{**SETTINGS, "client__lr": 0.02})
    return untouched(folder, partial(find, folder, other), "client.lr = 0.01 in the run, 0.02 now")


def untouched(folder: Path, act: Callable[[], Any], says: str) -> Outcome:
    """Refused, with these words, and the directory is what it was."""
    before = directory_hash(folder)
    said = refused(act, ValueError, says, folder)
    return Outcome(f"refused: {said}; directory untouched", before, directory_hash(folder))


def by_hand(ground: Ground) -> Outcome:
    job = ground.job()
    with suppress(KeyboardInterrupt):
        execute(job, interrupting)
    expect((job.folder / "adapter").is_dir(), "there is no adapter of the last round")
    return said_first("the last round's adapter is there", ground.resumed(job.folder, 1))


def interrupting(event: str, facts: Mapping[str, Any]) -> None:
    """Ctrl-C while the first client trains in round 2."""
    if event == "fit" and facts["round"] == 2:
        raise KeyboardInterrupt


def flip(data: bytes) -> bytes:
    """One bit in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


# ---------------------------------------------------------------- clients


def faulty(ground: Ground, fault: Fault) -> Outcome:
    folder = on_flower(ground.place, ground.name(), fault.options(), **LENIENT)
    expect(codes(folder) == [[code] for code in fault.codes], f"the codes are {codes(folder)}")
    told = ", then ".join(f"`{code}`" for code in dict.fromkeys(fault.codes))
    return Outcome(told, ground.others, adapter_hash(folder))


def not_asked(ground: Ground) -> Outcome:
    """Two of three clients are asked in a round; the third answers as well."""
    changes = {"merge__participation": 0.6}
    want = ground.place.run(ground.name(), **changes)
    folder = on_flower(ground.place, ground.name(), unasked(), **changes)
    expect(codes(folder) == [["unasked"]] * 2, f"the codes are {codes(folder)}")
    return Outcome("`unasked`", adapter_hash(want), adapter_hash(folder))


def too_few(ground: Ground) -> Outcome:
    """One of three answers in the second round, the last one."""
    job = ground.place.job(ground.name())
    with suppress(KeyboardInterrupt):
        execute(job, interrupting)  # leaves the adapter of round 1
    settings = {"run__min_clients": 2, "run__max_failed_rounds": 2}
    folder = on_flower(ground.place, ground.name(), silent({2}, "0"), **settings)
    return Outcome("the adapter is kept", adapter_hash(job.folder), adapter_hash(folder))


def too_few_for_too_long(ground: Ground) -> Outcome:
    """Nobody answers in rounds 2 and 3; before the run is started again, all are back."""
    settings = {"run__rounds": 4, "run__max_failed_rounds": 2}
    want = on_flower(ground.place, ground.name(), silent({2}), **settings)
    name = ground.name()
    run = partial(on_flower, ground.place, name, **settings)
    folder = ground.place.folder / name
    said = refused(partial(run, silent({2, 3})), ValueError, "2. round in a row; stopped", folder)
    reached = find(folder)[1].checkpoint
    expect(reached is not None and reached.round == 2, "there is no checkpoint of round 2")
    run()
    told = f"{said}; started again: resumed after round 2"
    return Outcome(told, adapter_hash(want), adapter_hash(folder))


def silent(rounds: set[int], but: str = "") -> Options:
    """Nobody answers in these rounds but this client."""

    def change(reply: Message) -> Message | None:
        client = trained_by(reply)
        lost = client and client != but and reply.content.config_records["reply"]["round"] in rounds
        return None if lost else reply

    return {"change": change}


# ---------------------------------------------------------------- what rows are made of


def expect(held: bool, otherwise: str) -> None:
    if not held:
        raise UnexpectedError(otherwise)


def refused(act: Callable[[], Any], kind: type[Exception], says: str, folder: Path) -> str:
    """What it says where it is refused, as it must be, with these words."""
    try:
        act()
    except kind as error:
        expect(says in str(error), f"it says: {error}")
        return quoted(str(error), folder)
    raise UnexpectedError(f"it was not refused with {says!r}")


def quoted(message: str, folder: Path) -> str:
    """The beginning of a message, as text of a page, without the place where the run lies."""
    plain = message.replace(f"{folder}/", "").replace(str(folder), "RUN")
    return f"`{plain if len(plain) <= 120 else plain[:119] + '…'}`"


def said_first(said: str, outcome: Outcome) -> Outcome:
    return replace(outcome, happened=f"{said}; {outcome.happened}")


def codes(folder: Path) -> list[list[str]]:
    """The codes of the failures, round by round."""
    return [[failure["code"] for failure in record["failures"]] for record in records(folder)[1:]]


def adapter_hash(folder: Path) -> str:
    return shortened(adapter_bytes(folder))


def directory_hash(folder: Path) -> str:
    """Of all names and bytes in it."""
    files = {f"{path.relative_to(folder)}": path for path in folder.rglob("*") if path.is_file()}
    return shortened(b"".join(name.encode() + files[name].read_bytes() for name in sorted(files)))


def shortened(data: bytes) -> str:
    return f"`{sha256(data).hexdigest()[:12]}`"


# ---------------------------------------------------------------- the rows

RUNS = [
    Row("SIGKILL before the first client trains", partial(killed, point="fit:1", after=0)),
    Row("SIGKILL in round 2, before training", partial(killed, point="fit:4", after=1)),
    Row("SIGKILL in round 2, after training", partial(killed, point="fitted:6", after=1)),
    Row("SIGKILL, its checkpoint half written", partial(killed, point="half:2", after=1, left=1)),
    Row("SIGKILL at the fsync of its checkpoint",
        partial(killed, point=f"fsync:{SYNC}", after=1, left=1)),
    Row("SIGKILL before the rename of its checkpoint",
        partial(killed, point="replace:4", after=1, left=1)),
    Row("SIGKILL after that rename", partial(killed, point="replaced:4", after=2)),
    Row("SIGKILL at the rename of the final adapter", partial(killed, point="rename:2", after=3)),
    Row("SIGKILL at random moments", killed_at_random),
    Row("Ctrl-C in round 2", by_hand),
    Row("disk full (ENOSPC) at the checkpoint of round 2", full_disk),
    Row("disk broken (EIO) from that checkpoint on", broken_disk),
    Row("a bit flipped in the newest checkpoint", partial(damaged, damage=flip)),
    Row("the newest checkpoint cut in half", partial(damaged, damage=cut)),
    Row("both checkpoints cut in half", all_damaged),
    Row("resumed with another config", other_config),
    Row("one of three answers in round 2, `min_clients = 2`", too_few),
    Row("none answers in rounds 2 and 3, `max_failed_rounds = 2`", too_few_for_too_long),
]  # fmt: skip
CLIENTS = [
    *(Row(fault.done, partial(faulty, fault=fault)) for fault in FAULTS),
    Row("an answer of a client that was not asked", not_asked),
]
