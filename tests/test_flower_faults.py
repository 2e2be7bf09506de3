"""Clients that fail on Flower: every bad reply is refused with its code and changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import Place, adapter_bytes, records
from conftest import random_adapter, same_adapters
from flower_grid import LocalGrid
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
)

from fedlora.flower.app import client
from fedlora.flower.serving import serve
from fedlora.flower.wire import Order, read_reply, reply_content
from fedlora.policy import PLAIN, Policy
from fedlora.rounds import Failure, close_round, open_round
from fedlora.rules import get_rule
from fedlora.server import ServerState

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]
NODES: list[dict[str, Any]] = [{"partition-id": number} for number in range(3)]
LENIENT = {"run__min_clients": 1, "run__max_failed_rounds": 2, "run__rounds": 2}


@pytest.fixture
def place(tiny: Tiny, tmp_path: Path) -> Place:
    return Place(tiny("bert"), tmp_path)


def run(place: Place, name: str, change: Any = lambda reply: reply, nodes: Any = None,
        **changes: Any) -> Path:  # fmt: skip
    config = place.config(name, **changes)
    return serve(LocalGrid(client, config.flat(), nodes or NODES, change=change), config.flat())


def of_client(name: str, spoil: Callable[[Message], Message | None]) -> Any:
    """Spoils the training replies of one client, and no other message."""

    def change(reply: Message) -> Message | None:
        if reply.has_error() or reply.metadata.message_type != "train":
            return reply
        values = reply.content.config_records["reply"]
        return spoil(reply) if values.get("client") == name else reply

    return change


def with_array(edit: Callable[[np.ndarray], Any], which: str = "lora_B") -> Any:
    def spoil(reply: Message) -> Message:
        arrays = reply.content.array_records["arrays"]
        name = next(name for name in arrays if which in name)
        made = edit(arrays[name].numpy())
        arrays[name] = made if isinstance(made, Array) else Array(made)
        return reply

    return spoil


def with_value(key: str, value: Any) -> Any:
    def spoil(reply: Message) -> Message:
        reply.content.config_records["reply"][key] = value
        return reply

    return spoil


def without_arrays(reply: Message) -> Message:
    del reply.content["arrays"]
    return reply


def without_one(reply: Message) -> Message:
    arrays = reply.content.array_records["arrays"]
    del arrays[next(iter(arrays))]
    return reply


def with_one_more(reply: Message) -> Message:
    reply.content.array_records["arrays"]["bert.pooler"] = Array(np.zeros((2, 2), np.float32))
    return reply


def an_error(reply: Message) -> Message:
    return Message(error=Error(2, "the process died"), metadata=reply.metadata)


def of_superlink(code: int) -> Any:
    """What Flower itself answers in place of a node, from no node's address."""

    def spoil(reply: Message) -> Message:
        said = reply.metadata
        error = Error(code, "Flower says why")
        return Message(
            error=error,
            metadata=Metadata(
                run_id=1, message_id="", src_node_id=1, dst_node_id=1, group_id="", ttl=0.0,
                reply_to_message_id=said.reply_to_message_id, created_at=said.created_at,
                message_type="system",
            ),
        )  # fmt: skip

    return spoil


def lying(array: np.ndarray) -> Array:
    honest = Array(array)
    return Array("float32", honest.shape, "numpy.ndarray", Array(np.zeros((1, 1))).data)


BAD = [
    ("nan", with_array(lambda a: a * np.float32(np.nan)), "tensors"),
    ("inf", with_array(lambda a: a + np.float32(np.inf)), "tensors"),
    ("broadcasts", with_array(lambda a: a[:1]), "shapes"),
    ("transposed", with_array(lambda a: a.T), "shapes"),
    ("float64", with_array(lambda a: a.astype(np.float64)), "dtypes"),
    ("oversized", with_array(lambda a: Array("float32", a.shape, "numpy.ndarray", b"0" * 10**6)),
     "size"),
    ("rubbish", with_array(lambda a: Array("float32", a.shape, "numpy.ndarray", b"rubbish")),
     "bytes"),
    ("pickle", with_array(lambda a: Array("float32", a.shape, "pickle", b"cos\nsystem\n")),
     "dtypes"),
    ("lies of its shape", with_array(lying), "bytes"),
    ("no arrays", without_arrays, "message"),
    ("one missing", without_one, "names"),
    ("one too many", with_one_more, "names"),
    ("no examples", with_value("examples", 0), "examples"),
    ("negative", with_value("examples", -5), "values"),
    ("half", with_value("examples", 1.5), "values"),
    ("stale", with_value("round", 0), "stale"),
    ("another run", with_value("run", "other/0"), "stale"),
    ("error", an_error, "error"),
    ("silent", lambda reply: None, "missing"),
    ("its node is gone", of_superlink(5), "error"),
    ("beyond its time to live", of_superlink(3), "missing"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "code"), [bad[1:] for bad in BAD], ids=[b[0] for b in BAD])
def test_a_bad_reply_is_refused_and_the_adapter_is_that_of_the_others(
    place: Place, spoil: Any, code: str
) -> None:
    without = run(place, "without", of_client("1", lambda reply: None), **LENIENT)
    spoiled = run(place, "spoiled", of_client("1", spoil), **LENIENT)
    assert adapter_bytes(spoiled) == adapter_bytes(without)
    for record in records(spoiled)[1:]:
        assert [(f["client"], f["code"]) for f in record["failures"]] == [("1", code)]
        assert "client 1" in record["failures"][0]["reason"]


def test_too_few_replies_keep_the_adapter_and_then_end_the_run_resumable(place: Place) -> None:
    """Rounds 2 and 3 fail; the third in a row would end it, and round 4 is whole again."""
    silent = {2, 3}

    def change(reply: Message) -> Message | None:
        values = reply.content.config_records["reply"]
        return None if values.get("round") in silent else reply

    whole = run(place, "whole", change, run__rounds=4, run__max_failed_rounds=3)
    log = records(whole)
    assert [len(record["failures"]) for record in log] == [0, 0, 3, 3, 0]
    assert log[1]["global"] == log[2]["global"] == log[3]["global"] != log[4]["global"]
    with pytest.raises(ValueError, match=r"round 3: 0 of 3 clients .* 2\. round in a row; stopped"):
        run(place, "ended", change, run__rounds=4, run__max_failed_rounds=2)
    silent.clear()
    resumed = run(place, "ended", run__rounds=4, run__max_failed_rounds=2)
    assert [record["round"] for record in records(resumed)] == [0, 1, 2, 3, 4]


def test_a_node_that_says_late_who_it_is_is_asked_once_and_takes_part_from_then_on(
    place: Place,
) -> None:
    """A node that hangs does not hold up the others, and its answer is not lost."""
    config = place.config("late", flower__wait=0.5, **LENIENT | {"run__rounds": 3})
    seen: list[Any] = []

    def change(reply: Message) -> Message:
        values = reply.content.config_records["reply"]
        seen.append((values["client"], values.get("round")))
        return reply

    def held(reply: Message) -> bool:
        says = reply.content.config_records["reply"]
        return says["client"] == "2" and "round" not in says and ("1", 1) not in seen

    folder = serve(LocalGrid(client, config.flat(), NODES, change=change, held=held), config.flat())
    failures = [record["failures"] for record in records(folder)]
    assert [[(f["client"], f["code"]) for f in found] for found in failures] == [
        [], [("2", "missing")], [], []
    ]  # fmt: skip
    assert seen.count(("2", None)) == 1


@pytest.mark.parametrize("damaged", [False, True])
def test_a_stopped_server_goes_on_to_the_same_bytes(place: Place, damaged: bool) -> None:
    """Nodes keep their moments on their own disk and start the repeated round from where it
    began; also where the newest checkpoint is damaged and one round more is repeated.
    """
    changes = {"client__optimiser": "keep", "run__rounds": 4}
    whole = run(place, "whole", **changes)
    seen: list[int] = []

    def dies(reply: Message) -> Message | None:
        seen.append(reply.content.config_records["reply"].get("round") or 0)
        if seen.count(4) == 2:
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        run(place, "stopped", dies, **changes)
    if damaged:
        newest = max((place.folder / "stopped" / "checkpoints").iterdir())
        newest.write_bytes(newest.read_bytes()[:-3])
    assert adapter_bytes(run(place, "stopped", **changes)) == adapter_bytes(whole)


def test_two_thousand_generated_replies_change_nothing_and_raise_nothing(place: Place) -> None:
    """Fields of every type in every place: refused one and all, the merge is that of the others."""
    rng = random.Random(7)
    made: list[Any] = [
        lambda: 3, lambda: -1, lambda: 1.5, lambda: "x" * rng.randrange(50), lambda: True,
        lambda: [1, 2], lambda: ["a"], lambda: b"bytes", lambda: 2**40, lambda: float("nan"),
    ]  # fmt: skip

    def array() -> Array:
        shape = tuple(rng.randrange(4) for _ in range(rng.randrange(4)))
        kind = rng.choice(["float32", "float64", "int64", "object", "complex64"])
        data = rng.randbytes(rng.randrange(200))
        if rng.random() < 0.5:
            values = np.zeros(shape, dtype=np.float32 if kind == "object" else kind)
            data = Array(values).data
        return Array(kind, shape, rng.choice(["numpy.ndarray", "pickle", ""]), data)

    count = 0

    def spoil(reply: Message) -> Message:
        nonlocal count
        count += 1
        content = reply.content
        for _ in range(rng.randrange(1, 4)):
            turn = rng.random()
            if turn < 0.4:
                arrays = content.array_records["arrays"]
                arrays[rng.choice([*arrays, "new"])] = array()
            elif turn < 0.8:
                values = content.config_records["reply"]
                values[rng.choice([*values, "code", "new"])] = rng.choice(made)()
            else:
                kinds = [ArrayRecord(), ConfigRecord(), MetricRecord()]
                content[rng.choice(["arrays", "reply"])] = rng.choice(kinds)
                break
        return reply

    start = random_adapter(0)
    state, rule = ServerState(start), get_rule("fra")
    opened = open_round(rule, start, state, 1, ["a", "b"], seed=0, participation=1.0, policy=PLAIN)
    grid = LocalGrid(client, {}, [{}])
    order = Order("run/0", 1, "b", opened.plan, "hash")
    good = [reply_content(Order("run/0", 1, c, opened.plan, "h"), dict(opened.messages[c]), 5, {})
            for c in ("a", "b")]  # fmt: skip
    one = Policy(min_clients=1)
    replies = [read_reply(grid.create_message(good[0], "train", 1, "1"), "a", "run/0", opened)]
    want = close_round(rule, opened, state, replies, one).state.adapter
    refused = 0
    for _ in range(2000):
        content = reply_content(order, dict(opened.messages["b"]), 5, {})
        message = spoil(grid.create_message(RecordDict(dict(content)), "train", 1, "1"))
        found = read_reply(message, "b", "run/0", opened)
        if isinstance(found, Failure):
            refused += 1
            closed = close_round(rule, opened, state, [*replies, found], one)
            assert same_adapters(closed.state.adapter, want)
    assert count == 2000
    assert refused > 1900
