"""A client's half of a round: put the adapter in, train it on the client's own rows, give it back.

`make_fit` closes over the shared base model; what `fit` returns depends on its arguments and the
config alone, never on which client ran before.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedlora.adapter import Adapter, ClientResult, ClientState, flatten, overlay
from fedlora.config import Config
from fedlora.data import Data, Examples
from fedlora.errors import PublicError
from fedlora.evaluate import Scores, autocast, evaluate
from fedlora.model import Model, read_adapter, train_only, write_adapter
from fedlora.moments import moments, restore, transported
from fedlora.partition import Rows
from fedlora.privacy.apart import check_rows_apart
from fedlora.privacy.example import Budgets, planned_round
from fedlora.privacy.plan import hides_evaluation
from fedlora.rules import Plan
from fedlora.seeding import derive, numpy_generator
from fedlora.settings import ClientSettings, shares_metrics, steps_per_round
from fedlora.simulation import Fit

POOL = 50  # batches that are sorted by length together
PIECE = 16  # examples whose own gradients are taken in one pass


def make_fit(
    model: Model, data: Data, config: Config, ledgers: Path | None = None, *, alone: bool = False
) -> Fit:
    """The training of one client in one round, for `simulate` and for every other engine.

    With `privacy.unit = "example"` it is private, and `ledgers` the folder of the clients' ledgers;
    `alone` takes each row's gradient by itself, so that no weights whatever, made to that end, let
    a row change what others add.
    Raises ValueError, naming the client, where the loss or the weights cease to be finite, or where
    its privacy budget is spent; before any training for a model that cannot be private.
    """
    private = _private(model, config, ledgers, alone)

    def fit(
        client: str, round: int, plan: Plan, adapter: Adapter, state: ClientState
    ) -> ClientResult:
        kept_parts = plan.trains - plan.shares
        if state.adapter is not None:
            adapter = overlay(flatten(state.adapter, kept_parts), adapter)
        if config.client.optimiser == "transport" and state.adapter is not None:
            state = replace(state, optimiser=transported(state.optimiser, state.adapter, adapter))
        write_adapter(model, adapter)
        with torch.random.fork_rng(_cuda_index(model)):
            torch.manual_seed(_training_seed(config, client, round))
            training = _train(model, data, config, client, round, plan, state, private)
        trained = read_adapter(model, adapter)
        count = sum(tensor.numel() for tensor in flatten(trained, plan.trains).values())
        metrics = training.metrics | {"trained": float(count)}
        metrics |= _own_scores(model, data, config, client, round)
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in flatten(trained).values())
        if not (finite and all(map(math.isfinite, metrics.values()))):
            raise PublicError(
                f"client {client}: training diverged in round {round} (loss "
                f"{metrics.get('train_loss', '-')}): lower client.lr, now {config.client.lr}"
            )
        keeps = kept_parts or config.client.optimiser == "transport"
        kept = ClientState(trained if keeps else None, training.optimiser)
        return ClientResult(client, trained, len(data.rows[client]), metrics, kept)

    return fit


def learning_rate(
    settings: ClientSettings, round: int, rounds: int, step: int, steps: int
) -> float:
    """The rate at `step` (from 0) of `round` (from 1).

    One course over the whole run, whatever is done to the optimiser in between: a climb over the
    first `warmup` of it, then `schedule` down to zero; times a short climb in the first
    `round_warmup` steps of each round, if asked for.
    """
    begun = (round - 1 + step / steps) / rounds
    ended = (round - 1 + (step + 1) / steps) / rounds
    if ended <= settings.warmup:
        course = ended / settings.warmup
    elif settings.schedule == "constant":
        course = 1.0
    else:
        passed = max(0.0, begun - settings.warmup) / (1 - settings.warmup)
        course = (
            1 - passed if settings.schedule == "linear" else (1 + math.cos(math.pi * passed)) / 2
        )
    climb = min(1.0, (step + 1) / (settings.round_warmup + 1))
    return settings.lr * course * climb


def batches(
    rows: Rows, lengths: Rows, batch: int, seed: int, client: str, first: int
) -> Iterator[Rows]:
    """The client's endless stream of batches from number `first` on.

    Every epoch is a fresh permutation (its own named stream), cut into pools of 50 batches that are
    sorted by length, so that a batch holds texts of like length; the order of batches is shuffled.
    """
    per_epoch = math.ceil(len(rows) / batch)
    epoch, skip = divmod(first, per_epoch)
    while True:
        rng = numpy_generator(seed, "batches", client, epoch)
        order = rng.permutation(rows)
        dealt: list[Rows] = []
        for start in range(0, len(order), batch * POOL):
            pool = order[start : start + batch * POOL]
            pool = pool[lengths[pool].argsort(kind="stable")]
            dealt += [pool[at : at + batch] for at in range(0, len(pool), batch)]
        for index in rng.permutation(len(dealt))[skip:]:
            yield dealt[index]
        epoch, skip = epoch + 1, 0


def evaluation_rows(config: Config, data: Data, round: int) -> Rows | None:
    """The rows to follow a run by, the same in every round; None where this one is not evaluated.

    All of them, or a subset drawn by the seed. The last round is always evaluated.
    """
    if round != config.run.rounds and round % config.evaluate.every:
        return None
    rows, limit = data.evaluation_rows, config.evaluate.limit
    if limit == 0 or limit >= len(rows):
        return rows
    drawn = numpy_generator(config.run.seed, "evaluate").permutation(len(rows))[:limit]
    drawn.sort()
    return rows[drawn]


@dataclass(frozen=True, eq=False)
class _Private:
    """What a private fit has: budgets, how many rows' gradients it takes in one pass, and made-up
    rows, one of them as long as can be, to try a step with that is not charged.
    """

    budgets: Budgets
    piece: int
    trial: Examples


@dataclass(frozen=True, eq=False)
class _Training:
    metrics: dict[str, float]
    optimiser: dict[str, Tensor]


def _train(
    model: Model,
    data: Data,
    config: Config,
    client: str,
    round: int,
    plan: Plan,
    state: ClientState,
    private: _Private | None,
) -> _Training:
    settings, rows = config.client, data.rows[client]
    parameters = train_only(model, plan.trains)
    optimiser = torch.optim.AdamW(
        parameters.values(),
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        fused=model.device.type in ("cpu", "cuda"),
    )
    restore(optimiser, parameters, state.optimiser)
    anchors = {name: p.detach().clone() for name, p in parameters.items()} if settings.prox else {}
    steps = steps_per_round(settings, len(rows))
    model.network.train()
    losses: list[Tensor] = []
    seconds = 0.0
    rates = [
        learning_rate(settings, round, config.run.rounds, step, steps) for step in range(steps)
    ]
    with _gradients(model, data, config, client, round, parameters, private) as gradients:
        for rate in rates:
            for group in optimiser.param_groups:
                group["lr"] = rate
            began = perf_counter()
            losses += gradients()
            _pull(parameters, anchors, settings.prox)
            if settings.clip and private is None:
                nn.utils.clip_grad_norm_(parameters.values(), settings.clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            seconds += perf_counter() - began
    metrics = {
        "steps": float(steps),
        "learning_rate_first": rates[0],
        "learning_rate_last": rates[-1],
    }
    if shares_metrics(config.privacy):  # a long row takes longer
        metrics["seconds_compute"] = seconds
    if losses and shares_metrics(config.privacy):
        metrics["train_loss"] = float(torch.stack(losses).double().mean())
    if private is not None:
        metrics["epsilon"] = private.budgets.spent(client)
    if settings.optimiser == "reset":
        return _Training(metrics, {})
    # a part that this round did not train keeps its moments for the round that does
    return _Training(metrics, {**state.optimiser, **moments(optimiser, parameters)})


@contextmanager
def _gradients(
    model: Model,
    data: Data,
    config: Config,
    client: str,
    round: int,
    parameters: Mapping[str, nn.Parameter],
    private: _Private | None,
) -> Iterator[Callable[[], list[Tensor]]]:
    """What fills the gradients of one step and returns its mean loss; of no example, no loss.

    With `private` the round is charged here, before anything is drawn.
    """
    rows = data.rows[client]
    if private is None:
        first = (round - 1) * steps_per_round(config.client, len(rows))
        lengths, seed = data.train.lengths, config.run.seed
        stream = batches(rows, lengths, config.client.batch, seed, client, first)

        def plain() -> list[Tensor]:
            loss = _losses(model, model.network, data.train, next(stream)).mean()
            loss.backward()
            return [loss.detach()]

        yield plain
        return
    from fedlora.privacy.dpsgd import poisson_batch, private_steps

    mechanism = planned_round(config, len(rows))
    expected = mechanism.sampling * len(rows)
    with private_steps(
        model.network, parameters,
        clip=config.privacy.clip, noise=mechanism.noise, expected=expected,
    ) as steps:  # fmt: skip

        def backward(examples: Examples, drawn: Rows) -> Tensor:
            steps.begin(len(drawn))
            losses = _losses(model, steps.module, examples, drawn)
            losses.sum().backward()
            return losses.detach()

        def noised() -> list[Tensor]:
            drawn = poisson_batch(rows, mechanism.sampling)
            drawn = drawn[data.train.lengths[drawn].argsort(kind="stable")]
            starts = range(0, len(drawn), private.piece)
            found = [backward(data.train, drawn[at : at + private.piece]) for at in starts]
            steps.finish()
            return [torch.cat(found).mean()] if found else []

        # a layer that cannot be private, or too little memory for a long row, ends the round
        # before it is charged, whatever the client's rows are
        backward(private.trial, np.array([0, len(private.trial) - 1]))
        steps.rehearse()
        private.budgets.charge(client, round, mechanism)
        yield noised
        steps.check()


def _training_seed(config: Config, client: str, round: int) -> int:
    """What dropout is drawn from: the run's seed, but for privacy the system's randomness.

    Masks that are known would depend on who else is in the batch, and tell it.
    """
    if config.privacy.unit == "example":
        return secrets.randbits(63)
    return derive(config.run.seed, "client", client, round)


def _losses(model: Model, network: nn.Module, examples: Examples, rows: Rows) -> Tensor:
    """The loss of each of these examples, in nats."""
    inputs, labels = examples.batch(rows, model.device)
    with autocast(model):
        logits = network(**inputs).logits
    return cross_entropy(logits.float(), labels, reduction="none")


def _private(model: Model, config: Config, ledgers: Path | None, alone: bool) -> _Private | None:
    if config.privacy.unit != "example":
        return None
    if ledgers is None:
        raise ValueError("example-level privacy needs a folder for the clients' ledgers")
    trial = check_rows_apart(model, config.data.max_length)
    return _Private(Budgets(config, ledgers), 1 if alone else PIECE, trial)


def _pull(
    parameters: Mapping[str, nn.Parameter], anchors: Mapping[str, Tensor], prox: float
) -> None:
    """FedProx (Li et al. 2020, 1812.06127): adds prox * (parameter - anchor) to each gradient."""
    for name, anchor in anchors.items():
        gradient = parameters[name].grad
        if gradient is not None:
            gradient.add_(parameters[name].detach() - anchor, alpha=prox)


def _own_scores(
    model: Model, data: Data, config: Config, client: str, round: int
) -> dict[str, float]:
    """The client's own adapter after training, on the shared set and on what it held out."""
    began = perf_counter()
    scores: dict[str, Scores] = {}
    rows = evaluation_rows(config, data, round)
    lets_out = shares_metrics(config.privacy)
    if rows is not None and config.evaluate.clients:
        batch = config.evaluate.batch
        if not hides_evaluation(config, data):
            scores["evaluation"] = evaluate(model, data.evaluation, rows, batch)
        if data.heldout[client].size and lets_out:
            scores["heldout"] = evaluate(model, data.train, data.heldout[client], batch)
    named = {
        f"{kind}.{name}": float(value)
        for kind, found in scores.items()
        for name, value in found.record().items()
    }
    return named | {"seconds_evaluate": perf_counter() - began}


def _cuda_index(model: Model) -> list[int]:
    return [model.device.index or 0] if model.device.type == "cuda" else []
