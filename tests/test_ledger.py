"""The ledger: charged before anything is drawn, whole or refused, and never beyond its budget."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedlora.privacy.accounting import Mechanism, epsilon
from fedlora.privacy.ledger import (
    Intent,
    Terms,
    check_heads,
    close,
    close_all,
    heads,
    intend,
    open_ledger,
    read_ledger,
)

pytest.importorskip("dp_accounting")
TERMS = Terms("hospital-a", "example", 3.0, 1e-5)
STEP = Mechanism(8.0, 5)  # 3.0 is enough for a few of these


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledgers" / "hospital-a.ledger"


def test_every_intent_counts_closed_or_not(path: Path) -> None:
    intend(path, TERMS, 1, [STEP])
    close(path, 1)
    intend(path, TERMS, 2, [STEP])
    intend(path, TERMS, 2, [STEP])  # the round was made again after a crash
    found = read_ledger(path)
    assert found.intents == (Intent(1, (STEP,), True), Intent(2, (STEP,)), Intent(2, (STEP,)))
    assert found.spent == epsilon([Mechanism(8.0, 15)], 1e-5)
    close(path, 2)
    assert [one.closed for one in read_ledger(path).intents] == [True, False, True]
    assert read_ledger(path).spent == found.spent


def test_nothing_is_charged_beyond_the_budget(path: Path) -> None:
    done = 0
    while epsilon([Mechanism(8.0, 5 * (done + 1))], 1e-5) <= 3.0:
        intend(path, TERMS, done, [STEP])
        done += 1
    assert done > 1
    with pytest.raises(ValueError, match=r"hospital-a: the privacy budget is spent: round"):
        intend(path, TERMS, done, [STEP])
    spent = read_ledger(path).spent
    assert spent <= 3.0
    intend(path, TERMS, done, [Mechanism(1000.0)])  # a smaller step may still fit
    assert spent < read_ledger(path).spent <= 3.0


def test_a_budget_stands_once_it_is_opened(path: Path) -> None:
    open_ledger(path, TERMS)
    for other in (
        Terms("hospital-b", "example", 3.0, 1e-5),
        Terms("hospital-a", "client", 3.0, 1e-5),
        Terms("hospital-a", "example", 30.0, 1e-5),
        Terms("hospital-a", "example", 3.0, 1e-3),
        Terms("hospital-a", "example", 3.0, 1e-5, "rdp"),
    ):
        with pytest.raises(ValueError, match="a budget stands once it is opened"):
            intend(path, other, 1, [STEP])
    assert read_ledger(path).intents == ()


def written(path: Path) -> list[bytes]:
    intend(path, TERMS, 1, [STEP])
    close(path, 1)
    intend(path, TERMS, 2, [STEP])
    intend(path, TERMS, 3, [STEP])
    return path.read_bytes().splitlines(keepends=True)


def changed(line: bytes, **values: object) -> bytes:
    return json.dumps({**json.loads(line), **values}).encode() + b"\n"


def with_(line: bytes, old: bytes, new: bytes) -> bytes:
    assert line.count(old) == 1
    return line.replace(old, new)


@pytest.mark.parametrize(
    ("what", "edit"),
    [
        (
            "less noise told",
            lambda lines: [*lines[:3], lines[3].replace(b"8.0", b"80.0"), lines[4]],
        ),
        (
            "fewer steps",
            lambda lines: [lines[0], lines[1].replace(b'"steps": 5', b'"steps": 1'), *lines[2:]],
        ),
        ("a larger budget", lambda lines: [changed(lines[0], epsilon=99.0), *lines[1:]]),
        ("an intent left out", lambda lines: [*lines[:3], lines[4]]),
        ("two lines swapped", lambda lines: [*lines[:3], lines[4], lines[3]]),
        ("a line twice", lambda lines: [*lines, lines[4]]),
        ("the first line gone", lambda lines: lines[1:]),
        ("no JSON", lambda lines: [*lines[:2], b"rubbish\n", *lines[2:]]),
        ("another kind", lambda lines: [*lines[:4], changed(lines[4], kind="gift")]),
        ("a byte of a hash", lambda lines: [*lines[:4], changed(lines[4], hash="0" * 64)]),
        ("not a line of ours", lambda lines: [*lines, b"[]\n"]),
    ],
)
def test_an_edited_ledger_is_refused(path: Path, what: str, edit) -> None:
    path.write_bytes(b"".join(edit(written(path))))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"edited or damaged|is empty: it is no ledger"):
        read_ledger(path)
    if before:
        with pytest.raises(ValueError, match="count its data's budget as gone"):
            intend(path, TERMS, 4, [STEP])
    assert path.read_bytes() == before


@pytest.mark.parametrize("cut", [1, 10, 100, 200])
def test_a_line_cut_short_by_a_crash_was_never_drawn_for(path: Path, cut: int) -> None:
    lines = written(path)
    path.write_bytes(b"".join(lines)[:-cut])
    path.with_suffix(".head").write_text(json.loads(lines[-2])["hash"])  # its own was not written
    assert [one.round for one in read_ledger(path).intents] == [1, 2]
    intend(path, TERMS, 3, [STEP])
    assert path.read_bytes() == b"".join(lines)


def test_a_first_line_that_was_cut_short_opened_nothing(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(written(path.parent / "other.ledger")[0][:40])
    intend(path, TERMS, 1, [STEP])
    assert len(read_ledger(path).intents) == 1


def test_a_ledger_that_was_shortened_or_replaced_is_noticed(path: Path) -> None:
    lines = written(path)
    known = heads(path.parent)
    check_heads(path.parent, known)
    intend(path, TERMS, 4, [Mechanism(100.0)])
    check_heads(path.parent, known)
    for left in ([], lines[:1], lines[:4]):
        path.write_bytes(b"".join(left))
        with pytest.raises(ValueError, match=r"lines are missing|is empty"):
            check_heads(path.parent, known)
    path.unlink()
    with pytest.raises(ValueError, match="lines are missing"):
        check_heads(path.parent, known)


@pytest.mark.parametrize("left", [1, 2, 3, 4])
def test_a_ledger_that_is_behind_its_head_is_refused(path: Path, left: int) -> None:
    """Lines cut off the end, by whom ever: those before still hash on, but are not all."""
    path.write_bytes(b"".join(written(path)[:left]))
    before = path.read_bytes()
    for reads in (
        read_ledger,
        lambda path: intend(path, TERMS, 4, [STEP]),
        lambda path: close(path, 3),
    ):
        with pytest.raises(ValueError, match=r"hospital-a\.ledger .* lines are missing"):
            reads(path)
    assert path.read_bytes() == before


def test_a_last_line_that_was_synced_is_not_taken_for_one_cut_short(path: Path) -> None:
    path.write_bytes(b"".join(written(path))[:-1])
    with pytest.raises(ValueError, match="lines are missing"):
        intend(path, TERMS, 4, [STEP])


def test_a_ledger_that_is_gone_is_not_opened_anew(path: Path) -> None:
    """Its head is still there; before a run's first checkpoint nothing else tells."""
    written(path)
    path.unlink()
    with pytest.raises(ValueError, match="lines are missing"):
        intend(path, TERMS, 4, [STEP])
    with pytest.raises(ValueError, match="lines are missing"):
        check_heads(path.parent, {})
    assert not path.exists()


def test_a_ledger_whose_head_is_gone_is_read_and_not_gone_on_with(path: Path) -> None:
    written(path)
    path.with_suffix(".head").unlink()
    assert len(read_ledger(path).intents) == 3
    with pytest.raises(ValueError, match="lines are missing"):
        intend(path, TERMS, 4, [STEP])


@pytest.mark.parametrize("lines", [1, 2, 3])
def test_a_crash_between_a_line_and_its_head_stops_nothing(path: Path, lines: int) -> None:
    """The line is on disk and counts, though nothing was drawn for it yet."""
    heads_then: list[str | None] = [None]
    head = path.with_suffix(".head")
    open_ledger(path, TERMS)
    for round in (1, 2):
        heads_then.append(head.read_text())
        intend(path, TERMS, round, [STEP])
    if lines == 1:
        path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    if lines == 2:
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    before = heads_then[lines - 1]
    head.unlink()
    if before is not None:
        head.write_text(before)
    assert len(read_ledger(path).intents) == lines - 1
    intend(path, TERMS, 3, [STEP])
    assert [one.round for one in read_ledger(path).intents] == [*range(1, lines), 3]
    check_heads(path.parent, {})


def test_two_crashes_before_a_head_stop_nothing(path: Path) -> None:
    """After the first line, and after the second: neither was drawn for."""
    head = path.with_suffix(".head")
    open_ledger(path, TERMS)
    head.unlink()
    open_ledger(path, TERMS)
    noted = head.read_text()
    intend(path, TERMS, 1, [STEP])
    head.write_text(noted)
    intend(path, TERMS, 2, [STEP])
    assert [one.round for one in read_ledger(path).intents] == [1, 2]


def test_the_head_is_synced_before_the_charge_is_told(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ledger first, then head: the other way round a crash would look like a cut."""
    told: list[str] = []
    real, replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        told.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real(handle)

    open_ledger(path, TERMS)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *args: (told.append("replace"), replace(*args)))
    intend(path, TERMS, 1, [STEP])
    assert told == ["hospital-a.ledger", ".hospital-a.head.tmp", "replace", "ledgers"]


def test_all_ledgers_of_a_folder_are_closed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        intend(tmp_path / f"{name}.ledger", Terms(name, "example", 3.0, 1e-5), 1, [STEP])
    close_all(tmp_path, 1)
    close_all(tmp_path / "none", 1)
    assert all(read_ledger(tmp_path / f"{n}.ledger").intents[0].closed for n in ("a", "b"))


def test_a_ledger_that_a_crash_left_empty_is_none(tmp_path: Path) -> None:
    """Killed between making the file and its first line: nothing was drawn, nothing to close."""
    intend(tmp_path / "a.ledger", Terms("a", "example", 3.0, 1e-5), 1, [STEP])
    (tmp_path / "b.ledger").write_bytes(b"")
    (tmp_path / "c.ledger").write_bytes(b'{"kind": "opened", "owner"')
    close_all(tmp_path, 1)
    assert list(heads(tmp_path)) == ["a"]
    check_heads(tmp_path, heads(tmp_path))


CHARGING = """
import sys
from pathlib import Path
from fedlora.privacy.accounting import Mechanism
from fedlora.privacy.ledger import Terms, intend
for round in range(10**6):
    intend(Path(sys.argv[1]), Terms("a", "example", 1e6, 1e-5, "rdp"), round, [Mechanism(50.0)])
    print(round, flush=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_no_charge(path: Path) -> None:
    """What was told after the charge is in the ledger, and at most one round more."""
    next_round = 0
    for wait in (0.2, 0.35, 0.5):
        worker = subprocess.Popen(
            [sys.executable, "-c", CHARGING, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert worker.stdout is not None
        assert worker.stdout.readline() == "0\n"
        time.sleep(wait)
        os.kill(worker.pid, signal.SIGKILL)
        told = 1 + len(worker.communicate()[0].split())
        there = len(read_ledger(path).intents) - next_round
        assert told <= there <= told + 1
        next_round += there
