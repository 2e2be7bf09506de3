"""What Flower runs: `fedlora.flower.app:server` and `fedlora.flower.app:client`.

Both read the run's settings from Flower's run config, which is the flat form of a fedlora config.
A client says no in words of its own: Flower would send the server the text of any exception, and
with it rows and paths.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeAlias

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedlora.errors import PublicError
from fedlora.flower.limits import admit
from fedlora.flower.node import load_node, train
from fedlora.flower.serving import serve
from fedlora.flower.wire import REPLY, read_order, refusal_content, reply_content

FAILED = "this node failed and keeps the reason in its own log: ask those who run it"
Handler: TypeAlias = Callable[[Message, Context], Message]
log = logging.getLogger(__name__)

client = ClientApp()
server = ServerApp()


def _discreet(work: Callable[[Message, Context], RecordDict]) -> Handler:
    """A handler that answers with what the work gives, or with a refusal; it never raises.

    Of an exception only what is a `PublicError` is told, the rest is logged here.
    """

    def handle(message: Message, context: Context) -> Message:
        own = context.node_config
        name = str(own.get("name", own.get("partition-id", "")))
        try:
            content = work(message, context)
        except PublicError as error:
            log.warning("refused: %s", error)
            content = refusal_content(name, getattr(error, "code", "raised"), str(error))
        except Exception:  # of any kind: whatever is not caught here goes to the server
            log.exception("this node could not do what the server asked for")
            content = refusal_content(name, "error", FAILED)
        return Message(content, reply_to=message)

    return handle


@client.query("hello")
@_discreet
def hello(message: Message, context: Context) -> RecordDict:
    """Says who this node is: its client's name, its rows, its base model's fingerprint."""
    node = load_node(context.run_config, context.node_config)
    values: dict[str, Any] = {
        "client": node.client,
        "examples": node.examples,
        "base": node.loaded.base,
    }
    return RecordDict({REPLY: ConfigRecord(values)})


@client.train()
@_discreet
def train_round(message: Message, context: Context) -> RecordDict:
    """Trains one round, unless the order is not to be trusted or beyond the node's limits."""
    node = load_node(context.run_config, context.node_config)
    order = read_order(message.content)
    if refused := admit(node, order):
        log.warning("refused: %s: %s", *refused)
        return refusal_content(node.client, *refused)
    result, shared = train(node, order, message.content)
    return reply_content(order, shared, result.examples, result.metrics)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the federation of the run config to its end, or on from where it stopped."""
    serve(grid, context.run_config)
