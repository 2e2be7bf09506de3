"""The server's half of a round: choose clients, check what came back, merge it; all pure.

Knows rules and adapters; no model, no transport, no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

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
)
from fedlora.rules import Plan, Rule, checked_weights
from fedlora.seeding import numpy_generator

Head: TypeAlias = Literal["average", "freeze", "local"]
Weighting: TypeAlias = Literal["examples", "uniform"]


@dataclass(frozen=True, eq=False)
class ServerState:
    """The server between two rounds: the global adapter and what the rule may look back at.

    `memory` holds the figures of the last merge (`merge_error`); a rule's `plan` reads it.
    """

    adapter: Adapter
    memory: Mapping[str, float] = field(default_factory=dict)


def plan_round(rule: Rule, head: Head, state: ServerState, round: int) -> Plan:
    """What clients train, share and are sent in this round: the rule's plan and the head policy."""
    plan = rule.plan(round, state.memory)
    if head == "freeze":
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
    count = max(1, math.ceil(participation * len(ids) - 1e-9))
    chosen = numpy_generator(seed, "sample", round).permutation(len(ids))[:count]
    return sorted(ids[index] for index in chosen)


def downlink(state: ServerState, plan: Plan) -> dict[str, Tensor]:
    """The tensors sent to a client; what the plan leaves out it has from the common start."""
    return flatten(state.adapter, plan.receives)


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


def base_weights(results: Sequence[ClientResult], weighting: Weighting) -> Tensor:
    """The weights of the average, summing to one: by example counts, or all alike (float64)."""
    counts = [result.examples for result in results]
    for result in results:
        if isinstance(result.examples, bool) or result.examples <= 0:
            raise ValueError(
                f"client {result.client} reports {result.examples!r} examples: it must be above 0"
            )
    shares = torch.tensor(
        counts if weighting == "examples" else [1] * len(counts), dtype=torch.float64
    )
    return shares / shares.sum()


def aggregate(
    rule: Rule,
    state: ServerState,
    results: Sequence[ClientResult],
    round: int,
    *,
    weighting: Weighting = "examples",
) -> ServerState:
    """The next server state: every layer merged by the rule, dense tensors averaged; pure.

    A residual that the rule returns is dropped. The order of `results` does not matter (sorted by
    client here). Sums in float64; float32 comes out.
    `memory["merge_error"]` is ||sum w_k dW_k - dW||_F / ||sum w_k dW_k||_F over all layers,
    against the weights that the rule used; float32 at rest puts its floor near 1e-7.
    """
    if not results:
        raise ValueError(f"round {round} has no results to merge: keep the last adapter instead")
    ordered = sorted(results, key=lambda result: result.client)
    names = [result.client for result in ordered]
    if len(set(names)) != len(names):
        raise ValueError(f"round {round} holds two results of one client: {', '.join(names)}")
    weights = base_weights(ordered, weighting)
    if rule.reweigh is not None:
        weights = checked_weights(
            rule.reweigh([state.adapter] * len(ordered), ordered, weights), len(ordered)
        )

    layers: dict[str, Factors] = {}
    missed = norm = 0.0
    for name in sorted(state.adapter.layers):
        sent = [_precise(result.adapter.layers[name]) for result in ordered]
        merged = rule(_precise(state.adapter.layers[name]), sent, weights)
        factors = merged.factors if isinstance(merged, Merged) else merged
        layers[name] = converted(factors, torch.float32, "cpu")
        mean = mix(sent, weights, factors.scaling)
        missed += frobenius(mix([mean, _precise(layers[name])], [1.0, -1.0], factors.scaling)) ** 2
        norm += frobenius(mean) ** 2

    dense = {
        name: sum(
            (w * r.adapter.dense[name].double() for w, r in zip(weights, ordered, strict=True)),
            start=torch.zeros((), dtype=torch.float64),
        )
        .float()
        .cpu()
        for name in sorted(state.adapter.dense)
    }
    error = math.sqrt(missed / norm) if norm > 0 else 0.0
    return ServerState(Adapter(layers, dense), {**state.memory, "merge_error": error})


def _precise(factors: Factors) -> Factors:
    return converted(factors, torch.float64, factors.A.device)
