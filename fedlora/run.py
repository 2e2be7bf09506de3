"""One run from a config to a run directory, in one process: where data, model and engine meet.

What happens is told to `watch`, one event at a time; who draws it is somebody else's matter.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fedlora.adapter import Adapter, ClientResult, ClientState, byte_count, flatten
from fedlora.checks import check_has_data, check_loaded
from fedlora.client import make_fit
from fedlora.config import Config
from fedlora.data import read_silos, tokenised
from fedlora.model import configured_model, read_adapter
from fedlora.modes import for_mode, merge_policy, steps
from fedlora.privacy.ledger import LEDGERS
from fedlora.privacy.plan import announce, merge_for
from fedlora.privacy.reserve import check_payable
from fedlora.recording import Job, Watch, recording
from fedlora.remarks import remarks
from fedlora.resume import Resumed
from fedlora.rules import Plan, get_rule
from fedlora.runlog import run_folder
from fedlora.server import rehearse
from fedlora.settings import round_size
from fedlora.shelf import shelf
from fedlora.simulation import Fit
from fedlora.stopped import check_new


def prepare(config: Config, resumed: Resumed | None = None) -> Job:
    """Reads, checks and loads everything; ValueError for any mistake, before any training.

    With `resumed` (see `resume.find`) the run goes on where it stopped.
    """
    if resumed is None:
        check_new(run_folder(config))
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    check_has_data(config)
    silos = read_silos(config)
    config = replace(config, data=replace(config.data, labels=silos.labels))
    model = configured_model(config, silos.labels)
    start = read_adapter(model)
    if config.run.mode == "federated":
        rehearse(get_rule(config.merge.rule, **config.merge.options), start)
        merge_policy(config, sorted(silos.parts))
    data = tokenised(config, silos, model.tokenizer)
    check_loaded(config, model, data)
    executed, pooled = for_mode(config, data)
    rows = {client: len(own) for client, own in pooled.rows.items()}
    costs, known = announce(executed, rows, start), remarks(config, silos)
    columns = silos.table.columns
    return Job(config, data, model, start, resumed, costs, known, columns=columns)


def execute(job: Job, watch: Watch = lambda event, facts: None) -> Path:
    """Trains, merges, evaluates and logs every round, then saves; returns the run directory.

    Events: those of `recording`, and `fit` and `fitted` for each client in each round. Ctrl-C
    leaves a readable directory with the adapter of the last finished round; KeyboardInterrupt goes
    on.
    """
    config, data = for_mode(job.config, job.data)
    fit = _watched(make_fit(job.model, data, config, job.folder / LEDGERS), watch)
    checkpoint = job.resumed.checkpoint if job.resumed else None
    with recording(job, watch) as note:
        if checkpoint is None:
            note(None)
        loops, clients = checkpoint.loops if checkpoint else None, sorted(data.rows)
        replies = round_size(len(clients), config.merge.participation)
        expected = replies * byte_count(flatten(job.start))
        shelve = shelf(job.folder, expected, config.run.replies_mb * 10**6)
        merge = merge_for(config, len(clients), job.folder / LEDGERS)
        made = steps(config, fit, job.start, clients, loops, shelve, merge)
        for round in range(checkpoint.round + 1 if checkpoint else 1, config.run.rounds + 1):
            check_payable(config, clients, job.folder, round)
            note(next(made))
    return job.folder


def _watched(fit: Fit, watch: Watch) -> Fit:
    def told(
        client: str, round: int, plan: Plan, adapter: Adapter, state: ClientState
    ) -> ClientResult:
        watch("fit", {"client": client, "round": round})
        result = fit(client, round, plan, adapter, state)
        watch("fitted", {"client": client, "round": round, "metrics": result.metrics})
        return result

    return told
