"""Whole runs on tiny models and files: what they train, what they write, what survives a Ctrl-C."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench import ALL, Place, adapter_bytes, records, summary
from conftest import same_adapters
from tiny import BAD, GOOD, logits, tokens, toy_rows, write_csv
from transformers import AutoModelForSequenceClassification

from fedlora.adapter import ClientState
from fedlora.client import evaluation_rows, make_fit
from fedlora.evaluate import evaluate
from fedlora.model import load_adapter, write_adapter
from fedlora.report import write_report
from fedlora.rules import get_rule
from fedlora.run import execute
from fedlora.rundir import read_run
from fedlora.runlog import read_config
from fedlora.simulation import simulate

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]
FILES = {"config.toml", "run-id", "versions.json", "metrics.jsonl", "summary.json", "adapter"}


@pytest.fixture
def place(tiny: Tiny, tmp_path: Path) -> Place:
    return Place(tiny("bert"), tmp_path)


# ---------------------------------------------------------------- what is written


def test_a_run_directory_holds_the_whole_story(place: Place) -> None:
    job = place.job(run__rounds=3)
    folder = execute(job)
    assert {file.name for file in folder.iterdir()} == FILES
    assert read_config(folder) == job.config
    assert job.config.data.labels == ["neg", "pos"]
    versions = json.loads((folder / "versions.json").read_text())
    assert {"fedlora", "torch", "peft", "transformers", "python", "device"} <= versions.keys()
    assert [record["round"] for record in records(folder)] == [0, 1, 2, 3]
    assert {file.name for file in (folder / "adapter").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip


def test_the_last_line_of_the_log_is_what_the_saved_adapter_scores(place: Place) -> None:
    job = place.job(evaluate__limit=7)
    folder = execute(job)
    write_adapter(job.model, load_adapter(job.model, folder / "adapter"))
    want = evaluate(job.model, job.data.evaluation, np.arange(20))
    log, end = records(folder), summary(folder)
    assert log[-1]["global"] == end["final"] == want.record()
    assert end["confusion"] == want.confusion.tolist()
    assert [record["global"]["examples"] for record in log] == [7, 7, 20]
    rows = evaluation_rows(job.config, job.data, 2)
    assert rows.size == 7
    part = evaluate(job.model, job.data.evaluation, rows).record()
    assert log[-1]["subset"] == pytest.approx(part)
    assert [record["subset"] for record in log[:-1]] == [None, None]
    first = log[-1]["clients"]["0"]
    assert first["evaluation"]["examples"] == 7
    shared = evaluate(job.model, job.data.train, job.data.heldout["0"])
    assert log[-1]["heldout"]["clients"]["0"] == shared.record()
    assert first["examples"] == job.data.rows["0"].size
    assert first["steps"] == 3
    own = [(client["train_loss"], client["examples"]) for client in log[-1]["clients"].values()]
    train = sum(loss * rows for loss, rows in own) / sum(rows for _, rows in own)
    assert end["gap"] == pytest.approx(want.loss - train)
    assert read_run(folder).gap == pytest.approx(end["gap"])


def test_bytes_and_sizes_by_hand(place: Place) -> None:
    folder = place.run(merge__rule="ffa")
    numbers_B = 4 * 3 * 32  # four layers of 32 x 32, rank 3
    head = 2 * 32 + 2
    log, end = records(folder), summary(folder)
    assert [record["bytes_up"] for record in log] == [0] + [3 * 4 * (numbers_B + head)] * 2
    assert [record["bytes_down"] for record in log] == [0] + [3 * 4 * (numbers_B + head)] * 2
    assert end["trainable_parameters"] == numbers_B + head
    assert end["bytes_up_total"] == sum(record["bytes_up"] for record in log)
    assert end["full_finetuning_bytes_total"] == 2 * 4 * end["base_parameters"] * 6
    assert end["clients"]["0"] == {"train": 12, "heldout": 4}


def test_trainable_parameters_are_what_clients_trained_in_the_mean(place: Place) -> None:
    """Clients of rank 3 and 1; the hybrid trains A and B in its first round, B in its second."""
    one, head = 4 * 32, 2 * 32 + 2  # a pair's rows or columns in all layers, and the head
    hybrid = place.run("hybrid", merge__rule="hybrid", merge__options={"switch": 1})
    assert summary(hybrid)["trainable_parameters"] == (6 * one + head + 3 * one + head) / 2
    trained = [client["trained"] for client in records(hybrid)[-1]["clients"].values()]
    assert trained == [3 * one + head] * 3
    mixed = place.run("mixed", client__ranks=[3, 1, 1])
    assert summary(mixed)["trainable_parameters"] == round((6 + 2 + 2) / 3 * one + head)
    alone = place.run("alone", run__mode="local", merge__head="freeze")
    assert summary(alone)["trainable_parameters"] == 6 * one


def test_the_card_says_what_was_done(place: Place) -> None:
    folder = place.run("clinic", data__label_names=["bad", "nice"], data__labels=["neg", "pos"])
    card = (folder / "adapter" / "README.md").read_text()
    end = summary(folder)
    for words in (
        "base_model: bert\n", "# clinic\n", "merge rule **fra**",
        "rank 3, alpha 6, seed 0, 2 rounds",
        "on 20 examples", f"accuracy {end['final']['accuracy']:.4f}", "bad, nice",
        "| 1 | 12 | 4 |", f"{end['trainable_parameters']:,}",
    ):  # fmt: skip
        assert words in card
    assert str(place.base) not in card


def test_evaluation_is_skipped_between_its_rounds(place: Place) -> None:
    log = records(place.run(run__rounds=3, evaluate__every=2))
    assert [record["global"] is not None for record in log] == [True, False, True, True]
    assert log[1]["clients"]["0"]["evaluation"] is None


def test_events_come_in_order(place: Place) -> None:
    told: list[tuple[str, Any, Any]] = []

    def watch(event: str, facts: Mapping[str, Any]) -> None:
        told.append((event, facts.get("round"), facts.get("client")))

    place.run(watch=watch)
    rounds = [
        (event, round, client)
        for round in (0, 1, 2)
        for client in (("0", "1", "2", None) if round else (None,))
        for event in (("fit", "fitted") if client else ("evaluate", "round"))
    ]
    assert told == [("start", None, None), *rounds, ("done", None, None)]


# ---------------------------------------------------------------- same bits


@pytest.mark.parametrize("rule", ["fra", "fedavg", "ffa"])
def test_the_same_config_gives_the_same_bytes(place: Place, rule: str) -> None:
    changes = {"merge__rule": rule, "model__dropout": 0.2, "merge__participation": 0.6}
    first, second = place.run("one", **changes), place.run("two", **changes)
    assert adapter_bytes(first) == adapter_bytes(second)
    for left, right in zip(records(first), records(second), strict=True):
        assert {**left, "seconds": 0} == {**right, "seconds": 0}
    assert adapter_bytes(place.run("three", run__seed=1, **changes)) != adapter_bytes(first)


def test_neither_the_order_of_clients_nor_of_calls_changes_a_bit(place: Place) -> None:
    job = place.job(model__dropout=0.2, client__optimiser="keep")
    fit = make_fit(job.model, job.data, job.config)
    results: dict[tuple[str, int], Any] = {}

    def interleaved(client: str, round: int, *rest: Any) -> Any:
        fit("2", 1, ALL, job.start, ClientState())  # another client trains in between
        results[client, round] = fit(client, round, *rest)
        return results[client, round]

    orders = (["0", "1", "2"], ["2", "0", "1"])
    ends = [
        [*simulate(get_rule("fra"), run, job.start, order, rounds=2)][-1].state.adapter
        for run, order in zip((fit, interleaved), orders, strict=True)
    ]
    assert same_adapters(*ends)
    saved = load_adapter(job.model, execute(job) / "adapter")
    assert same_adapters(saved, ends[0])


# ---------------------------------------------------------------- best, merged


def test_the_best_adapter_is_chosen_on_held_out_rows_alone(place: Place) -> None:
    """On an evaluation set with its labels swapped, every choice by evaluation would be another."""
    swapped = [(text, {"neg": "pos", "pos": "neg"}[label]) for text, label in toy_rows(48)]
    write_csv(place.dev, swapped)
    constant = {"client__schedule": "constant", "client__lr": 0.03, "data__holdout": 0.4}
    folder = place.run(run__save_best=True, run__rounds=6, **constant)
    log = records(folder)[1:]
    heldout = [
        sum(c["accuracy"] * c["examples"] for c in own) / sum(c["examples"] for c in own)
        for own in (record["heldout"]["clients"].values() for record in log)
    ]
    best = 1 + heldout.index(max(heldout))
    shared = [record["global"]["accuracy"] for record in log]
    assert shared[best - 1] < max(shared), "this case would not tell the two apart"
    assert summary(folder)["best"] == {"round": best, "heldout_accuracy": max(heldout)}
    assert best < 6, "this case would not tell best and last apart"
    until = place.run("until", run__rounds=best, **constant)
    assert adapter_bytes(folder, "best") == adapter_bytes(until) != adapter_bytes(folder)


def test_the_best_adapter_is_judged_on_the_held_out_rows_of_all_clients(place: Place) -> None:
    """Also where few take part: scores on other rows each round cannot be compared."""
    job = place.job(run__save_best=True, merge__participation=0.3, data__holdout=0.4)
    folder = execute(job)
    write_adapter(job.model, load_adapter(job.model, folder / "best"))
    rows = np.concatenate(list(job.data.heldout.values()))
    want = evaluate(job.model, job.data.train, rows)
    assert summary(folder)["best"]["heldout_accuracy"] == pytest.approx(want.accuracy)
    last = records(folder)[-1]
    assert set(last["clients"]) < set(last["heldout"]["clients"]) == set(job.data.heldout)
    write_adapter(job.model, load_adapter(job.model, folder / "adapter"))
    want = evaluate(job.model, job.data.train, rows)
    found = (last["heldout"]["accuracy"], last["heldout"]["loss"])
    assert found == pytest.approx((want.accuracy, want.loss))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_merged_model_is_written_on_demand(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    job = Place(tiny(kind), tmp_path).job(run__save_merged=True)
    folder = execute(job)
    write_adapter(job.model, load_adapter(job.model, folder / "adapter"))
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "merged")
    inputs = tokens(job.model, ["the film was very good", "cold"])
    torch.testing.assert_close(logits(merged, inputs), logits(job.model.network, inputs))


def test_each_client_with_a_head_of_its_own_gets_a_merged_model(place: Place) -> None:
    job = place.job(run__save_merged=True, run__rounds=1, merge__head="local")
    folder = execute(job)
    heads = []
    for client in job.data.rows:
        write_adapter(job.model, load_adapter(job.model, folder / "adapter" / client))
        merged = AutoModelForSequenceClassification.from_pretrained(folder / "merged" / client)
        inputs = tokens(job.model, ["the film was very good", "cold"])
        torch.testing.assert_close(logits(merged, inputs), logits(job.model.network, inputs))
        heads.append(logits(merged, inputs))
    assert not torch.equal(heads[0], heads[1])


# ---------------------------------------------------------------- refusals and interruptions


def test_a_run_directory_that_exists_is_refused_and_untouched(place: Place) -> None:
    folder = place.run()
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"exists already and was not touched.*run\.out=DIR"):
        place.run(model__name="/no/such/model")  # seen before anything is loaded
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("event", ["fit", "fitted"])
def test_an_interrupted_run_keeps_the_last_finished_round(place: Place, event: str) -> None:
    def interrupt(told: str, facts: Mapping[str, Any]) -> None:
        if told == event and facts["round"] == 2 and facts["client"] == "1":
            raise KeyboardInterrupt

    constant = {"client__schedule": "constant", "client__optimiser": "keep"}
    with pytest.raises(KeyboardInterrupt):
        place.run("cut", interrupt, run__rounds=3, **constant)
    cut = place.folder / "cut"
    assert [record["round"] for record in records(cut)] == [0, 1]
    assert (summary(cut)["interrupted"], summary(cut)["rounds"]) == (True, 1)
    whole = place.run("whole", run__rounds=1, **constant)
    assert adapter_bytes(cut) == adapter_bytes(whole)
    assert summary(whole)["interrupted"] is False
    assert [path.name for path in write_report([cut])] == ["report.png", "report.svg", "report.md"]
    assert not [path for path in cut.rglob("*") if path.name.startswith(".")]


def test_a_run_interrupted_at_once_keeps_the_start(place: Place) -> None:
    def interrupt(told: str, facts: Mapping[str, Any]) -> None:
        if told == "fit":
            raise KeyboardInterrupt

    job = place.job()
    with pytest.raises(KeyboardInterrupt):
        execute(job, interrupt)
    assert same_adapters(load_adapter(job.model, job.folder / "adapter"), job.start)
    assert [record["round"] for record in records(job.folder)] == [0]


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        ("average", {"client__lr": 1e38}),  # the loss is NaN in the second step
        ("average", {"client__lr": 1e38, "client__steps": 1}),  # the weights are after the first
        ("local", {"client__lr": 1e38, "client__steps": 1}),
        ("average", {"client__lr": 1e25, "client__steps": 1}),  # the logits are
    ],
)
def test_a_run_that_diverges_names_the_client_and_keeps_what_it_had(
    place: Place, head: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"client 0.*diverged"):
        place.run(client__clip=0.0, merge__head=head, **changes)
    assert summary(place.folder / "run")["interrupted"] is True
    assert summary(place.folder / "run")["rounds"] == 0


def test_a_federation_learns(tiny: Tiny, tmp_path: Path) -> None:
    """Llama reads its answer off the last token, here the word that tells."""
    place = Place(tiny("llama"), tmp_path)
    for file, count, seed in ((place.train, 120, 0), (place.dev, 40, 9)):
        rows = [
            (f"{text[:8].rpartition(' ')[0]} {(BAD, GOOD)[n % 2][n // 2 % 4]}", label)
            for n, (text, label) in enumerate(toy_rows(count, seed))
        ]
        write_csv(file, rows)
    changes = {"client__steps": 10, "client__batch": 8, "client__lr": 0.03}
    log = records(place.run(run__rounds=5, **changes))
    assert log[0]["global"]["accuracy"] < 0.7
    assert log[-1]["global"]["accuracy"] > 0.8
    assert log[-1]["global"]["loss"] < log[0]["global"]["loss"] / 2
