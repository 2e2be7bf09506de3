"""Flower's strategy loop in one process: a Grid that hands messages to a ClientApp, as a network
would: copied, in any order, and with whatever goes wrong on the way.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Context, Error, Message, Metadata, RecordDict
from flwr.serverapp import Grid

App = Callable[[Message, Context], Message]
Change = Callable[[Message], Message | None]
Shuffle = Callable[[list[Message]], list[Message]]


class LocalGrid(Grid):
    """Nodes with random-looking ids, each with its node config; replies in a shuffled order.

    `change` is what the way does to a reply (None: it is lost), `held` says which is late.
    """

    def __init__(
        self,
        app: App,
        run_config: Mapping[str, Any],
        nodes: Sequence[Mapping[str, Any]],
        *,
        shuffle: Shuffle = lambda messages: messages[::-1],
        change: Change = lambda reply: reply,
        held: Callable[[Message], bool] = lambda reply: False,
    ) -> None:
        self.app, self.shuffle, self.change, self.held = app, shuffle, change, held
        self.replies: dict[str, Message] = {}
        ids = [7_919 * (number + 3) % 104_729 for number in range(len(nodes))]
        self.contexts = {
            node_id: Context(1, node_id, dict(config), RecordDict(), dict(run_config))
            for node_id, config in zip(ids, nodes, strict=True)
        }
        self.numbers = itertools.count(1)
        self.bytes_out = self.bytes_in = 0

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str,
        ttl: float | None = None,
    ) -> Message:  # fmt: skip
        metadata = Metadata(
            run_id=1, message_id=str(next(self.numbers)), src_node_id=1, dst_node_id=dst_node_id,
            reply_to_message_id="", group_id=group_id, created_at=0.0, ttl=ttl or 1e12,
            message_type=message_type,
        )  # fmt: skip
        return Message(content=content, metadata=metadata)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids: list[str] = []
        for message in messages:
            context = self.contexts[message.metadata.dst_node_id]
            message.metadata.created_at = 2e9  # replies limit their time to live by it
            try:
                reply = self.app(copy.deepcopy(message), context)
            except Exception as error:
                reply = Message(Error(2, str(error)), reply_to=message)
            changed = self.change(copy.deepcopy(reply))
            ids.append(message.metadata.message_id)
            if changed is not None:
                self.replies[ids[-1]] = changed
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """What has arrived by now; replies that are `held` are under way."""
        here = [name for name in message_ids if name in self.replies]
        arrived = [name for name in here if not self.held(self.replies[name])]
        return self.shuffle([self.replies.pop(name) for name in arrived])

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))
