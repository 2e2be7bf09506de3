"""The server's half on Flower: a strategy whose rounds are `open_round` and `close_round`.

Flower carries the messages; which clients take part, what is sent, what is refused and how it is
merged is decided by the same functions as in one process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedlora.adapter import WHOLE, Adapter, ClientState, byte_count, flatten
from fedlora.config import Config
from fedlora.flower.wire import (
    ORDER,
    REASON,
    REPLY,
    Order,
    Packed,
    order_content,
    packed,
    read_reply,
)
from fedlora.modes import GLOBAL, Step, loop_adapters, merge_policy
from fedlora.rounds import MOST, Closed, Failure, Merge, Opened, Reply, close_round, open_round
from fedlora.rules import get_rule
from fedlora.server import ServerState, aggregate
from fedlora.simulation import Progress

TRAIN, HELLO = "train", "query.hello"
PAUSE = 1.0  # seconds between two looks for nodes
EXPIRED = 3  # Flower's error code for a message whose time to live is over
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seen:
    """A node that has introduced itself."""

    node_id: int
    client: str
    examples: int
    base: str


class FedloraStrategy(Strategy):
    """A federation from its config: `progress` is where it stands, `note` hears of every round,
    `kept` gives what clients kept for themselves after a round, of those on this machine.

    Rounds count on from `progress`, so that a resumed run asks for the rounds that are left.
    """

    def __init__(
        self,
        config: Config,
        start: Adapter,
        clients: Sequence[str],
        *,
        base: str,
        progress: Progress | None = None,
        merge: Merge = aggregate,
        note: Callable[[Step], None] = lambda step: None,
        kept: Callable[[int], Mapping[str, ClientState]] = lambda _: {},
    ) -> None:
        self.config, self.start_adapter, self.clients = config, start, sorted(clients)
        self.rule = get_rule(config.merge.rule, **config.merge.options)
        self.policy = merge_policy(config, self.clients)
        self.base, self.note, self.merge = base, note, merge
        self.kept = kept
        self.run_id = ""  # of the run directory, once there is one
        self.progress = progress or Progress(0, ServerState(start))
        self.done_before = self.progress.round
        self.seen: dict[str, Seen] = {}
        self.opened: Opened | None = None
        self.asked: list[tuple[Metadata, str]] = []  # Flower gives a message its id as it is sent
        self.greeted: dict[str, int] = {}

    @property
    def run_name(self) -> str:
        """What every message of this federation carries: a late one of another run is stale."""
        return f"{self.config.run.name}/{self.config.run.seed}"

    def summary(self) -> None:
        """Logs what is about to run."""
        log.info("fedlora: rule %s, clients %s", self.rule.name, ", ".join(self.clients))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages of a round, to the nodes of its clients."""
        opened = open_round(
            self.rule, self.start_adapter, self.progress.state, self.done_before + server_round,
            self.clients, seed=self.config.run.seed,
            participation=self.config.merge.participation, policy=self.policy,
        )  # fmt: skip
        self.opened, self.asked = opened, []
        self.find_nodes(grid, opened.messages, self.config.flower.wait)
        messages = []
        made: dict[int, Packed] = {}  # clients that are alike are sent the same tensors
        for client, tensors in opened.messages.items():
            if client not in self.seen:
                continue  # close_round names it as missing
            if id(tensors) not in made:
                made[id(tensors)] = packed(tensors)
            node_id = self.seen[client].node_id
            order = Order(
                self.run_name, opened.round, client, opened.plan, self.base, self.run_id
            )  # fmt: skip
            message = grid.create_message(
                order_content(order, made[id(tensors)]), TRAIN, node_id, str(opened.round),
                self.config.flower.deadline,
            )  # fmt: skip
            self.asked.append((message.metadata, client))
            messages.append(message)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Checks and merges what came back; FederationError as in `close_round`."""
        opened = self.opened
        if opened is None:
            raise RuntimeError("a round is closed that was never opened")
        began = perf_counter()
        closed = close_round(
            self.rule, opened, self.progress.state, self.read(replies, opened), self.policy,
            self.merge,
        )  # fmt: skip
        self.progress = Progress(opened.round, closed.state, self.states(closed))
        for failure in closed.failures:
            log.warning("round %d: %s: %s", opened.round, failure.code, failure.reason)
            self.seen.pop(failure.client, None)  # ask anew who it is before the next round
        down = sum(byte_count(opened.messages[client]) for _, client in self.asked)
        self.note(
            Step(
                opened.round,
                loop_adapters(self.config, self.clients, {GLOBAL: self.progress}),
                closed.results,
                closed.state.memory,
                closed.bytes_up,
                down,
                perf_counter() - began,
                {GLOBAL: self.progress},
                closed.failures,
                closed.state.budget,
            )
        )
        error = closed.state.memory.get("merge_error", 0.0)
        return (
            ArrayRecord(flatten(closed.state.adapter, WHOLE)),
            MetricRecord({"clients": len(closed.results), "merge_error": error}),
        )

    def states(self, closed: Closed) -> Mapping[str, ClientState]:
        """The parts that clients keep, where those of all that answered are on this machine."""
        opened = self.opened
        if opened is None or opened.plan.trains <= opened.plan.shares:
            return {}
        found = self.kept(opened.round)
        return found if all(result.client in found for result in closed.results) else {}

    def read(self, replies: Iterable[Message], opened: Opened) -> list[Reply | Failure]:
        """Every reply as what `close_round` takes, by the node it came from.

        Where a node is gone Flower answers in its place, from an address of its own, to the
        message that it had for the node.
        """
        nodes = {sent.dst_node_id: client for sent, client in self.asked}
        sent_to = {sent.message_id: client for sent, client in self.asked}
        known = {seen.node_id: client for client, seen in self.seen.items()}
        found: list[Reply | Failure] = []
        for message in replies:
            client = nodes.get(message.metadata.src_node_id)
            if message.has_error():
                client = sent_to.get(message.metadata.reply_to_message_id, client)
            if client is None:
                name = known.get(message.metadata.src_node_id, "unknown")
                found.append(Failure(name, "unasked", f"client {name} is not of this round"))
            elif not (message.has_error() and message.error.code == EXPIRED):
                found.append(read_reply(message, client, self.run_name, opened))
        return found  # close_round names the others as missing

    def find_nodes(self, grid: Grid, wanted: Iterable[str], seconds: float) -> None:
        """Asks the connected nodes who they are until all wanted clients are there, or in vain.

        A question stays open: a node that answers it late is known from the next round on.
        """
        until = time.monotonic() + (seconds if not self.seen else min(seconds, 30.0))
        while True:
            self.greet(grid, set(grid.get_node_ids()))
            if set(wanted) <= self.seen.keys() or time.monotonic() > until:
                return
            time.sleep(PAUSE)

    def greet(self, grid: Grid, ids: Set[int]) -> None:
        """Asks those of the connected nodes that neither are known nor have been asked, and learns
        name, rows and base model of those that have answered.
        """
        self.seen = {name: seen for name, seen in self.seen.items() if seen.node_id in ids}
        self.greeted = {key: node_id for key, node_id in self.greeted.items() if node_id in ids}
        known = {seen.node_id for seen in self.seen.values()}
        content = RecordDict({ORDER: ConfigRecord({"run": self.run_name})})
        messages = [
            grid.create_message(content, HELLO, node_id, "hello", self.config.flower.wait)
            for node_id in sorted(ids - known - set(self.greeted.values()))
        ]
        if messages:
            grid.push_messages(messages)
        self.greeted |= {m.metadata.message_id: m.metadata.dst_node_id for m in messages}
        for message in grid.pull_messages(list(self.greeted)) if self.greeted else []:
            self.hear(message)

    def hear(self, message: Message) -> None:
        """A node's answer to who it is."""
        node_id = self.greeted.pop(message.metadata.reply_to_message_id)
        if message.has_error():
            log.warning("node %d did not introduce itself: %s", node_id, message.error.reason)
            return
        said = message.content.config_records.get(REPLY, ConfigRecord())
        if "code" in said:
            who, reason = (str(said.get(key, ""))[:REASON] for key in ("client", "reason"))
            log.warning("node %d (%s) did not introduce itself: %s", node_id, who or "-", reason)
            return
        seen = _seen(node_id, message.content)
        if seen.client in self.clients:
            earlier = self.seen.get(seen.client, seen).node_id
            if earlier != node_id:
                log.warning(
                    "two nodes call themselves %r, %d and now %d, which is asked from here on: "
                    "unless the first was stopped, give each a name of its own",
                    seen.client, earlier, node_id,
                )  # fmt: skip
            self.seen[seen.client] = seen
        else:
            log.warning("a node calls itself %r, which the run does not know", seen.client)

    def check_bases(self) -> None:
        """ValueError, naming both, where a node holds another base model than the server."""
        for seen in self.seen.values():
            if seen.base != self.base:
                raise ValueError(
                    f"client {seen.client} holds base model {seen.base}, the server {self.base}: "
                    "the same adapter would be two models; give both the same model.name, "
                    "revision and run.precision ('auto' is bfloat16 on GPUs that have it, float32 "
                    "elsewhere)"
                )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: clients evaluate in their training message."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Nothing to aggregate."""
        return None


def _seen(node_id: int, content: RecordDict) -> Seen:
    values: Mapping[str, Any] = content.config_records.get(REPLY, ConfigRecord())
    claimed = values.get("examples", 0)
    counts = type(claimed) is int and 0 <= claimed <= MOST  # a bool is an int to isinstance
    examples = claimed if counts else 0
    return Seen(node_id, str(values.get("client", "")), examples, str(values.get("base", "")))
