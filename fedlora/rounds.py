"""One round in two halves: what is sent to whom, and what becomes of what came back; pure.

Engines differ in how messages travel between the halves, and in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch import Tensor

from fedlora.adapter import Adapter, ClientResult, ClientState, byte_count, overlay
from fedlora.policy import Policy, Receiver, cut_for
from fedlora.rules import Plan, Rule
from fedlora.server import ServerState, aggregate, downlink, plan_round, receive, sample_clients

MOST = 2**53  # examples that a client may report: larger weights are no longer exact
Merge: TypeAlias = Callable[[Rule, ServerState, Sequence[ClientResult], int, Policy], ServerState]
FAILED = "failed_rounds"  # in the server's memory: rounds in a row that too few clients answered


@dataclass(frozen=True, eq=False)
class Opened:
    """A round that waits for replies: its plan, the message for each client, what each one holds.

    `messages` are the named tensors that travel; `held` completes them with what a client has from
    the common start.
    """

    round: int
    plan: Plan
    messages: Mapping[str, Mapping[str, Tensor]]
    held: Mapping[str, Adapter]


@dataclass(frozen=True, eq=False)
class Reply:
    """What came back from one client, not looked at yet; `state` where the engine keeps it."""

    client: str
    tensors: Mapping[str, Tensor]
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    state: ClientState = field(default_factory=ClientState)


@dataclass(frozen=True)
class Failure:
    """A client whose reply was not used: a code for machines, a reason for people."""

    client: str
    code: str
    reason: str


@dataclass(frozen=True, eq=False)
class Closed:
    """A finished round: the next state, the results it is made of, the failures, bytes received."""

    state: ServerState
    results: Sequence[ClientResult]
    failures: Sequence[Failure]
    bytes_up: int


class FederationError(ValueError):
    """Too many rounds in a row that too few clients answered; the last good state is kept."""


def open_round(
    rule: Rule,
    start: Adapter,
    state: ServerState,
    round: int,
    clients: Sequence[str],
    *,
    seed: int,
    participation: float,
    policy: Policy,
) -> Opened:
    """The clients of this round with the message for each; `start` is the common, seeded start."""
    plan = plan_round(rule, policy.head, state, round)
    messages: dict[str, Mapping[str, Tensor]] = {}
    held: dict[str, Adapter] = {}
    made: dict[Receiver | None, tuple[Mapping[str, Tensor], Adapter]] = {}
    for client in sample_clients(clients, participation, seed, round):
        receiver = policy.receivers.get(client)
        if receiver not in made:  # one message for all that are alike
            message = downlink(state, plan, receiver)
            made[receiver] = message, overlay(message, cut_for(start, receiver))
        messages[client], held[client] = made[receiver]
    return Opened(round, plan, messages, held)


def close_round(
    rule: Rule,
    opened: Opened,
    state: ServerState,
    replies: Iterable[Reply | Failure],
    policy: Policy,
    merge: Merge = aggregate,
) -> Closed:
    """Checks every reply, merges the good ones, and names the others.

    Fewer than `policy.min_clients` good replies (0: all that were asked) leave the adapter as it is
    to the bit; after `policy.max_failed_rounds` such rounds in a row FederationError ends the run.
    The order of replies does not matter; a client that answers twice is left out. `merge` takes the
    place of `aggregate` where what is merged must be private.
    """
    results: dict[str, ClientResult] = {}
    sizes: dict[str, int] = {}
    failures: list[Failure] = []
    for reply in replies:
        found = reply if isinstance(reply, Failure) else checked_reply(opened, reply)
        if isinstance(found, ClientResult) and found.client in sizes:
            results.pop(found.client, None)  # which one counts would depend on their order
            reason = f"client {found.client} answered twice: no answer of it is used"
            found = Failure(found.client, "twice", reason)
        if isinstance(found, Failure):
            failures.append(found)
            continue
        results[found.client] = found
        sizes[found.client] = byte_count(reply.tensors) if isinstance(reply, Reply) else 0
    answered = results.keys() | {failure.client for failure in failures}
    failures += [
        Failure(client, "missing", f"client {client} did not answer in time")
        for client in sorted(opened.messages.keys() - answered)
    ]
    failures.sort(key=lambda failure: (failure.client, failure.code, failure.reason))
    good = [results[client] for client in sorted(results)]
    received = sum(sizes[client] for client in results)
    if not policy.whoever and len(good) < (policy.min_clients or len(opened.messages)):
        return Closed(_failed(opened, state, good, failures, policy), good, failures, received)
    merged = merge(rule, state, good, opened.round, policy)
    merged = replace(merged, memory={**merged.memory, FAILED: 0.0})
    return Closed(merged, good, failures, received)


def checked_reply(opened: Opened, reply: Reply) -> ClientResult | Failure:
    """The reply as a result, completed from what the client was sent; or why it is refused."""
    held = opened.held.get(reply.client)
    if held is None:
        return Failure(reply.client, "unasked", f"client {reply.client} is not of this round")
    if isinstance(reply.examples, bool) or not isinstance(reply.examples, int):
        reason = f"client {reply.client} reports {reply.examples!r} examples: no whole number"
        return Failure(reply.client, "examples", reason)
    if not 0 < reply.examples <= MOST:
        reason = f"client {reply.client} reports {reply.examples} examples: it must be 1 to {MOST}"
        return Failure(reply.client, "examples", reason)
    try:
        adapter = receive(reply.client, reply.tensors, held, opened.plan)
    except ValueError as error:
        return Failure(reply.client, "tensors", str(error))
    return ClientResult(reply.client, adapter, reply.examples, reply.metrics, reply.state)


def _failed(
    opened: Opened,
    state: ServerState,
    good: Sequence[ClientResult],
    failures: Sequence[Failure],
    policy: Policy,
) -> ServerState:
    """The state after a round that too few answered: the adapter as it was, the count one
    higher.
    """
    count = state.memory.get(FAILED, 0.0) + 1
    if count >= policy.max_failed_rounds:
        reasons = "; ".join(f"{failure.code}: {failure.reason}" for failure in failures)
        wanted = policy.min_clients or len(opened.messages)
        raise FederationError(
            f"round {opened.round}: {len(good)} of {len(opened.messages)} clients gave a usable "
            f"reply, {wanted} are wanted, for the {int(count)}. round in a row; stopped, the last "
            f"merged adapter is kept ({reasons})"
        )
    return replace(state, memory={**state.memory, FAILED: count}, budget={})
