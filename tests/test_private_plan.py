"""What a private run says before it trains: its noise, its costs, what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
from bench import Place, records
from private import PRIVATE, TRUSTED, charged, started

from fedlora.privacy.example import planned_round, sampling_rate
from fedlora.privacy.ledger import LEDGERS, read_ledger
from fedlora.run import execute

pytest.importorskip("opacus")
pytest.importorskip("dp_accounting")
pytest_plugins = ["tiny", "private"]


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
