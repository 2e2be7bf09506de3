"""What is said of a private run: its statement, its adapter's card, its status."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from bench import Place
from private import PRIVATE, TRUSTED, killed_in_round, remove_ledger, started, started_as, told
from tiny import LABELS, toy_rows, write_csv
from typer.testing import CliRunner

from fedlora.cli import app
from fedlora.privacy.ledger import LEDGERS
from fedlora.run import execute, prepare
from fedlora.status import status_lines

pytest.importorskip("opacus")
pytest.importorskip("dp_accounting")
pytest_plugins = ["tiny", "private"]


def test_the_command_prints_the_statement_of_a_run_and_of_a_ledger(place: Place) -> None:
    folder = started(place, **PRIVATE)
    done = CliRunner().invoke(app, ["privacy", str(folder)])
    assert done.exit_code == 0, done.output
    for word in ("Unit: each example", "Neighbours", "Mechanism", "Sampling: Poisson", "Covered"):
        assert word in done.output
    alone = CliRunner().invoke(app, ["privacy", str(folder / LEDGERS / "0.ledger")])
    assert "Ledger of 0: each example is protected." in alone.output
    assert json.loads((folder / LEDGERS / "0.ledger").read_text().splitlines()[0])["epsilon"] == 8


def test_the_statement_says_what_neighbours_are(place: Place) -> None:
    """One file dealt to clients is a simulation; files and columns of their own are not."""
    dealt = told(started(place, **PRIVATE))
    assert "one row more or less, the number of rows itself taken as public" in dealt
    assert "this epsilon is of a simulated split" in dealt
    rows = [(*row, "ab"[at // 2 % 2]) for at, row in enumerate(toy_rows(48))]
    file = write_csv(place.folder / "column.csv", rows, ("text", "label", "house"))
    by_house = {"data__train": str(file), "partition__by": "column", "partition__column": "house"}
    files = {"a": str(place.train), "b": str(write_csv(place.folder / "b.csv", toy_rows(20)))}
    for name, own, simulated in (
        ("files", {"data__train": "", "data__clients": files, "data__labels": list(LABELS)}, False),
        ("houses", by_house, False),
        ("drawn", {**by_house, "data__limit": 40}, True),
    ):
        folder = execute(prepare(place.config(name, **PRIVATE, **own)))
        assert ("simulated split" in told(folder)) is simulated, name


def test_no_epsilon_is_printed_where_a_ledger_is_missing(place: Place) -> None:
    """The largest of those that are left is not the largest of all."""
    folder = started(place, **PRIVATE)
    remove_ledger(folder, "1")
    with pytest.raises(ValueError, match=r"client 1 .*run/ledgers/1\.ledger is missing: restore"):
        told(folder)
    trusted = execute(prepare(place.config("trusted", **TRUSTED)))
    remove_ledger(trusted, "server")
    with pytest.raises(ValueError, match=r"server\.ledger is missing"):
        told(trusted)
    (trusted / LEDGERS / ".lock").unlink(missing_ok=True)
    (trusted / LEDGERS).rmdir()
    with pytest.raises(ValueError, match=r"server\.ledger is missing"):
        told(trusted)


def test_no_epsilon_is_printed_where_an_older_ledger_took_the_place_of_the_last(
    place: Place,
) -> None:
    folder = started(place, **PRIVATE)
    ledger = folder / LEDGERS / "1.ledger"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:3]))
    ledger.with_suffix(".head").write_text(json.loads(lines[2])["hash"])
    with pytest.raises(ValueError, match=r"client 1 reported epsilon .*an older one took"):
        told(folder)


def test_no_epsilon_is_printed_where_the_servers_ledger_lacks_a_round(place: Place) -> None:
    folder = started(place, **TRUSTED)
    ledger = folder / LEDGERS / "server.ledger"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:3]))
    ledger.with_suffix(".head").unlink()
    with pytest.raises(ValueError, match="lines are missing"):
        told(folder)
    ledger.with_suffix(".head").write_text(json.loads(lines[2])["hash"])
    with pytest.raises(ValueError, match=r"round 2 was merged and its noise is not in .*an older"):
        told(folder)


def test_no_epsilon_is_printed_where_all_ledgers_are_gone(place: Place) -> None:
    folder = started(place, **PRIVATE)
    shutil.rmtree(folder / LEDGERS)
    with pytest.raises(ValueError, match="is missing: restore it"):
        told(folder)


def test_the_status_of_a_run_says_that_its_ledger_is_damaged(place: Place) -> None:
    with pytest.raises(KeyboardInterrupt):
        started(place, killed_in_round(2), **PRIVATE)
    folder = place.folder / "run"
    (folder / LEDGERS / "1.ledger").write_text("{}\n")
    assert any("cannot go on" in line and "edited" in line for line in status_lines(folder))


def test_the_statement_names_the_files_that_have_figures_of_clients(place: Place) -> None:
    text = told(started(place, **TRUSTED))
    assert "metrics.jsonl, summary.json" in text
    assert "the adapter's README.md has none of it" in text


def card_of(folder: Path) -> str:
    return (folder / "adapter" / "README.md").read_text()


def test_the_card_of_a_private_adapter_tells_nothing_of_single_clients(place: Place) -> None:
    """It goes out with the adapter: what it tells must be public, or noised."""
    public, own = {}, {"data__evaluate": ""}
    for name, unit, data, scored in (
        ("open", {}, own, True),
        ("example", PRIVATE, public, True),
        ("shared", {**PRIVATE, "privacy__share_metrics": True}, own, True),
        ("clients", TRUSTED, public, True),
        ("own", TRUSTED, own, False),
    ):
        folder = started_as(place, name, **unit, **data)
        card, private = card_of(folder), bool(unit)
        assert ("accuracy" in card) is scored, name
        for word in ("| client |", "| 0 |", "held out", "Peak memory"):
            assert (word in card) is not private, (name, word)
        assert ("Communication" in card) is (unit is not TRUSTED), name
        assert ("not told" in card) is private
        assert "# run" in card
        assert "Trainable parameters: " in card


@pytest.mark.parametrize(
    ("settings", "whose", "open_end"),
    [
        (PRIVATE, "each training row of a client", "how many rows each client has"),
        ({**PRIVATE, "privacy__share_metrics": True}, "each training row", "let out as they are"),
        (TRUSTED, "each client", "it sees every update as it is"),
    ],
)
def test_the_adapters_card_and_the_run_directory_say_what_is_protected(
    place: Place, settings: dict[str, Any], whose: str, open_end: str
) -> None:
    folder = started(place, **settings)
    card = (folder / "adapter" / "README.md").read_text()
    delta = settings.get("privacy__delta", 1e-5)
    assert f"Protected: {whose}" in card
    assert f"by a budget of epsilon 8 at delta {delta:g} over all rounds. Not covered: " in card
    assert open_end in card
    assert (folder / "privacy.txt").read_text() == told(folder) + "\n"


def test_the_card_of_a_dealt_run_says_that_its_clients_are_made(place: Place) -> None:
    files = {"a": str(place.train), "b": str(write_csv(place.folder / "b.csv", toy_rows(20)))}
    own = {"data__train": "", "data__clients": files, "data__labels": list(LABELS)}
    assert "simulated split" in card_of(started_as(place, "dealt", **PRIVATE))
    assert "simulated split" not in card_of(started_as(place, "trusted", **TRUSTED))
    assert "simulated split" not in card_of(started_as(place, "files", **PRIVATE, **own))


def test_a_ledger_that_a_crash_left_empty_hides_no_other(place: Place) -> None:
    folder = started(place, **PRIVATE)
    before = told(folder)
    (folder / LEDGERS / "late.ledger").write_bytes(b"")
    assert told(folder) == before


def test_the_card_of_a_run_without_privacy_claims_none(place: Place) -> None:
    folder = started(place)
    assert "rivacy" not in (folder / "adapter" / "README.md").read_text()
    assert not (folder / "privacy.txt").exists()


def test_a_run_without_privacy_has_no_statement(place: Place) -> None:
    folder = started(place)
    with pytest.raises(ValueError, match="was trained without privacy"):
        told(folder)
