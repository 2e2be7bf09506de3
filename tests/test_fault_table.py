"""The fault table is a check that can fail, and its page shows the rows that it has."""

from __future__ import annotations

import re
from pathlib import Path

import fault_table
import pytest
from bad_replies import FAULTS
from fault_rows import CLIENTS, RUNS, Outcome, Row
from fault_table import main

import fedlora.rounds
from fedlora.adapter import overlay

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reliability.md"


def test_the_page_shows_every_row_of_the_table_with_equal_hashes() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row[0].startswith("what ")]
    assert [row[0] for row in rows] == [row.done for row in [*RUNS, *CLIENTS]], "run it, paste it"
    happened = {row[0]: row[1] for row in rows}
    for _, _, before, after in rows:
        assert re.fullmatch(r"`[0-9a-f]{12}`", before)
        assert before == after
    for fault in FAULTS:
        assert set(re.findall(r"`(\w+)`", happened[fault.done])) == set(fault.codes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "only", ["half written", "random", "disk full", "both checkpoints", "another config", "Inf in"]
)
def test_a_row_is_as_it_should_be(only: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", only, "--random", "2"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if only in line]
    *_, before, after = row.strip("| ").split(" | ")
    assert before == after


def test_it_fails_where_a_bad_reply_is_merged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        fedlora.rounds, "receive", lambda c, tensors, sent, plan: overlay(tensors, sent)
    )
    assert main(["--only", "NaN in an array"]) == 1
    assert "NOT AS IT SHOULD BE" in capsys.readouterr().out


def test_it_fails_where_hashes_differ_or_no_row_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    differs = Row("differs", lambda ground: Outcome("-", "`00`", "`01`"))
    monkeypatch.setattr(fault_table, "TABLES", [("what was done", [differs])])
    assert main(["--only", "differs"]) == 1
    assert main(["--only", "no such row"]) == 1
