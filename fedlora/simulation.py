"""A federation in one process: a loop over the two functions that hold it together.

Knows neither models nor files: `fit` brings the training, the caller looks at each round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TypeAlias

from fedlora.adapter import Adapter, ClientResult, ClientState, byte_count, copied, flatten, overlay
from fedlora.rules import Plan, Rule
from fedlora.server import (
    Head,
    ServerState,
    Weighting,
    aggregate,
    downlink,
    plan_round,
    receive,
    sample_clients,
)

Fit: TypeAlias = Callable[[str, int, Plan, Adapter, ClientState], ClientResult]


@dataclass(frozen=True, eq=False)
class Round:
    """One finished round: the new state, what came back, and what it cost (bytes, seconds).

    `personal` is each client's personal adapter, the global one with the parts that it trains but
    does not share in place; empty where nothing is personal.
    """

    round: int
    state: ServerState
    results: list[ClientResult]
    personal: dict[str, Adapter]
    bytes_up: int
    bytes_down: int
    seconds_aggregate: float


def simulate(
    rule: Rule,
    fit: Fit,
    start: Adapter,
    clients: Sequence[str],
    *,
    rounds: int,
    seed: int = 0,
    participation: float = 1.0,
    head: Head = "average",
    weighting: Weighting = "examples",
) -> Iterator[Round]:
    """Runs the rounds 1..rounds one after another and yields each as it ends.

    `fit(client, round, plan, adapter, state)` is a client's half. Clients run in sorted order; as
    `fit` depends on its arguments alone, any order gives the same bits. Client state stays in a
    dict here.
    """
    state = ServerState(start)
    states: dict[str, ClientState] = {}
    for round in range(1, rounds + 1):
        plan = plan_round(rule, head, state, round)
        down = downlink(state, plan)
        common = overlay(down, start)
        results: list[ClientResult] = []
        up = 0
        for client in sample_clients(clients, participation, seed, round):
            sent = copied(common)
            result = fit(client, round, plan, sent, states.get(client, ClientState()))
            states[client] = result.state
            shared = flatten(copied(result.adapter), plan.shares)
            up += byte_count(shared)
            results.append(replace(result, adapter=receive(client, shared, common, plan)))
        began = perf_counter()
        state = aggregate(rule, state, results, round, weighting=weighting)
        elapsed = perf_counter() - began
        personal = {
            client: overlay(flatten(own.adapter, plan.trains - plan.shares), state.adapter)
            for client, own in sorted(states.items())
            if own.adapter is not None
        }
        yield Round(round, state, results, personal, up, byte_count(down) * len(results), elapsed)
