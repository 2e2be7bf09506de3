"""The server's half of a round: choose clients, check what came back, merge it; all pure.

Knows rules and adapters; no model, no transport, no file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import overload

import torch
from torch import Tensor

from fedlora.adapter import (
    Adapter,
    ClientResult,
    Factors,
    Merged,
    converted,
    flatten,
    frobenius,
    mix,
    overlay,
    precise,
    rescaled,
    sketched_frobenius,
    stacked,
)
from fedlora.budget import round_budget, settled, totals
from fedlora.lowrank import compress
from fedlora.policy import (
    PLAIN,
    Head,
    Policy,
    Receiver,
    Term,
    cut_for,
    residual_policy,
    terms,
    unsent,
    with_residual,
)
from fedlora.rules import SETTLED, Plan, Residual, Rule
from fedlora.seeding import numpy_generator
from fedlora.settings import round_size

EXACT = 8e9  # multiplications up to which the norm of a layer is exact
HELD = 2**25  # bytes of one layer of all clients up to which they are converted at once
NORMS = {"drop": (), "fold": ("folded", "cut"), "carry": ("carried",)}  # of what is not dropped


@dataclass(frozen=True, eq=False)
class ServerState:
    """The server between two rounds: the global adapter and what the rule may look back at.

    `memory` holds the figures of the last merge (see `aggregate`); a rule's `plan` reads it.
    `carried` is what the policy `carry` still owes, layer by layer; `budget` the norms and angles
    of the last round's merge (see `fedlora.budget`), empty where nothing was merged.
    """

    adapter: Adapter
    memory: Mapping[str, float] = field(default_factory=dict)
    carried: Mapping[str, Factors] = field(default_factory=dict)
    budget: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def plan_round(rule: Rule, head: Head, state: ServerState, round: int) -> Plan:
    """What clients train, share and are sent in this round: the rule's plan and the head policy.

    A rule that plans the head itself (fedsa keeps it local) has its way, unless it is frozen.
    """
    plan = rule.plan(round, state.memory)
    if head == "freeze":
        return Plan(plan.trains - {"head"}, plan.shares - {"head"}, plan.receives - {"head"})
    if "head" in plan.trains:
        return plan
    if head == "local":
        return replace(plan, trains=plan.trains | {"head"})
    return Plan(plan.trains | {"head"}, plan.shares | {"head"}, plan.receives | {"head"})


def sample_clients(
    clients: Sequence[str], participation: float, seed: int, round: int
) -> list[str]:
    """The clients of a round, sorted: ceil(participation * K) of them, drawn from a named stream.

    Drawn over the sorted ids, so neither their order nor the engine changes the draw.
    """
    ids = sorted(clients)
    if not 0 < participation <= 1:
        raise ValueError(f"participation {participation!r} is outside (0, 1]")
    count = round_size(len(ids), participation)
    chosen = numpy_generator(seed, "sample", round).permutation(len(ids))[:count]
    return sorted(ids[index] for index in chosen)


def downlink(state: ServerState, plan: Plan, receiver: Receiver | None = None) -> dict[str, Tensor]:
    """The tensors sent to a client, cut to its rank; what the plan leaves out it has from the
    start.

    What was folded so far is always sent whole, so that a client may join or come back at any time.
    """
    return flatten(cut_for(state.adapter, receiver), plan.receives | {"frozen"})


def receive(client: str, tensors: Mapping[str, Tensor], sent: Adapter, plan: Plan) -> Adapter:
    """What a client shared, checked and completed from what it was sent: a rule sees whole factors.

    ValueError names client, tensor and reason: missing or extra names, shape, dtype, NaN or Inf.
    """
    expected = flatten(sent, plan.shares)
    if missing := sorted(set(expected) - set(tensors)):
        raise ValueError(f"client {client} did not send {missing[0]!r} ({len(missing)} missing)")
    if extra := sorted(set(tensors) - set(expected)):
        raise ValueError(f"client {client} sent {extra[0]!r}, which this round does not share")
    for name, tensor in tensors.items():
        want = expected[name]
        if tensor.shape != want.shape:
            raise ValueError(
                f"client {client} sent {name!r} with shape {tuple(tensor.shape)}, "
                f"the server expects {tuple(want.shape)}"
            )
        if tensor.dtype != want.dtype:
            raise ValueError(
                f"client {client} sent {name!r} as {tensor.dtype}, the server expects {want.dtype}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"client {client} sent {name!r} with NaN or Inf: its training diverged"
            )
    return overlay(tensors, sent)


def aggregate(
    rule: Rule,
    state: ServerState,
    results: Sequence[ClientResult],
    round: int,
    policy: Policy = PLAIN,
) -> ServerState:
    """The next server state: every layer merged by the rule, dense tensors averaged; pure.

    The order of `results` does not matter (sorted by client here). Sums in float64; float32 comes
    out. `memory` gets, all relative to ||sum w_k dW_k||_F over all layers:
    `merge_error`, what the model lacks of the merge's target (the weighted mean of the increments,
    with the weights that the rule used, and what was carried); `fold_tail`, the part of it that
    `fold_rank` cut; `carried`, what the next round still owes; and `frozen_rank`, the largest rank
    of the folded increments. `settled` counts rounds as `budget.settled`, from the second merge
    on; `unsent`, where clients have ranks of their own, is `policy.unsent`. float32 at rest puts
    the floor of the errors near 1e-7; where a norm would cost more than the merge (1,600 rank rows
    of a 4096 x 4096 layer) it is sketched, within a few percent. Where one layer of all clients is
    large (32 MB) a rule gets them lazily, so that one which reads them one after another (means of
    factors) needs the memory of one.
    """
    ordered = _ordered(results, round)
    fate = residual_policy(rule, policy.residual)
    merging = _Merging(with_residual(rule, fate), fate, policy.fold_rank, round)
    receivers = [policy.receivers.get(result.client) for result in ordered]
    made = {receiver: cut_for(state.adapter, receiver) for receiver in set(receivers)}
    sent = [made[receiver] for receiver in receivers]
    parts = terms(rule, sent, ordered, policy)
    heard = [term for term in parts if term.coefficient] or parts[:1]  # others shape nothing
    done = {
        name: _merged_layer(merging, state, heard, name) for name in sorted(state.adapter.layers)
    }
    adapter = Adapter(
        {name: layer.factors for name, layer in done.items()},
        {name: _averaged(parts, name) for name in sorted(state.adapter.dense)},
        {name: layer.frozen for name, layer in done.items() if layer.frozen and layer.frozen.rank},
    )
    carried = {name: layer.carried for name, layer in done.items() if layer.carried}
    got, weights = [r.adapter for r in ordered], [p.coefficient for p in parts[: len(ordered)]]
    moved = round_budget(state.adapter, sent, got, weights, adapter)
    budget = {name: {**layer.norms, **moved[name]} for name, layer in done.items()}
    figures = _figures(fate, done) | {SETTLED: _settled(state, budget, weights)}
    if policy.receivers:
        figures["unsent"] = unsent(state.adapter, parts)
    return ServerState(adapter, {**state.memory, **figures}, carried, budget)


def _ordered(results: Sequence[ClientResult], round: int) -> list[ClientResult]:
    """The results by client; ValueError where there is none, or two of one client."""
    if not results:
        raise ValueError(f"round {round} has no results to merge: keep the last adapter instead")
    ordered = sorted(results, key=lambda result: result.client)
    names = [result.client for result in ordered]
    if len(set(names)) != len(names):
        raise ValueError(f"round {round} holds two results of one client: {', '.join(names)}")
    return ordered


def rehearse(rule: Rule, start: Adapter) -> None:
    """Merges two clients that changed nothing, one layer: ValueError for what the rule refuses.

    For before a run: an option out of the rule's range shows itself before anybody trains.
    """
    first = Adapter(dict([*start.layers.items()][:1]))
    results = [ClientResult(client, first, 1) for client in ("a", "b")]
    aggregate(rule, ServerState(first), results, 1)


@dataclass(frozen=True)
class _Merging:
    """How the layers of one round are merged."""

    rule: Rule
    fate: Residual
    fold_rank: int
    round: int


@dataclass(frozen=True, eq=False)
class _Layer:
    """One merged layer, float32, and the norms (float64) that its figures are made of.

    `wanted` of the merge's target, `tail` of what the model lacks of it; `folded`, and `cut` by the
    cap; `carried`, what is owed.
    """

    factors: Factors
    frozen: Factors | None
    carried: Factors | None
    norms: Mapping[str, float]


def _merged_layer(
    merging: _Merging, state: ServerState, parts: Sequence[Term], name: str
) -> _Layer:
    """One layer of all terms merged, its residual folded or carried."""
    prev = precise(state.adapter.layers[name])
    weights = torch.tensor([term.coefficient for term in parts], dtype=torch.float64)
    frozen, carried = state.adapter.frozen.get(name), state.carried.get(name)
    if carried is not None:
        weights = torch.cat([weights, weights.new_ones(1)])
    lazy = _Terms(parts, name, prev.scaling, carried)
    factors: Sequence[Factors] = lazy if lazy.size > HELD else list(lazy)
    answer = merging.rule.combine(prev, factors, weights, merging.round, name)
    merged, residual = (
        (answer.factors, answer.residual) if isinstance(answer, Merged) else (answer, None)
    )
    result = converted(rescaled(merged, prev.scaling), torch.float32, "cpu")
    lost = [(-1.0, precise(result))]
    norms = dict.fromkeys(NORMS[merging.fate], 0.0)
    if merging.fate == "fold" and residual is not None:
        pressed = _folded(frozen, residual, merging.fold_rank)
        frozen, norms["cut"] = pressed.factors, frobenius(pressed.residual)
        norms["folded"] = frobenius(residual)
        lost += [(-1.0, residual), (1.0, pressed.residual)]
    if merging.fate == "carry" and residual is not None:
        carried = compress(residual, merging.fold_rank or None).factors
        norms["carried"] = frobenius(carried)
    norms |= {"wanted": _size(factors, weights), "tail": _size(factors, weights, lost)}
    return _Layer(result, _at_rest(frozen), _at_rest(carried), norms)


@dataclass(frozen=True, eq=False)
class _Terms(Sequence[Factors]):
    """One layer of all terms, each converted to float64 when it is read."""

    parts: Sequence[Term]
    name: str
    scaling: float
    carried: Factors | None

    def __len__(self) -> int:
        return len(self.parts) + (self.carried is not None)

    @overload
    def __getitem__(self, index: int) -> Factors: ...
    @overload
    def __getitem__(self, index: slice) -> list[Factors]: ...
    def __getitem__(self, index: int | slice) -> Factors | list[Factors]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        if place == len(self.parts) and self.carried is not None:
            return precise(self.carried)
        return self.parts[place].factors(self.name, self.scaling)

    @property
    def size(self) -> int:
        """Bytes in float64."""
        layers = [term.adapter.layers[self.name] for term in self.parts]
        return sum(8 * (factors.A.numel() + factors.B.numel()) for factors in layers)


def _folded(frozen: Factors | None, residual: Factors, cap: int) -> Merged:
    """What is frozen with the residual added, in as few pairs as hold it, and what the cap cut."""
    whole = rescaled(residual, 1.0)
    if frozen is not None:
        whole = stacked(precise(frozen), whole)
    return compress(whole, cap or None)


def _figures(fate: Residual, layers: Mapping[str, _Layer]) -> dict[str, float]:
    """The memory of a merge, relative to the norm of what was wanted over all layers."""
    norms = totals({name: layer.norms for name, layer in layers.items()})
    wanted = norms.get("wanted") or math.inf
    figures = {"merge_error": norms.get("tail", 0.0) / wanted}
    if fate == "fold":
        ranks = (layer.frozen.rank for layer in layers.values() if layer.frozen)
        figures["fold_tail"] = norms.get("cut", 0.0) / wanted
        figures["frozen_rank"] = float(max(ranks, default=0))
    if fate == "carry":
        figures["carried"] = norms.get("carried", 0.0) / wanted
    return figures


def _settled(
    state: ServerState, budget: Mapping[str, Mapping[str, float]], weights: Sequence[float]
) -> float:
    """`budget.settled` from the second merge on: before the first, B is zero."""
    first = "merge_error" not in state.memory
    return 0.0 if first else settled(budget, weights, state.memory.get(SETTLED, 0.0))


def _size(
    terms: Sequence[Factors], weights: Tensor, more: Iterable[tuple[float, Factors]] = ()
) -> float:
    """The norm of the weighted sum and of some terms more, sketched where the exact one would cost
    more than the merge.
    """
    added = list(more)
    coefficients = [*weights.tolist(), *(coefficient for coefficient, _ in added)]
    every = chain(terms, (factors for _, factors in added))
    if isinstance(terms, _Terms):
        return sketched_frobenius(every, coefficients)
    whole = mix(every, coefficients, 1.0)
    m, n = whole.shape
    cost = whole.rank * min(whole.rank * (m + n), m * n)
    return frobenius(whole) if cost <= EXACT else sketched_frobenius([whole], [1.0])


def _at_rest(factors: Factors | None) -> Factors | None:
    return None if factors is None else converted(factors, torch.float32, "cpu")


def _averaged(parts: Sequence[Term], name: str) -> Tensor:
    """The sum of one dense tensor over all terms."""
    total = torch.zeros((), dtype=torch.float64)
    for term in parts:
        total = total + term.coefficient * term.adapter.dense[name].double().cpu()
    return total.float().contiguous()
