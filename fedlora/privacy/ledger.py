"""What was spent, on disk: an append-only file of hashed lines, one ledger for each data owner.

An intent is written and synced before any noise is drawn, and closed when what came of it is safe.
Every intent counts, closed or not: a crash can waste budget, never hide what was spent. Beside it
lies its head, the hash of its last line, written after each: a ledger that lost lines is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlora.errors import PublicError
from fedlora.files import locked, make_folder, sync_folder, write_text
from fedlora.privacy.accounting import Accountant, Mechanism, epsilon

LEDGERS, SUFFIX = "ledgers", ".ledger"  # where a run has them, and what they end in
HEAD = ".head"  # what the files beside them end in
OPENED, INTENT, CLOSED = "opened", "intent", "closed"
START = "0" * 64


@dataclass(frozen=True)
class Terms:
    """What a ledger is about and may spend: never changed once its first line is written.

    `unit` is what neighbouring data sets differ in by one: an `example` or a `client`.
    """

    owner: str
    unit: str
    epsilon: float
    delta: float
    accountant: Accountant = "pld"


@dataclass(frozen=True)
class Intent:
    """Noise that was meant to be drawn in a round, and whether what came of it was kept."""

    round: int
    mechanisms: tuple[Mechanism, ...]
    closed: bool = False


@dataclass(frozen=True)
class Ledger:
    """A ledger as read: its terms, every intent so far, the hash of each line."""

    path: Path
    terms: Terms
    intents: Sequence[Intent] = ()
    hashes: tuple[str, ...] = field(default=(), repr=False)
    size: int = field(default=0, repr=False)  # bytes of whole lines

    @property
    def head(self) -> str:
        """The hash of the last line, which stands for all before it."""
        return self.hashes[-1] if self.hashes else START

    @property
    def spent(self) -> float:
        """Epsilon of all intents, at the ledger's delta."""
        return self._epsilon([])

    def after(self, mechanisms: Sequence[Mechanism]) -> float:
        """What epsilon would be with these mechanisms too."""
        return self._epsilon(mechanisms)

    def _epsilon(self, more: Sequence[Mechanism]) -> float:
        every = [one for intent in self.intents for one in intent.mechanisms]
        return epsilon([*every, *more], self.terms.delta, self.terms.accountant)


def read_ledger(path: Path) -> Ledger:
    """The ledger in a file; ValueError, with the line, where it was edited or is not whole.

    A last line that a crash cut short was never synced, so that nothing was drawn for it: it is
    left out, and overwritten by the next one. A line that is there and not in the head counts; a
    head that is not among the lines means that some are gone. A copy without a head is read as is.
    """
    noted = _noted_head(path)  # before the lines: another process may be writing both
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    ledger: Ledger | None = None
    for number, text in enumerate(whole.splitlines(), start=1):
        try:
            entry = json.loads(text)
            ledger = _followed(path, ledger, entry)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: this ledger was edited or damaged ({error}); what was "
                "spent is not known any more: restore the file, or count its data's budget as gone"
            ) from None
    if ledger is None:
        raise ValueError(f"{path} is empty: it is no ledger")
    if noted and noted not in ledger.hashes:
        raise _lines_missing(path)
    return replace(ledger, size=len(whole))


def ledger_path(folder: Path, owner: str) -> Path:
    """Where the ledger of a data owner is."""
    return folder / f"{owner}{SUFFIX}"


def opened_ledgers(folder: Path) -> list[Path]:
    """The files of a folder's ledgers that have a line, in the order of their owners."""
    return [path for path in sorted(folder.glob(f"*{SUFFIX}")) if is_opened(path)]


def is_opened(path: Path) -> bool:
    """Whether a ledger has a whole line; one that a crash cut short has no intent behind it."""
    return path.exists() and b"\n" in path.read_bytes()


def open_ledger(path: Path, terms: Terms) -> Ledger:
    """The ledger in the file, made with these terms where there is none yet.

    ValueError where it has other terms: a budget is not changed by starting again.
    """
    with _held(path):
        return _opened(path, terms)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """The ledger's folder, there to stay, for this process alone."""
    make_folder(path.parent)
    with locked(path.parent):
        yield


def _opened(path: Path, terms: Terms) -> Ledger:
    """As `open_ledger`, under the lock."""
    ledger = _whole(path)
    if ledger is None:
        return _append(Ledger(path, terms), {"kind": OPENED, **asdict(terms)})
    if not _noted_head(path):
        write_text(path.with_suffix(HEAD), ledger.head)
    for name, value in asdict(terms).items():
        before = getattr(ledger.terms, name)
        if before != value:
            raise PublicError(
                f"{path.name} was opened with {name} = {before!r}, this run has {value!r}: a "
                "budget stands once it is opened; set it back, or start a new run"
            )
    return ledger


def intend(path: Path, terms: Terms, round: int, mechanisms: Sequence[Mechanism]) -> Ledger:
    """Charges the mechanisms before anything is drawn, synced to disk; the ledger after them.

    ValueError, with nothing charged, where it would go beyond the budget.
    """
    with _held(path):
        ledger = _opened(path, terms)
        after = ledger.after(mechanisms)
        if after > terms.epsilon:
            raise PublicError(
                f"{terms.owner}: the privacy budget is spent: round {round} would bring epsilon "
                f"from {ledger.spent:.4g} to {after:.4g}, allowed are {terms.epsilon:g} "
                f"({len(ledger.intents)} intents in {path.name}); nothing was drawn"
            )
        made = [asdict(mechanism) for mechanism in mechanisms]
        return _append(ledger, {"kind": INTENT, "round": round, "mechanisms": made})


def close(path: Path, round: int) -> Ledger:
    """Notes that what came of this round's last intent is safe; without one, nothing is written.

    Earlier intents of the round are those that a crash wasted: they stay open.
    """
    with _held(path):
        ledger = read_ledger(path)
        place = _last(ledger.intents, round)
        if place is None or ledger.intents[place].closed:
            return ledger
        return _append(ledger, {"kind": CLOSED, "round": round})


def close_all(folder: Path, round: int) -> None:
    """Closes this round's intents in every ledger of a folder, if there are any."""
    for path in opened_ledgers(folder):
        close(path, round)


def heads(folder: Path) -> dict[str, str]:
    """The hash of the last line of every ledger in a folder, by owner: for `check_heads`."""
    return {path.stem: read_ledger(path).head for path in opened_ledgers(folder)}


def check_heads(folder: Path, known: Mapping[str, str]) -> None:
    """ValueError unless every ledger that was there is there and goes on from where it was.

    Those that were there are the `known`, and whatever has a head in the folder.
    """
    there = {path.stem for ending in (HEAD, SUFFIX) for path in folder.glob(f"*{ending}")}
    for owner in sorted(there | set(known)):
        path = ledger_path(folder, owner)
        ledger = _whole(path)
        if owner in known and (ledger is None or known[owner] not in ledger.hashes):
            raise _lines_missing(path)


def _whole(path: Path) -> Ledger | None:
    """The ledger in the file, as long as its head says; None where no line was ever written.

    ValueError where lines are missing: without a head a crash leaves the first line alone at most.
    """
    noted = _noted_head(path)
    ledger = read_ledger(path) if is_opened(path) else None
    if noted and ledger is None:
        raise _lines_missing(path)
    if not noted and ledger is not None and len(ledger.hashes) > 1:
        raise _lines_missing(path)
    return ledger


def _lines_missing(path: Path) -> ValueError:
    return ValueError(
        f"{path} is not the ledger that this run went on with: lines are missing, and with them "
        "what was spent; restore it and its head, or count its data's budget as gone"
    )


def _noted_head(path: Path) -> str:
    """The hash in the file beside a ledger; empty where there is none."""
    file = path.with_suffix(HEAD)
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def _append(ledger: Ledger, entry: Mapping[str, Any]) -> Ledger:
    """The ledger with one line more, it and its head on disk before this returns."""
    linked = {**entry, "previous": ledger.head}
    line = {**linked, "hash": _hash(linked)}
    with ledger.path.open("r+b" if ledger.path.exists() else "w+b") as file:
        file.truncate(ledger.size)
        file.seek(ledger.size)
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    if not ledger.size:
        sync_folder(ledger.path.parent)
    write_text(ledger.path.with_suffix(HEAD), line["hash"])  # after the line, never ahead of it
    before = ledger if ledger.hashes else None
    return replace(_followed(ledger.path, before, line), size=size)


def _followed(path: Path, ledger: Ledger | None, entry: Mapping[str, Any]) -> Ledger:
    """The ledger with this line, which must carry the hash of all before it."""
    before = ledger.head if ledger else START
    rest = {key: value for key, value in entry.items() if key != "hash"}
    if entry["previous"] != before or entry["hash"] != _hash(rest):
        raise ValueError("its hash does not fit")
    facts = {key: value for key, value in rest.items() if key not in ("kind", "previous")}
    kind = entry["kind"]
    if ledger is None:
        if kind != OPENED:
            raise ValueError(f"it begins with {kind!r}")
        return Ledger(path, Terms(**facts), (), (entry["hash"],))
    hashes = (*ledger.hashes, entry["hash"])
    if kind == INTENT:
        drawn = tuple(Mechanism(**mechanism) for mechanism in facts["mechanisms"])
        intents = (*ledger.intents, Intent(facts["round"], drawn))
        return replace(ledger, intents=intents, hashes=hashes)
    if kind == CLOSED:
        place = _last(ledger.intents, facts["round"])
        done = [
            replace(one, closed=one.closed or index == place)
            for index, one in enumerate(ledger.intents)
        ]
        return replace(ledger, intents=tuple(done), hashes=hashes)
    raise ValueError(f"{kind!r} is no kind of line")


def _last(intents: Sequence[Intent], round: int) -> int | None:
    """The place of the last intent of a round."""
    return max((at for at, one in enumerate(intents) if one.round == round), default=None)


def _hash(entry: Mapping[str, Any]) -> str:
    """SHA-256 of a line without its hash, in one form whatever the order of its keys."""
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
