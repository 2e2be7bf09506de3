"""The server of a federation on Flower: run directory, model and evaluation around the strategy."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from fedlora.adapter import WHOLE, ClientState, flatten
from fedlora.checks import check_loaded
from fedlora.config import Config, make_config
from fedlora.data import Data, Examples, encode, read_silos, tokenised
from fedlora.flower.node import CLIENTS, load_shared, read_state
from fedlora.flower.strategy import FedloraStrategy, Seen
from fedlora.modes import GLOBAL
from fedlora.privacy.ledger import LEDGERS
from fedlora.privacy.plan import announce, merge_for
from fedlora.recording import Job, recording
from fedlora.resume import Resumed, find
from fedlora.rules import get_rule
from fedlora.runlog import FLOWER, read_id, run_folder
from fedlora.server import rehearse
from fedlora.settings import NO_EVALUATION
from fedlora.stopped import check_new
from fedlora.tables import UNKNOWN, label_ids, read_table

log = logging.getLogger(__name__)


def serve(grid: Grid, run_config: Mapping[str, Any]) -> Path:
    """Runs the rounds that are left and returns the run directory.

    A run directory that holds a run of the same config that stopped is gone on with; ValueError
    for one that has ended or was run with another config.
    """
    config = make_config(run_config)
    if config.run.mode != "federated":
        raise ValueError(f"run.mode = {config.run.mode!r} needs no Flower: run it in one process")
    folder, resumed = run_folder(config), None
    if folder.exists():
        config, resumed = find(folder, config, FLOWER)
        config = replace(config, run=replace(config.run, out=str(folder)))
    else:
        check_new(folder)
    job, base = _job(config, resumed)
    names = job.config.flower.clients or sorted(job.data.rows)
    checkpoint = resumed.checkpoint if resumed else None
    strategy = FedloraStrategy(
        job.config, job.start, names, base=base,
        progress=checkpoint.loops[GLOBAL] if checkpoint else None,
        merge=merge_for(job.config, len(names), job.folder / LEDGERS),
        kept=partial(kept_here, job.folder, [] if config.flower.clients else names),
    )  # fmt: skip
    strategy.find_nodes(grid, names, config.flower.wait)
    strategy.check_bases()
    if job.config.flower.clients:
        job = replace(job, data=_with_rows(job.data, strategy.seen))
    known = {client: len(job.data.rows.get(client, ())) for client in names}
    job = replace(job, privacy=announce(job.config, known, job.start))
    with recording(job, _told) as note:
        if checkpoint is None:
            note(None)
        strategy.note, strategy.run_id = note, read_id(folder)
        left = job.config.run.rounds - strategy.done_before
        arrays = ArrayRecord(flatten(strategy.progress.state.adapter, WHOLE))
        strategy.start(grid, arrays, num_rounds=left, timeout=config.flower.deadline)
    return folder


def kept_here(folder: Path, clients: Sequence[str], round: int) -> dict[str, ClientState]:
    """What clients kept for themselves up to a round, in the run directory: where all nodes are on
    this machine, as in a simulation. Without optimisers, which only their owners need.
    """
    found = {
        client: read_state(folder / CLIENTS / client, read_id(folder), round + 1)
        for client in clients
    }
    return {
        client: replace(state, optimiser={})
        for client, state in found.items()
        if state.adapter is not None
    }


def _job(config: Config, resumed: Resumed | None) -> tuple[Job, str]:
    """Everything that the server needs, and its base model's fingerprint.

    Where nodes bring their own data the server reads the evaluation set at most.
    """
    if not config.flower.clients:
        silos = read_silos(config)
        config = replace(config, data=replace(config.data, labels=silos.labels))
        model, start, base = load_shared(config, silos.labels)
        rehearse(get_rule(config.merge.rule, **config.merge.options), start)
        data = tokenised(config, silos, model.tokenizer)
        check_loaded(config, model, data)
        job = Job(config, data, model, start, resumed, engine=FLOWER, columns=silos.table.columns)
        return job, base
    labels = list(config.data.labels)
    if not labels:
        raise ValueError("data.labels must list the labels: the server sees no training data")
    model, start, base = load_shared(config, labels)
    rehearse(get_rule(config.merge.rule, **config.merge.options), start)
    source, columns = config.data.evaluate, UNKNOWN
    if source and source != NO_EVALUATION:
        table = read_table(source, config.data)
        columns = table.columns
        examples = encode(table, label_ids(table, labels), model.tokenizer, config.data.max_length)
        data = Data(examples, {}, {}, examples, np.arange(len(examples)))
    else:
        none = Examples({}, np.arange(0), np.arange(0), {})
        data = Data(none, {}, {}, none, np.arange(0))
    check_loaded(config, model, data)
    return Job(config, data, model, start, resumed, engine=FLOWER, columns=columns), base


def _with_rows(data: Data, seen: Mapping[str, Seen]) -> Data:
    """The data with as many rows of each client as its node says, which are not here."""
    row = np.zeros(1, dtype=np.int64)  # only their number is known, which takes no memory
    rows = {client: np.broadcast_to(row, one.examples) for client, one in sorted(seen.items())}
    return replace(data, rows=rows, heldout={client: np.arange(0) for client in rows})


def _told(event: str, facts: Mapping[str, Any]) -> None:
    """The run's events in Flower's log."""
    if event == "round":
        shared = facts["global"] or facts["personal"] or {}
        log.info("round %d: accuracy %s", facts["round"], shared.get("accuracy", "-"))
