"""Nodes with rows, ledgers and limits of their own, and what a server hears of them."""

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

import pytest
from bench import Place, records
from flower_grid import LocalGrid
from flwr.app import RecordDict
from private import PRIVATE, TRUSTED, told
from tiny import toy_rows, write_csv

from fedlora.adapter import flatten
from fedlora.client import make_fit
from fedlora.errors import PublicError
from fedlora.files import locked
from fedlora.flower import node
from fedlora.flower.app import client
from fedlora.flower.limits import admit, refusal
from fedlora.flower.node import SECRET, ledger_folder, load_node, own_secret
from fedlora.flower.nodeconfig import own_labels, own_settings
from fedlora.flower.serving import serve
from fedlora.flower.wire import Order, packed
from fedlora.privacy.accounting import Mechanism, noise_for
from fedlora.privacy.ledger import LEDGERS, Terms, intend, read_ledger
from fedlora.resume import find
from fedlora.rules import Plan
from fedlora.run import execute, prepare
from fedlora.seeding import derive
from fedlora.stopped import check_new

pytest.importorskip("opacus")
pytest.importorskip("dp_accounting")
pytest_plugins = ["tiny", "private"]


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


def named_too(place: Place) -> dict[str, Any]:
    """What a node under a limit on epsilon names beside name, data and state."""
    return {"model": str(place.base), "labels": "neg, pos", "text": "text", "label": "label"}


def limited(place: Place, settings: dict[str, Any], name: str = "run", **limits: Any) -> Any:
    """A node with a file and limits of its own, in a run of this name."""
    flat = place.config(name, **{**PRIVATE, "data__labels": ["neg", "pos"], **settings}).flat()
    file = write_csv(place.folder / "own.csv", toy_rows(16))
    own = {"name": "1", "data": str(file), "state": str(place.folder / "states")}
    own |= named_too(place)
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
    """What a server hears of a node with these rows, before any round."""
    wanted = {**PRIVATE, "data__labels": ["neg", "pos"], "flower__clients": ["north"], **settings}
    flat = place.config("run", **wanted).flat()
    limits = {
        "name": "north", "data": str(write_csv(place.folder / "own.csv", rows)),
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


def test_a_model_of_the_nodes_own_tells_no_server_whether_a_text_is_there(place: Place) -> None:
    """A tokenizer of the server's fails at one text: whether the node does would tell, for free."""
    shutil.copytree(place.base, odd := place.folder / "odd")
    made = json.loads((odd / "tokenizer.json").read_text())
    words = {word: at for word, at in made["model"]["vocab"].items() if word != "warm"}
    made["model"] = {"type": "WordLevel", "vocab": words, "unk_token": "[NONE]"}
    (odd / "tokenizer.json").write_text(json.dumps(made))
    kept = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "pad_token": "[PAD]"}
    (odd / "tokenizer_config.json").write_text(json.dumps(kept))
    known = [row for row in toy_rows(40) if "warm" not in row[0]]
    server = {"model__name": str(odd), "model__revision": "x"}
    assert probed(place, known, run__seed=1, **server).all_rows == len(known)
    asked = [*known, ("the film was warm", "pos")]
    with pytest.raises(Exception, match="Missing"):
        probed(place, asked, **server)
    ready = probed(place, asked, {"model": str(place.base)}, **server)
    assert ready.all_rows == len(asked)
    assert ready.loaded.model.settings.name == str(place.base)


@pytest.mark.parametrize(
    ("own", "name", "revision"),
    [
        ("org/base", "org/base", ""),
        ("org/base@0f3c", "org/base", "0f3c"),
        ("{folder}", "{folder}", ""),
    ],
)
def test_a_nodes_model_is_a_folder_or_a_hubs_at_a_revision(
    place: Place, own: str, name: str, revision: str
) -> None:
    folder = place.folder / "at@home"
    folder.mkdir()
    asked = place.config("run", model__name="org/servers", model__revision="refs/pr/1")
    said = {"name": "1", "data": "own.csv", "model": own.format(folder=folder)}
    model = own_settings(asked, said).model
    assert (model.name, model.revision) == (name.format(folder=folder), revision)
    assert own_settings(asked, {"name": "1", "data": "own.csv"}).model == asked.model


def test_labels_of_the_nodes_own_tell_no_server_whether_one_is_there(place: Place) -> None:
    """Left out of `data.labels`, one that a single row has would end the start."""
    (place.folder / "own.csv").unlink(missing_ok=True)
    rows, labels = toy_rows(40), {"labels": "neg, pos, odd"}
    with pytest.raises(PublicError, match="the run's labels, neg, pos, are not those of") as error:
        probed(place, rows, labels)
    assert "odd" not in str(error.value)
    told = probed(place, [*rows, ("so warm", "odd")], labels, data__labels=["neg", "pos", "odd"])
    assert told.all_rows == 41


@pytest.mark.parametrize(
    ("said", "known"),
    [
        ("neg, pos", ["neg", "pos"]),
        (" neg,pos ", ["neg", "pos"]),
        ('["fever, acute", " odd "]', ["fever, acute", " odd "]),
    ],
)
def test_labels_are_a_list_with_commas_or_of_json(said: str, known: list[str]) -> None:
    assert own_labels({"labels": said}) == known


def test_labels_that_are_no_list_are_refused() -> None:
    with pytest.raises(ValueError, match="labels = '\\[neg, pos\\]' is no JSON list"):
        own_labels({"labels": "[neg, pos]"})


@pytest.mark.parametrize("key", ["state", "model", "label"])
@pytest.mark.parametrize("said", ["", "  "])
def test_what_is_empty_does_not_stand_for_the_nodes_own(place: Place, key: str, said: str) -> None:
    """`state="$STATE"` without the variable: the ledger would lie where the server says."""
    with pytest.raises(ValueError, match=f"node config {key} is empty"):
        limited(place, {}, epsilon=8, **{key: said})


@pytest.mark.parametrize("key", ["model", "text", "evaluate"])
def test_what_goes_with_a_nodes_own_data_is_not_passed_over_without(place: Place, key: str) -> None:
    """The model that would be trained is the server's."""
    with pytest.raises(ValueError, match=f"node config {key} says nothing without data"):
        load_node(place.config("run").flat(), {"partition-id": 0, key: "x"})


@pytest.mark.parametrize(("limits", "alone"), [({"epsilon": 8}, True), ({}, False)])
def test_rows_are_taken_alone_where_the_server_is_not_trusted(
    place: Place, monkeypatch: pytest.MonkeyPatch, limits: dict[str, Any], alone: bool
) -> None:
    """It chooses the weights: large ones make of padding what counts, and one row moves others'
    gradients (10 clips were measured with MiniLM and factors of deviation 1000).
    """
    asked: list[bool] = []

    def spied(*args: Any, **named: Any) -> Any:
        asked.append(named["alone"])
        return make_fit(*args, **named)

    monkeypatch.setattr(node, "make_fit", spied)
    ready = limited(place, {}, **limits)
    sent = flatten(ready.start, frozenset({"A", "B", "head"}))
    node.train(ready, order(ready), RecordDict(packed(sent)))
    assert asked == [alone]


@pytest.mark.parametrize("switch", ["share-metrics", "trust-remote-code"])
@pytest.mark.parametrize("said", ["false", "no", 0])
def test_yes_or_no_is_said_as_such(place: Place, switch: str, said: Any) -> None:
    """A word is true to Python, `"false"` as well."""
    with pytest.raises(ValueError, match=rf"{switch} = {said!r} must be true or false"):
        limited(place, {}, **{switch: said})


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


BOUND = ["name", "data", "state", "model", "labels", "text", "label"]


@pytest.mark.parametrize("missing", BOUND)
def test_a_limit_on_epsilon_needs_all_that_a_server_must_not_choose(
    place: Place, missing: str
) -> None:
    """Clients x1, x2, ... of the server's config were each given all of epsilon; a label or column
    of its choice fails at a single row.
    """
    own = {"name": "1", "data": str(place.train), "state": str(place.folder), "partition-id": 0}
    own |= named_too(place)
    del own[missing]
    if missing == "data":  # else these say nothing, which is refused before
        own = {key: own[key] for key in ("name", "state", "labels", "partition-id")}
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
    nodes: list[dict[str, Any]] = [
        {"name": name, "data": str(place.train), "state": str(place.folder / "states")}
        for name in ("a", "b")
    ]
    nodes[1] |= {"epsilon": 8, **named_too(place)}  # a limit is kept by the same run
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
