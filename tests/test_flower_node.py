"""A node looks before it trains: its limits, its base model, its own disk, what it is sent."""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import Place, records, summary
from conftest import random_adapter, same_adapters
from flower_grid import LocalGrid
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from tiny import toy_rows, write_lines

from fedlora.adapter import PARTS, ClientState
from fedlora.adapter_folder import open_folder
from fedlora.config import make_config
from fedlora.flower.app import FAILED, client
from fedlora.flower.limits import refusal
from fedlora.flower.node import (
    KEPT,
    RUNS,
    STATES,
    fingerprint,
    keep_state,
    load_node,
    read_state,
)
from fedlora.flower.project import write_project
from fedlora.flower.serving import serve
from fedlora.flower.strategy import FedloraStrategy
from fedlora.flower.wire import Order, order_content, packed
from fedlora.model import configured_model
from fedlora.rules import Plan
from fedlora.runlog import read_id
from fedlora.stopped import stopped_line

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]
PLAN = Plan(*[frozenset({"A", "B", "head"})] * 3)


@pytest.fixture
def place(tiny: Tiny, tmp_path: Path) -> Place:
    return Place(tiny("bert"), tmp_path)


def node(place: Place, **own: Any) -> Any:
    return load_node(place.config().flat(), {"partition-id": 1} | own)


@pytest.mark.parametrize(
    ("own", "change", "code"),
    [
        ({}, {}, None),
        ({"max-rounds": 3}, {}, None),
        ({"max-rounds": 2}, {}, "rounds"),
        ({"min-examples": 12}, {}, None),
        ({"min-examples": 13}, {}, "examples"),
        ({"rules": "fra, ffa"}, {}, None),
        ({"rules": "ffa"}, {}, "rule"),
        ({"shares": "A, B,head"}, {}, None),
        ({"shares": "A,head"}, {}, "shares"),
        ({"shares": "B,head"}, {"plan": Plan(PARTS, frozenset({"B"}), PARTS)}, None),
        ({"base": "0000"}, {}, "base"),
        ({}, {"base": "another"}, "base"),
        ({}, {"client": "0"}, "client"),
    ],
)
def test_a_node_refuses_what_is_beyond_its_limits(
    place: Place, own: dict[str, Any], change: dict[str, Any], code: str | None
) -> None:
    ready = node(place, **own)
    order = replace(Order("run/0", 3, "1", PLAN, ready.loaded.base, "id"), **change)
    refused = refusal(ready, order)
    assert (refused[0] if refused else None) == code


def test_a_limit_that_names_no_part_refuses_every_order(place: Place) -> None:
    ready = node(place, shares="A,classifier")
    with pytest.raises(ValueError, match="'classifier' is no part of an adapter, which are A, B"):
        refusal(ready, Order("run/0", 1, "1", PLAN, ready.loaded.base, "id"))


def test_a_base_of_other_weights_stops_the_run_before_it_trains_and_names_both(
    place: Place, tiny: Tiny
) -> None:
    flat = place.config("run").flat()
    grid = LocalGrid(client, flat | {"model.name": str(tiny("roberta"))}, [{"partition-id": 0}])
    want = load_node(flat, {"partition-id": 0}).loaded.base
    with pytest.raises(ValueError, match=rf"client 0 holds base model \w+, the server {want}"):
        serve(grid, flat | {"flower.wait": 0.1})
    assert not (place.folder / "run").exists()


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"colour": "red"}, "node config 'colour' is not known"),
        ({"partition-id": 3}, r"partition-id in 0\.\.2"),
        ({"name": "nobody"}, "the run knows no client 'nobody'; it has 0, 1, 2"),
        ({"data": "mine.csv"}, "needs a name"),
    ],
)
def test_a_node_config_that_makes_no_sense_is_refused(
    place: Place, own: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        node(place, **own)


def test_a_nodes_own_file_is_never_named_to_the_server(place: Place) -> None:
    """All that it says: name, rows, fingerprint; and per round arrays, rows and metrics."""
    flat = place.config("run", flower__clients=["north"], data__labels=["neg", "pos"],
                        run__rounds=1).flat()  # fmt: skip
    said: list[Message] = []

    def listen(reply: Message) -> Message:
        said.append(reply)
        return reply

    own = {"name": "north", "data": str(place.train), "state": str(place.folder / "own")}
    serve(LocalGrid(client, flat, [own], change=listen), flat)
    assert len(said) == 2
    hello, trained = (message.content for message in said)
    assert set(hello.config_records["reply"]) == {"client", "examples", "base"}
    assert set(trained.config_records["reply"]) == {"run", "round", "client", "examples"}
    assert set(trained.array_records) == {"arrays"}
    assert all("lora_" in name or "classifier" in name for name in trained.config_records["layout"])
    assert set(trained.config_records) == {"reply", "layout"}
    text = f"{hello}{trained.config_records}{trained.metric_records}"
    assert str(place.train) not in text
    assert not any(word in text for word in ("good", "awful", "food"))


@pytest.mark.parametrize(("claimed", "noted"), [(2**50, 2**50), (2**60, 0), (-5, 0), (True, 0)])
def test_the_rows_that_a_node_claims_take_no_memory_at_the_server(
    place: Place, claimed: int, noted: int
) -> None:
    flat = place.config("run", flower__clients=["north"], data__labels=["neg", "pos"],
                        run__rounds=1).flat()  # fmt: skip

    def boast(reply: Message) -> Message:
        if reply.metadata.message_type == "query.hello":
            reply.content.config_records["reply"]["examples"] = claimed
        return reply

    own = {"name": "north", "data": str(place.train), "state": str(place.folder / "own")}
    folder = serve(LocalGrid(client, flat, [own], change=boast), flat)
    assert summary(folder)["clients"]["north"]["train"] == noted


def test_a_server_without_data_of_its_own_runs_all_the_same(place: Place) -> None:
    flat = place.config("run", flower__clients=["north"], data__labels=["neg", "pos"],
                        data__evaluate="").flat()  # fmt: skip
    own = {"name": "north", "data": str(place.train), "state": str(place.folder / "own")}
    folder = serve(LocalGrid(client, flat, [own]), flat)
    log = records(folder)
    assert [record["global"] for record in log] == [None, None, None]
    assert log[-1]["clients"]["north"]["evaluation"]["examples"] == 12  # what it holds out itself
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "kept_whole"),
    [
        ({"merge__rule": "fedsa"}, True),
        ({"merge__head": "local"}, True),
        ({"client__optimiser": "transport"}, False),  # it keeps an adapter, and shares all of it
    ],
    ids=["fedsa", "head", "all shared"],
)
def test_a_part_that_never_leaves_its_node_is_there_as_a_whole_adapter(
    place: Place, changes: dict[str, Any], kept_whole: bool
) -> None:
    flat = place.config("run", flower__clients=["north"], data__labels=["neg", "pos"],
                        data__evaluate="", **changes).flat()  # fmt: skip
    own = {"name": "north", "data": str(place.train), "state": str(place.folder / "own")}
    folder = serve(LocalGrid(client, flat, [own]), flat)
    found = list((place.folder / "own" / "north" / "adapters").glob("*/*"))
    assert [path.name for path in found] == (["round-000002"] if kept_whole else [])
    if kept_whole:
        state = read_state(place.folder / "own" / "north", read_id(folder), 3).adapter
        assert state is not None
        saved = open_folder(found[0])
        for layer, factors in state.layers.items():
            for part in ("A", "B"):
                assert torch.equal(getattr(saved.factors(layer), part), getattr(factors, part))
        assert state.dense.keys() == saved.dense.keys()
        for name, tensor in state.dense.items():
            assert torch.equal(saved.tensor(name), tensor)


def test_what_a_client_keeps_is_that_of_the_round_before_and_of_this_run(tmp_path: Path) -> None:
    for number in (1, 2, 3, 4):
        keep_state(tmp_path, "run/0", number, kept(number))
    files = sorted(tmp_path.rglob("*.state"))
    assert len(files) == KEPT
    for number, want in ((5, 4), (4, 3), (3, 2)):
        assert is_kept(read_state(tmp_path, "run/0", number), want)
    assert read_state(tmp_path, "other/1", 5).adapter is None
    assert read_state(tmp_path, "run/0", 1).adapter is None
    files[-1].write_bytes(files[-1].read_bytes()[:-3])
    with pytest.raises(ValueError, match="its head speaks of"):
        read_state(tmp_path, "run/0", 5)


def test_a_round_that_is_made_again_replaces_what_was_kept_of_it(tmp_path: Path) -> None:
    """Also where the checkpoint that was left is older than all that is kept."""
    for number in range(1, 7):
        keep_state(tmp_path, "run/0", number, kept(number))
    for number in (3, 4):
        keep_state(tmp_path, "run/0", number, kept(10 + number))
        assert is_kept(read_state(tmp_path, "run/0", number + 1), 10 + number)


def test_runs_side_by_side_keep_their_own(tmp_path: Path) -> None:
    """Two runs with one client on one node; of older ones the last few stay."""
    for number in (1, 2, 3, 4):
        keep_state(tmp_path, "one/0", number, kept(number))
        keep_state(tmp_path, "two/0", number, kept(10 + number))
    for name, first in (("one/0", 0), ("two/0", 10)):
        assert is_kept(read_state(tmp_path, name, 5), first + 4)
        assert is_kept(read_state(tmp_path, name, 4), first + 3)
    for number in range(RUNS - 1):
        keep_state(tmp_path, f"later/{number}", 1, kept(number))
    assert read_state(tmp_path, "one/0", 5).adapter is None
    assert is_kept(read_state(tmp_path, "two/0", 5), 14)
    assert is_kept(read_state(tmp_path, "later/0", 2), 0)


def kept(number: int) -> ClientState:
    return ClientState(random_adapter(number), random_adapter(number + 9).dense)


def is_kept(state: ClientState, number: int) -> bool:
    return state.adapter is not None and same_adapters(state.adapter, random_adapter(number))


def test_an_order_that_is_none_is_answered_with_its_code_and_trains_nothing(place: Place) -> None:
    flat = place.config("run").flat()
    ready = load_node(flat, {"partition-id": 0})
    grid = LocalGrid(client, flat, [{"partition-id": 0}])
    (number,) = grid.get_node_ids()
    order = Order("run/0", 1, "0", PLAN, ready.loaded.base, "id")
    tensors = dict(list(order_tensors(ready).items())[:-1])
    replies = grid.send_and_receive(
        [grid.create_message(order_content(order, packed(tensors)), "train", number, "1")]
    )
    (reply,) = replies
    assert reply.content.config_records["reply"]["code"] == "names"
    assert "is missing" in str(reply.content.config_records["reply"]["reason"])


def order_tensors(ready: Any) -> dict[str, Any]:
    from fedlora.adapter import flatten

    return flatten(ready.start)


def app_config(project: Path) -> dict[str, Any]:
    """The settings of a project, flat, as Flower reads them."""
    tables = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    sections = tables["tool"]["flwr"]["app"]["config"]
    return {f"{s}.{key}": value for s, keys in sections.items() for key, value in keys.items()}


def test_a_project_is_written_whole_and_holds_the_config(place: Place, tmp_path: Path) -> None:
    config = place.config("run", merge__rule="fedex", client__ranks=[])
    write_project(tmp_path / "project", config)
    assert make_config(app_config(tmp_path / "project")) == config
    made = tomllib.loads((tmp_path / "project" / "pyproject.toml").read_text())
    assert made["project"]["dependencies"] == []
    assert "app = server" in (tmp_path / "project" / "federation" / "server_app.py").read_text()
    with pytest.raises(ValueError, match="exists already"):
        write_project(tmp_path / "project", config)
    with pytest.raises(ValueError, match="needs no other machines"):
        write_project(tmp_path / "other", place.config("x", run__mode="central"))


def test_a_project_is_valid_whatever_the_settings_say(place: Place, tmp_path: Path) -> None:
    """Emoji are not pairs of surrogates in TOML, and a package's name is ASCII."""
    names = {"data__labels": ["neg", "pos"], "data__label_names": ["mal 😕", 'so "gut"\x7f']}
    config = place.config("run", run__name="Klinik-Ü 😕 1", **names)
    write_project(tmp_path / "project", config)
    assert make_config(app_config(tmp_path / "project")) == config
    made = tomllib.loads((tmp_path / "project" / "pyproject.toml").read_text(encoding="utf-8"))
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", made["project"]["name"])


OWN: dict[str, Any] = {"data__labels": ["neg", "pos"], "flower__clients": ["north"]}


@pytest.mark.parametrize("far", [{}, OWN], ids=["dealt", "own data"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data__max_length": 512}, "max_length = 512 is more than the model reads"),
        ({"privacy__unit": "example", "client__ranks": [1]}, r"does not go with client\.ranks"),
        ({"privacy__unit": "example", "data__evaluate": ""}, r"needs data\.evaluate, a public set"),
    ],
    ids=["length", "ranks", "evaluation"],
)
def test_server_and_nodes_check_what_a_run_in_one_process_checks(
    place: Place, changes: dict[str, Any], says: str, far: dict[str, Any]
) -> None:
    """But for rows that nobody else scores: nodes with their own need no public set."""
    flat = place.config("run", **changes | far).flat()
    own = {"name": "north", "data": str(place.train), "state": str(place.folder / "own")}
    if far and "data__evaluate" in changes:
        load_node(flat, own)
        return
    with pytest.raises(ValueError, match=says):
        load_node(flat, own if far else {"partition-id": 0, "state": str(place.folder / "own")})
    with pytest.raises(ValueError, match=says):
        serve(LocalGrid(client, flat, []), flat | {"flower.wait": 0.1})
    assert not (place.folder / "run").exists()


def test_a_fingerprint_is_that_of_the_base_alone(place: Place, tiny: Tiny) -> None:
    """Not of the run's seed, its labels, or the layers that get an adapter; of precision, yes."""

    def of(*labels: str, **changes: Any) -> str:
        config = place.config(**changes)
        return fingerprint(configured_model(config, labels or ["neg", "pos"]))

    own = of()
    assert own == of(run__seed=5) == of("a", "b", "c") == of(model__targets=["key"], model__rank=1)
    assert own != of(model__name=str(tiny("roberta")))
    assert own != of(run__precision="bfloat16")
    drawn = {"model__name": str(tiny("distilbert")), "model__targets": ["q_lin"]}
    assert of(**drawn) == of(**drawn, run__seed=5)  # with a layer more that is drawn


def test_bases_of_another_precision_are_refused_with_the_setting(place: Place) -> None:
    flat = place.config("run").flat()
    grid = LocalGrid(client, flat | {"run.precision": "bfloat16"}, [{"partition-id": 0}])
    with pytest.raises(ValueError, match=r"the same model\.name, revision and run\.precision"):
        serve(grid, flat | {"flower.wait": 0.1})


def test_clients_that_are_sent_the_same_share_its_bytes(place: Place) -> None:
    """Forty clients hold one message of 16 MB, not forty."""
    config = place.config("run", client__ranks=[2, 1], model__rank=2)
    ready = load_node(config.flat(), {"partition-id": 0})
    strategy = FedloraStrategy(config, ready.loaded.start, ["0", "1", "2"], base=ready.loaded.base)
    grid = LocalGrid(client, config.flat(), [{"partition-id": k} for k in range(3)])
    messages = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
    data = [m.content.array_records["arrays"]["packed"].data for m in messages]
    assert data[0] is data[2]
    assert len(data[1]) < len(data[0])
    said = [m.content.config_records["order"]["client"] for m in messages]
    assert said == ["0", "1", "2"]


SECRET = "patient Jane Doe of Elm Street"


def private_file(place: Place, **row: str) -> Path:
    """A node's file with one odd row, the first."""
    odd, *rows = [{"text": text, "label": label} for text, label in toy_rows(20)]
    return write_lines(place.folder / "private.jsonl", [odd | row, *rows])


def answers(place: Place, own: dict[str, Any], **changes: Any) -> list[str]:
    """What a node of its own file says to a question and to an order, the whole of it as text."""
    flat = place.config("run", **OWN | changes).flat()
    state = {"name": "north", "state": str(place.folder / "own")}
    grid = LocalGrid(client, flat, [state | own])
    (number,) = grid.get_node_ids()
    order = order_content(Order("run/0", 1, "north", PLAN, "base", "id"), packed({}))
    asked = [
        grid.create_message(RecordDict(), "query.hello", number, "0"),
        grid.create_message(order, "train", number, "1"),
    ]
    replies = [grid.send_and_receive([message]) for message in asked]
    assert not any(reply.has_error() for (reply,) in replies)
    return [str(reply.content.config_records["reply"]) for (reply,) in replies]


@pytest.mark.parametrize(
    ("row", "changes"),
    [
        ({"label": SECRET}, {}),
        ({"text": SECRET}, {"data__label": "text", "data__text": "label"}),
        ({SECRET: ""}, {"data__text": "diagnosis"}),
    ],
    ids=["odd label", "servers column", "names of columns"],
)
def test_what_a_node_cannot_read_stays_in_its_own_log(
    place: Place, row: dict[str, str], changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The server's config names columns and labels: what does not fit them was sent back to it."""
    file = private_file(place, **row)
    for said in answers(place, {"data": str(file)}, **changes):
        assert "'code': 'error'" in said
        assert FAILED in said
        assert not any(word in said for word in ("Jane", "good", "text", str(place.folder)))
    assert SECRET in caplog.text


def test_a_node_that_is_broken_says_nothing_of_how(place: Place) -> None:
    """Neither of its folders, nor of a limit that makes no sense."""
    states = place.folder / "own" / "north"
    states.mkdir(parents=True)
    (states / STATES).write_bytes(b"no folder")
    own = {"name": "north", "data": str(place.train), "state": str(place.folder / "own")}
    changes = {"run__rounds": 1, "run__max_failed_rounds": 1, "merge__head": "local"}
    flat = place.config("run", **OWN, **changes).flat()
    for limit in ({}, {"max-rounds": SECRET}):
        with pytest.raises(ValueError, match=f"error: client north: {FAILED}") as caught:
            serve(LocalGrid(client, flat, [own | limit]), flat)
        assert "Jane" not in str(caught.value)
        shutil.rmtree(place.folder / "run")


def test_the_server_learns_which_node_to_ask(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    flat = place.config("run", **OWN).flat() | {"flower.wait": 0.1}
    own = {"name": "north", "data": str(private_file(place, label=SECRET)), "state": "/nowhere"}
    with pytest.raises(ValueError, match="client north did not answer in time"):
        serve(LocalGrid(client, flat, [own]), flat)
    told = [r.getMessage() for r in caplog.records if r.name == "fedlora.flower.strategy"]
    assert any(f"(north) did not introduce itself: {FAILED}" in line for line in told)
    assert not any("Jane" in line for line in told)


def test_two_nodes_with_one_name_are_told(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """They would take turns, and what is called one client's would be of two silos."""
    flat = place.config("run", **OWN, run__rounds=1).flat()
    own = {"name": "north", "data": str(place.train)}
    serve(LocalGrid(client, flat, [own]), flat)
    assert not [r for r in caplog.records if "call themselves" in r.getMessage()]
    shutil.rmtree(place.folder / "run")
    serve(LocalGrid(client, flat, [own, own]), flat)
    told = [r.getMessage() for r in caplog.records if "call themselves" in r.getMessage()]
    assert told
    assert "two nodes call themselves 'north'" in told[0]
    assert "a name of its own" in told[0]


def test_a_nodes_own_columns_win_over_the_servers(place: Place) -> None:
    rows = [
        {"note": text, "text": SECRET, "class": label, "x": "film"} for text, label in toy_rows(20)
    ]
    file = write_lines(place.folder / "own.jsonl", rows)
    own = {"name": "north", "data": str(file), "text": "note", "label": "class"}
    asked = {"data__text": "text", "data__pair": "x", "data__label": "text", **OWN}
    ready = load_node(place.config(**asked).flat(), own)
    data, tokens = ready.loaded.data.train, ready.loaded.model.tokenizer
    first = tokens.decode(data.inputs["input_ids"][0], skip_special_tokens=True)
    assert first == rows[0]["note"]
    assert data.labels.tolist() == [["neg", "pos"].index(row["class"]) for row in rows]


def test_a_stopped_run_of_nodes_with_their_own_rows_says_how_it_goes_on(place: Place) -> None:
    """In one process it cannot: `fedlora run --resume` has no rows."""
    changes = {"flower__clients": ["north"], "data__train": "", "data__labels": ["neg", "pos"]}
    flat = place.config("run", run__rounds=1, **changes).flat()
    own = {"name": "north", "data": str(place.train), "state": str(place.folder / "own")}
    folder = serve(LocalGrid(client, flat, [own]), flat)
    (folder / "summary.json").unlink()
    line = stopped_line(folder)
    assert "the same `flwr run` goes on with it, its nodes have the data" in line
    assert "--resume" not in line
