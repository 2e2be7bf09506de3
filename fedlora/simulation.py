"""A federation in one process: a loop over the two functions that hold it together.

Knows neither models nor files: `fit` brings the training, the caller looks at each round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TypeAlias

from fedlora.adapter import Adapter, ClientResult, ClientState, byte_count, copied, flatten, overlay
from fedlora.policy import PLAIN, Policy, cut_for
from fedlora.rules import Plan, Rule
from fedlora.server import (
    ServerState,
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

    `personal` as in `personal_adapters`.
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
    policy: Policy = PLAIN,
) -> Iterator[Round]:
    """Runs the rounds 1..rounds one after another and yields each as it ends.

    `fit(client, round, plan, adapter, state)` is a client's half. Clients run in sorted order; as
    `fit` depends on its arguments alone, any order gives the same bits. Client state stays in a
    dict here.
    """
    state = ServerState(start)
    states: dict[str, ClientState] = {}
    for round in range(1, rounds + 1):
        plan = plan_round(rule, policy.head, state, round)
        results: list[ClientResult] = []
        up = down = 0
        for client in sample_clients(clients, participation, seed, round):
            receiver = policy.receivers.get(client)
            message = downlink(state, plan, receiver)
            down += byte_count(message)
            held = overlay(message, cut_for(start, receiver))
            result = fit(client, round, plan, copied(held), states.get(client, ClientState()))
            states[client] = result.state
            shared = flatten(copied(result.adapter), plan.shares)
            up += byte_count(shared)
            results.append(replace(result, adapter=receive(client, shared, held, plan)))
        began = perf_counter()
        state = aggregate(rule, state, results, round, policy)
        elapsed = perf_counter() - began
        personal = personal_adapters(state.adapter, states, plan, policy)
        yield Round(round, state, results, personal, up, down, elapsed)


def personal_adapters(
    adapter: Adapter, states: Mapping[str, ClientState], plan: Plan, policy: Policy
) -> dict[str, Adapter]:
    """Each client's own adapter, the parts it keeps for itself in place.

    Empty where it keeps none.
    """
    own = plan.trains - plan.shares
    return {
        client: overlay(flatten(state.adapter, own), cut_for(adapter, policy.receivers.get(client)))
        for client, state in sorted(states.items())
        if own and state.adapter is not None
    }
