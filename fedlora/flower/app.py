"""What Flower runs: `fedlora.flower.app:server` and `fedlora.flower.app:client`.

Both read the run's settings from Flower's run config, which is the flat form of a fedlora config.
"""

from __future__ import annotations

import logging
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedlora.flower.limits import admit
from fedlora.flower.node import load_node, train
from fedlora.flower.serving import serve
from fedlora.flower.wire import REPLY, read_order, refusal_content, reply_content

log = logging.getLogger(__name__)

client = ClientApp()
server = ServerApp()


@client.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Says who this node is: its client's name, its rows, its base model's fingerprint."""
    node = load_node(context.run_config, context.node_config)
    values: dict[str, Any] = {
        "client": node.client,
        "examples": node.examples,
        "base": node.loaded.base,
    }
    return Message(RecordDict({REPLY: ConfigRecord(values)}), reply_to=message)


@client.train()
def train_round(message: Message, context: Context) -> Message:
    """Trains one round, unless the order is not to be trusted or beyond the node's limits."""
    node = load_node(context.run_config, context.node_config)
    try:
        order = read_order(message.content)
        if refused := admit(node, order):
            log.warning("refused: %s: %s", *refused)
            return Message(refusal_content(node.client, *refused), reply_to=message)
        result, shared = train(node, order, message.content)
    except ValueError as error:
        code = getattr(error, "code", "raised")
        return Message(refusal_content(node.client, code, str(error)), reply_to=message)
    content = reply_content(order, shared, result.examples, result.metrics)
    return Message(content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the federation of the run config to its end, or on from where it stopped."""
    serve(grid, context.run_config)
