"""The error budget of a run as its log holds it: what a merge lost, and what clients changed.

A line's `budget` holds norms under names such as `wanted`, `tail`, `cross`, and the same for each
layer under `layers`; whatever of it is not there is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from fedlora.rundir import Array, Run

CHANGES = {  # parts of the clients' changes, orthogonal to one another
    "shared": "common, known directions",
    "shared_new": "common, new directions",
    "apart": "apart, known directions",
    "apart_new": "apart, new directions",
}


def total(run: Run, name: str) -> Array:
    """A figure of the budget over all layers by round; NaN where there is none."""
    return np.array([_figure(line.get("budget"), name) for line in run.rounds])


def total_names(run: Run) -> list[str]:
    """The figures over all layers that any round's budget has, in the order of the log."""
    budgets = [line.get("budget") for line in run.rounds]
    known = [budget for budget in budgets if isinstance(budget, Mapping)]
    return list(dict.fromkeys(k for one in known for k, v in one.items() if _is_number(v)))


def layer_names(run: Run) -> list[str]:
    """The layers that any round's budget names, in the order of the log."""
    return list(dict.fromkeys(name for line in run.rounds for name in _layers(line)))


def layer_shares(runs: Sequence[Run], names: Sequence[str], part: str) -> tuple[Array, Array]:
    """Rounds, and `part` relative to `wanted` (layers x rounds), mean over the runs that know
    it.
    """
    x = np.unique(np.concatenate([run.series("round") for run in runs]))
    cube = np.full((len(runs), len(names), len(x)), np.nan)
    for grid, run in zip(cube, runs, strict=True):
        for line in run.rounds:
            place, layers = int(np.searchsorted(x, line["round"])), _layers(line)
            for row, name in enumerate(names):
                own = layers.get(name)
                grid[row, place] = _ratio(_figure(own, part), _figure(own, "wanted"))
    known = np.isfinite(cube).any(axis=(0, 1))
    cube = cube[:, :, known]
    count = np.isfinite(cube).sum(axis=0)
    mean = np.divide(
        np.nansum(cube, axis=0), count, out=np.full(count.shape, np.nan), where=count > 0
    )
    return x[known], mean


def relative(part: str) -> Callable[[Run], Array]:
    """What reads a part relative to the norm of what was wanted, over all layers by round."""

    def read(run: Run) -> Array:
        wanted, own = total(run, "wanted"), total(run, part)
        share: Array = np.divide(own, wanted, out=np.full(len(own), np.nan), where=wanted > 0)
        return share

    return read


def change_share(part: str) -> Callable[[Run], Array]:
    """What reads the share that a part has in all that clients changed, as squared norms.

    sum w_k ||D_k||^2 = update^2 + drift^2, and each of them is what lies in the rows of the last A
    (known directions) and beside them: four parts that add up to one.
    """

    def read(run: Run) -> Array:
        new, new_drift = (np.nan_to_num(total(run, name)) ** 2 for name in ("new", "new_drift"))
        parts = {
            "shared": np.maximum(total(run, "update") ** 2 - new, 0.0),
            "shared_new": new,
            "apart": np.maximum(total(run, "drift") ** 2 - new_drift, 0.0),
            "apart_new": new_drift,
        }
        whole = sum(parts.values(), np.zeros(len(new)))
        share: Array = np.divide(parts[part], whole, out=np.full(len(new), np.nan), where=whole > 0)
        return share

    return read


def _layers(line: Mapping[str, Any]) -> Mapping[str, Any]:
    budget = line.get("budget")
    layers = budget.get("layers") if isinstance(budget, Mapping) else None
    return layers if isinstance(layers, Mapping) else {}


def _figure(figures: Any, name: str) -> float:
    value = figures.get(name) if isinstance(figures, Mapping) else None
    return float(value) if _is_number(value) else math.nan


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
