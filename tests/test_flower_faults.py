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
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedlora.flower.app import client
from fedlora.flower.serving import serve
from fedlora.flower.wire import FORM, Order, read_reply, reply_content
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


def plain(values: np.ndarray) -> Array:
    return Array(str(values.dtype), values.shape, FORM, values.tobytes())


def with_array(edit: Callable[[np.ndarray], Any]) -> Any:
    def spoil(reply: Message) -> Message:
        arrays = reply.content.array_records["arrays"]
        made = edit(np.frombuffer(arrays["packed"].data, "<f4"))
        arrays["packed"] = made if isinstance(made, Array) else plain(made)
        return reply

    return spoil


def with_layout(edit: Callable[[list[int]], Any], which: str = "lora_B") -> Any:
    """Another shape for one tensor; None takes it out of the layout."""

    def spoil(reply: Message) -> Message:
        layout = reply.content.config_records["layout"]
        name = next(name for name in layout if which in name)
        made = edit(layout.pop(name))
        if made is not None:
            layout[name] = made
        return reply

    return spoil


def with_value(key: str, value: Any) -> Any:
    def spoil(reply: Message) -> Message:
        reply.content.config_records["reply"][key] = value
        return reply

    return spoil


def without(record: str) -> Any:
    def spoil(reply: Message) -> Message:
        del reply.content[record]
        return reply

    return spoil


def with_one_more(reply: Message) -> Message:
    reply.content.config_records["layout"]["bert.pooler"] = [2, 2]
    packed = reply.content.array_records["arrays"]["packed"]
    packed.data, packed.shape = packed.data + bytes(16), (packed.shape[0] + 4,)
    return reply


def with_a_stowaway(reply: Message) -> Message:
    reply.content.array_records["arrays"]["bert.pooler"] = plain(np.zeros((2, 2), np.float32))
    return reply


def an_error(reply: Message) -> Message:
    return Message(error=Error(2, "the process died"), metadata=reply.metadata)


def with_header(text: str) -> Any:
    """An array in NumPy's own format whose header says what its sender likes."""
    header = text.encode().ljust(117) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    return with_array(lambda a: Array("float32", a.shape, "numpy.ndarray", data))


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }"
BAD = [
    ("nan", with_array(lambda a: a * np.float32(np.nan)), "tensors"),
    ("inf", with_array(lambda a: a + np.float32(np.inf)), "tensors"),
    ("broadcasts", with_layout(lambda shape: [1, shape[1]]), "shapes"),
    ("transposed", with_layout(lambda shape: shape[::-1]), "shapes"),
    ("flat", with_layout(lambda shape: [shape[0] * shape[1]]), "shapes"),
    ("below nothing", with_layout(lambda shape: [-shape[0], -shape[1]]), "shapes"),
    ("a text for a shape", with_layout(str), "shapes"),
    ("float64", with_array(lambda a: a.astype(np.float64)), "dtypes"),
    ("oversized", with_array(lambda a: Array("float32", a.shape, FORM, a.tobytes() + b"0000")),
     "size"),
    ("rubbish", with_array(lambda a: Array("float32", a.shape, FORM, b"rubbish")), "size"),
    ("pickle", with_array(lambda a: Array("float32", a.shape, "pickle", b"cos\nsystem\n")),
     "dtypes"),
    ("a petabyte", with_header(HEADER % 10**15), "dtypes"),
    ("beyond counting", with_header(HEADER % 10**22), "dtypes"),
    ("half a header", with_header("{("), "dtypes"),
    ("no arrays", without("arrays"), "message"),
    ("no layout", without("layout"), "message"),
    ("one missing", with_layout(lambda shape: None), "names"),
    ("one too many", with_one_more, "names"),
    ("a stowaway", with_a_stowaway, "names"),
    ("cut off", with_array(lambda a: a[:-1]), "size"),
    ("no examples", with_value("examples", 0), "examples"),
    ("negative", with_value("examples", -5), "values"),
    ("half", with_value("examples", 1.5), "values"),
    ("stale", with_value("round", 0), "stale"),
    ("another run", with_value("run", "other/0"), "stale"),
    ("error", an_error, "error"),
    ("silent", lambda reply: None, "missing"),
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


def test_a_stopped_server_goes_on_to_the_same_bytes(place: Place) -> None:
    """Nodes keep their moments on their own disk and start the repeated round from where it
    began.
    """
    changes = {"client__optimiser": "keep", "run__rounds": 4}
    whole = run(place, "whole", **changes)
    seen: list[int] = []

    def dies(reply: Message) -> Message | None:
        seen.append(reply.content.config_records["reply"].get("round") or 0)
        if seen.count(3) == 2:
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        run(place, "stopped", dies, **changes)
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
            data = values.tobytes()
        return Array(kind, shape, rng.choice([FORM, "pickle", ""]), data)

    count = 0

    def spoil(reply: Message) -> Message:
        nonlocal count
        count += 1
        content = reply.content
        for _ in range(rng.randrange(1, 4)):
            turn = rng.random()
            if turn < 0.3:
                arrays = content.array_records["arrays"]
                arrays[rng.choice([*arrays, "new"])] = array()
            elif turn < 0.7:
                values = content.config_records[rng.choice(["reply", "layout"])]
                values[rng.choice([*values, "code", "new"])] = rng.choice(made)()
            else:
                kinds = [ArrayRecord(), ConfigRecord(), MetricRecord()]
                content[rng.choice(["arrays", "reply", "layout"])] = rng.choice(kinds)
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
