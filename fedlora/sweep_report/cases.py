"""A sweep's runs sorted for a report: cases, in each its methods, in each its seeds.

Knows what is planned and what is there; draws nothing, judges nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlora.rundir import Run, number
from fedlora.sweepdir import Entry, SweepRuns, heldout_score


@dataclass(frozen=True)
class Tried:
    """A tuning run: its values of the tuned settings, and its accuracy on held-out rows.

    The accuracy is NaN where the run has not ended or scored none.
    """

    grid: Mapping[str, Any]
    seed: int
    accuracy: float


@dataclass(frozen=True, eq=False)
class Arm:
    """One method in one case; `index` is its place in the sweep and so its colour everywhere.

    The references `central` and `local` are not counted: the first of each has index -1.
    """

    method: str
    index: int
    mode: str
    runs: Mapping[int, Run]
    planned: Sequence[int]
    tried: Sequence[Tried]
    chosen: Mapping[str, Any]

    @property
    def all(self) -> list[Run]:
        """The finished runs, by seed."""
        return [self.runs[seed] for seed in sorted(self.runs)]

    @property
    def missing(self) -> list[int]:
        """The planned seeds without a finished run."""
        return [seed for seed in self.planned if seed not in self.runs]

    def finals(self, metric: str = "accuracy") -> dict[int, float]:
        """Each seed's `metric` after the last round, where it was measured then."""
        found = {seed: _at_the_end(self.runs[seed], metric) for seed in sorted(self.runs)}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}


@dataclass(frozen=True, eq=False)
class Case:
    """The methods of one case, in the order of the sweep; `slug` is its name in file names."""

    name: str
    slug: str
    arms: Sequence[Arm]

    @property
    def title(self) -> str:
        """The case's name, or `results` where the sweep has one case without a name."""
        return self.name or "results"

    @property
    def heading(self) -> str:
        """The title with a capital."""
        return self.title[:1].upper() + self.title[1:]

    def entitled(self, text: str) -> str:
        """The title of a figure, with the case's name where it has one."""
        return f"{text}, {self.name}" if self.name else text

    def opening(self, text: str) -> str:
        """A sentence that says which case it is about, where that has a name."""
        sentence = f"{self.name}: {text}" if self.name else text
        return sentence[:1].upper() + sentence[1:]

    @property
    def there(self) -> list[Arm]:
        """The methods with at least one finished run."""
        return [arm for arm in self.arms if arm.runs]

    @property
    def followed(self) -> list[Arm]:
        """The methods that were evaluated in any round after the start."""
        return [arm for arm in self.there if any(was_followed(run) for run in arm.all)]

    def arm(self, method: str) -> Arm | None:
        """The method's arm, None where it has no finished run."""
        return next((arm for arm in self.there if arm.method == method), None)


def was_followed(run: Run) -> bool:
    """Whether the run was evaluated in any round after its start."""
    return bool(np.isfinite(run.evaluation("accuracy")[run.series("round") > 0]).any())


def method_names(sweep: SweepRuns) -> list[str]:
    """The methods in the order of the sweep."""
    return list(dict.fromkeys(entry.method for entry in sweep.entries))


def read_cases(sweep: SweepRuns) -> list[Case]:
    """Every case of the sweep with all its methods."""
    names = list(dict.fromkeys(entry.case for entry in sweep.entries))
    slugs = _slugs(names)
    modes = {method: _mode(sweep, method) for method in method_names(sweep)}
    places = _places(modes)
    return [
        Case(name, slug, [_arm(sweep, name, *each, places[each[0]]) for each in modes.items()])
        for name, slug in zip(names, slugs, strict=True)
    ]


def _mode(sweep: SweepRuns, method: str) -> str:
    """The mode of the method's runs; `federated` where none has ended."""
    own = [entry for entry in sweep.entries if entry.method == method]
    return next((sweep.runs[entry.id].mode for entry in own if entry.id in sweep.runs), "federated")


def _places(modes: Mapping[str, str]) -> dict[str, int]:
    """A number for each method, by which its colour is known; -1 for a mode's first reference."""
    references = {mode: m for m, mode in reversed(list(modes.items())) if mode != "federated"}
    counted = [method for method in modes if method not in references.values()]
    return dict.fromkeys(references.values(), -1) | {m: place for place, m in enumerate(counted)}


def _at_the_end(run: Run, metric: str) -> float:
    """The summary's figure, else that of the last round, never an earlier one."""
    value = number(run.summary, ("final", metric))
    return value if math.isfinite(value) else float(run.evaluation(metric)[-1])


def _arm(sweep: SweepRuns, case: str, method: str, mode: str, index: int) -> Arm:
    entries = [entry for entry in sweep.entries if (entry.case, entry.method) == (case, method)]
    counted = [entry for entry in entries if not entry.tuning]
    return Arm(
        method,
        index,
        mode,
        {entry.seed: sweep.runs[entry.id] for entry in counted if entry.id in sweep.runs},
        sorted(entry.seed for entry in counted),
        [_tried(sweep, entry) for entry in entries if entry.tuning],
        sweep.chosen(method, case),
    )


def _tried(sweep: SweepRuns, entry: Entry) -> Tried:
    try:
        accuracy = heldout_score(sweep.runs[entry.id].path).accuracy
    except (KeyError, ValueError):  # it has not ended, or scored no held-out rows
        accuracy = math.nan
    return Tried(entry.grid, entry.seed, accuracy)


def _slugs(names: Sequence[str]) -> list[str]:
    """Names as short words for files, each different."""
    slugs: list[str] = []
    for name in names:
        word = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-") or "all"
        same = sum(slug == word or slug.startswith(f"{word}-n") for slug in slugs)
        slugs.append(f"{word}-n{same + 1}" if same else word)
    return slugs
