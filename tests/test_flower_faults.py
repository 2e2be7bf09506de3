"""Clients that fail on Flower: every bad reply is refused with its code and changes nothing."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_replies import FAULTS, FAULTY, LENIENT, NODES, Fault, on_flower, run_without, unasked
from bench import Place, adapter_bytes, records
from conftest import random_adapter, same_adapters
from flower_grid import LocalGrid
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedlora.flower.wire import FORM, Order, read_reply, reply_content
from fedlora.policy import PLAIN, Policy
from fedlora.records import FIGURES
from fedlora.rounds import Failure, close_round, open_round
from fedlora.rules import get_rule
from fedlora.server import ServerState

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]


@pytest.fixture
def place(tiny: Tiny, tmp_path: Path) -> Place:
    return Place(tiny("bert"), tmp_path)


@pytest.fixture(scope="module")
def without(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, bytes]:
    """A place, and the bytes of the plain loop over the clients that are not faulty."""
    place = Place(tiny("bert"), tmp_path_factory.mktemp("faults"))
    return place, adapter_bytes(run_without(place, "without", FAULTY, **LENIENT))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.done)
def test_a_bad_reply_is_refused_and_the_adapter_is_that_of_the_others(
    without: tuple[Place, bytes], fault: Fault
) -> None:
    place, want = without
    spoiled = on_flower(place, f"fault-{FAULTS.index(fault)}", fault.options(), **LENIENT)
    assert adapter_bytes(spoiled) == want
    found = [record["failures"] for record in records(spoiled)[1:]]
    assert [[(f["client"], f["code"]) for f in failures] for failures in found] == [
        [(FAULTY, code)] for code in fault.codes
    ]
    for failures in found:
        assert f"client {FAULTY}" in failures[0]["reason"]
        assert len(failures[0]["reason"]) < 500


def test_an_answer_that_nobody_asked_for_is_named_and_changes_nothing(place: Place) -> None:
    """Two of three clients are asked in a round; the third answers as well."""
    changes = {"merge__participation": 0.6, "run__rounds": 3}
    folder = on_flower(place, "unasked", unasked(), **changes)
    assert adapter_bytes(folder) == adapter_bytes(place.run("plain", **changes))
    for record in records(folder)[1:]:
        (failure,) = record["failures"]
        assert failure["code"] == "unasked"
        assert failure["client"] not in record["clients"]
        assert len(record["clients"]) == 2


def test_too_few_replies_keep_the_adapter_and_then_end_the_run_resumable(place: Place) -> None:
    """Rounds 2 and 3 fail; the third in a row would end it, and round 4 is whole again."""
    silent = {2, 3}

    def change(reply: Message) -> Message | None:
        values = reply.content.config_records["reply"]
        return None if values.get("round") in silent else reply

    whole = on_flower(place, "whole", {"change": change}, run__rounds=4, run__max_failed_rounds=3)
    log = records(whole)
    assert [len(record["failures"]) for record in log] == [0, 0, 3, 3, 0]
    assert log[1]["global"] == log[2]["global"] == log[3]["global"] != log[4]["global"]
    with pytest.raises(ValueError, match=r"round 3: 0 of 3 clients .* 2\. round in a row; stopped"):
        on_flower(place, "ended", {"change": change}, run__rounds=4, run__max_failed_rounds=2)
    silent.clear()
    resumed = on_flower(place, "ended", run__rounds=4, run__max_failed_rounds=2)
    assert [record["round"] for record in records(resumed)] == [0, 1, 2, 3, 4]


def test_a_node_that_says_late_who_it_is_is_asked_once_and_takes_part_from_then_on(
    place: Place,
) -> None:
    """A node that hangs does not hold up the others, and its answer is not lost."""
    changes = {"flower__wait": 0.5, **LENIENT, "run__rounds": 3}
    seen: list[Any] = []

    def change(reply: Message) -> Message:
        values = reply.content.config_records["reply"]
        seen.append((values["client"], values.get("round")))
        return reply

    def held(reply: Message) -> bool:
        says = reply.content.config_records["reply"]
        return says["client"] == "2" and "round" not in says and ("1", 1) not in seen

    folder = on_flower(place, "late", {"change": change, "held": held}, **changes)
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
    whole = on_flower(place, "whole", **changes)
    seen: list[int] = []

    def dies(reply: Message) -> Message | None:
        seen.append(reply.content.config_records["reply"].get("round") or 0)
        if seen.count(4) == 2:
            raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        on_flower(place, "stopped", {"change": dies}, **changes)
    if damaged:
        newest = max((place.folder / "stopped" / "checkpoints").iterdir())
        newest.write_bytes(newest.read_bytes()[:-3])
    assert adapter_bytes(on_flower(place, "stopped", **changes)) == adapter_bytes(whole)


@pytest.mark.parametrize("changes", [{"client__optimiser": "keep"}, {"merge__head": "local"}])
def test_a_run_of_the_same_name_and_seed_knows_nothing_of_the_one_before(
    place: Place, changes: dict[str, Any]
) -> None:
    """Nodes keep their states where the server's run directory is not."""
    changes |= {"run__rounds": 4, "merge__participation": 0.6}
    nodes = [node | {"state": str(place.folder / "nodes")} for node in NODES]
    before = adapter_hashes(on_flower(place, "again", {"nodes": nodes}, **changes))
    states = kept_states(place)
    assert states
    shutil.rmtree(place.folder / "again")
    again = on_flower(place, "again", {"nodes": nodes}, **changes)
    assert adapter_hashes(again) == before
    both = kept_states(place)
    assert states.items() <= both.items()
    assert len(both) == 2 * len(states)
    assert not set(states.values()) & {both[path] for path in both.keys() - states.keys()}  # owners


def kept_states(place: Place) -> dict[Path, bytes]:
    """What the nodes keep, of all runs."""
    return {path: path.read_bytes() for path in place.folder.glob("nodes/*/states/*/*.state")}


def adapter_hashes(folder: Path) -> dict[str, bytes]:
    """The saved tensors, whatever the folder that a run without a global adapter has."""
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}
    assert found
    return found


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
                values = content.config_records["reply"]
                values[rng.choice([*values, "code", "new"])] = rng.choice(made)()
            elif turn < 0.8:
                odd = [math.nan, -math.inf, 1e300, [0.5], 2**40]
                content.metric_records["metrics"][rng.choice(FIGURES)] = rng.choice(odd)
            else:
                kinds = [ArrayRecord(), ConfigRecord(), MetricRecord()]
                content[rng.choice(["arrays", "reply", "metrics"])] = rng.choice(kinds)
                break
        return reply

    start = random_adapter(0)
    state, rule = ServerState(start), get_rule("fra")
    opened = open_round(rule, start, state, 1, ["a", "b"], seed=0, participation=1.0, policy=PLAIN)
    grid = LocalGrid(lambda message, context: message, {}, [{}])
    order = Order("run/0", 1, "b", opened.plan, "hash", "id")
    figures = dict.fromkeys(FIGURES, 0.5)
    other = replace(order, client="a")
    good = reply_content(other, dict(opened.messages["a"]), 5, figures)
    one = Policy(min_clients=1)
    replies = [read_reply(grid.create_message(good, "train", 1, "1"), "a", "run/0", opened)]
    want = close_round(rule, opened, state, replies, one).state.adapter
    refused = 0
    for _ in range(2000):
        content = reply_content(order, dict(opened.messages["b"]), 5, figures)
        message = spoil(grid.create_message(RecordDict(dict(content)), "train", 1, "1"))
        found = read_reply(message, "b", "run/0", opened)
        if isinstance(found, Failure):
            refused += 1
            closed = close_round(rule, opened, state, [*replies, found], one)
            assert same_adapters(closed.state.adapter, want)
    assert count == 2000
    assert refused > 1900
