"""Client-level privacy on a trusted server: whole updates clipped, summed, noised, then merged.

Neighbours: one client's answers left out; who is asked is public. McMahan et al. 2018 (1710.06963)
with a fixed denominator and uniform weights, in the space of the increments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from fedlora.adapter import (
    Adapter,
    ClientResult,
    Factors,
    change,
    converted,
    frobenius,
    mix,
    precise,
    rescaled,
)
from fedlora.budget import turn
from fedlora.lowrank import Gauge, truncate
from fedlora.policy import Policy
from fedlora.privacy.accounting import Mechanism
from fedlora.privacy.designs import noised_shape
from fedlora.privacy.ledger import Terms, intend
from fedlora.privacy.noise import gaussian
from fedlora.rules import Rule
from fedlora.server import ServerState, plan_round
from fedlora.sums import EXCHANGES, Add, Message, add_up, summed, weighted

Design: TypeAlias = Literal["increment", "rows", "core", "power", "sketch"]
CLIP = "clip"  # in the server's memory: the clip in force
HIDDEN = 1e-12  # of the terms: more than rounding makes of them in any of the sums here
COUNT_SHARE = 0.05  # of the squared budget, for the count that moves the clip


@dataclass(frozen=True)
class Noising:
    """How updates are made private: the clip, the noise for all of a round, who divides.

    `noise` is that of the whole round, as if it were one Gaussian of sensitivity 1: two messages
    and the count of the clip share it. `clients` is the fixed denominator, the number that is asked
    in a round, whoever answers. `quantile` above 0 moves the clip towards that quantile of the
    norms (Andrew et al. 2021, 1905.03871) at `rate`.
    """

    design: Design
    noise: float
    clients: int
    clip: float
    quantile: float = 0.0
    rate: float = 0.2

    @property
    def message_noise(self) -> float:
        """Noise of each message over the clip in force."""
        messages = EXCHANGES[self.design].messages
        share = 1 - COUNT_SHARE if self.quantile else 1.0
        return self.noise * math.sqrt(messages / share)

    @property
    def count_noise(self) -> float:
        """Noise of the count of small updates over its sensitivity, which is 1/2 about 1/2."""
        return self.noise / math.sqrt(COUNT_SHARE)

    @property
    def mechanisms(self) -> list[Mechanism]:
        """What a round costs, each charged apart."""
        found = [Mechanism(self.message_noise, EXCHANGES[self.design].messages)]
        return found + ([Mechanism(self.count_noise)] if self.quantile else [])


@dataclass(frozen=True)
class PrivateMerge:
    """The server's half of a round under client-level privacy, in place of `server.aggregate`."""

    noising: Noising
    ledger: Path
    terms: Terms
    seed: int

    def __call__(
        self,
        rule: Rule,
        state: ServerState,
        results: Sequence[ClientResult],
        round: int,
        policy: Policy,
    ) -> ServerState:
        """Charges the round, then merges; nothing that was not noised is left in the state.

        The state's `budget` is made of the noised sums alone: no update is in it as it was.
        ValueError, with nothing drawn, where the budget is spent.
        """
        intend(self.ledger, self.terms, round, self.noising.mechanisms)
        clip = state.memory.get(CLIP, self.noising.clip)
        heads = "head" in plan_round(rule, policy.head, state, round).shares
        before = state.adapter if heads else replace(state.adapter, dense={})
        ordered = [r.adapter for r in sorted(results, key=lambda result: result.client)]
        norms = [update_norm(update(before, after)) for after in ordered]
        factors = [clip_factor(norm, clip) / self.noising.clients for norm in norms]
        sigma = self.noising.message_noise * clip / self.noising.clients
        parts = [pair for pair in zip(ordered, factors, strict=True) if pair[1]]
        layers, budget = {}, {}
        for name, prev in before.layers.items():
            layers[name], budget[name] = self._layer(rule, name, prev, parts, sigma, round)
        dense = {name: _dense(name, tensor, parts, sigma) for name, tensor in before.dense.items()}
        adapter = replace(state.adapter, layers=layers, dense={**state.adapter.dense, **dense})
        memory = {**state.memory, CLIP: clip}
        if self.noising.quantile:
            memory[CLIP] = self._next_clip(clip, norms)
        return ServerState(adapter, memory, budget=budget)

    def _layer(
        self,
        rule: Rule,
        name: str,
        before: Factors,
        parts: Sequence[tuple[Adapter, float]],
        sigma: float,
        round: int,
    ) -> tuple[Factors, dict[str, float]]:
        """One layer of the next adapter (float32) and its budget; clients are read one by one."""
        design, prev = self.noising.design, precise(before)
        exchange = EXCHANGES[design]
        updates, add = Clipped(name, prev, parts), noising(sigma * exchange.stretch)
        added = summed(exchange, prev, updates, self.seed + round, add)
        after = converted(joined(design, rule, prev, added), torch.float32, "cpu")
        numbers = math.prod(noised_shape(design, prev.shape, prev.rank))
        figures = {
            "wanted": frobenius(mix([prev, added], [1.0, 1.0], 1.0)),
            "tail": frobenius(mix([prev, added, precise(after)], [1.0, 1.0, -1.0], 1.0)),
            "noise": sigma * exchange.stretch * math.sqrt(numbers),
        }
        return after, figures | turn(before, after)

    def _next_clip(self, clip: float, norms: Sequence[float]) -> float:
        """C exp(-rate (share below C, noised, minus the quantile)).

        A client adds 1/2 or -1/2 to the count, and nothing where it did not answer: its answer
        moves the count by 1/2 at most.
        """
        bits = sum(0.5 if norm <= clip else -0.5 for norm in norms)
        noised = bits + 0.5 * self.noising.count_noise * float(gaussian(1)[0])
        below = 0.5 + noised / self.noising.clients
        return clip * math.exp(-self.noising.rate * (below - self.noising.quantile))


def update(before: Adapter, after: Adapter) -> Adapter:
    """What a client changed: each layer's increment as factors of rank 2 r, dense differences."""
    layers = {n: change(precise(before.layers[n]), precise(f)) for n, f in after.layers.items()}
    dense = {n: after.dense[n].double() - tensor.double() for n, tensor in before.dense.items()}
    return Adapter(layers, dense)


def update_norm(moved: Adapter) -> float:
    """A bound of the Frobenius norm over all increments and dense tensors, never below it.

    From the factors alone: ||s L R|| = s ||T_L T_R^T|| with the triangles of QR, O(r^2 (m + n)). To
    it comes what rounding can hide where terms of size T cancel, 1e-12 T: a client whose factors
    are huge and whose increment is small is cut more, never less. Inf where it is not finite.
    """
    norms = [_bound(factors) for factors in moved.layers.values()]
    norms += [float(tensor.norm()) for tensor in moved.dense.values()]
    return math.hypot(*norms) if all(map(math.isfinite, norms)) else math.inf


def clip_factor(norm: float, clip: float) -> float:
    """min(1, clip / norm); 0 for an update that is not finite, so that it counts as none."""
    if not math.isfinite(norm):
        return 0.0
    return 1.0 if norm <= clip else clip / norm


def noising(sigma: float) -> Add:
    """An adder that puts N(0, sigma^2) on every number of the sum, drawn anew for each message."""

    def add(messages: Iterable[Message]) -> Message:
        total = add_up(messages)
        return {name: tensor + sigma * _gaussian_like(tensor) for name, tensor in total.items()}

    return add


@dataclass(frozen=True)
class Clipped:
    """One layer's clipped updates of the clients, made one after another as they are read.

    The first one is zero, so that a round in which nobody answered has a sum too.
    """

    name: str
    prev: Factors
    parts: Sequence[tuple[Adapter, float]]

    def __iter__(self) -> Iterator[Factors]:
        """Begins anew each time."""
        prev = self.prev
        yield Factors(prev.A[:1], torch.zeros_like(prev.B[:, :1]), prev.scaling)
        for after, factor in self.parts:
            yield weighted(change(prev, precise(after.layers[self.name])), factor)


def joined(design: Design, rule: Rule, prev: Factors, added: Factors) -> Factors:
    """The new global factors: post-processing, whatever was noised.

    For `rows` A stays as it is; else the SVD of the sum, in the gauge that the rule was given.
    """
    if design == "rows":
        step = torch.linalg.lstsq(prev.A.mT, added.A.mT, driver="gelsd").solution.mT
        return Factors(prev.A, prev.B + rescaled(added, prev.scaling).B @ step, prev.scaling)
    whole = mix([prev, added], [1.0, 1.0], prev.scaling)
    gauge = cast(Gauge, rule.options.get("gauge", "balanced"))
    return truncate(whole, prev.rank, gauge=gauge, previous=prev)


def _dense(
    name: str, before: Tensor, parts: Sequence[tuple[Adapter, float]], sigma: float
) -> Tensor:
    start = before.double()
    total = start + sigma * _gaussian_like(start)
    for after, factor in parts:
        total = total + factor * (after.dense[name].double() - start)
    return total.float().contiguous()


def _gaussian_like(tensor: Tensor) -> Tensor:
    return torch.from_numpy(gaussian(tensor.numel())).view(tensor.shape).to(tensor.device)


def _bound(factors: Factors) -> float:
    plain = rescaled(factors, 1.0)
    left, right = torch.linalg.qr(plain.B, mode="r").R, torch.linalg.qr(plain.A.mT, mode="r").R
    return float((left @ right.mT).norm()) + HIDDEN * float(left.norm()) * float(right.norm())
