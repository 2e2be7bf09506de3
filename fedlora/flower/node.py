"""A client's half across machines: its own data and limits, its own disk, one round at a time.

What the server may ask for is bounded by the node's own config (nodeconfig.py, limits.py); the node
looks before it trains.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict
from torch import Tensor

from fedlora.adapter import Adapter, ClientResult, ClientState, flatten, overlay
from fedlora.checkpoint import decode_state, encode_state
from fedlora.checks import check_loaded
from fedlora.client import make_fit
from fedlora.config import Config, make_config
from fedlora.data import Data, read_silos, tokenised
from fedlora.files import locked, make_folder, write_bytes, write_text
from fedlora.flower.nodeconfig import (
    LIMITS,
    OWN,
    check_asked,
    check_keys,
    client_name,
    own_settings,
)
from fedlora.flower.wire import Order, WireError, shapes_of, tensors_of
from fedlora.model import Model, configured_model, read_adapter, save_adapter
from fedlora.modes import merge_policy
from fedlora.policy import cut_for
from fedlora.privacy.ledger import LEDGERS, close_all
from fedlora.runlog import run_folder

CLIENTS = "clients"  # of a run directory: where nodes without a folder of their own keep states
ADAPTERS = "adapters"  # in a client's folder: its own, where a part of it never leaves
SECRET = "split"  # in a client's folder: what its held-out rows are drawn from
WAIT = 60.0  # seconds for another run on this node to let its folder go
STATES = "states"  # in a client's folder: what it keeps from round to round, by run
KEPT = 3  # states of a run on a client's disk: after a damaged checkpoint two rounds are repeated
RUNS = 8  # runs whose states stay on a client's disk, the last ones
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Loaded:
    """What all clients of a process share: config, model, data, the common start, the base's
    hash.
    """

    config: Config
    model: Model
    data: Data
    start: Adapter
    base: str


@dataclass(frozen=True, eq=False)
class Node:
    """A client that is ready: its name, what it holds at the start, what it allows, where it keeps
    what is its own.
    """

    client: str
    loaded: Loaded
    start: Adapter
    limits: Mapping[str, Any]
    states: Path

    @property
    def examples(self) -> int:
        """Training rows."""
        return len(self.loaded.data.rows[self.client])

    @property
    def all_rows(self) -> int:
        """Rows, those that it holds out too: a number that no config changes."""
        return self.examples + len(self.loaded.data.heldout[self.client])


def load_node(run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Node:
    """The node of a run, model and data loaded once per process; ValueError for a bad config."""
    check_keys(node_config)
    run_text = json.dumps(dict(run_config), sort_keys=True)
    own = {key: str(node_config[key]) for key in OWN if key in node_config}
    asked = make_config(run_config)
    check_asked(asked, node_config)
    secret = None
    if asked.privacy.unit == "example" and {"name", "data"} <= set(own):
        secret = own_secret(Path(str(node_config["state"]), own["name"]))
    loaded = _load(run_text, json.dumps(own) if "data" in own else "", secret)
    names = loaded.config.flower.clients or sorted(loaded.data.rows)
    client = client_name(names, node_config)
    if client not in loaded.data.rows:
        raise ValueError(f"there is no data of a client {client!r}: its node config names none")
    policy = merge_policy(loaded.config, names)
    start = cut_for(loaded.start, policy.receivers.get(client))
    folder = node_config.get("state") or run_folder(loaded.config) / CLIENTS
    limits = {key: node_config[key] for key in LIMITS if key in node_config}
    return Node(client, loaded, start, limits, Path(str(folder)) / client)


def train(node: Node, order: Order, content: RecordDict) -> tuple[ClientResult, dict[str, Tensor]]:
    """One round: what came in is checked, trained, kept where it is the client's own, and the
    tensors to share are returned. WireError, ValueError (diverged) leave the disk as it was.
    """
    plan = order.plan
    want = shapes_of(node.start, plan.receives)
    tensors = tensors_of(content, want, free=".frozen_")
    _check_frozen(node.start, tensors)
    held = overlay(tensors, node.start)
    ledgers = ledger_folder(node.states, order.run)
    loaded, alone = node.loaded, "epsilon" in node.limits  # no trust in what the server sends
    fit = make_fit(loaded.model, loaded.data, loaded.config, ledgers, alone=alone)
    state = read_state(node.states, order.run_id, order.round)
    result = fit(node.client, order.round, plan, held, state)
    keep_state(node.states, order.run_id, order.round, result.state)
    if plan.trains - plan.shares and node.loaded.data.own_evaluation:
        keep_adapter(node, order.run, order.round, result.adapter)
    close_all(ledgers, order.round)
    return result, flatten(result.adapter, plan.shares)


def own_secret(folder: Path) -> int:
    """What a node under example-level privacy draws its held-out rows from, made once, its own.

    Drawn from a seed and a share that a server chooses, the number of rows that are left would
    tell whether a row is there.
    """
    path = folder / SECRET
    if not path.is_file():
        make_folder(folder)
        with locked(folder, WAIT):
            if not path.is_file():
                write_text(path, f"{secrets.randbits(128):x}\n")
    return int(path.read_text(encoding="utf-8"), 16)


def ledger_folder(states: Path, run: str) -> Path:
    """Where a node keeps its ledger of a run: one for each name and seed, whoever starts it."""
    return states / LEDGERS / _short(run)


def keep_adapter(node: Node, run: str, round: int, adapter: Adapter) -> Path:
    """Writes the client's whole adapter after its own training, in PEFT's form, and takes away
    those of earlier rounds: what its figures are of, and nobody else has.
    """
    own = node.states / ADAPTERS / _short(run) / f"round-{round:06d}"
    shutil.rmtree(own, ignore_errors=True)  # of a round that is made again
    save_adapter(node.loaded.model, adapter, own)
    for old in own.parent.glob("round-*"):
        if old != own:
            shutil.rmtree(old)
    log.info("round %d: this client's own adapter is in %s", round, own)
    return own


def _short(run: str) -> str:
    """A name for the folder of a run: what the server calls it is no path."""
    return hashlib.sha256(run.encode()).hexdigest()[:16]


def read_state(folder: Path, run: str, round: int) -> ClientState:
    """What the client kept from its last round of the run before this one; nothing where it did
    not take part.

    ValueError where the file is damaged: training on without what it kept would be another run.
    """
    for path in sorted(_kept(folder, run), reverse=True):
        if int(path.stem.removeprefix("round-")) < round:
            return decode_state(path.read_bytes())[1]
    return ClientState()


def keep_state(folder: Path, run: str, round: int, state: ClientState) -> None:
    """Writes what the client keeps after a round, in one step; those just before stay as well, and
    so do the states of the runs before this one and beside it.

    Files of later rounds are of rounds that are made again: left to be replaced.
    """
    if state.adapter is None and not state.optimiser:
        return
    own = folder / STATES / _short(run) / f"round-{round:06d}.state"
    own.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(own, encode_state(run, state))
    for old in sorted(path for path in _kept(folder, run) if path <= own)[:-KEPT]:
        old.unlink()
    runs = sorted((folder / STATES).iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for ended in runs[:-RUNS]:
        shutil.rmtree(ended)


def _kept(folder: Path, run: str) -> list[Path]:
    return list((folder / STATES / _short(run)).glob("round-*.state"))


def fingerprint(model: Model) -> str:
    """A SHA-256 of the base's weights, names and shapes at the precision that it computes in.

    Of the base alone: not of the head and the layers that it lacked, which the run's seed drew,
    nor of where an adapter is put.
    """
    own = {id(parameter) for parameter in model.parameters.values()}
    held = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.network.named_parameters()
        if id(parameter) not in own and "lora_" not in name and ".original_module." not in name
    }
    digest = hashlib.sha256()
    for name, parameter in sorted(held.items()):
        plain = parameter.detach().float().cpu().contiguous()
        digest.update(f"{name}{tuple(plain.shape)}".encode())
        digest.update(plain.numpy().data)
    return digest.hexdigest()[:16]


def load_shared(config: Config, labels: list[str]) -> tuple[Model, Adapter, str]:
    """The model of a run with the common start and the base's fingerprint."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    model = configured_model(config, labels)
    return model, read_adapter(model), fingerprint(model)


@lru_cache(maxsize=8)
def _load(run_text: str, own_text: str, secret: int | None = None) -> Loaded:
    config = make_config(json.loads(run_text))
    if own_text:
        config = own_settings(config, json.loads(own_text))
    elif config.flower.clients:
        raise ValueError("this node has no data: its node config must have name and data")
    if secret is not None:  # a refusal would tell which labels its rows have
        config = replace(config, partition=replace(config.partition, single_class="allow"))
    silos = read_silos(config)
    config = replace(config, data=replace(config.data, labels=silos.labels))
    model, start, base = load_shared(config, silos.labels)
    tokens = tokenised(config, silos, model.tokenizer, secret)
    check_loaded(config, model, None if own_text else tokens)
    if own_text:
        tokens = replace(tokens, own_evaluation=True)  # its evaluation file is the node's own, too
    return Loaded(config, model, tokens, start, base)


def _check_frozen(start: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """WireError unless what is frozen comes in pairs that fit their layers."""
    for name in tensors:
        layer, _, part = name.rpartition(".")
        if part not in ("frozen_A", "frozen_B"):
            continue
        A, B = tensors.get(f"{layer}.frozen_A"), tensors.get(f"{layer}.frozen_B")
        own = start.layers.get(layer)
        fits = (
            A is not None and B is not None and own is not None and A.ndim == B.ndim == 2
            and (B.shape[0], A.shape[1]) == own.shape
            and A.shape[0] == B.shape[1] <= min(own.shape)
        )  # fmt: skip
        if not fits:
            raise WireError("shapes", f"array {name!r} is half of no frozen increment of its layer")
