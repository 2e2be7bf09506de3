"""Merging from sums alone: each client encodes, somebody adds, the server decodes what was added.

What a client sends is linear in its update and no longer than it, so that a protocol which only
ever shows a sum (secure aggregation), or a sum with noise (privacy), can carry it. An exchange is
of one layer; it may take two messages a round, the second one knowing the sum of the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float64
from torch import Tensor

from fedlora.adapter import Adapter, Factors, flatten, increment, mix, overlay, rescaled
from fedlora.rules import Plan
from fedlora.seeding import derive

Message: TypeAlias = Mapping[str, Tensor]
Public: TypeAlias = Mapping[str, Tensor]  # what everybody knows before a message
Add: TypeAlias = Callable[[Iterable[Message]], Message]

TESTS = 4  # random columns by which the warm sketch is checked
WEIGHT = "weight"
EXTRA = 8  # columns of the random sketch beyond r
FAR = 0.02  # error of the warm sketch on them above which a second message is asked for


@runtime_checkable
class Exchange(Protocol):
    """How one layer's sum of updates travels: what is sent, and what is made of the sum.

    All tensors are float64.
    """

    @property
    def messages(self) -> int:
        """The most messages that a round takes."""

    @property
    def stretch(self) -> float:
        """The largest norm of a message over that of its update."""

    def begin(self, prev: Factors, seed: int) -> Public:
        """What everybody derives from the last global factors and a public seed."""

    def encode(self, public: Public, update: Factors) -> Message:
        """What a client sends of its update; linear in it."""

    def follow(self, public: Public, total: Message) -> Public | Factors:
        """The sum of the updates (as far as it is known), or what the next message needs."""


@dataclass(frozen=True)
class Increment:
    """The update itself, m x n numbers: exact, and as much traffic as full fine-tuning."""

    messages: int = 1
    stretch: float = 1.0

    def begin(self, prev: Factors, seed: int) -> Public:
        """Nothing is needed."""
        return {}

    def encode(self, public: Public, update: Factors) -> Message:
        """delta W, dense."""
        return {"D": increment(update)}

    def follow(self, public: Public, total: Message) -> Factors:
        """The sum, as factors of full rank."""
        D = total["D"]
        m, n = D.shape
        if n <= m:
            return Factors(torch.eye(n, dtype=D.dtype, device=D.device), D, 1.0)
        return Factors(D, torch.eye(m, dtype=D.dtype, device=D.device), 1.0)


@dataclass(frozen=True)
class Rows:
    """D V on an orthonormal basis V (n x r) of the rows of the last A: m x r numbers.

    Exact where clients train B alone: their updates have no other rows. FFA-LoRA (2403.12313) with
    the basis made orthonormal, so that a message is as long as its update.
    """

    messages: int = 1
    stretch: float = 1.0

    def begin(self, prev: Factors, seed: int) -> Public:
        """The basis."""
        return {"V": row_basis(prev)}

    def encode(self, public: Public, update: Factors) -> Message:
        """D V."""
        return {"Y": moved(update, public["V"])}

    def follow(self, public: Public, total: Message) -> Factors:
        """Y V^T."""
        return Factors(public["V"].mT, total["Y"], 1.0)


@dataclass(frozen=True)
class Core:
    """U^T D V on bases of the last global increment: r x r numbers, and no new direction ever.

    U (m x r) is that of the columns of B; while B is zero, random columns stand in.
    """

    messages: int = 1
    stretch: float = 1.0

    def begin(self, prev: Factors, seed: int) -> Public:
        """Both bases."""
        return {"V": row_basis(prev), "U": column_basis(prev, seed)}

    def encode(self, public: Public, update: Factors) -> Message:
        """U^T D V."""
        return {"X": public["U"].mT @ moved(update, public["V"])}

    def follow(self, public: Public, total: Message) -> Factors:
        """U X V^T."""
        return Factors(public["V"].mT, public["U"] @ total["X"], 1.0)


@dataclass(frozen=True)
class Power:
    """One subspace iteration in two messages: Y = D V, then Z = Q^T D with Q the basis of Y.

    V is that of the last A's rows (FedPower, 2605.08443), or with `extra` 0 or more random columns
    beyond r an unrelated one (the two sketches of FedASK, 2507.09990). r (m + n) numbers.
    """

    extra: int = -1
    messages: int = 2
    stretch: float = 1.0

    def begin(self, prev: Factors, seed: int) -> Public:
        """The first basis."""
        if self.extra < 0:
            return {"V": row_basis(prev)}
        n = prev.shape[1]
        return {"V": random_basis(n, min(prev.rank + self.extra, *prev.shape), seed, prev.A)}

    def encode(self, public: Public, update: Factors) -> Message:
        """D V, then Q^T D."""
        if "Q" in public:
            return {"Z": against(public["Q"], update)}
        return {"Y": moved(update, public["V"])}

    def follow(self, public: Public, total: Message) -> Public | Factors:
        """Q, then Q Z."""
        if "Q" in public:
            return Factors(total["Z"], public["Q"], 1.0)
        return {**public, "Q": _basis(total["Y"])}


@dataclass(frozen=True)
class Warm:
    """FRA in one message of the adapter's size: Y = W V and Z = U^T W on the last bases.

    With Q the basis of Y the sum is Q X, U^T Q X = Z. Near the best rank-r approximation while the
    subspaces of two rounds overlap; a few random columns, sent too, tell when they do not, and
    then Z = Q^T W is asked for in a second message (always while B is zero). Encode whole
    increments, not updates: those have other subspaces.
    """

    messages: int = 2
    stretch: float = math.sqrt(3)  # three projections of one update
    tolerance: float = FAR

    def begin(self, prev: Factors, seed: int) -> Public:
        """Both bases and the columns for the test, scaled to an expected norm of one."""
        tests = random_basis(prev.shape[1], TESTS, seed, prev.A)
        known = {"V": row_basis(prev), "T": tests}
        return {**known, "U": column_basis(prev, seed)} if bool(prev.B.any()) else known

    def encode(self, public: Public, update: Factors) -> Message:
        """Y, Z and the test columns; in a second message Z alone."""
        left = public.get("Q", public.get("U"))
        Z = {} if left is None else {"Z": against(left, update)}
        if "Q" in public:
            return Z
        return {"Y": moved(update, public["V"]), "test": moved(update, public["T"]), **Z}

    def follow(self, public: Public, total: Message) -> Public | Factors:
        """The sum, or Q where the guess is too far off."""
        if "Q" in public:
            return Factors(total["Z"], public["Q"], 1.0)
        Q = _basis(total["Y"])
        if "U" in public:
            X = torch.linalg.lstsq(public["U"].mT @ Q, total["Z"], driver="gelsd").solution
            missed = float((Q @ (X @ public["T"]) - total["test"]).norm())
            if missed <= self.tolerance * float(total["test"].norm()):
                return Factors(X, Q, 1.0)
        return {**public, "Q": Q}


EXCHANGES: dict[str, Exchange] = {
    "increment": Increment(),
    "rows": Rows(),
    "core": Core(),
    "power": Power(),
    "sketch": Power(extra=EXTRA),
    "warm": Warm(),
}


def add_up(messages: Iterable[Message]) -> Message:
    """The sum of the messages, name by name, in their order; what a secure protocol would show.

    At least one message; one after another is held.
    """
    stream = iter(messages)
    total = dict(next(stream))
    for message in stream:
        total = {name: total[name] + tensor for name, tensor in message.items()}
    return total


def summed(
    exchange: Exchange,
    prev: Factors,
    updates: Iterable[Factors],
    seed: int,
    add: Add = add_up,
) -> Factors:
    """One layer's sum of updates as the exchange sees it; `add` is all that sees single messages.

    `updates` carry their weights (in B) and are read anew for each message, one after another. The
    result may have more rank than the adapter.
    """
    public = exchange.begin(prev, seed)
    for _ in range(exchange.messages):
        found = exchange.follow(public, add(map(partial(exchange.encode, public), updates)))
        if isinstance(found, Factors):
            return found
        public = found
    raise RuntimeError(f"{exchange} did not end after {exchange.messages} messages")


def linear_message(adapter: Adapter, plan: Plan, weight: float) -> Message:
    """What a client adds to the sum of a linear rule: its weight, and its shared tensors times it.

    `weight` is its number of examples, or 1 for all alike.
    """
    shared = flatten(adapter, plan.shares)
    return {WEIGHT: torch.tensor(float(weight), dtype=torch.float64)} | {
        name: weight * tensor.double() for name, tensor in shared.items()
    }


def linear_merge(total: Message, previous: Adapter) -> Adapter:
    """The means from the sums: what rules with the law `linear` make of one round (float32)."""
    weight = float(total[WEIGHT])
    if not weight > 0:
        raise ValueError(f"the weights of the clients sum to {weight}: nobody took part")
    means = {n: (t / weight).float().contiguous() for n, t in total.items() if n != WEIGHT}
    return overlay(means, previous)


def moved(update: Factors, columns: Float64[Tensor, "n c"]) -> Float64[Tensor, "m c"]:
    """D times some columns, in O((m + n) r c)."""
    plain = rescaled(update, 1.0)
    return plain.B @ (plain.A @ columns)


def against(columns: Float64[Tensor, "m c"], update: Factors) -> Float64[Tensor, "c n"]:
    """Some columns' transpose times D, in O((m + n) r c)."""
    plain = rescaled(update, 1.0)
    return (columns.mT @ plain.B) @ plain.A


def weighted(update: Factors, weight: float) -> Factors:
    """The update times a number."""
    return mix([update], [weight], update.scaling)


def row_basis(prev: Factors) -> Float64[Tensor, "n r"]:
    """An orthonormal basis of the rows of A."""
    return _basis(prev.A.mT)


def column_basis(prev: Factors, seed: int) -> Float64[Tensor, "m r"]:
    """An orthonormal basis of the columns of B; of random columns where B is zero."""
    if bool(prev.B.any()):
        return _basis(prev.B)
    return random_basis(prev.shape[0], prev.rank, seed, prev.B)


def random_basis(size: int, count: int, seed: int, like: Tensor) -> Float64[Tensor, "size count"]:
    """Random orthonormal columns of a public seed: the same for everybody."""
    stream = torch.Generator().manual_seed(derive(seed, "sums", size, count))
    drawn = torch.randn(size, min(size, count), generator=stream, dtype=torch.float64)
    return _basis(drawn).to(like.device)


def _basis(columns: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(columns).Q
    return Q
