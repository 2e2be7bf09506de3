"""One run from a config to a run directory: the one place where data, model, engine and log meet.

What happens is told to `watch`, one event at a time; who draws it is somebody else's matter.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import torch

from fedlora.adapter import Adapter, ClientResult, ClientState
from fedlora.base import portable_name
from fedlora.checkpoint import Checkpoint, remove_checkpoints, save_checkpoint
from fedlora.client import evaluation_rows, make_fit
from fedlora.config import Config
from fedlora.data import Data, Silos, read_silos, tokenised
from fedlora.evaluate import Scores, evaluate
from fedlora.files import write_text
from fedlora.model import (
    Model,
    load_model,
    longest_input,
    parameter_counts,
    read_adapter,
    save_adapter,
    save_merged,
    write_adapter,
)
from fedlora.modes import GLOBAL, Step, for_mode, loop_adapters, steps
from fedlora.records import Record, round_record, summary_record
from fedlora.resume import CHECKPOINTS, Resumed
from fedlora.robust import warning
from fedlora.rules import Plan, get_rule
from fedlora.runlog import append_record, check_new, create_run, model_card, versions, write_json
from fedlora.server import rehearse
from fedlora.simulation import Fit

Watch: TypeAlias = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True, eq=False)
class Job:
    """A run that is ready to start: everything checked and loaded, nothing trained."""

    config: Config
    silos: Silos
    data: Data
    model: Model
    start: Adapter
    resumed: Resumed | None = None

    @property
    def folder(self) -> Path:
        """The run directory."""
        return run_folder(self.config)


@dataclass(frozen=True, eq=False)
class _Done:
    """What is finished so far: the log, the adapters of the last round, and the best ones."""

    records: Sequence[Record]
    adapters: Mapping[str, Adapter]
    scores: Scores | None
    best: tuple[float, int, Mapping[str, Adapter]] | None = None

    def then(self, record: Record, adapters: Mapping[str, Adapter], scores: Scores | None) -> _Done:
        best, held = self.best, record["heldout"]
        if held and (best is None or held["accuracy"] > best[0]):
            best = (held["accuracy"], record["round"], adapters)
        return _Done([*self.records, record], adapters, scores, best)


def run_folder(config: Config) -> Path:
    """Where a run goes: `run.out`, else runs/<name>."""
    return Path(config.run.out) if config.run.out else Path("runs") / config.run.name


def prepare(config: Config, resumed: Resumed | None = None) -> Job:
    """Reads, checks and loads everything; ValueError for any mistake, before any training.

    With `resumed` (see `resume.find`) the run goes on where it stopped.
    """
    if resumed is None:
        check_new(run_folder(config))
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    silos = read_silos(config)
    config = replace(config, data=replace(config.data, labels=silos.labels))
    model = load_model(
        config.model,
        config.data.label_names or silos.labels,
        seed=config.run.seed,
        device=config.run.device,
        precision=config.run.precision,
    )
    if config.data.max_length > longest_input(model):
        raise ValueError(
            f"data.max_length = {config.data.max_length} is more than the model reads: "
            f"take at most {longest_input(model)}"
        )
    start = read_adapter(model)
    if config.run.mode == "federated":
        rehearse(get_rule(config.merge.rule, **config.merge.options), start)
    data = tokenised(config, silos, model.tokenizer)
    return Job(config, silos, data, model, start, resumed)


def execute(job: Job, watch: Watch = lambda event, facts: None) -> Path:
    """Trains, merges, evaluates and logs every round, then saves; returns the run directory.

    Events: `start`, then per round `fit` and `fitted` (each client), `evaluate` and `round`, at
    last `done`. Ctrl-C leaves a readable directory with the adapter of the last finished round;
    KeyboardInterrupt goes on.
    """
    sizes = {
        client: {"train": len(rows), "heldout": len(job.data.heldout[client])}
        for client, rows in job.data.rows.items()
    }
    place = {"device": str(job.model.device), "threads": torch.get_num_threads()}
    if job.resumed is None:
        create_run(job.folder, job.config, place)
    else:
        job.resumed.take_up(job.folder)
    facts = {"folder": job.folder, "clients": sizes, "rounds": job.config.run.rounds}
    watch("start", {**facts, "notes": _notes(job, len(sizes), place)})
    done = _begun(job)
    interrupted = True
    try:
        for record, step, adapters, scores in _rounds(job, watch):
            append_record(job.folder, record)
            done = done.then(record, adapters, scores)
            if step is not None:
                _keep(job.folder, step, done)
            watch("round", record)
        interrupted = False
    finally:
        if done.records:
            _save(job, done, sizes, interrupted)
    remove_checkpoints(job.folder / CHECKPOINTS)
    watch("done", {"folder": job.folder, "record": done.records[-1]})
    return job.folder


def _begun(job: Job) -> _Done:
    """What is there before the first round of this process."""
    if job.resumed is None or job.resumed.checkpoint is None:
        return _Done([], {GLOBAL: job.start}, None)
    checkpoint, records = job.resumed.checkpoint, job.resumed.records
    config, data = for_mode(job.config, job.data)
    adapters = loop_adapters(config, sorted(data.rows), checkpoint.loops)
    scores = _evaluated(job.model, data, config, checkpoint.round, adapters)[0]
    best = (*checkpoint.notes["best"], checkpoint.best) if checkpoint.notes["best"] else None
    return _Done(records, adapters, scores, best)


def _keep(folder: Path, step: Step, done: _Done) -> None:
    """The checkpoint of a round, whose line is in the log already."""
    best = done.best[2] if done.best else {}
    notes = {"best": list(done.best[:2]) if done.best else []}
    save_checkpoint(folder / CHECKPOINTS, Checkpoint(step.round, step.loops, best, notes))


def _notes(job: Job, clients: int, place: Mapping[str, Any]) -> list[str]:
    """What the user should know before the first round."""
    config = job.config
    a_round = math.ceil(config.merge.participation * clients - 1e-9)
    federated = config.run.mode == "federated"
    notes = [warning(config.merge.robust, a_round)] if federated else []
    notes += job.resumed.notes(versions() | dict(place)) if job.resumed else []
    return [note for note in notes if note]


def _rounds(
    job: Job, watch: Watch
) -> Iterator[tuple[Record, Step | None, dict[str, Adapter], Scores | None]]:
    """Every round's record, step, adapters and global scores, round 0 (nothing trained) first."""
    config, data = for_mode(job.config, job.data)
    fit = _watched(make_fit(job.model, data, config), watch)

    def scored(step: Step | None, adapters: dict[str, Adapter], began: float) -> Any:
        round = step.round if step else 0
        watch("evaluate", {"round": round})
        reached = perf_counter()
        shared, heldout = _evaluated(job.model, data, config, round, adapters)
        spent = perf_counter() - reached
        total = perf_counter() - began
        record = round_record(
            round, shared, heldout, step, seconds_evaluate=spent, seconds_total=total
        )
        return record, step, adapters, shared

    checkpoint = job.resumed.checkpoint if job.resumed else None
    if checkpoint is None:
        yield scored(None, {GLOBAL: job.start}, perf_counter())
    began = perf_counter()
    loops = checkpoint.loops if checkpoint else None
    for step in steps(config, fit, job.start, sorted(data.rows), loops):
        finished = scored(step, step.adapters, began)
        began = perf_counter()  # what the caller does with a round counts for the next one
        yield finished


def _evaluated(
    model: Model, data: Data, config: Config, round: int, adapters: Mapping[str, Adapter]
) -> tuple[Scores | None, dict[str, Scores]]:
    """The global adapter on the shared set, and on each client's held-out rows (or the client's
    own).
    """
    rows, batch = evaluation_rows(config, data, round), config.evaluate.batch
    if rows is None:
        return None, {}
    heldout: dict[str, Scores] = {}
    shared: Scores | None = None
    for name, adapter in adapters.items():
        write_adapter(model, adapter)
        if name == GLOBAL:
            shared = evaluate(model, data.evaluation, rows, batch)
        for client in data.heldout if name == GLOBAL else [name]:
            if data.heldout[client].size:
                heldout[client] = evaluate(model, data.train, data.heldout[client], batch)
    for scores in (shared, *heldout.values()):
        if scores is not None and not math.isfinite(scores.loss):
            raise ValueError(
                f"round {round}: the loss of the merged adapter is {scores.loss}: training "
                f"diverged, lower client.lr, now {config.client.lr}"
            )
    return shared, heldout


def _watched(fit: Fit, watch: Watch) -> Fit:
    def told(
        client: str, round: int, plan: Plan, adapter: Adapter, state: ClientState
    ) -> ClientResult:
        watch("fit", {"client": client, "round": round})
        result = fit(client, round, plan, adapter, state)
        watch("fitted", {"client": client, "round": round, "metrics": result.metrics})
        return result

    return told


def _save(job: Job, done: _Done, sizes: Mapping[str, Any], interrupted: bool) -> None:
    """Writes summary, adapter(s) with their model card, and what else the config asks for."""
    config, folder = job.config, job.folder
    trainable, base = parameter_counts(job.model)
    summary = summary_record(
        done.records,
        done.scores,
        labels=job.model.labels,
        clients=sizes,
        trainable=trainable,
        base=base,
        interrupted=interrupted,
    )
    wanted = {"adapter": done.adapters}
    if config.run.save_best and done.best:
        wanted["best"] = done.best[2]
        summary["best"] = {"round": done.best[1], "heldout_accuracy": done.best[0]}
    write_json(folder / "summary.json", summary)
    card = model_card(config, summary, portable_name(config.model.name))
    for kind, adapters in wanted.items():
        shutil.rmtree(folder / kind, ignore_errors=True)  # of an interrupted run that was resumed
        for client, adapter in adapters.items():
            place = folder / kind / client if client else folder / kind
            save_adapter(job.model, adapter, place)
            write_text(place / "README.md", card)
    if config.run.save_merged and GLOBAL in done.adapters:
        shutil.rmtree(folder / "merged", ignore_errors=True)
        save_merged(job.model, done.adapters[GLOBAL], folder / "merged")
