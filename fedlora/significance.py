"""What a few seeds can tell: means with intervals, paired comparisons, rank correlations.

Knows numbers only, nothing of runs; scipy is imported where a distribution is needed.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import permutations
from typing import Any

import numpy as np

from fedlora.rundir import Array

LEVEL = 0.95
NOISE = 1e-12  # a spread below it is rounding, not a spread


@dataclass(frozen=True)
class Estimate:
    """The mean of n values, their standard deviation (n - 1), half the 95 % interval's width.

    The interval is Student's t; the deviation and the interval are NaN for fewer than two values.
    """

    n: int
    mean: float
    sd: float
    half: float


@dataclass(frozen=True)
class Paired:
    """A paired comparison: the mean difference with its interval, t, two-sided p, effect sizes.

    `d` is Cohen's d_z (mean over deviation of the differences), `g` the same without its bias
    (Hedges). t, p, d and g are NaN where the differences do not vary: no test can be made.
    """

    difference: Estimate
    t: float
    p: float
    d: float
    g: float

    @property
    def n(self) -> int:
        """The number of pairs."""
        return self.difference.n


def estimate(values: Sequence[float] | Array) -> Estimate:
    """Mean and 95 % interval of the values that are not NaN."""
    given = np.asarray(values, dtype=np.float64)
    known = given[np.isfinite(given)]
    n = len(known)
    if n == 0:
        return Estimate(0, math.nan, math.nan, math.nan)
    if n == 1:
        return Estimate(1, float(known[0]), math.nan, math.nan)
    sd = float(known.std(ddof=1))
    return Estimate(n, float(known.mean()), sd, t_quantile(n) * sd / math.sqrt(n))


def t_quantile(n: int) -> float:
    """How many standard errors the 95 % interval of the mean of n >= 2 values is wide, one side."""
    return float(_scipy("special").stdtrit(n - 1, (1 + LEVEL) / 2))


def paired(values: Sequence[float], baseline: Sequence[float]) -> Paired:
    """The paired t test of `values - baseline`, pair by pair; ValueError for unequal lengths."""
    if len(values) != len(baseline):
        raise ValueError(f"{len(values)} values and {len(baseline)} of the baseline make no pairs")
    difference = estimate(np.asarray(values, np.float64) - np.asarray(baseline, np.float64))
    if difference.n < 2 or difference.sd < NOISE:
        return Paired(difference, math.nan, math.nan, math.nan, math.nan)
    d = difference.mean / difference.sd
    t = d * math.sqrt(difference.n)
    p = float(2 * _scipy("special").stdtr(difference.n - 1, -abs(t)))
    return Paired(difference, t, p, d, d * hedges(difference.n))


def hedges(n: int) -> float:
    """The factor that makes d_z of n pairs unbiased (Hedges 1981); NaN below three pairs.

    With f = n - 1: Gamma(f / 2) / (sqrt(f / 2) Gamma((f - 1) / 2)), about 1 - 3 / (4 f - 1).
    """
    f = n - 1
    if f < 2:
        return math.nan
    return math.exp(math.lgamma(f / 2) - math.lgamma((f - 1) / 2)) / math.sqrt(f / 2)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979); NaN stays NaN and counts for nothing."""
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected, worst = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p))
        corrected[place] = worst
    return corrected


def centred(values: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    """Each value minus the mean of its group."""
    members: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(value)
    means = {group: math.fsum(found) / len(found) for group, found in members.items()}
    return [value - means[group] for value, group in zip(values, groups, strict=True)]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Spearman's rank correlation and its two-sided p; NaN for under three pairs or no spread.

    p is the share of the orders of `y` that go with `x` as closely or more: of all of them up to
    eight pairs, else of 20,000 drawn ones, the given one counted. It holds with ties, too.
    """
    if len(x) < 3 or np.ptp(x) < NOISE or np.ptp(y) < NOISE:
        return math.nan, math.nan
    ranks = _scipy("stats").rankdata
    first, second = (ranks(np.round(values, 12)) for values in (x, y))
    first, second = first - first.mean(), second - second.mean()
    scale = math.sqrt(float(first @ first) * float(second @ second))
    if len(x) <= 8:
        orders = np.array(list(permutations(second)))
    else:
        draw = np.random.default_rng(0)
        orders = np.stack([second, *(draw.permutation(second) for _ in range(20_000))])
    rho = float(first @ second) / scale
    return rho, float(np.mean(np.abs(orders @ first) / scale >= abs(rho) - 1e-9))


def _scipy(part: str) -> Any:
    """A part of scipy; ImportError names the extra where it is missing."""
    try:
        return import_module(f"scipy.{part}")
    except ImportError as error:
        raise ImportError(
            f"intervals need scipy ({error}); run: pip install 'fedlora[report]'"
        ) from error
