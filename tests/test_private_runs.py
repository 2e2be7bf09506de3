"""Whole runs with privacy: what is charged, and what a crash costs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from bench import Place, records, summary
from crashes import killed_at
from private import (
    PRIVATE,
    TRUSTED,
    charged,
    killed_in_round,
    remove_ledger,
    resumed,
    started,
    started_as,
    stopped_at,
    told,
)

from fedlora import run
from fedlora.evaluate import Scores
from fedlora.privacy.accounting import Mechanism, epsilon
from fedlora.privacy.ledger import LEDGERS, read_ledger
from fedlora.resume import find
from fedlora.run import execute, prepare
from fedlora.status import status_lines
from fedlora.stopped import check_new

pytest.importorskip("opacus")
pytest.importorskip("dp_accounting")
pytest_plugins = ["tiny", "private"]


@pytest.mark.parametrize("rule", ["fra", "fedavg", "ffa", "rolora", "fedsa", "hybrid", "flora"])
def test_a_private_run_charges_every_client_for_every_round(place: Place, rule: str) -> None:
    folder = started(place, **PRIVATE, merge__rule=rule)
    log = records(folder)
    for name in ("0", "1", "2"):
        ledger = read_ledger(folder / LEDGERS / f"{name}.ledger")
        assert [(one.round, one.closed) for one in ledger.intents] == [(1, True), (2, True)]
        assert 7.9 < ledger.spent <= 8
        assert log[-1]["clients"][name]["epsilon"] == pytest.approx(ledger.spent)
        assert log[-1]["clients"][name]["train_loss"] is None
        assert log[-1]["clients"][name]["heldout"] is None
    assert log[-1]["heldout"] is None
    assert summary(folder)["gap"] is None
    assert "Epsilon: 7.99" in told(folder) or "Epsilon: 8" in told(folder)


def test_figures_on_private_rows_are_let_out_only_if_asked_for(place: Place) -> None:
    folder = started(place, **PRIVATE, privacy__share_metrics=True)
    last = records(folder)[-1]["clients"]["0"]
    assert math.isfinite(last["train_loss"])
    assert last["heldout"] is not None
    assert "let out as they are" in told(folder)


def test_how_long_training_took_is_told_only_if_asked_for(place: Place) -> None:
    """A long row makes a round longer: the time is a figure on private rows as the loss is."""
    for name, shares in (("hidden", False), ("told", True)):
        seen: list[dict[str, float]] = []
        job = place.job(name, **PRIVATE, privacy__share_metrics=shares)
        folder = execute(job, lambda event, facts, to=seen: keep_metrics(event, facts, to))
        assert len(seen) == 6
        assert all(("seconds_compute" in metrics) is shares for metrics in seen)
        spent = [line["seconds"]["compute"] for line in records(folder)]
        assert spent[0] == 0.0  # nobody trained
        assert all((one is not None) is shares for one in spent[1:])
        assert (summary(folder)["seconds"]["compute"] is not None) is shares
        assert summary(folder)["seconds"]["total"] > 0


def keep_metrics(event: str, facts: Any, to: list[dict[str, float]]) -> None:
    if event == "fitted":
        to.append(facts["metrics"])


def test_a_round_that_is_made_again_is_charged_again(place: Place) -> None:
    """Stopped in round 2 after two of three clients had trained; one spare round was planned."""
    settings = {**PRIVATE, "privacy__rounds": 3}
    with pytest.raises(KeyboardInterrupt):
        started(place, killed_in_round(2), **settings)
    folder = place.folder / "run"
    half = {n: read_ledger(folder / LEDGERS / f"{n}.ledger") for n in ("0", "1", "2")}
    assert [len(half[n].intents) for n in half] == [2, 2, 1]
    assert [one.closed for one in half["0"].intents] == [True, False]
    assert "1 of them not closed (charged all the same)" in told(folder)
    resumed(folder, place.config("run", **settings))
    for name, intents in (("0", 3), ("1", 3), ("2", 2)):
        ledger = read_ledger(folder / LEDGERS / f"{name}.ledger")
        assert len(ledger.intents) == intents
        one = ledger.intents[0].mechanisms[0]
        want = epsilon([Mechanism(one.noise, one.steps * intents, one.sampling)], 1e-3)
        assert ledger.spent == want <= 8


def test_a_round_that_too_few_can_pay_for_is_charged_to_nobody(place: Place) -> None:
    """Without a spare round the two clients that trained twice have nothing left."""
    with pytest.raises(KeyboardInterrupt):
        started(place, killed_in_round(2), **PRIVATE)
    folder = place.folder / "run"
    before = charged(folder)
    with pytest.raises(
        ValueError,
        match=r"round 2 is not begun and nothing is charged: 0, 1 cannot pay .*3 of 3 are needed"
        r" \(2 rounds .*privacy.rounds = 3 would .*the result of round 1 is in .*run/adapter",
    ):
        resumed(folder, place.config("run", **PRIVATE))
    assert charged(folder) == before
    assert [len(before[name]) for name in ("0", "1", "2")] == [2, 2, 1]
    for name in ("0", "1", "2"):
        assert read_ledger(folder / LEDGERS / f"{name}.ledger").spent <= 8
    assert summary(folder)["interrupted"]
    assert summary(folder)["rounds"] == 1
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_the_status_offers_no_resume_that_cannot_succeed(place: Place) -> None:
    with pytest.raises(KeyboardInterrupt):
        started(place, killed_in_round(2), **PRIVATE)
    folder = place.folder / "run"
    first, *_ = status_lines(folder)
    assert "--resume" not in first
    assert "stopped after round 1 and cannot go on: round 2 is not begun" in first
    assert f"what there is is in {folder / 'adapter'}" in first
    (folder / "adapter").rename(folder / "gone")  # as after a kill, which saves nothing
    (line, *_) = status_lines(folder)
    assert line.endswith(f"--resume {folder}` would only save the result of round 1")
    with pytest.raises(ValueError, match=r"cannot go on: .*for a new run"):
        check_new(folder)


def test_those_who_can_pay_go_on_where_they_are_enough(place: Place) -> None:
    few = {**PRIVATE, "run__min_clients": 1}
    with pytest.raises(KeyboardInterrupt):
        started(place, killed_in_round(2), **few)
    folder = place.folder / "run"
    assert status_lines(folder)[0].endswith(f"go on with `fedlora run --resume {folder}`")
    log = records(resumed(folder, place.config("run", **few)))
    assert [one["client"] for one in log[-1]["failures"]] == ["0", "1"]
    assert list(log[-1]["clients"]) == ["2"]


def test_a_trusted_server_that_cannot_pay_lets_nobody_train(place: Place) -> None:
    with pytest.raises(KeyboardInterrupt):
        started(place, stopped_at("evaluate", 2), **TRUSTED)
    folder = place.folder / "run"
    assert len(charged(folder)["server"]) == 2
    assert "and cannot go on" in status_lines(folder)[0]
    heard: list[str] = []
    config, found = find(folder, place.config("run", **TRUSTED))
    with pytest.raises(ValueError, match="nothing is charged: server cannot pay"):
        execute(prepare(config, found), lambda event, facts: heard.append(event))
    assert "fit" not in heard


POINTS = ["fsync:10", "fsyncd:10", "fsync:11", "fsyncd:11", "fit:2", "fitted:2", "fitted:5",
          "half:1", "half:2", "replace:4", "replaced:4", "replace:5", "replaced:5", "replace:7",
          "replaced:7", "replace:8", "replaced:8", "round:2"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("unit", ["example", "client"])
def test_a_kill_at_any_step_leaves_all_that_was_drawn_charged(
    place: Place, unit: str, point: str
) -> None:
    """Killed by the system, gone on with: what came back to the client is in its ledger."""
    spare = {"privacy__rounds": 5}
    settings = {**(PRIVATE if unit == "example" else TRUSTED), **spare}
    folder = killed_at(prepare(place.config("run", **settings)), point)
    before = charged(folder)
    config, found = find(folder)
    log = records(execute(prepare(config, found)))
    assert log[-1]["round"] == 2
    after = charged(folder)
    for name, intents in after.items():
        there = before.get(name, [])
        assert [one.round for one in intents[: len(there)]] == [one.round for one in there]
        made = [one for one in intents if one.closed]
        assert sorted({one.round for one in made}) == [1, 2]
        assert len(intents) <= 3  # one round was made twice at most
        ledger = read_ledger(folder / LEDGERS / f"{name}.ledger")
        one = intents[0].mechanisms[0]
        every = Mechanism(one.noise, one.steps * len(intents), one.sampling)
        assert ledger.spent == epsilon([every], ledger.terms.delta) < 8


def test_an_edited_ledger_ends_the_run(place: Place) -> None:
    with pytest.raises(KeyboardInterrupt):
        started(place, killed_in_round(2), **PRIVATE)
    folder = place.folder / "run"
    path = folder / LEDGERS / "0.ledger"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:1], *lines[3:]]))
    with pytest.raises(ValueError, match="edited or damaged"):
        resumed(folder, place.config("run", **PRIVATE))
    with pytest.raises(ValueError, match="edited or damaged"):
        told(folder)


def test_a_ledger_that_is_gone_ends_the_run(place: Place) -> None:
    with pytest.raises(KeyboardInterrupt):
        started(place, killed_in_round(2), **PRIVATE, privacy__rounds=5)
    folder = place.folder / "run"
    remove_ledger(folder, "2")  # what is left to tell is the checkpoint
    with pytest.raises(ValueError, match=r"2\.ledger is not the ledger that this run went on with"):
        resumed(folder, place.config("run", **PRIVATE, privacy__rounds=5))


def test_a_run_is_not_resumed_without_the_head_of_a_ledger(place: Place) -> None:
    """It is looked at before any other client is charged."""
    settings = {**PRIVATE, "privacy__rounds": 5}
    with pytest.raises(KeyboardInterrupt):
        started(place, killed_in_round(2), **settings)
    ledgers = place.folder / "run" / LEDGERS
    (ledgers / "2.head").unlink()
    before = {path.name: path.read_bytes() for path in ledgers.glob("*.ledger")}
    with pytest.raises(ValueError, match=r"2\.ledger .* lines are missing"):
        resumed(place.folder / "run", place.config("run", **settings))
    assert {path.name: path.read_bytes() for path in ledgers.glob("*.ledger")} == before


@pytest.mark.parametrize("reached", [1, 2])
def test_a_shortened_ledger_ends_a_run_before_and_after_its_first_checkpoint(
    place: Place, reached: int
) -> None:
    """What was written after the last checkpoint is of no checkpoint yet."""
    settings = {**PRIVATE, "privacy__rounds": 5}
    with pytest.raises(KeyboardInterrupt):
        started(place, killed_in_round(reached), **settings)
    folder = place.folder / "run"
    path = folder / LEDGERS / "0.ledger"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    for act in (lambda: find(folder), lambda: told(folder)):
        with pytest.raises(ValueError, match=r"0\.ledger .* lines are missing"):
            act()
    path.unlink()
    with pytest.raises(ValueError, match=r"0\.ledger .* lines are missing"):
        find(folder)


@pytest.mark.parametrize("design", ["increment", "rows", "core", "power", "sketch"])
def test_a_run_on_a_trusted_server(place: Place, design: str) -> None:
    rule = "ffa" if design == "rows" else "fra"
    folder = started(place, **TRUSTED, privacy__design=design, merge__rule=rule)
    ledger = read_ledger(folder / LEDGERS / "server.ledger")
    assert 7.9 < ledger.spent <= 8
    assert [(one.round, one.closed) for one in ledger.intents] == [(1, True), (2, True)]
    last = records(folder)[-1]
    assert {"wanted", "tail", "noise", "effective_rank", "layers"} < set(last["budget"])
    assert "update" not in last["budget"]  # what clients changed is theirs
    assert last["merge_error"] is None
    assert last["merge"]["clip"] == 1.0
    text = told(folder)
    assert "on a trusted server" in text
    assert "it sees every update as it is" in text


def test_a_client_that_fails_adds_nothing_and_stops_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going on without it is what the run would do if the client were not there."""
    make = run.make_fit

    def broken(*args: Any) -> Any:
        fit = make(*args)

        def failing(client: str, *rest: Any) -> Any:
            if client == "1":
                raise ValueError("diverged")
            return fit(client, *rest)

        return failing

    monkeypatch.setattr(run, "make_fit", broken)
    folder = started(place, **TRUSTED)
    assert summary(folder)["rounds"] == 2
    assert [one["client"] for one in records(folder)[-1]["failures"]] == ["1"]


def test_single_clients_rows_end_no_run_of_a_trusted_server(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many rounds there were is on the card; without privacy a client may end it."""
    broken = Scores(loss=math.nan, confusion=np.eye(2, dtype=np.int64))
    monkeypatch.setattr("fedlora.recording.evaluate", lambda *_: broken)
    assert summary(started(place, **TRUSTED))["rounds"] == 2
    with pytest.raises(ValueError, match="the loss of the merged adapter is nan"):
        execute(place.job("plain"))
    monkeypatch.setattr("fedlora.recording.evaluate_with_part", lambda *_: (broken, broken))
    own = started_as(place, "own", **TRUSTED, data__evaluate="")
    assert summary(own)["rounds"] == 2
    assert records(own)[-1]["global"] is None
    with pytest.raises(ValueError, match="the loss of the merged adapter is nan"):
        execute(place.job("public", **TRUSTED))
