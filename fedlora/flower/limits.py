"""What a node does not do, by its own limits: looked at before any round is trained.

Every reason names settings and counts alone, so that it may be told to the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.adapter import PARTS
from fedlora.files import locked
from fedlora.flower.node import WAIT, Node, ledger_folder
from fedlora.flower.nodeconfig import listed
from fedlora.flower.wire import Order
from fedlora.privacy.example import planned_round, terms
from fedlora.privacy.ledger import (
    HEAD,
    SUFFIX,
    check_heads,
    is_opened,
    ledger_path,
    open_ledger,
    read_ledger,
)


def admit(node: Node, order: Order) -> tuple[str, str] | None:
    """As `refusal`, the limit on epsilon included: the run's whole budget is set aside first.

    Its ledger is opened under a lock on all of the client's ledgers, and those of other runs count
    with all that they may spend: runs at the same time cannot spend the same epsilon. A run that
    stopped keeps what it set aside, since it may go on. ValueError as in `refusal`, and where no
    round of this run could be private.
    """
    if (refused := refusal(node, order)) or "epsilon" not in node.limits:
        return refused
    config, limit = node.loaded.config, float(node.limits["epsilon"])
    planned_round(config, node.examples)  # a run that cannot begin sets nothing aside
    with locked(node.states, WAIT):
        if reason := _beyond_epsilon(node, order, limit):
            return "epsilon", reason
        own = ledger_path(ledger_folder(node.states, order.run), node.client)
        open_ledger(own, terms(config, node.client))
    return None


def refusal(node: Node, order: Order) -> tuple[str, str] | None:
    """(code, reason) why this node does not do what it is asked, by its own limits but that on
    epsilon; None if it does.

    ValueError where a limit itself makes no sense.
    """
    limits, rule = node.limits, node.loaded.config.merge.rule
    if order.client != node.client:
        return "client", f"this node is {node.client!r}, the order is for {order.client!r}"
    own = node.loaded.config.run
    if order.run != f"{own.name}/{own.seed}":
        return "run", f"the order is of run {order.run!r}, the node was set up for {own.name!r}"
    if order.base != node.loaded.base:
        return "base", f"base model {node.loaded.base} here, {order.base} at the server"
    if "base" in limits and not node.loaded.base.startswith(str(limits["base"])):
        return "base", f"base model {node.loaded.base} is not the {limits['base']} allowed here"
    if "max-rounds" in limits and order.round > int(limits["max-rounds"]):
        return "rounds", f"round {order.round} is beyond the {limits['max-rounds']} allowed here"
    allowed = listed(limits.get("rules", rule))
    if rule not in allowed:
        return "rule", f"rule {rule!r} is not one of {', '.join(allowed)} allowed here"
    if node.examples < int(limits.get("min-examples", 0)):
        return (
            "examples",
            f"{node.examples} rows are fewer than the {limits['min-examples']} wanted",
        )
    if beyond := order.plan.shares - _may_leave(limits):
        return "shares", f"{', '.join(sorted(beyond))} may not leave this node"
    return None


def _may_leave(limits: Mapping[str, Any]) -> frozenset[str]:
    """The parts of an adapter that the node's limit lets out, all without one; ValueError for
    others.
    """
    if "shares" not in limits:
        return PARTS
    named = frozenset(listed(limits["shares"]))
    if odd := named - PARTS:
        raise ValueError(
            f"node config shares = {limits['shares']!r}: {min(odd)!r} is no part of "
            f"an adapter, which are {', '.join(sorted(PARTS))}"
        )
    return named


def _beyond_epsilon(node: Node, order: Order, limit: float) -> str:
    """Why this run would let out more of the node's examples than its owner allows; else nothing.

    The budgets of all runs count together; their deltas must stay within the limit `delta` (else
    below 1 / rows).
    """
    privacy, own = node.loaded.config.privacy, ledger_folder(node.states, order.run)
    if privacy.share_metrics and not node.limits.get("share-metrics"):
        return "the run wants figures on private rows (privacy.share_metrics), not allowed here"
    for kept in {path.parent for path in node.states.rglob(f"*{HEAD}")}:
        check_heads(kept, {})  # a ledger that is gone is no budget that is free again
    others = [
        read_ledger(path).terms
        for path in node.states.rglob(f"*{SUFFIX}")
        if path.parent != own and is_opened(path)
    ]
    taken = sum(one.epsilon for one in others)
    deltas = privacy.delta + sum(one.delta for one in others)
    most = float(node.limits.get("delta", 1 / node.all_rows))
    if taken + privacy.epsilon <= limit and deltas <= most:
        return ""
    return (
        f"epsilon {privacy.epsilon:g} of this run and {taken:.3g} of {len(others)} others (delta "
        f"{deltas:.2g}) are beyond the {limit:g} (delta {most:.2g}) allowed here"
    )
