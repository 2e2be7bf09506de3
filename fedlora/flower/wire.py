"""Messages as Flower carries them: arrays and plain values, checked before anybody looks at them.

No pickle and no format to parse: the bytes of float32 numbers, beside texts and numbers. All
tensors are one array, since Flower sends an array as three objects and each object in a request of
its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedlora.adapter import Adapter, Part, flatten
from fedlora.errors import PublicError
from fedlora.records import FIGURES, KINDS, OPTIONAL, SCORES
from fedlora.rounds import Failure, Opened, Reply
from fedlora.rules import Plan

ARRAYS, LAYOUT, ORDER, REPLY, METRICS = "arrays", "layout", "order", "reply", "metrics"
PACKED = "packed"  # the one array: the tensors of the layout one after another, by sorted name
FORM = "float32-le"  # an array's bytes: its numbers in C order, little-endian, and nothing else
REASON = 400  # characters of a reason that are kept
Packed: TypeAlias = dict[str, ArrayRecord | ConfigRecord]
LARGEST = 1e30  # of a client's figures: sums over clients and rounds stay finite


@dataclass(frozen=True)
class Order:
    """What a client is asked to do in a round, beside the arrays.

    `run` names the federation, whoever starts it again; `run_id` is of this run alone, and owns
    what a client keeps for itself.
    """

    run: str
    round: int
    client: str
    plan: Plan
    base: str
    run_id: str


class WireError(PublicError):
    """A message that is not what it should be; `code` is for machines."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def packed(tensors: Mapping[str, Tensor]) -> Packed:
    """The records of named float32 tensors: their shapes, and their numbers in one array."""
    layout: dict[str, Any] = {name: list(tensors[name].shape) for name in sorted(tensors)}
    data = b"".join(_bytes(tensors[name]) for name in layout)
    array = Array("float32", (len(data) // 4,), FORM, data)
    return {ARRAYS: ArrayRecord({PACKED: array}), LAYOUT: ConfigRecord(layout)}


def _bytes(tensor: Tensor) -> bytes:
    values = tensor.detach().numpy().astype("<f4", casting="equiv")  # TypeError unless float32
    return bytes(values.tobytes())


def tensors_of(
    content: RecordDict, want: Mapping[str, tuple[int, ...]], *, free: str = ""
) -> dict[str, Tensor]:
    """The tensors of a message, each of the shape it should have; WireError for anything else.

    Sizes are looked at before bytes are. With `free`, names that end in it or in its pair
    (`frozen_A`, `frozen_B`) may be there as well, of any rank that their layer can have.
    """
    layout, record = content.config_records.get(LAYOUT), content.array_records.get(ARRAYS)
    if layout is None or record is None:
        raise WireError("message", "the message holds no arrays, or not their layout")
    if odd := sorted(record.keys() - {PACKED}):
        raise WireError("names", f"array {odd[0]!r} is not the packed one")
    shapes = {name: _shape(layout, name) for name in sorted(layout)}
    for name, shape in shapes.items():
        if name not in want and not (free and free in name):
            raise WireError("names", f"array {name!r} was not asked for")
        if name in want and shape != want[name]:
            raise WireError("shapes", f"array {name!r} has shape {shape}, expected {want[name]}")
    if missing := sorted(want.keys() - shapes.keys()):
        raise WireError("names", f"array {missing[0]!r} is missing ({len(missing)} in all)")
    sizes = [math.prod(shape) for shape in shapes.values()]
    values, ends = _numbers(record, sum(sizes)), accumulate(sizes)
    return {
        name: torch.from_numpy(values[end - size : end].reshape(shape).astype(np.float32))
        for (name, shape), size, end in zip(shapes.items(), sizes, ends, strict=True)
    }


def _shape(layout: ConfigRecord, name: str) -> tuple[int, ...]:
    sizes = layout[name]
    if not isinstance(sizes, list):
        raise WireError("shapes", f"array {name!r} has shape {sizes!r}")
    whole = [size for size in sizes if isinstance(size, int) and size >= 0]
    if len(whole) < len(sizes):
        raise WireError("shapes", f"array {name!r} has shape {sizes!r}")
    return tuple(whole)


def _numbers(record: ArrayRecord, count: int) -> NDArray[np.float32]:
    array = record.get(PACKED)
    if array is None:
        raise WireError("message", "the message holds no array")
    if array.dtype != "float32" or array.stype != FORM:
        raise WireError("dtypes", f"the arrays are {array.stype} of {array.dtype}")
    if len(array.data) != 4 * count:
        raise WireError("size", f"the arrays bring {len(array.data)} bytes for {count} numbers")
    return np.frombuffer(array.data, "<f4")


def order_content(order: Order, records: Packed) -> RecordDict:
    """The content of a training message; `records` may be shared by many of them."""
    values: dict[str, Any] = {
        "run": order.run,
        "round": order.round,
        "client": order.client,
        "trains": ",".join(sorted(order.plan.trains)),
        "shares": ",".join(sorted(order.plan.shares)),
        "receives": ",".join(sorted(order.plan.receives)),
        "base": order.base,
        "run_id": order.run_id,
    }
    return RecordDict({**records, ORDER: ConfigRecord(values)})


def read_order(content: RecordDict) -> Order:
    """The order of a training message; WireError where it is none."""
    values = content.config_records.get(ORDER)
    if values is None:
        raise WireError("message", "the message holds no order")
    texts = {key: _text(values, key) for key in ("run", "client", "base", "run_id")}
    plan = Plan(*(_parts(_text(values, key)) for key in ("trains", "shares", "receives")))
    round = _count(values, "round")
    return Order(texts["run"], round, texts["client"], plan, texts["base"], texts["run_id"])


def reply_content(
    order: Order, tensors: Mapping[str, Tensor], examples: int, metrics: Mapping[str, float]
) -> RecordDict:
    """The content of a client's reply."""
    values: dict[str, Any] = {
        "run": order.run,
        "round": order.round,
        "client": order.client,
        "examples": examples,
    }
    return RecordDict(
        {
            **packed(tensors),
            REPLY: ConfigRecord(values),
            METRICS: MetricRecord({name: float(value) for name, value in metrics.items()}),
        }
    )


def refusal_content(client: str, code: str, reason: str) -> RecordDict:
    """The content of a reply that says no."""
    return RecordDict({REPLY: ConfigRecord({"client": client, "code": code, "reason": reason})})


def read_reply(message: Message, client: str, run: str, opened: Opened) -> Reply | Failure:
    """A client's answer, its arrays of the right names, shapes and type; or why it is not used.

    `client` is whom the message was sent to; what a reply says of itself must agree.
    """
    if message.has_error():
        reason = message.error.reason or "no reason"
        return Failure(client, "error", f"client {client}: {reason[:REASON]}")
    try:
        return _answer(message.content, client, run, opened)
    except WireError as error:
        return Failure(client, error.code, f"client {client}: {str(error)[:REASON]}")


def _answer(content: RecordDict, client: str, run: str, opened: Opened) -> Reply | Failure:
    values = content.config_records.get(REPLY)
    if values is None:
        raise WireError("message", "the reply holds no record of itself")
    if "code" in values:
        code, reason = _text(values, "code"), _text(values, "reason")
        return Failure(client, code[:40], f"client {client}: {reason[:REASON]}")
    said = (_text(values, "run"), _count(values, "round"), _text(values, "client"))
    if said != (run, opened.round, client):
        raise WireError("stale", f"it answers {said}, asked was {(run, opened.round, client)}")
    tensors = tensors_of(content, shapes_of(opened.held[client], opened.plan.shares))
    metrics = content.metric_records.get(METRICS) or MetricRecord()
    return Reply(client, tensors, _count(values, "examples"), _figures(metrics))


def shapes_of(adapter: Adapter, parts: frozenset[Part]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of these parts."""
    return {name: tuple(tensor.shape) for name, tensor in flatten(adapter, parts).items()}


def _text(values: ConfigRecord, key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str):
        raise WireError("values", f"{key} = {value!r} is no text")
    return value


def _count(values: ConfigRecord, key: str) -> int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise WireError("values", f"{key} = {value!r} is no whole number")
    return value


def _figures(record: MetricRecord) -> dict[str, float]:
    """The figures that a round's record is made of, all of them; what else is there is left out."""
    kinds = [kind for kind in KINDS if any(name.startswith(f"{kind}.") for name in record)]
    figures: dict[str, float] = {}
    given = [name for name in OPTIONAL if name in record]
    for name in [*FIGURES, *given, *(f"{kind}.{score}" for kind in kinds for score in SCORES)]:
        value = record.get(name)
        if not isinstance(value, float) or not abs(value) < LARGEST:
            raise WireError("metrics", f"{name} = {value!r} is no number below {LARGEST:g}")
        figures[name] = value
    return figures


def _parts(text: str) -> frozenset[Part]:
    parts: dict[str, Part] = {"A": "A", "B": "B", "head": "head"}
    names = [name for name in text.split(",") if name]
    if odd := [name for name in names if name not in parts]:
        raise WireError("values", f"{odd[0]!r} is no part of an adapter")
    return frozenset(parts[name] for name in names)
