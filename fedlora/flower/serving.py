"""The server of a federation on Flower: run directory, model and evaluation around the strategy."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from fedlora.adapter import WHOLE, flatten
from fedlora.config import Config, make_config
from fedlora.data import Data, Examples, encode, read_silos, tokenised
from fedlora.flower.node import load_shared
from fedlora.flower.strategy import FedloraStrategy
from fedlora.modes import GLOBAL
from fedlora.privacy.ledger import LEDGERS
from fedlora.privacy.plan import announce, merge_for
from fedlora.privacy.plan import check as check_privacy
from fedlora.recording import Job, recording
from fedlora.resume import Resumed, find
from fedlora.rules import get_rule
from fedlora.runlog import check_new, run_folder
from fedlora.server import rehearse
from fedlora.settings import NO_EVALUATION
from fedlora.tables import label_ids, read_table

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
        config, resumed = find(folder, config)
        config = replace(config, run=replace(config.run, out=str(folder)))
    else:
        check_new(folder)
    check_privacy(config)
    job, base = _job(config, resumed)
    names = job.config.flower.clients or sorted(job.data.rows)
    checkpoint = resumed.checkpoint if resumed else None
    strategy = FedloraStrategy(
        job.config, job.start, names, base=base,
        progress=checkpoint.loops[GLOBAL] if checkpoint else None,
        merge=merge_for(job.config, len(names), job.folder / LEDGERS),
    )  # fmt: skip
    strategy.find_nodes(grid, names, config.flower.wait)
    strategy.check_bases()
    if job.config.flower.clients:
        row = np.zeros(1, dtype=np.int64)  # only their number is known, which takes no memory
        rows = {c: np.broadcast_to(row, seen.examples) for c, seen in sorted(strategy.seen.items())}
        none = {client: np.arange(0) for client in rows}
        job = replace(job, data=replace(job.data, rows=rows, heldout=none))
    known = {client: len(job.data.rows.get(client, ())) for client in names}
    job = replace(job, privacy=announce(job.config, known, job.start))
    with recording(job, _told) as note:
        if checkpoint is None:
            note(None)
        strategy.note = note
        left = job.config.run.rounds - strategy.done_before
        arrays = ArrayRecord(flatten(strategy.progress.state.adapter, WHOLE))
        strategy.start(grid, arrays, num_rounds=left, timeout=config.flower.deadline)
    return folder


def _job(config: Config, resumed: Resumed | None) -> tuple[Job, str]:
    """Everything that the server needs, and its base model's fingerprint.

    Where nodes bring their own data the server reads the evaluation set at most.
    """
    if not config.flower.clients:
        silos = read_silos(config)
        config = replace(config, data=replace(config.data, labels=silos.labels))
        model, start, base = load_shared(config, silos.labels)
        rehearse(get_rule(config.merge.rule, **config.merge.options), start)
        return Job(config, tokenised(config, silos, model.tokenizer), model, start, resumed), base
    labels = list(config.data.labels)
    if not labels:
        raise ValueError("data.labels must list the labels: the server sees no training data")
    model, start, base = load_shared(config, labels)
    rehearse(get_rule(config.merge.rule, **config.merge.options), start)
    source = config.data.evaluate
    if source and source != NO_EVALUATION:
        table = read_table(source, config.data)
        examples = encode(table, label_ids(table, labels), model.tokenizer, config.data.max_length)
        data = Data(examples, {}, {}, examples, np.arange(len(examples)))
    else:
        none = Examples({}, np.arange(0), np.arange(0), {})
        data = Data(none, {}, {}, none, np.arange(0))
    return Job(config, data, model, start, resumed), base


def _told(event: str, facts: Mapping[str, Any]) -> None:
    """The run's events in Flower's log."""
    if event == "round":
        shared = facts["global"] or {}
        log.info("round %d: accuracy %s", facts["round"], shared.get("accuracy", "-"))
