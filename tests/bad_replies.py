"""Clients that fail on Flower's strategy loop, and how: what its tests and the fault table share.

A fault is done by client 1 in every round; the others go on as if nothing were.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from bench import Place
from flower_grid import App, Change, LocalGrid
from flwr.app import Array, Context, Error, Message, Metadata

from fedlora.flower.app import client
from fedlora.flower.serving import serve
from fedlora.flower.wire import FORM
from fedlora.run import execute

NODES: list[dict[str, Any]] = [{"partition-id": number} for number in range(3)]
LENIENT = {"run__min_clients": 1, "run__max_failed_rounds": 2, "run__rounds": 2}
FAULTY = "1"
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Fault:
    """What client 1 does, the options of a grid that make it so, its code in rounds 1 and 2."""

    done: str
    options: Callable[[], Options]
    codes: tuple[str, str]


def on_flower(place: Place, name: str, options: Options | None = None, **changes: Any) -> Path:
    """A run on Flower's strategy loop, its messages handed over by a grid with these options."""
    flat = place.config(name, **changes).flat()
    chosen = {"app": client, "nodes": NODES} | dict(options or {})
    return serve(LocalGrid(run_config=flat, **chosen), flat)


def run_without(place: Place, name: str, client: str, **changes: Any) -> Path:
    """The plain loop over the other clients: a run of which this one has never been a part."""
    job = place.job(name, **changes)
    rows, heldout = (
        {other: part for other, part in parts.items() if other != client}
        for parts in (job.data.rows, job.data.heldout)
    )
    return execute(replace(job, data=replace(job.data, rows=rows, heldout=heldout)))


def trained_by(message: Message) -> str:
    """The client whose training this is a reply of; empty for any other message."""
    if message.has_error() or message.metadata.message_type != "train":
        return ""
    return str(message.content.config_records["reply"].get("client", ""))


def of_client(name: str, spoil: Change) -> Change:
    """Spoils the training replies of one client, and no other message."""
    return lambda reply: spoil(reply) if trained_by(reply) == name else reply


def plain(values: np.ndarray) -> Array:
    return Array(str(values.dtype), values.shape, FORM, values.tobytes())


def with_array(edit: Callable[[np.ndarray], Any]) -> Change:
    """Another array in place of the one that holds all tensors."""

    def spoil(reply: Message) -> Message:
        arrays = reply.content.array_records["arrays"]
        made = edit(np.frombuffer(arrays["packed"].data, "<f4"))
        arrays["packed"] = made if isinstance(made, Array) else plain(made)
        return reply

    return spoil


def with_layout(edit: Callable[[list[int]], Any], which: str = "lora_B") -> Change:
    """Another shape for one tensor; None takes it out of the layout."""

    def spoil(reply: Message) -> Message:
        layout = reply.content.config_records["layout"]
        name = next(name for name in layout if which in name)
        made = edit(layout.pop(name))
        if made is not None:
            layout[name] = made
        return reply

    return spoil


def with_value(key: str, value: Any) -> Change:
    def spoil(reply: Message) -> Message:
        reply.content.config_records["reply"][key] = value
        return reply

    return spoil


def with_figure(name: str, value: Any) -> Change:
    def spoil(reply: Message) -> Message:
        reply.content.metric_records["metrics"][name] = value
        return reply

    return spoil


def without(record: str) -> Change:
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


def of_superlink(code: int) -> Change:
    """What Flower itself answers in place of a node, from no node's address."""

    def spoil(reply: Message) -> Message:
        said = reply.metadata
        metadata = Metadata(
            run_id=1, message_id="", src_node_id=1, dst_node_id=1, group_id="", ttl=0.0,
            reply_to_message_id=said.reply_to_message_id, created_at=said.created_at,
            message_type="system",
        )  # fmt: skip
        return Message(error=Error(code, "Flower says why"), metadata=metadata)

    return spoil


def with_header(shape: str) -> Change:
    """An array in NumPy's own format whose header says what its sender likes."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    header = text.encode().ljust(117) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    return with_array(lambda a: Array("float32", a.shape, "numpy.ndarray", data))


def a_round_late() -> Options:
    """Every answer arrives in place of the next round's."""
    kept: list[Message] = []

    def late(reply: Message) -> Message | None:
        kept.append(reply)
        return kept.pop(0) if len(kept) > 1 else None

    return {"change": of_client(FAULTY, late)}


def twice(order: Callable[[Sequence[Message]], list[Message]]) -> Callable[[], Options]:
    """A second answer with other numbers arrives behind the first, or before it."""
    other = with_array(lambda a: 2 * a)

    def shuffle(replies: list[Message]) -> list[Message]:
        pairs = [[r, other(copy.deepcopy(r))] if trained_by(r) == FAULTY else [r] for r in replies]
        return [reply for pair in pairs for reply in order(pair)]

    return lambda: {"shuffle": shuffle}


def unasked() -> Options:
    """Every node that is not asked in a round answers as well, as one that was."""
    nodes: set[int] = set()

    def shuffle(replies: list[Message]) -> list[Message]:
        asked = {reply.metadata.src_node_id for reply in replies}
        nodes.update(asked)
        answers = [reply for reply in replies if trained_by(reply)]
        return replies + [_sent_by(node, r) for r in answers[:1] for node in sorted(nodes - asked)]

    return {"shuffle": shuffle}


def _sent_by(node: int, reply: Message) -> Message:
    made = copy.deepcopy(reply)
    made.metadata.__dict__["_src_node_id"] = node  # Flower gives it no setter
    return made


def diverging(message: Message, context: Context) -> Message:
    """The client's training, from arrays so large that it really diverges."""
    if _order_for(message) == FAULTY:
        message = with_array(lambda a: np.full_like(a, 3e38))(message) or message
    return client(message, context)


def raising(message: Message, context: Context) -> Message:
    if _order_for(message) == FAULTY:
        raise RuntimeError("out of memory")
    return client(message, context)


def misled(message: Message, context: Context) -> Message:
    if _order_for(message) == FAULTY:
        message.content.config_records["order"]["client"] = "0"
    return client(message, context)


def _order_for(message: Message) -> str:
    order = message.content.config_records["order"]
    return str(order.get("client", ""))


def spoiling(spoil: Change) -> Callable[[], Options]:
    return lambda: {"change": of_client(FAULTY, spoil)}


def running(app: App) -> Callable[[], Options]:
    return lambda: {"app": app}


def limited(**limits: Any) -> Callable[[], Options]:
    """Its node config has these limits."""
    own = {key.replace("_", "-"): value for key, value in limits.items()}
    return lambda: {"nodes": [node | own if node == NODES[1] else node for node in NODES]}


def fault(done: str, code: str, spoil: Change) -> Fault:
    return Fault(done, spoiling(spoil), (code, code))


FAULTS = [
    Fault("its training diverges", running(diverging), ("raised", "raised")),
    Fault("its training raises an exception", running(raising), ("error", "error")),
    fault("its process exits, Flower says so", "error", an_error),
    fault("its node is gone, Flower says so", "error", of_superlink(5)),
    fault("no answer before the deadline", "missing", lambda reply: None),
    fault("no answer in its time, Flower says so", "missing", of_superlink(3)),
    Fault("every answer a round late", a_round_late, ("missing", "stale")),
    fault("an answer to another run", "stale", with_value("run", "other/0")),
    fault("NaN in an array", "tensors", with_array(lambda a: a * np.float32(np.nan))),
    fault("Inf in an array", "tensors", with_array(lambda a: a + np.float32(np.inf))),
    fault("a tensor of a shape that would broadcast", "shapes", with_layout(lambda s: [1, s[1]])),
    fault("a tensor transposed", "shapes", with_layout(lambda s: s[::-1])),
    fault("a tensor of negative size", "shapes", with_layout(lambda s: [-s[0], -s[1]])),
    fault("a text as a tensor's shape", "shapes", with_layout(str)),
    fault("an array in float64", "dtypes", with_array(lambda a: a.astype(np.float64))),
    fault("an array pickled", "dtypes",
          with_array(lambda a: Array("float32", a.shape, "pickle", b"cos\nsystem\n"))),
    fault("an array with a header of a petabyte", "dtypes", with_header(f"({10**15},)")),
    fault("an array with half a header", "dtypes", with_header("(")),
    fault("a tensor missing", "names", with_layout(lambda shape: None)),
    fault("a tensor too many", "names", with_one_more),
    fault("an array beside the one asked for", "names", with_a_stowaway),
    fault("1 MB in a small array", "size",
          with_array(lambda a: Array("float32", a.shape, FORM, b"0" * 10**6))),
    fault("an array cut short", "size", with_array(lambda a: a[:-1])),
    fault("bytes that are no numbers", "size",
          with_array(lambda a: Array("float32", a.shape, FORM, b"rubbish"))),
    Fault("two answers, the good one first", twice(list), ("twice", "twice")),
    Fault("two answers, the good one last", twice(lambda p: [*reversed(p)]),
          ("twice", "twice")),
    fault("no arrays at all", "message", without("arrays")),
    fault("no word of the arrays' shapes", "message", without("layout")),
    fault("0 examples", "examples", with_value("examples", 0)),
    fault("-5 examples", "values", with_value("examples", -5)),
    fault("1.5 examples", "values", with_value("examples", 1.5)),
    fault("`True` examples", "values", with_value("examples", True)),
    fault("a megabyte of text as examples", "values", with_value("examples", "x" * 10**6)),
    fault("2^62 examples", "examples", with_value("examples", 2**62)),
    fault("NaN as its training loss", "metrics", with_figure("train_loss", math.nan)),
    fault("10^308 seconds of training", "metrics", with_figure("seconds_compute", 1e308)),
    fault("no figures of its training", "metrics", without("metrics")),
    fault("a list among its scores", "metrics", with_figure("evaluation.accuracy", [0.5])),
    Fault("its node does not allow the rule", limited(rules="ffa"), ("rule", "rule")),
    Fault("its node allows no rounds", limited(max_rounds=0), ("rounds", "rounds")),
    Fault("its node allows another base model", limited(base="0000"), ("base", "base")),
    Fault("the order it gets is another client's", running(misled), ("client", "client")),
]  # fmt: skip
