"""A sweep's folder as written and read: what was planned, where its runs are, one row for each run.

`sweep.json` lists the runs, `runs/<id>` are ordinary run directories, `results.parquet` is a table
of all. Imports no torch.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedlora.files import write_bytes, write_text
from fedlora.rundir import Run, number, read_run

PLAN, RUNS, RESULTS = "sweep.json", "runs", "results.parquet"
TEXTS = ("id", "method", "case", "path")
FIGURES = {  # column -> file and place in it
    "accuracy": ("summary", "final", "accuracy"),
    "macro_f1": ("summary", "final", "macro_f1"),
    "loss": ("summary", "final", "loss"),
    "heldout_accuracy": ("log", "heldout", "accuracy"),
    "merge_error": ("log", "merge_error"),
    "gap": ("summary", "gap"),
    "rounds": ("summary", "rounds"),
    "bytes_up": ("summary", "bytes_up_total"),
    "bytes_down": ("summary", "bytes_down_total"),
    "seconds": ("summary", "seconds", "total"),
    "seconds_server": ("summary", "seconds", "aggregate"),
}


@dataclass(frozen=True)
class Entry:
    """A planned run: what it is of; `varied` are the settings in which the sweep's runs differ."""

    id: str
    method: str
    case: str
    seed: int
    tuning: bool
    varied: Mapping[str, Any]
    grid: Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """Accuracy and loss (nats) over the held-out training rows of all clients."""

    accuracy: float
    loss: float


@dataclass(frozen=True)
class SweepRuns:
    """A sweep as read: its entries, and those runs that have come to their end."""

    name: str
    folder: Path
    entries: Sequence[Entry]
    runs: Mapping[str, Run]

    def counted(self, method: str, case: str) -> list[Run]:
        """The finished runs that count (not those of tuning), by seed."""
        found = self._counted(method, case)
        return [self.runs[e.id] for e in sorted(found, key=lambda e: e.seed) if e.id in self.runs]

    def chosen(self, method: str, case: str) -> Mapping[str, Any]:
        """The values that tuning chose for the method in this case; empty where none is planned."""
        return next((entry.grid for entry in self._counted(method, case)), {})

    def _counted(self, method: str, case: str) -> list[Entry]:
        return [e for e in self.entries if (e.method, e.case, e.tuning) == (method, case, False)]


def run_path(folder: Path, id: str) -> Path:
    """Where the run of this id is."""
    return folder / RUNS / id


def is_finished(path: Path) -> bool:
    """Whether a run directory holds a run that came to its end."""
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return not summary["interrupted"]


def heldout_score(path: Path) -> Score:
    """The score of a finished run's last round on the rows held out of the clients' training."""
    found = read_run(path).rounds[-1]["heldout"]
    if not found:
        raise ValueError(f"{path} scored no held-out rows: tuning needs data.holdout above 0")
    return Score(found["accuracy"], found["loss"])


def read_sweep(folder: Path) -> SweepRuns:
    """The sweep in a folder; ValueError where it holds none."""
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is no sweep: it has no {PLAN}") from error
    except ValueError as error:
        raise ValueError(f"{folder / PLAN} is damaged: {error}; run the sweep again") from error
    entries = [Entry(**entry) for entry in plan["runs"]]
    paths = {entry.id: run_path(folder, entry.id) for entry in entries}
    runs = {id: read_run(path) for id, path in paths.items() if is_finished(path)}
    return SweepRuns(plan["name"], folder, entries, runs)


def write_plan(folder: Path, name: str, entries: Sequence[Entry]) -> None:
    """Writes down what the sweep consists of, in one step."""
    plan = {"name": name, "runs": [asdict(entry) for entry in entries]}
    write_text(folder / PLAN, json.dumps(plan, indent=1) + "\n")


def write_results(folder: Path, entries: Sequence[Entry]) -> Path:
    """Writes `results.parquet`: a row for each planned run, its figures empty until it has ended.

    A varied setting is a column of text. Bytes are those of all clients and rounds, seconds those
    of the whole run and of its server; accuracies are shares.
    """
    pyarrow, parquet = arrow()
    keys = sorted({key for entry in entries for key in entry.varied})
    rows = [_row(folder, entry, keys) for entry in entries]
    kinds = {"seed": pyarrow.int64(), "tuning": pyarrow.bool_(), "finished": pyarrow.bool_()}
    kinds |= {name: pyarrow.float64() for name in FIGURES}
    names = [*TEXTS, *keys, "seed", "tuning", "finished", *FIGURES]
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in names])
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), buffer)
    write_bytes(folder / RESULTS, buffer.getvalue())
    return folder / RESULTS


def arrow() -> tuple[Any, Any]:
    """pyarrow and its parquet module; ValueError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("a sweep writes parquet: pip install 'fedlora[sweep]'") from error
    return pyarrow, pyarrow.parquet


def _row(folder: Path, entry: Entry, keys: Sequence[str]) -> dict[str, Any]:
    path = run_path(folder, entry.id)
    run = read_run(path) if is_finished(path) else None
    texts = {
        "id": entry.id,
        "method": entry.method,
        "case": entry.case,
        "path": f"{RUNS}/{entry.id}",
    }
    found = {key: entry.varied[key] for key in keys if key in entry.varied}
    varied = {k: v if isinstance(v, str) else json.dumps(v) for k, v in found.items()}
    facts = {"seed": entry.seed, "tuning": entry.tuning, "finished": run is not None}
    return texts | varied | facts | (_figures(run) if run else {})


def _figures(run: Run) -> dict[str, float | None]:
    last = run.rounds[-1] if run.rounds else {}
    values = {
        name: number(run.summary if place == "summary" else last, keys)
        for name, (place, *keys) in FIGURES.items()
    }
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
