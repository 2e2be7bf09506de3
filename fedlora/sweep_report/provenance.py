"""Where a report's numbers come from: versions, data sizes, settings, seeds, and how was tuned."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePath
from typing import Any

from fedlora.rundir import Run, number
from fedlora.sweep_report.cases import Case
from fedlora.sweep_report.content import Table
from fedlora.sweep_report.findings import setting
from fedlora.sweep_report.tables import value

SETTINGS = (
    "model.name", "model.rank", "model.alpha", "run.rounds", "client.steps", "client.epochs",
    "client.batch", "client.lr", "client.schedule", "client.optimiser", "merge.head",
    "partition.by", "partition.clients", "data.holdout", "evaluate.every", "evaluate.limit",
)  # fmt: skip
SHOWN = 4  # more different values than this are not listed


def origin_table(cases: Sequence[Case]) -> Table:
    """Data, sizes, settings and versions of the runs that count."""
    runs = [run for case in cases for arm in case.there for run in arm.all]
    rows = [
        ["runs", str(len(runs))],
        [
            "seeds",
            _listed({str(seed) for case in cases for arm in case.there for seed in arm.runs}),
        ],
        ["training data", _listed(_source(run) for run in runs)],
        ["training rows, all clients", _counts(runs, lambda run: _rows(run, "train"))],
        ["held-out training rows", _counts(runs, lambda run: _rows(run, "heldout"))],
        ["evaluation rows", _counts(runs, lambda run: number(run.summary, ("final", "examples")))],
        ["steps, all clients and rounds", _counts(runs, _steps)],
    ]
    rows += [[key, _listed(_shown(setting(run, key)) for run in runs)] for key in SETTINGS]
    versions = [_versions(run) for run in runs]
    for key in dict.fromkeys(key for found in versions for key in found):
        rows.append(
            [
                key,
                _listed(
                    str(found.get(key, "-"))[: 12 if key == "commit" else 80] for found in versions
                ),
            ]
        )
    known = [row for row in rows if row[1] != "-"]
    return Table("Data, settings and versions", ["what", "value"], known, texts=2)


def tuning_words(cases: Sequence[Case]) -> str:
    """How settings were chosen."""
    tried = [one for case in cases for arm in case.arms for one in arm.tried]
    if not tried:
        return "No setting was tuned: every method ran with the values that the sweep gave it."
    keys = ", ".join(dict.fromkeys(key for one in tried for key in one.grid))
    numbers = sorted({one.seed for one in tried})
    what = f"seed {numbers[0]}" if len(numbers) == 1 else "seeds " + ", ".join(map(str, numbers))
    return (
        f"{keys} was chosen for each method and case apart, by mean accuracy on training rows held "
        f"out of the clients' training ({len(tried)} tuning runs, {what}, which count nowhere "
        "else). The evaluation set had no part in any choice; final scores are those of the last "
        "round, never of the best one."
    )


def _source(run: Run) -> str:
    """The training data by name; of a file its name alone."""
    files = setting(run, "data.clients")
    if files:
        return ", ".join(str(client) for client in files)
    return PurePath(str(setting(run, "data.train") or "-")).name


def _rows(run: Run, kind: str) -> float:
    clients = run.summary.get("clients") or {}
    return float(sum(sizes.get(kind, 0) for sizes in clients.values()))


def _steps(run: Run) -> float:
    return sum(
        float(one.get("steps") or 0) for line in run.rounds for one in line["clients"].values()
    )


def _versions(run: Run) -> dict[str, Any]:
    """The versions that the run wrote down; empty where it did not."""
    try:
        found = json.loads((run.path / "versions.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _counts(runs: Sequence[Run], read: Callable[[Run], float]) -> str:
    found = sorted({count for run in runs if (count := read(run)) == count})
    if len(found) > SHOWN:
        return f"{found[0]:,.0f} to {found[-1]:,.0f}"
    return " or ".join(f"{count:,.0f}" for count in found) or "-"


def _shown(setting: Any) -> str:
    return "-" if setting is None or setting == "" else value(setting)


def _listed(values: Iterable[str]) -> str:
    """The different values; only their number where they are many."""
    found = sorted(set(values), key=lambda text: (not text.isdecimal(), text.zfill(9)))
    if len(found) <= SHOWN or all(text.isdecimal() for text in found):
        return ", ".join(found) or "-"
    return f"{len(found)} different ones: {found[0]}, {found[1]}, ..."
