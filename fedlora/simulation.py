"""A federation in one process: a loop over the two functions that hold it together.

Knows neither models nor files: `fit` brings the training, the caller looks at each round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TypeAlias

from torch import Tensor

from fedlora.adapter import Adapter, ClientResult, ClientState, byte_count, copied, flatten, overlay
from fedlora.policy import PLAIN, Policy, cut_for
from fedlora.rounds import Failure, Merge, Opened, Reply, close_round, open_round
from fedlora.rules import Plan, Rule
from fedlora.server import ServerState, aggregate

Fit: TypeAlias = Callable[[str, int, Plan, Adapter, ClientState], ClientResult]
Shelve: TypeAlias = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Progress:
    """Where a federation stands between two rounds: all that the next round depends on.

    `round` is the last finished one (0: none); `clients` what each client keeps for itself, where
    the engine keeps it for them.
    """

    round: int
    state: ServerState
    clients: Mapping[str, ClientState] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Round:
    """One finished round: where it leads, what came back, and what it cost (bytes, seconds).

    `personal` as in `personal_adapters`; `failures` are the clients whose replies were not used.
    """

    progress: Progress
    results: Sequence[ClientResult]
    failures: Sequence[Failure]
    personal: dict[str, Adapter]
    bytes_up: int
    bytes_down: int
    seconds_aggregate: float

    @property
    def round(self) -> int:
        """The number of the round, from 1."""
        return self.progress.round

    @property
    def state(self) -> ServerState:
        """The server after the round."""
        return self.progress.state


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
    progress: Progress | None = None,
    shelve: Shelve = lambda tensors: tensors,
    merge: Merge = aggregate,
) -> Iterator[Round]:
    """Runs the rounds up to `rounds` one after another and yields each as it ends.

    `fit(client, round, plan, adapter, state)` is a client's half; a ValueError of it is that
    client's failure. Clients run in sorted order; as `fit` depends on its arguments alone, any
    order gives the same bits. Client state stays in a dict here. With `progress` the rounds after
    it are run, to the same bits as without the pause. `shelve` puts a reply's tensors where they
    wait for the others (out of memory, for many clients). `merge` and FederationError as in
    `close_round`.
    """
    state, states, done = ServerState(start), dict[str, ClientState](), 0
    if progress is not None:
        state, states, done = progress.state, dict(progress.clients), progress.round
    for round in range(done + 1, rounds + 1):
        opened = open_round(
            rule, start, state, round, clients,
            seed=seed, participation=participation, policy=policy,
        )  # fmt: skip
        replies = [_answer(fit, opened, client, states, shelve) for client in opened.messages]
        states |= {reply.client: reply.state for reply in replies if isinstance(reply, Reply)}
        began = perf_counter()
        closed = close_round(rule, opened, state, replies, policy, merge)
        elapsed = perf_counter() - began
        state = closed.state
        yield Round(
            Progress(round, state, dict(states)),
            closed.results,
            closed.failures,
            personal_adapters(state.adapter, states, opened.plan, policy),
            closed.bytes_up,
            sum(map(byte_count, opened.messages.values())),
            elapsed,
        )


def personal_adapters(
    adapter: Adapter, states: Mapping[str, ClientState], plan: Plan, policy: Policy
) -> dict[str, Adapter]:
    """Each client's own adapter, what it keeps for itself in place; empty where it keeps none."""
    own = plan.trains - plan.shares
    return {
        client: overlay(flatten(state.adapter, own), cut_for(adapter, policy.receivers.get(client)))
        for client, state in sorted(states.items())
        if own and state.adapter is not None
    }


def _answer(
    fit: Fit, opened: Opened, client: str, states: Mapping[str, ClientState], shelve: Shelve
) -> Reply | Failure:
    """The client's half, on copies of all that it is given."""
    state = states.get(client, ClientState())
    try:
        result = fit(client, opened.round, opened.plan, copied(opened.held[client]), state)
    except ValueError as error:
        return Failure(client, "raised", str(error))
    shared = flatten(copied(result.adapter), opened.plan.shares)
    return Reply(client, shelve(shared), result.examples, result.metrics, result.state)
