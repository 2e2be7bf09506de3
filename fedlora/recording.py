"""What a run leaves while it goes on, whatever engine drives it: scores, log, checkpoints, results.

Evaluates what the rounds bring and writes the run directory; trains and merges nothing.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import torch

from fedlora.adapter import Adapter
from fedlora.base import portable_name
from fedlora.checkpoint import Checkpoint, remove_checkpoints, save_checkpoint
from fedlora.client import evaluation_rows
from fedlora.config import Config
from fedlora.data import Data
from fedlora.digests import data_record
from fedlora.evaluate import Scores, evaluate, evaluate_with_part
from fedlora.files import locked, write_text
from fedlora.model import Model, base_count, save_adapter, save_merged, write_adapter
from fedlora.modes import GLOBAL, Step, fits_per_round, for_mode, loop_adapters
from fedlora.privacy.ledger import LEDGERS, close_all, heads
from fedlora.privacy.plan import hides_evaluation
from fedlora.privacy.statement import card_section, write_statement
from fedlora.records import Record, Scored, round_record, summary_record
from fedlora.resume import Resumed
from fedlora.robust import warning
from fedlora.runlog import (
    CHECKPOINTS,
    COLUMNS,
    PROCESS,
    append_record,
    create_run,
    model_card,
    run_folder,
    versions,
    write_json,
)
from fedlora.settings import round_size, shares_metrics
from fedlora.simulation import Progress
from fedlora.tables import UNKNOWN, Columns

COMMON = "common"  # the folder of what all share, where clients keep the rest on other machines
COMMON_CARD = """# The common part of a federation

What its clients share, in PEFT's form. What makes an adapter of it (a head, or B) is on their own
machines; here these are as they were before training. Nobody was scored with it or uses it alone.
"""
Watch: TypeAlias = Callable[[str, Mapping[str, Any]], None]
Note: TypeAlias = Callable[[Step | None], None]


@dataclass(frozen=True, eq=False)
class Job:
    """A run that is ready to start: everything checked and loaded, nothing trained."""

    config: Config
    data: Data
    model: Model
    start: Adapter
    resumed: Resumed | None = None
    privacy: Sequence[str] = ()  # what it will cost, in words
    remarks: Sequence[str] = ()  # what to know of its data
    engine: str = PROCESS
    columns: Columns = UNKNOWN  # that its texts were read from

    @property
    def folder(self) -> Path:
        """The run directory."""
        return run_folder(self.config)


@dataclass(frozen=True, eq=False)
class _Done:
    """What is finished so far: the log, the adapters of the last round, and the best ones.

    `common` is what all clients share, where none of their own adapters is here.
    """

    records: Sequence[Record]
    adapters: Mapping[str, Adapter]
    scores: Scores | None
    best: tuple[float, int, Mapping[str, Adapter]] | None = None
    common: Adapter | None = None

    def then(
        self,
        record: Record,
        adapters: Mapping[str, Adapter],
        scores: Scores | None,
        common: Adapter | None,
    ) -> _Done:
        best, held = self.best, record["heldout"]
        if held and (best is None or held["accuracy"] > best[0]):
            best = (held["accuracy"], record["round"], adapters)
        return _Done([*self.records, record], adapters, scores, best, common)


@contextmanager
def recording(job: Job, watch: Watch) -> Iterator[Note]:
    """Opens the run directory and yields what is to be called after every round, None for round 0.

    The directory is this process's own until the end; ValueError where another one has it. Each
    call evaluates, writes a line to the log, then the checkpoint. At the end, and where the engine
    stops early, the results are saved: adapter, summary, card. Events: `start`, then per round
    `evaluate` and `round`, at last `done`.
    """
    sizes = {
        client: {"train": len(rows), "heldout": len(job.data.heldout[client])}
        for client, rows in job.data.rows.items()
    }
    place = {"device": str(job.model.device), "threads": torch.get_num_threads()}
    if job.resumed is None:
        facts: dict[str, Any] = {"engine": job.engine, **place, **_data_record(job)}
        if job.columns != UNKNOWN:
            facts[COLUMNS] = list(job.columns)
        create_run(job.folder, job.config, facts)
    with locked(job.folder):
        if job.resumed is not None:
            job.resumed.take_up(job.folder)
        with _rounds(job, watch, sizes, place) as note:
            yield note


@contextmanager
def _rounds(
    job: Job, watch: Watch, sizes: Mapping[str, Any], place: Mapping[str, Any]
) -> Iterator[Note]:
    """As `recording`, in a directory that is there and this process's own."""
    config, data = for_mode(job.config, job.data)
    checkpoint = job.resumed.checkpoint if job.resumed else None
    facts = {
        "folder": job.folder,
        "clients": sizes,
        "rounds": config.run.rounds,
        "done": checkpoint.round if checkpoint else 0,
        "fits": fits_per_round(config, len(data.rows)),
    }
    watch("start", {**facts, "notes": _notes(job, sizes, place)})
    done, began = _begun(job), perf_counter()

    def note(step: Step | None) -> None:
        nonlocal done, began
        adapters = step.adapters if step else {GLOBAL: job.start}
        round = step.round if step else 0
        watch("evaluate", {"round": round})
        reached = perf_counter()
        scored = _evaluated(job.model, data, config, round, adapters)
        spent, total = perf_counter() - reached, perf_counter() - began
        record = round_record(round, scored, step, seconds_evaluate=spent, seconds_total=total)
        began = perf_counter()  # what writing and watching take counts for the next round
        append_record(job.folder, record)
        common = _common(step.loops, adapters) if step else None
        done = done.then(record, adapters, scored.shared.get(GLOBAL), common)
        if step is not None:
            _keep(job.folder, step, done)
        watch("round", record)

    try:
        yield note
    except BaseException as error:
        stopped = " ".join(str(error).split()) or type(error).__name__
        stopped = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else stopped
        try:
            _save(job, done, sizes, stopped)
        except OSError as second:  # a full disk, most likely, that ended the run already
            error.add_note(f"the results so far could not be saved either: {second}")
        raise
    _save(job, done, sizes, "")
    remove_checkpoints(job.folder / CHECKPOINTS)
    watch("done", {"folder": job.folder, "record": done.records[-1]})


def _data_record(job: Job) -> dict[str, str]:
    """What the data files of the run are, with their rows."""
    data = job.data
    rows = {"data.train": len(data.train), "data.evaluate": len(data.evaluation)}
    for client, own in data.rows.items():
        rows[f"data.clients.{client}"] = len(own) + len(data.heldout[client])
    return data_record(job.config.data, rows)


def _begun(job: Job) -> _Done:
    """What is there before the first round of this process."""
    if job.resumed is None or job.resumed.checkpoint is None:
        return _Done([], {GLOBAL: job.start}, None)
    checkpoint, records = job.resumed.checkpoint, job.resumed.records
    config, data = for_mode(job.config, job.data)
    adapters = loop_adapters(config, sorted(data.rows), checkpoint.loops)
    scored = _evaluated(job.model, data, config, checkpoint.round, adapters)
    best = (*checkpoint.notes["best"], checkpoint.best) if checkpoint.notes["best"] else None
    common = _common(checkpoint.loops, adapters)
    return _Done(records, adapters, scored.shared.get(GLOBAL), best, common)


def _common(loops: Mapping[str, Progress], adapters: Mapping[str, Adapter]) -> Adapter | None:
    return None if adapters else loops[GLOBAL].state.adapter


def _keep(folder: Path, step: Step, done: _Done) -> None:
    """The checkpoint of a round, whose line is in the log already."""
    best = done.best[2] if done.best else {}
    notes: dict[str, Any] = {"best": list(done.best[:2]) if done.best else []}
    if (folder / LEDGERS).is_dir():
        notes["ledgers"] = heads(folder / LEDGERS)
    save_checkpoint(folder / CHECKPOINTS, Checkpoint(step.round, step.loops, best, notes))
    close_all(folder / LEDGERS, step.round)


def _notes(job: Job, sizes: Mapping[str, Any], place: Mapping[str, Any]) -> list[str]:
    """What the user should know before the first round."""
    config = job.config
    a_round = round_size(len(sizes), config.merge.participation)
    federated = config.run.mode == "federated"
    notes = [warning(config.merge.robust, a_round)] if federated else []
    notes += job.resumed.notes(versions() | dict(place)) if job.resumed else []
    notes += [*job.remarks, *job.privacy]
    return [note for note in notes if note]


def _evaluated(
    model: Model, data: Data, config: Config, round: int, adapters: Mapping[str, Adapter]
) -> Scored:
    """Each adapter on the shared set, and on its client's held-out rows (the global one: all)."""
    part, batch = evaluation_rows(config, data, round), config.evaluate.batch
    if part is None or not len(part) or hides_evaluation(config, data):
        return Scored()  # not now, or nothing that may be scored
    rows = data.evaluation_rows if round == config.run.rounds else part
    scored = Scored()
    # whether a run of a trusted server ends must not depend on one client's rows
    private = config.privacy.unit == "client"
    for name, adapter in adapters.items():
        write_adapter(model, adapter)
        whole, again = evaluate_with_part(model, data.evaluation, rows, part, batch)
        if math.isfinite(whole.loss) or not (private and data.own_evaluation):
            scored.shared[name] = whole
            if len(part) < len(rows):
                scored.subset[name] = again
        for client in data.heldout if name == GLOBAL else [name]:
            if data.heldout[client].size and shares_metrics(config.privacy):
                own = evaluate(model, data.train, data.heldout[client], batch)
                if math.isfinite(own.loss) or not private:
                    scored.heldout[client] = own
    for scores in (*scored.shared.values(), *scored.heldout.values()):
        if not math.isfinite(scores.loss):
            raise ValueError(
                f"round {round}: the loss of the merged adapter is {scores.loss}: training "
                f"diverged, lower client.lr, now {config.client.lr}"
            )
    return scored


def _save(job: Job, done: _Done, sizes: Mapping[str, Any], stopped: str) -> None:
    """Writes summary, adapter(s) with their model card, and what else the config asks for.

    `stopped` says what ended the run early; empty where it came to its end.
    """
    if not done.records:
        return
    config, folder = job.config, job.folder
    summary = summary_record(
        done.records,
        done.scores,
        labels=job.model.labels,
        clients=sizes,
        base=base_count(job.model),
        interrupted=bool(stopped),
    )
    summary["own_evaluation"] = job.data.own_evaluation
    if stopped:
        summary["stopped_by"] = stopped
    wanted = {"adapter": done.adapters}
    if config.run.save_best and done.best:
        wanted["best"] = done.best[2]
        summary["best"] = {"round": done.best[1], "heldout_accuracy": done.best[0]}
    if done.common is not None:
        wanted[COMMON] = {GLOBAL: done.common}
    card = model_card(config, summary, portable_name(config.model.name)) + card_section(config)
    for kind, adapters in wanted.items():
        shutil.rmtree(folder / kind, ignore_errors=True)  # of an interrupted run that was resumed
        for client, adapter in adapters.items():
            place = folder / kind / client if client else folder / kind
            save_adapter(job.model, adapter, place)
            write_text(place / "README.md", COMMON_CARD if kind == COMMON else card)
    if config.run.save_merged:
        shutil.rmtree(folder / "merged", ignore_errors=True)
        for client, adapter in done.adapters.items():
            save_merged(job.model, adapter, folder / "merged" / client)
    if config.privacy.unit != "none":
        write_statement(folder)
    write_json(folder / "summary.json", summary)  # last: it says that all is there
