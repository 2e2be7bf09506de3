"""The settings of a run, section by section: names, defaults, one-line help, allowed values.

Data, and what a setting comes to; `fedlora.config` reads, checks and flattens them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from fedlora.rules import Option
from fedlora.sources import NO_EVALUATION as NO_EVALUATION


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: int | float | None = None,
    high: int | float | None = None,
    above: int | float | None = None,
) -> Any:
    """A field of a config section: its default, its one-line help, and what values it takes."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "above": above}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunSettings:
    """The run as a whole."""

    name: str = setting("run", "name of the run; its directory is runs/<name> unless out is set")
    mode: str = setting(
        "federated",
        "federated; or a reference: central (data pooled), local (each client alone)",
        choices=("federated", "central", "local"),
    )
    seed: int = setting(0, "the one seed, from which every random stream is derived by name", low=0)
    rounds: int = setting(10, "rounds of send, train, merge", low=1)
    out: str = setting("", "run directory, from where you are; must not exist yet")
    device: str = setting(
        "auto",
        "where to compute; auto takes cuda, then mps, then cpu",
        choices=("auto", "cuda", "mps", "cpu"),
    )
    precision: str = setting(
        "auto",
        "of the frozen base: auto is bfloat16 on GPUs that have it, float32 elsewhere",
        choices=("auto", "float32", "bfloat16"),
    )
    threads: int = setting(
        0, "threads within one operation on the CPU; 0 leaves the choice to torch", low=0
    )
    min_clients: int = setting(
        0, "usable replies that make a round; fewer keep the adapter as it is; 0: all asked", low=0
    )
    max_failed_rounds: int = setting(
        1, "rounds in a row with too few replies that end the run, resumable", low=1
    )
    replies_mb: int = setting(
        1024,
        "MB that a round's replies may take in memory; else they wait on disk, in the run folder",
        low=0,
    )
    save_best: bool = setting(False, "also keep the best adapter, chosen on held-out training rows")
    save_merged: bool = setting(False, "also write the base with each final adapter merged in")


@dataclass(frozen=True)
class ModelSettings:
    """The base model and its adapter."""

    name: str = setting(
        "builtin:minilm", "hub name or local folder of a sequence-classification model"
    )
    revision: str = setting("", "revision of a hub model")
    rank: int = setting(8, "r, the rank of the adapter", low=1)
    alpha: float = setting(16.0, "LoRA's alpha; delta W = alpha / r * B A", above=0)
    rslora: bool = setting(False, "scale by alpha / sqrt(r) instead")
    dropout: float = setting(0.0, "dropout before A", low=0, high=0.999)
    targets: list[str] = setting(
        [], "modules that get an adapter; empty takes PEFT's for the architecture"
    )
    pad_token: str = setting("", "padding token for a model that has none")
    trust_remote_code: bool = setting(
        False, "run code that comes with the model; only if you read it"
    )


@dataclass(frozen=True)
class DataSettings:
    """Texts, labels and the evaluation set."""

    train: str = setting(
        "builtin:reviews",
        "file (csv, tsv, jsonl, parquet) or hub name (glue/sst2) to partition over the clients",
    )
    clients: dict[str, str] = setting(
        {}, "one file per client instead: {hospital-a = 'a.csv', ...}"
    )
    evaluate: str = setting(
        "", "shared evaluation set; empty: the built-in or hub set's own, else none; none: none"
    )
    text: str = setting("", "column of the text; empty guesses among the usual names")
    pair: str = setting("", "column of the second text, for pairs")
    label: str = setting("", "column of the label; empty guesses")
    labels: list[str] = setting(
        [], "the labels in the order of their ids; empty: sorted, from one file"
    )
    label_names: list[str] = setting([], "names to show for the labels, in the same order")
    max_length: int = setting(128, "longest input in tokens; the rest is cut", low=4)
    holdout: float = setting(
        0.1, "share of each client's rows held out of its training", low=0, high=0.9
    )
    limit: int = setting(0, "rows to draw, by the seed, from a single training file; 0: all", low=0)
    quoting: str = setting(
        "auto",
        "of csv and tsv; auto: csv quoted, tsv not (GLUE's way)",
        choices=("auto", "none", "quoted"),
    )


@dataclass(frozen=True)
class PartitionSettings:
    """Who gets which rows of a single training file."""

    by: str = setting(
        "iid",
        "iid, label shares, Dirichlet, or a column",
        choices=("iid", "shares", "dirichlet", "column"),
    )
    clients: int = setting(3, "number of clients (by column: as many as values)", low=1)
    shares: list[list[float]] = setting([], "by shares: one list per client, one share per label")
    alpha: float = setting(0.5, "by dirichlet: small is skewed", above=0)
    column: str = setting("", "by column: its name")
    single_class: str = setting(
        "refuse", "what to do about a client whose rows have one label", choices=("refuse", "allow")
    )


@dataclass(frozen=True)
class ClientSettings:
    """Local training, the same on every client."""

    steps: int = setting(20, "optimiser steps a round", low=1)
    epochs: float = setting(0.0, "passes over the client's rows a round, instead of steps", low=0)
    batch: int = setting(32, "examples a step", low=1)
    lr: float = setting(1e-3, "peak learning rate of AdamW", above=0)
    weight_decay: float = setting(0.0, "AdamW's decoupled weight decay", low=0)
    clip: float = setting(1.0, "largest gradient norm; 0: no clipping", low=0)
    schedule: str = setting(
        "linear",
        "course of the learning rate over the whole run",
        choices=("constant", "linear", "cosine"),
    )
    warmup: float = setting(
        0.0, "share of the whole run in which the rate climbs, once", low=0, high=1
    )
    round_warmup: int = setting(
        0, "first steps of every round in which the rate climbs again", low=0
    )
    optimiser: str = setting(
        "reset",
        "AdamW's moments from round to round (references always keep); transport turns them along "
        "with the factors, for rules that change the factors' coordinates",
        choices=("reset", "keep", "transport"),
    )
    prox: float = setting(
        0.0,
        "FedProx: mu / 2 times the squared distance to what was sent is added to the loss",
        low=0,
    )
    ranks: list[int] = setting(
        [],
        "each client's own rank, in the order of their names, dealt again where the list is short; "
        "empty: model.rank for all",
    )


@dataclass(frozen=True)
class MergeSettings:
    """What the server makes of the adapters."""

    rule: str = setting("fra", "merge rule; `fedlora rules` lists them")
    options: dict[str, Option] = setting({}, "options of the rule, such as {gauge = 'orthonormal'}")
    weights: Literal["examples", "uniform"] = setting(
        "examples", "weights of the clients", choices=("examples", "uniform")
    )
    head: Literal["average", "freeze", "local"] = setting(
        "average",
        "the classifier head: averaged, frozen at its start, or kept local",
        choices=("average", "freeze", "local"),
    )
    participation: float = setting(1.0, "share of the clients in a round", above=0, high=1)
    residual: Literal["rule", "drop", "fold", "carry"] = setting(
        "rule",
        "what becomes of what the rank cannot hold: dropped, folded into a frozen increment, or "
        "carried to the next merge; rule: the rule's own way",
        choices=("rule", "drop", "fold", "carry"),
    )
    fold_rank: int = setting(
        0, "largest rank of folded and carried residuals, their tail is cut; 0: as it comes", low=0
    )
    server_lr: float = setting(
        1.0, "share of the way from what was sent to what the rule says", above=0, high=2
    )
    robust: Literal[
        "none", "norm_clipping", "multi_krum", "geometric_median", "centred_clipping"
    ] = setting(
        "none",
        "bound the influence of faulty clients; with fewer than five it protects nobody",
        choices=("none", "norm_clipping", "multi_krum", "geometric_median", "centred_clipping"),
    )
    robust_bound: float = setting(
        0.0, "largest norm of a client's update, for clipping; 0: the median of the round", low=0
    )
    robust_faulty: int = setting(
        0, "clients that may be faulty, for multi_krum; 0: as many as it can bear", low=0
    )


@dataclass(frozen=True)
class FlowerSettings:
    """Across machines, on Flower."""

    clients: list[str] = setting(
        [], "names of the nodes that bring their own data; empty: the data above, by partition"
    )
    deadline: float = setting(3600.0, "seconds that a round waits for its replies", above=0)
    wait: float = setting(600.0, "seconds that the first round waits for its nodes", above=0)


@dataclass(frozen=True)
class PrivacySettings:
    """Differential privacy: what is protected, and how much may be spent in the whole run."""

    unit: str = setting(
        "none",
        "what is protected: nothing; each example of a client, by DP-SGD in its training; each "
        "client as a whole, by noise on a trusted server",
        choices=("none", "example", "client"),
    )
    epsilon: float = setting(8.0, "budget of each client over all rounds", above=0)
    delta: float = setting(
        1e-5, "chance that is left out of epsilon; below 1 / rows", above=0, high=0.1
    )
    clip: float = setting(
        1.0, "largest norm of an example's gradient, or of a client's update", above=0
    )
    design: Literal["increment", "rows", "core", "power", "sketch"] = setting(
        "increment",
        "of client-level noise: on what of an update it is put",
        choices=("increment", "rows", "core", "power", "sketch"),
    )
    quantile: float = setting(
        0.0, "of clients' norms that the clip moves towards, for a share of the budget; 0: fixed",
        low=0, high=0.99,
    )  # fmt: skip
    accept_noise: bool = setting(
        False, "run client-level privacy where its noise drowns the updates"
    )
    rounds: int = setting(
        0, "rounds that a client takes part in, for which noise is planned; 0: run.rounds", low=0
    )
    accountant: Literal["pld", "rdp"] = setting(
        "pld", "how epsilon is composed: pld is tighter, rdp faster", choices=("pld", "rdp")
    )
    share_metrics: bool = setting(
        False,
        "let figures on private rows (training loss and time, held-out scores) out, unprotected",
    )


@dataclass(frozen=True)
class EvaluateSettings:
    """When and on how much to evaluate."""

    every: int = setting(1, "evaluate every so many rounds, and always in the last", low=1)
    limit: int = setting(0, "rows of the fixed, seeded subset before the last round; 0: all", low=0)
    batch: int = setting(64, "examples a forward pass", low=1)
    clients: bool = setting(True, "evaluate each client's own adapter too, after local training")


def round_size(clients: int, participation: float) -> int:
    """How many of the clients take part in a round: ceil(participation * K), at least one."""
    return max(1, math.ceil(participation * clients - 1e-9))


def steps_per_round(settings: ClientSettings, rows: int) -> int:
    """Optimiser steps of a client with so many rows: `steps`, or enough for `epochs` passes."""
    if settings.epochs == 0:
        return settings.steps
    return max(1, round(settings.epochs * math.ceil(rows / settings.batch)))


def names_training_file(data: DataSettings) -> bool:
    """Whether `data.train` was set: it has a default, the built-in reviews."""
    return data.train not in ("", DataSettings().train)


def shares_metrics(privacy: PrivacySettings) -> bool:
    """Whether figures on a client's own rows may leave it."""
    return privacy.unit != "example" or privacy.share_metrics
