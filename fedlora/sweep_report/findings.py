"""What a case's runs say, as numbers: comparisons to the baseline, targets, one-setting changes.

Tables, figures and sentences are all made from these, so that they cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlora.rundir import EXACT, Run, last_known
from fedlora.significance import Estimate, Paired, centred, estimate, holm, paired, rank_correlation
from fedlora.sweep_report.cases import Arm, Case, was_followed
from fedlora.sweep_report.curves import median, reached

DECIDES = 5  # fewer pairs than this decide nothing
METHODS = ("merge.rule", "run.mode")  # these make another method, not another setting of one


@dataclass(frozen=True, eq=False)
class Versus:
    """A method against the baseline over the seeds both have; `corrected` is Holm's p."""

    arm: Arm
    paired: Paired
    corrected: float

    @property
    def beyond_noise(self) -> bool:
        """Whether the difference is told from noise: p below 0.05 after Holm, enough seeds."""
        return self.paired.n >= DECIDES and self.corrected < 0.05


@dataclass(frozen=True)
class Speed:
    """How soon a method's seeds reached the target; medians count `never` as later than all."""

    seeds: int
    arrived: int
    rounds: float
    megabytes: float


@dataclass(frozen=True, eq=False)
class Change:
    """A method that differs from `base` in one setting only."""

    key: str
    before: Any
    after: Any
    versus: Versus


@dataclass(frozen=True)
class Tie:
    """Rank correlation of merge error with accuracy: over runs (centred), over methods' means."""

    runs: int
    rho: float
    methods: int
    rho_methods: float
    p_methods: float


def final(arm: Arm, metric: str = "accuracy") -> Estimate:
    """The method's final figure over its seeds."""
    return estimate(list(arm.finals(metric).values()))


def target_of(case: Case, share: float) -> float:
    """The accuracy that counts as reached: `share` of the case's best mean final accuracy."""
    means = [final(arm).mean for arm in case.there]
    return share * max((mean for mean in means if math.isfinite(mean)), default=math.nan)


def speed(arm: Arm, target: float) -> Speed:
    """How soon the method's seeds reached the target."""
    found = [reached(run, target) for run in arm.all if was_followed(run)]
    return Speed(
        len(found),
        sum(math.isfinite(one.round) for one in found),
        median([one.round for one in found]),
        median([one.megabytes for one in found]),
    )


def against(base: Arm, others: Sequence[Arm]) -> list[Versus]:
    """Each method against `base`, paired by seed, p corrected for the number of methods here."""
    tests = []
    for arm in others:
        mine, its = arm.finals(), base.finals()
        common = [seed for seed in mine if seed in its]
        tests.append(paired([mine[seed] for seed in common], [its[seed] for seed in common]))
    corrected = holm([test.p for test in tests])
    return [Versus(*found) for found in zip(others, tests, corrected, strict=True)]


def compared(case: Case, baseline: str) -> list[Versus]:
    """All methods of the case against the baseline; empty where the baseline has no run."""
    base = case.arm(baseline)
    return against(base, [arm for arm in case.there if arm is not base]) if base else []


def one_setting_apart(case: Case, varied: Sequence[str]) -> list[tuple[Arm, list[Change]]]:
    """Methods that differ from another one in one setting only, in groups round a common base.

    Only the settings `varied` are looked at (tuned ones left out); two methods of other rules or
    modes are no such pair. The base is the method with the most neighbours, the earlier one of two.
    """
    arms, keys = case.there, [key for key in varied if key not in METHODS]
    fixed = {arm.method: [setting(arm.all[0], key) for key in METHODS] for arm in arms}
    near: dict[str, dict[str, str]] = {arm.method: {} for arm in arms}
    for first in arms:
        for second in arms:
            differing = [key for key in keys if _differ(first, second, key)]
            if (
                first is not second
                and len(differing) == 1
                and fixed[first.method] == fixed[second.method]
            ):
                near[first.method][second.method] = differing[0]
    groups: list[tuple[Arm, list[Change]]] = []
    left = {arm.method for arm in arms}
    while True:
        sizes = {
            arm.method: len(left & set(near[arm.method])) for arm in arms if arm.method in left
        }
        if not sizes or max(sizes.values()) == 0:
            return groups
        name = max(sizes, key=lambda method: sizes[method])
        base = next(arm for arm in arms if arm.method == name)
        others = [arm for arm in arms if arm.method in near[name] and arm.method in left]
        groups.append((base, [
            _change(near[name][versus.arm.method], base, versus) for versus in against(base, others)
        ]))  # fmt: skip
        left -= {name, *near[name]}


def setting(run: Run, key: str) -> Any:
    """The run's value of `section.key`, or of `section.table.entry`; None where it has none."""
    value: Any = run.config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def lowest_loss(run: Run) -> tuple[float, float]:
    """The round of the lowest evaluation loss, and how far the last known one is above it (nats).

    NaN where there is none.
    """
    loss = run.evaluation("loss")
    if not np.isfinite(loss).any():
        return math.nan, math.nan
    place = int(np.nanargmin(loss))
    return float(run.series("round")[place]), last_known(loss) - float(loss[place])


def merge_error(run: Run) -> float:
    """The merge error of the last round that has one; NaN where nothing was merged."""
    return last_known(run.series("merge_error"))


def mean_error(run: Run) -> float:
    """The mean merge error over the rounds, at least what rounding is; NaN without a merge.

    Over all rounds, since what an early merge lost is gone however exact the later ones are.
    """
    errors = run.series("merge_error")
    known = errors[np.isfinite(errors)]
    return max(float(known.mean()), EXACT) if known.size else math.nan


def exactness(case: Case) -> Tie:
    """How merge error (mean over rounds) and final accuracy go together within the case."""
    return tied(
        [
            (arm.method, seed, mean_error(arm.runs[seed]), value)
            for arm in case.there
            for seed, value in arm.finals().items()
            if math.isfinite(mean_error(arm.runs[seed]))
        ]
    )


def tied(runs: Sequence[tuple[str, Hashable, float, float]]) -> Tie:
    """How error and accuracy go together over runs: method, seed, error (above 0), accuracy.

    Of the seeds that all methods have, so that no method stands for easy seeds. Over runs:
    Spearman's correlation after each seed's mean is taken off both (the error as a logarithm, what
    is exact up to rounding counted as equal). Runs of one method are much alike, so only the
    correlation of the methods' means carries a p value, and that counts methods as independent,
    which variants of one rule are not.
    """
    rows = [(method, seed, math.log10(error), value) for method, seed, error, value in runs]
    names = list(dict.fromkeys(method for method, *_ in rows))
    own = [{seed for method, seed, *_ in rows if method == name} for name in names]
    rows = [row for row in rows if all(row[1] in seeds for seeds in own)]
    names = names if rows else []
    seeds = [seed for _, seed, _, _ in rows]
    errors = centred([row[2] for row in rows], seeds)
    scores = centred([row[3] for row in rows], seeds)
    means = [_means(name, rows) for name in names]
    rho, p = rank_correlation([mean[0] for mean in means], [mean[1] for mean in means])
    return Tie(len(rows), rank_correlation(errors, scores)[0], len(names), rho, p)


def _means(name: str, rows: Sequence[tuple[str, Hashable, float, float]]) -> tuple[float, float]:
    own = [(error, score) for method, _, error, score in rows if method == name]
    return sum(e for e, _ in own) / len(own), sum(s for _, s in own) / len(own)


def _differ(first: Arm, second: Arm, key: str) -> bool:
    return bool(setting(first.all[0], key) != setting(second.all[0], key))


def _change(key: str, base: Arm, versus: Versus) -> Change:
    before, after = setting(base.all[0], key), setting(versus.arm.all[0], key)
    return Change(key, before, after, versus)
