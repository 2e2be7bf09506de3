"""Series of a method over its seeds: means with bands, targets reached, areas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedlora.rundir import Array, Run, smoothed, stacked
from fedlora.significance import t_quantile


@dataclass(frozen=True, eq=False)
class Curve:
    """The mean over seeds in the rounds `x` that all of them have; `half` the band's half width.

    `raw` is the mean without smoothing; `half` is NaN for fewer than two seeds.
    """

    x: Array
    mean: Array
    half: Array
    raw: Array
    n: int

    @property
    def low(self) -> Array:
        """The lower edge of the 95 % band; the mean itself where there is no band."""
        return self.mean - np.nan_to_num(self.half)

    @property
    def high(self) -> Array:
        """The upper edge of the 95 % band; the mean itself where there is no band."""
        return self.mean + np.nan_to_num(self.half)


@dataclass(frozen=True)
class Reached:
    """When one run first reached a target: its round and the megabytes moved; inf where never."""

    round: float
    megabytes: float


def curve(runs: Sequence[Run], read: Callable[[Run], Array], rolling: int = 1) -> Curve:
    """The mean of what `read` gives, each run smoothed first, with Student's 95 % band by round.

    Rounds that are NaN in any run are left out; round 0 enters no rolling mean.
    """
    x = np.unique(np.concatenate([run.series("round") for run in runs]))
    rows = stacked(x, runs, read)
    seen = np.isfinite(rows).all(axis=0)
    smooth = np.stack([smoothed(x, row, rolling) for row in rows])[:, seen]
    n, half = len(runs), np.full(int(seen.sum()), np.nan)
    if n > 1:
        half = t_quantile(n) * smooth.std(axis=0, ddof=1) / math.sqrt(n)
    return Curve(x[seen], smooth.mean(axis=0), half, rows[:, seen].mean(axis=0), n)


def accuracy(run: Run) -> Array:
    """Accuracy of the global adapter on the evaluation set by round (see `Run.evaluation`)."""
    return run.evaluation("accuracy")


def moved(run: Run) -> Array:
    """Megabytes moved up to each round, both ways, all clients."""
    return run.megabytes("up") + run.megabytes("down")


def reached(run: Run, target: float) -> Reached:
    """When the run's accuracy, as measured, was first at or above the target, once trained."""
    hits = np.flatnonzero((accuracy(run) >= target) & (run.series("round") > 0))
    if not hits.size:
        return Reached(math.inf, math.inf)
    first = hits[0]
    return Reached(float(run.series("round")[first]), float(moved(run)[first]))


def area(run: Run) -> float:
    """The area under accuracy by round over the rounds it spans: a mean; NaN under two points."""
    x, y = run.series("round"), accuracy(run)
    known = np.isfinite(y)
    if known.sum() < 2:
        return math.nan
    return float(np.trapezoid(y[known], x[known]) / np.ptp(x[known]))


def median(values: Sequence[float]) -> float:
    """The median, in which infinity (never) is later than all; NaN for nothing."""
    return float(np.median(values)) if values else math.nan
