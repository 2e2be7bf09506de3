"""Whole runs with privacy: what is charged, what a crash costs, what is said of it."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import Place, records, summary
from crashes import killed_at
from flower_grid import LocalGrid
from tiny import LABELS, toy_rows, write_csv
from typer.testing import CliRunner

from fedlora import run
from fedlora.cli import app
from fedlora.errors import PublicError
from fedlora.evaluate import Scores
from fedlora.files import locked
from fedlora.flower.app import client
from fedlora.flower.limits import admit, refusal
from fedlora.flower.node import SECRET, ledger_folder, load_node, own_secret
from fedlora.flower.serving import serve
from fedlora.flower.wire import Order
from fedlora.privacy.accounting import Mechanism, epsilon, noise_for
from fedlora.privacy.example import planned_round, sampling_rate
from fedlora.privacy.ledger import LEDGERS, Intent, Terms, intend, read_ledger
from fedlora.privacy.statement import statement
from fedlora.resume import find
from fedlora.rules import Plan
from fedlora.run import execute, prepare
from fedlora.seeding import derive
from fedlora.status import status_lines
from fedlora.stopped import check_new

pytest.importorskip("opacus")
pytest.importorskip("dp_accounting")
pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]
PRIVATE: dict[str, Any] = {"privacy__unit": "example", "privacy__delta": 1e-3, "run__rounds": 2}
TRUSTED: dict[str, Any] = {
    "privacy__unit": "client", "merge__weights": "uniform", "privacy__accept_noise": True,
    "run__rounds": 2,
}  # fmt: skip


@pytest.fixture
def place(tiny: Tiny, tmp_path: Path) -> Place:
    return Place(tiny("bert"), tmp_path)


def started(place: Place, watch: Any = None, **settings: Any) -> Path:
    config = place.config("run", **settings)
    return execute(prepare(config), *([watch] if watch else []))


def resumed(folder: Path, config: Any) -> Path:
    config, found = find(folder, config)
    return execute(prepare(config, found))


def told(folder: Path) -> str:
    return "\n".join(statement(folder))


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


def killed_in_round(number: int) -> Callable[[str, Any], None]:
    def watch(event: str, facts: Any) -> None:
        if event == "fitted" and facts["round"] == number and facts["client"] == "1":
            raise KeyboardInterrupt

    return watch


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


def stopped_at(event: str, round: int) -> Callable[[str, Any], None]:
    def watch(heard: str, facts: Any) -> None:
        if heard == event and facts["round"] == round:
            raise KeyboardInterrupt

    return watch


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


def charged(folder: Path) -> dict[str, list[Intent]]:
    found = sorted((folder / LEDGERS).glob("*.ledger"))
    return {path.stem: list(read_ledger(path).intents) for path in found}


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


def remove_ledger(folder: Path, owner: str) -> None:
    """With its head, so that nothing beside it tells."""
    for suffix in (".ledger", ".head"):
        (folder / LEDGERS / f"{owner}{suffix}").unlink()


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


def test_without_a_public_evaluation_set_private_rows_would_be_scored(place: Place) -> None:
    with pytest.raises(ValueError, match=r"needs data\.evaluate, a public set"):
        started(place, **{**PRIVATE, "data__evaluate": ""})
    folder = started(place, **{**PRIVATE, "data__evaluate": ""}, privacy__share_metrics=True)
    assert records(folder)[-1]["global"] is not None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"client__ranks": [1, 2]}, "does not go with client.ranks"),
        ({"run__save_best": True}, "run.save_best chooses on held-out rows"),
        ({"privacy__quantile": 0.5}, r"privacy\.quantile is for privacy\.unit = 'client'"),
        ({"privacy__design": "core"}, r"privacy\.design is for privacy\.unit = 'client'"),
        ({"privacy__rounds": 1}, "privacy.rounds = 1 .* in 2 rounds"),
        ({"privacy__delta": 0.1}, r"lets one of 1\d examples through"),
    ],
)
def test_settings_that_do_not_go_with_private_examples_are_refused(
    place: Place, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        started(place, **{**PRIVATE, **settings})
    assert not (place.folder / "run").exists()


def test_privacy_without_a_unit_is_refused(place: Place) -> None:
    with pytest.raises(ValueError, match=r"privacy\.epsilon is set, privacy\.unit is not"):
        place.config("run", privacy__epsilon=3.0)
    place.config("run", privacy__epsilon=3.0, privacy__unit="none")


def test_pooled_training_is_planned_as_it_is_executed(place: Place) -> None:
    job = place.job("run", **PRIVATE, run__mode="central")
    rows = sum(map(len, job.data.rows.values()))
    folder = execute(job)
    (path,) = (folder / LEDGERS).glob("*.ledger")
    ledger = read_ledger(path)
    assert ledger.terms.owner == "central"
    assert 12 / rows <= ledger.intents[0].mechanisms[0].sampling <= 1.01 * 12 / rows
    assert 7.9 < ledger.spent <= 8


@pytest.mark.parametrize(
    ("batch", "rows", "rate"),
    [(128, 21999, 0.00582), (1, 10, 0.1), (1, 3, 0.334), (7, 7, 1.0), (9, 7, 1.0), (1, 1000, 0.001),
     (999, 1000, 0.999), (9995, 10000, 1.0), (3, 10**7, 3e-7)],
)  # fmt: skip
def test_rates_are_rounded_up_to_three_digits(batch: int, rows: int, rate: float) -> None:
    assert sampling_rate(batch, rows) == rate


def test_clients_of_about_as_many_rows_share_their_noise(place: Place) -> None:
    config = place.config("run", **(PRIVATE | {"privacy__delta": 1e-5}))
    assert planned_round(config, 2001) == planned_round(config, 2003)


def test_a_run_says_what_it_will_cost_before_it_trains(place: Place) -> None:
    notes: list[str] = []
    started(place, lambda event, facts: notes.extend(facts["notes"]) if event == "start" else None,
            **PRIVATE)  # fmt: skip
    (line,) = [note for note in notes if note.startswith("privacy")]
    assert "every example of a client, epsilon 8 at delta 0.001 over 2 rounds" in line
    assert "noise 0." in line or "noise 1" in line


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (PRIVATE, "privacy.rounds = 3 would let one round be made again, for up to 22 % more"),
        ({**PRIVATE, "privacy__rounds": 2}, "nothing is in reserve"),
        ({**PRIVATE, "privacy__rounds": 3}, ""),
        (TRUSTED, "nothing is in reserve: a crash after a round was charged ends the run"),
        ({**TRUSTED, "privacy__rounds": 3}, ""),
    ],
)
def test_a_run_without_a_reserve_says_what_one_costs(
    place: Place, settings: dict[str, Any], says: str
) -> None:
    line = place.job("run", **settings).privacy[0]
    assert says in line
    assert ("reserve" in line) == bool(says)


@pytest.mark.parametrize(
    ("settings", "drowns"),
    [
        ({}, True),
        ({"privacy__epsilon": 40.0, "client__batch": 12, "merge__rule": "ffa"}, False),
    ],
)
def test_noise_far_longer_than_the_gradient_is_called_by_its_name(
    place: Place, settings: dict[str, Any], drowns: bool
) -> None:
    """Three clients: their mean takes sqrt 3 off what a step's noise is."""
    (line,) = place.job("run", **PRIVATE, **settings, privacy__accountant="rdp").privacy
    long = float(line.partition("noise is ")[2].split()[0])
    assert (long > math.sqrt(3)) == drowns
    assert ("little can be learned; take more rows, larger batches" in line) == drowns


@pytest.mark.parametrize("rule", ["fra", "ffa"])
def test_a_run_says_how_long_a_steps_noise_is(place: Place, rule: str) -> None:
    """By hand: sigma sqrt(trained numbers) / (expected batch), in units of the clip."""
    job = place.job("run", **PRIVATE, merge__rule=rule, partition__clients=1)
    one, rows = planned_round(job.config, len(job.data.rows["0"])), len(job.data.rows["0"])
    count = sum(t.numel() for t in job.start.dense.values())
    for factors in job.start.layers.values():
        count += factors.B.numel() + (factors.A.numel() if rule == "fra" else 0)
    want = one.noise * math.sqrt(count) / (one.sampling * rows)
    (line,) = job.privacy
    assert f"on {count:,} trained numbers a step's noise is {want:.2g} times as long" in line


def test_who_takes_part_is_known_so_noise_need_not_be_planned_for_more(place: Place) -> None:
    """Two of three clients a round: the rounds of the one that is asked most often are enough."""
    few = {**PRIVATE, "run__rounds": 5, "merge__participation": 0.5, "client__steps": 1}
    whole = place.job("whole", **few)
    execute(whole)
    most = max(len(intents) for intents in charged(place.folder / "whole").values())
    assert most < 5
    (line,) = whole.privacy
    assert f"no client takes part in more than {most} of them: privacy.rounds = {most}" in line
    with pytest.raises(ValueError, match=rf"privacy\.rounds = {most - 1} .* in {most} rounds"):
        place.job("fewer", **few, privacy__rounds=most - 1)
    execute(place.job("planned", **few, privacy__rounds=most))
    noise = [
        charged(place.folder / name)["0"][0].mechanisms[0].noise for name in ("whole", "planned")
    ]
    assert noise[1] < noise[0]
    ledgers = (place.folder / "planned" / LEDGERS).glob("*.ledger")
    assert 7.9 < max(read_ledger(path).spent for path in ledgers) <= 8


# ---------------------------------------------------------------- clients as a whole


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


def test_noise_that_drowns_the_update_is_refused_with_the_number_of_clients(place: Place) -> None:
    settings = {**TRUSTED, "privacy__accept_noise": False}
    with pytest.raises(
        ValueError, match=r"noise over signal is .* with 3 clients.*\d+ would bring"
    ) as found:
        started(place, **settings)
    for design in ("increment", "rows", "core", "power", "sketch"):
        assert design in str(found.value)
    assert not (place.folder / "run").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"merge__weights": "examples"}, "merge.weights = 'uniform'"),
        ({"merge__rule": "fedavg"}, "goes with merge.rule = 'fra'"),
        ({"privacy__design": "rows"}, "goes with merge.rule = 'ffa'"),
        ({"merge__head": "local"}, "head would be saved as it was trained, without noise"),
        ({"merge__robust": "norm_clipping"}, "merge.robust = 'none'"),
        ({"merge__server_lr": 0.5}, "merge.server_lr = 1.0"),
        ({"client__ranks": [1, 2]}, r"client.ranks = \[\]"),
        ({"run__mode": "central"}, "run.mode = 'federated'"),
        ({"run__min_clients": 1}, "run.min_clients = 0"),
        ({"run__save_best": True}, "run.save_best = False"),
        ({"privacy__rounds": 1}, "privacy.rounds = 1 are fewer than run.rounds = 2: take as many"),
        ({"privacy__delta": 0.1, "partition__clients": 10}, "lets one of 10 clients through"),
    ],
)
def test_settings_that_would_break_the_bound_are_refused(
    place: Place, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        started(place, **{**TRUSTED, **settings})


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


def started_as(place: Place, name: str, **settings: Any) -> Path:
    config = place.config(name, **{"run__name": "run", **settings})
    return execute(prepare(config))


def test_single_clients_rows_end_no_run_of_a_trusted_server(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many rounds there were is on the card; without privacy a client may end it."""
    broken = Scores(loss=math.nan, confusion=np.eye(2, dtype=np.int64))
    monkeypatch.setattr("fedlora.recording.evaluate", lambda *_: broken)
    assert summary(started(place, **TRUSTED))["rounds"] == 2
    with pytest.raises(ValueError, match="the loss of the merged adapter is nan"):
        execute(place.job("plain"))


def test_the_statement_names_the_files_that_have_figures_of_clients(place: Place) -> None:
    text = told(started(place, **TRUSTED))
    assert "metrics.jsonl, summary.json" in text
    assert "the adapter's README.md has none of it" in text


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


# ---------------------------------------------------------------- on Flower


def test_nodes_keep_their_own_ledgers(place: Place) -> None:
    flat = place.config("run", **PRIVATE).flat()
    states = place.folder / "states"
    nodes = [{"partition-id": k, "state": str(states)} for k in range(3)]
    folder = serve(LocalGrid(client, flat, nodes), flat)
    assert not (folder / LEDGERS).exists()
    found = sorted(states.glob(f"*/{LEDGERS}/*/*.ledger"))
    assert len(found) == 3
    for path in found:
        ledger = read_ledger(path)
        assert [(one.round, one.closed) for one in ledger.intents] == [(1, True), (2, True)]
        assert 7.9 < ledger.spent <= 8
    text = told(folder)
    assert text.count("as it says") == 3
    assert "Epsilon: at most 8 at delta 0.001, the budget that no node's ledger goes beyond" in text
    assert "at least 7.9" in text
    assert records(folder)[-1]["clients"]["0"]["train_loss"] is None
    assert records(folder)[-1]["seconds"]["compute"] is None


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The run's log with every line changed."""
    lines = records(folder)
    for line in lines:
        change(line)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def test_without_reports_of_nodes_the_statement_has_their_budget(place: Place) -> None:
    """All replies were lost, late or refused: charged and drawn for they were all the same."""
    flat = place.config("run", **PRIVATE).flat()
    folder = serve(LocalGrid(client, flat, [{"partition-id": k} for k in range(3)]), flat)
    rewritten(folder, lambda line: line["clients"].clear())
    assert "Epsilon: at most 8 at delta 0.001" in told(folder)
    assert "no client has reported one, rounds may have been charged" in told(folder)
    assert "nothing was spent" not in told(folder)


def test_a_node_whose_reports_do_not_rise_is_named_and_its_ledgers_add_up(place: Place) -> None:
    """The second ledger has its first round in it, or as much as the first one had."""
    flat = place.config("run", **PRIVATE).flat()
    folder = serve(LocalGrid(client, flat, [{"partition-id": k} for k in range(3)]), flat)

    def change(line: dict[str, Any]) -> None:
        for name, own in line["clients"].items():
            own["epsilon"] = {("1", 1): 6.5, ("1", 2): second}.get(
                (name, line["round"]), 2.0 * line["round"]
            )

    for second in (6.25, 6.5):
        rewritten(folder, change)
        text = told(folder)
        assert f"1: epsilon {6.5 + second:g}, as it says; its reports fell" in text
        assert "so that 2 of them add up, with delta 0.002" in text
        assert text.count("its reports fell") == 1
        assert (
            f"no bound is known, since 1 lost ledgers; at least {6.5 + second:g} is spent" in text
        )
        assert "at most 8" not in text


def test_a_private_run_goes_on_where_its_ledgers_are(place: Place) -> None:
    """The other engine would look for them elsewhere, and begin a new budget for each client."""
    flat = place.config("run", **PRIVATE).flat()
    grid = LocalGrid(client, flat, [{"partition-id": k} for k in range(3)])
    folder = serve(grid, flat)
    (folder / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"begun on Flower.*the same `flwr run` goes on"):
        find(folder, place.config("run", **PRIVATE))
    with pytest.raises(ValueError, match=r"stopped after .*: the same `flwr run` goes on with it"):
        check_new(folder)
    own = place.config("own", **PRIVATE)
    here = execute(prepare(own))
    (here / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"begun in one process.*`fedlora run --resume` goes on"):
        serve(grid, own.flat())
    with pytest.raises(ValueError, match="no checkpoint to resume from"):  # not for its ledgers
        find(here, own)


def test_a_run_without_privacy_goes_on_in_either_engine(place: Place) -> None:
    flat = place.config("run", run__rounds=1).flat()
    folder = serve(LocalGrid(client, flat, [{"partition-id": k} for k in range(3)]), flat)
    (folder / "summary.json").unlink()
    _, resumed = find(folder)
    assert not any("engine" in note for note in resumed.notes({"engine": "process"}))


def test_a_server_on_flower_charges_its_ledger(place: Place) -> None:
    flat = place.config("run", **TRUSTED).flat()
    folder = serve(LocalGrid(client, flat, [{"partition-id": k} for k in range(3)]), flat)
    assert 7.9 < read_ledger(folder / LEDGERS / "server.ledger").spent <= 8


ORDER_RUN = "run/0"


def order(ready: Any, name: str = ORDER_RUN) -> Order:
    return Order(name, 1, "1", Plan(*[frozenset({"A", "B", "head"})] * 3), ready.loaded.base, "id")


def limited(place: Place, settings: dict[str, Any], name: str = "run", **limits: Any) -> Any:
    """A node with a file and limits of its own, in a run of this name."""
    flat = place.config(name, **{**PRIVATE, "data__labels": ["neg", "pos"], **settings}).flat()
    file = write_csv(place.folder / "own.csv", toy_rows(16))
    own = {"name": "1", "data": str(file), "state": str(place.folder / "states")}
    (place.folder / "states" / "1").mkdir(parents=True, exist_ok=True)
    (place.folder / "states" / "1" / SECRET).write_text("0")  # four rows are held out
    return load_node(flat, own | limits)


@pytest.mark.parametrize(
    ("limits", "before", "settings", "code"),
    [
        ({"epsilon": 8}, 0, {}, None),
        ({"epsilon": 7.9}, 0, {}, "epsilon"),
        ({"epsilon": 12}, 6, {}, "epsilon"),
        ({"epsilon": 15}, 6, {}, None),
        ({"epsilon": 15, "delta": 1.005e-3}, 6, {}, "epsilon"),  # the deltas add up
        ({"epsilon": 15, "delta": 1.05e-3}, 6, {}, None),
        ({"epsilon": 8}, 0, {"privacy__delta": 0.06}, None),
        ({"epsilon": 8}, 0, {"privacy__delta": 0.07}, "epsilon"),  # of 16 rows, 12 of them trained
        ({"epsilon": 8, "delta": 1e-5}, 0, {}, "epsilon"),
        ({"epsilon": 8}, 0, {"privacy__share_metrics": True}, "epsilon"),
        ({"epsilon": 8, "share-metrics": True}, 0, {"privacy__share_metrics": True}, None),
    ],
)
def test_a_node_allows_so_much_over_all_runs(
    place: Place, limits: dict[str, Any], before: float, settings: dict[str, Any], code: str | None
) -> None:
    ready = limited(place, settings, **limits)
    if before:
        terms = Terms("1", "example", float(before), 1e-5)
        noise = Mechanism(noise_for(float(before), 1e-5, 1))
        intend(ledger_folder(ready.states, "../older/0") / "1.ledger", terms, 1, [noise])
    refused = admit(ready, order(ready))
    assert (refused[0] if refused else None) == code
    opened = list(ledger_folder(ready.states, ORDER_RUN).glob("*.ledger"))
    assert len(opened) == (code is None)


def test_a_ledger_that_is_gone_is_no_budget_that_is_free_again(place: Place) -> None:
    ready = limited(place, {}, "one", epsilon=9)
    assert admit(ready, order(ready, "one/0")) is None
    (ledger,) = ready.states.rglob("*.ledger")
    for lost in (lambda: ledger.write_bytes(b""), ledger.unlink):
        lost()
        after = limited(place, {}, "two", epsilon=9)
        with pytest.raises(ValueError, match=r"1\.ledger"):
            admit(after, order(after, "two/0"))


def probed(
    place: Place, rows: list[tuple[str, str]], own: dict[str, Any] | None = None, **settings: Any
) -> Any:
    """What a server hears of a node with these rows and a limit on epsilon, before any round."""
    wanted = {**PRIVATE, "data__labels": ["neg", "pos"], "flower__clients": ["north"], **settings}
    flat = place.config("run", **wanted).flat()
    limits = {
        "name": "north", "data": str(write_csv(place.folder / "own.csv", rows)), "epsilon": 8.0,
        "state": str(place.folder / "states"), "text": "text", "label": "label",
    }  # fmt: skip
    return load_node(flat, limits | (own or {}))


def test_the_number_of_rows_left_tells_no_server_whether_a_row_is_there(place: Place) -> None:
    """It chooses seed and share: by their hash it would hold out this row and no other, and count.

    A node draws from a secret of its own, the same in every run.
    """
    text, label = known = ("the film was warm and so good", "pos")
    draws = [derive(seed, "holdout", "north", text, text, label, 0) / 2.0**63 for seed in range(9)]
    seed, share = next((seed, draw) for seed, draw in enumerate(draws) if 0.1 < draw < 0.8)
    counts = [
        probed(place, [*toy_rows(40), known], data__holdout=tried, run__seed=seed).examples
        for tried in (share, math.nextafter(share, 1.0), 0.25)
    ]
    assert counts[0] == counts[1]
    again = probed(place, [*toy_rows(40), known], data__holdout=0.25, run__seed=seed + 1)
    assert again.examples == counts[2] < 41
    assert len((place.folder / "states" / "north" / SECRET).read_text().strip()) > 24


def test_a_nodes_secret_is_its_own(tmp_path: Path) -> None:
    first = own_secret(tmp_path / "a" / "b")
    assert own_secret(tmp_path / "a" / "b") == first
    assert own_secret(tmp_path / "a" / "c") != first


def test_a_tokenizer_of_the_servers_choice_tells_not_whether_a_text_is_there(place: Place) -> None:
    """One that makes nothing of a single text: a refusal of texts without a token would tell."""
    shutil.copytree(place.base, odd := place.folder / "odd")
    made = json.loads((odd / "tokenizer.json").read_text())
    made["normalizer"] = {"type": "Replace", "pattern": {"String": "the film"}, "content": ""}
    made["post_processor"] = None
    (odd / "tokenizer.json").write_text(json.dumps(made))
    ready = probed(place, [*toy_rows(40), ("the film", "pos")], model__name=str(odd))
    assert ready.all_rows == 41
    assert ready.loaded.data.train.lengths.min() == 1


def test_how_a_file_is_quoted_is_said_by_its_node_alone(place: Place) -> None:
    """Read without quotes a row with a comma would fail, and tell that it is there."""
    rows = [*toy_rows(40), ("good, and warm", "pos")]
    assert probed(place, rows, data__quoting="none").all_rows == 41
    with pytest.raises(ValueError, match=r"own\.csv, line 42"):
        probed(place, rows, {"quoting": "none"})


def test_a_single_class_is_no_reason_to_refuse(place: Place) -> None:
    rows = [(text, "pos") for text, _ in toy_rows(40)]
    assert probed(place, rows).all_rows == 40


def test_code_that_comes_with_a_model_runs_where_the_node_allows_it(place: Place) -> None:
    code = {"model__trust_remote_code": True}
    with pytest.raises(PublicError, match="not allowed here"):
        limited(place, code)
    assert limited(place, code, **{"trust-remote-code": True}).client == "1"


def test_a_node_with_a_limit_refuses_a_run_without_privacy(place: Place) -> None:
    """Before a row is read: how many are held out by label would be told at once."""
    (place.folder / "own.csv").unlink(missing_ok=True)
    for unit in ("none", "client"):
        with pytest.raises(PublicError, match="the run protects no examples"):
            limited(place, {"privacy__unit": unit, "privacy__epsilon": 1.0}, epsilon=8)


def test_runs_at_the_same_time_do_not_spend_the_same_epsilon(place: Place) -> None:
    """Each of three is looked at before any of them has drawn anything."""
    names = ("one", "two", "three")
    ready = [limited(place, {}, name, epsilon=17) for name in names]
    orders = [order(node, f"{name}/0") for node, name in zip(ready, names, strict=True)]
    refused = [admit(node, asked) for node, asked in zip(ready, orders, strict=True)]
    assert [reason and reason[0] for reason in refused] == [None, None, "epsilon"]
    assert "16 of 2 others" in str(refused[2])
    assert admit(ready[0], replace(orders[0], round=2)) is None  # what is set aside counts once


def test_a_budget_is_set_aside_by_one_run_at_a_time(place: Place) -> None:
    ready = limited(place, {}, epsilon=8)
    with ThreadPoolExecutor() as pool:
        with locked(ready.states):
            asked = pool.submit(admit, ready, order(ready))
            time.sleep(1.0)
            assert not asked.done()
        assert asked.result(10) is None


def test_a_run_that_cannot_begin_sets_nothing_aside(place: Place) -> None:
    ready = limited(place, {"privacy__delta": 0.09}, epsilon=8, delta=1)
    with pytest.raises(ValueError, match="lets one of 12 examples through"):
        admit(ready, order(ready))
    assert not list(place.folder.rglob("*.ledger"))


@pytest.mark.parametrize("missing", ["name", "data", "state"])
def test_a_limit_on_epsilon_needs_all_that_names_its_ledgers(place: Place, missing: str) -> None:
    """Clients x1, x2, ... of the server's config were each given all of epsilon."""
    own = {"name": "1", "data": str(place.train), "state": str(place.folder), "partition-id": 0}
    del own[missing]
    with pytest.raises(ValueError, match=f"a limit on epsilon needs {missing} in the node config"):
        load_node(place.config("run", **PRIVATE).flat(), own | {"epsilon": 8})


def test_a_node_takes_orders_of_the_run_that_it_was_set_up_for_alone(place: Place) -> None:
    """A name of the server's choice would be a ledger of the server's choice."""
    ready = load_node(place.config("run", **PRIVATE).flat(), {"partition-id": 1})
    for name in ("other/0", "run/1", "../run/0", ".."):
        refused = refusal(ready, order(ready, name))
        assert refused is not None
        assert refused[0] == "run"


def test_a_budget_needs_a_place_of_the_nodes_own(place: Place) -> None:
    flat = place.config("run", **PRIVATE).flat()
    flat |= {"flower.clients": '["0", "1"]', "data.labels": '["neg", "pos"]'}
    with pytest.raises(ValueError, match='needs state="FOLDER"'):
        load_node(flat, {"name": "1", "data": str(place.train)})


def test_a_node_with_its_own_rows_sends_no_scores_on_them(place: Place) -> None:
    flat = place.config("run", **PRIVATE).flat()
    flat |= {"flower.clients": '["a", "b"]', "data.labels": '["neg", "pos"]', "data.train": ""}
    nodes = [
        {"name": name, "data": str(place.train), "state": str(place.folder / "states")}
        for name in ("a", "b")
    ]
    folder = serve(LocalGrid(client, flat, nodes), flat)
    for found in records(folder)[-1]["clients"].values():
        assert found["evaluation"] is None
        assert found["heldout"] is None
        assert found["train_loss"] is None
        assert 7.9 < found["epsilon"] <= 8
    assert "the ledgers are on the clients" in told(folder)
    (folder / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"begun on Flower.*the same `flwr run` goes on"):
        find(folder)


# ---------------------------------------------------------------- the statement


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


def test_the_card_of_a_run_without_privacy_claims_none(place: Place) -> None:
    folder = started(place)
    assert "rivacy" not in (folder / "adapter" / "README.md").read_text()
    assert not (folder / "privacy.txt").exists()


def test_a_run_without_privacy_has_no_statement(place: Place) -> None:
    folder = started(place)
    with pytest.raises(ValueError, match="was trained without privacy"):
        told(folder)
