"""The three ways to run a config: federated, and the references central and local.

A reference is a federation of one: central pools the data of all clients, local leaves every client
alone. Nothing is merged there, so the optimiser is kept, and no bytes move.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle

import numpy as np

from fedlora.adapter import Adapter, ClientResult, lora_scaling
from fedlora.config import Config
from fedlora.data import Data
from fedlora.policy import Head, Policy, Receiver
from fedlora.robust import fewest
from fedlora.rounds import Failure, Merge
from fedlora.rules import Rule, get_rule
from fedlora.server import aggregate, plan_round
from fedlora.settings import round_size
from fedlora.simulation import Fit, Progress, Round, Shelve, personal_adapters, simulate

CENTRAL = "central"
GLOBAL = ""  # the key of the one adapter that all share


@dataclass(frozen=True, eq=False)
class Step:
    """A finished round in any mode; `adapters` as in `loop_adapters`.

    `loops` is where each loop stands after it: a federation is one loop, called as the global
    adapter; a reference is one per client. `budget` is the error budget of its merge by layer.
    """

    round: int
    adapters: dict[str, Adapter]
    results: Sequence[ClientResult]
    merge: Mapping[str, float]
    bytes_up: int
    bytes_down: int
    seconds_aggregate: float
    loops: Mapping[str, Progress]
    failures: Sequence[Failure] = ()
    budget: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def for_mode(config: Config, data: Data) -> tuple[Config, Data]:
    """Config and data as the run's mode trains with them.

    `central` takes the same number of steps on batches K times as large, so that the same number of
    examples is seen; its only client is called `central` and needs no evaluation of its own.
    """
    if config.run.mode == "federated":
        return config, data
    client = replace(config.client, optimiser="keep", prox=0.0, ranks=[])
    if config.run.mode == "local":
        return replace(config, client=client), data
    client = replace(client, batch=config.client.batch * len(data.rows))
    pooled = replace(
        data,
        rows={CENTRAL: np.sort(np.concatenate(list(data.rows.values())))},
        heldout={CENTRAL: np.sort(np.concatenate(list(data.heldout.values())))},
    )
    evaluation = replace(config.evaluate, clients=False)
    return replace(config, client=client, evaluate=evaluation), pooled


def fits_per_round(config: Config, clients: int) -> int:
    """How many of so many clients train in a round: all of them but in a federation."""
    if config.run.mode != "federated":
        return clients
    return round_size(clients, config.merge.participation)


def steps(
    config: Config,
    fit: Fit,
    start: Adapter,
    clients: list[str],
    loops: Mapping[str, Progress] | None = None,
    shelve: Shelve = lambda tensors: tensors,
    merge: Merge = aggregate,
) -> Iterator[Step]:
    """Runs the rounds of the config's mode; `clients` are those of `for_mode`'s data.

    With `loops`, those of an earlier step, the rounds after it. `shelve` and `merge` as in
    `simulate`.
    """
    loops = loops or {}
    if config.run.mode == "federated":
        rounds = _federation(config, fit, start, clients, loops.get(GLOBAL), shelve, merge)
        for round in rounds:
            yield _merged(round, loop_adapters(config, clients, {GLOBAL: round.progress}))
        return
    alone = [_alone(config, fit, start, client, loops.get(client)) for client in clients]
    for together in zip(*alone, strict=True):
        reached = {c: round.progress for c, round in zip(clients, together, strict=True)}
        own = loop_adapters(config, clients, reached)
        results = [result for round in together for result in round.results]
        yield Step(together[0].round, own, results, {}, 0, 0, 0.0, reached)


def loop_adapters(
    config: Config, clients: list[str], loops: Mapping[str, Progress]
) -> dict[str, Adapter]:
    """The adapters in use where these loops stand: the global one, or one per client.

    Of a federation whose clients keep parts for themselves those whose states are in its loop; none
    where they are elsewhere: what the server has is then nobody's adapter.
    """
    if config.run.mode == "federated":
        progress, policy = loops[GLOBAL], merge_policy(config, clients)
        plan = plan_round(_rule(config), policy.head, progress.state, progress.round)
        adapter = progress.state.adapter
        if plan.trains <= plan.shares:
            return {GLOBAL: adapter}
        return personal_adapters(adapter, progress.clients, plan, policy)
    if config.run.mode == CENTRAL:
        return {GLOBAL: loops[CENTRAL].state.adapter}
    return {client: loops[client].state.adapter for client in clients}


def merge_policy(config: Config, clients: list[str]) -> Policy:
    """What the config's server does around its rule, for these clients.

    ValueError where a round can have fewer replies than the robust method needs, or the server
    sees a part of the updates that it is to judge.
    """
    merge = config.merge
    plan = _rule(config).plan(1, {})
    if merge.robust != "none" and (plan.trains - plan.shares) & {"A", "B"}:
        raise ValueError(
            f"merge.robust = {merge.robust!r} judges whole updates, of which rule {merge.rule!r} "
            "gets a part: take another rule, such as fra, or merge.robust = 'none'"
        )
    needed = fewest(merge.robust, merge.robust_faulty)
    asked = round_size(len(clients), merge.participation)
    if (config.run.min_clients or asked) < needed or asked < needed:
        raise ValueError(
            f"merge.robust = {merge.robust!r} needs {needed} replies in a round: {asked} clients "
            f"are asked and run.min_clients = {config.run.min_clients} (0: all)"
        )
    return Policy(
        weighting=merge.weights,
        head=merge.head,
        residual=None if merge.residual == "rule" else merge.residual,
        fold_rank=merge.fold_rank,
        server_lr=merge.server_lr,
        robust=merge.robust,
        robust_bound=merge.robust_bound,
        robust_faulty=merge.robust_faulty,
        min_clients=config.run.min_clients,
        max_failed_rounds=config.run.max_failed_rounds,
        whoever=config.privacy.unit == "client",
        receivers=_receivers(config, clients),
    )


def _receivers(config: Config, clients: list[str]) -> dict[str, Receiver]:
    """The clients with a rank of their own, from client.ranks dealt in the order of their names."""
    ranks, model = config.client.ranks, config.model
    keep_A = config.merge.options.get("gauge") == "orthonormal"
    return {
        client: Receiver(rank, lora_scaling(model.alpha, rank, model.rslora), keep_A)
        for client, rank in zip(sorted(clients), cycle(ranks), strict=False)
        if rank != model.rank
    }


def _rule(config: Config) -> Rule:
    return get_rule(config.merge.rule, **config.merge.options)


def _federation(
    config: Config,
    fit: Fit,
    start: Adapter,
    clients: list[str],
    progress: Progress | None,
    shelve: Shelve,
    merge: Merge,
) -> Iterator[Round]:
    return simulate(
        _rule(config),
        fit,
        start,
        clients,
        rounds=config.run.rounds,
        seed=config.run.seed,
        participation=config.merge.participation,
        policy=merge_policy(config, clients),
        progress=progress,
        shelve=shelve,
        merge=merge,
    )


def _alone(
    config: Config, fit: Fit, start: Adapter, client: str, progress: Progress | None
) -> Iterator[Round]:
    head: Head = "freeze" if config.merge.head == "freeze" else "average"
    return simulate(
        get_rule("fedavg"),
        fit,
        start,
        [client],
        rounds=config.run.rounds,
        seed=config.run.seed,
        policy=Policy(head=head),
        progress=progress,
    )


def _merged(round: Round, adapters: dict[str, Adapter]) -> Step:
    return Step(
        round.round,
        adapters,
        round.results,
        round.state.memory,
        round.bytes_up,
        round.bytes_down,
        round.seconds_aggregate,
        {GLOBAL: round.progress},
        round.failures,
        round.state.budget,
    )
