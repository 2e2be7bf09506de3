"""The tables of a report: every figure as a number with its interval.

Accuracies are percentages, differences percentage points, MB 10^6 bytes of all clients of a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedlora.rundir import EXACT, Run, last_known, number, plain
from fedlora.significance import Estimate, estimate
from fedlora.sweep_report.budget import total, total_names
from fedlora.sweep_report.cases import Arm, Case
from fedlora.sweep_report.content import Table
from fedlora.sweep_report.curves import area
from fedlora.sweep_report.findings import (
    DECIDES,
    Change,
    Versus,
    final,
    lowest_loss,
    merge_error,
    speed,
)
from fedlora.sweep_report.results import sent, server_milliseconds

ALONE = "one seed has no interval"
ROUNDING = 1e-9
MEANINGS = {  # of the budget's columns, in short; docs/budget.md has the formulas
    "wanted": "the increment that the merge was to reach",
    "update": "what clients changed, their mean",
    "drift": "how far clients are apart",
    "cross": "what averaging A and B apart would lose",
    "tail": "what the model lacks after the merge",
    "folded": "what was folded into the model",
    "carried": "what the next round is owed",
    "new": "of the update, directions that the last A did not have",
    "new_drift": "the same of the drift",
    "effective_rank": "of the merged increment",
    "noise": "noise of client-level privacy",
}


def final_table(case: Case) -> Table:
    """Final accuracy of each method with its interval over seeds."""
    rows = []
    for arm in case.there:
        found, values = final(arm), list(arm.finals().values())
        rows.append([
            arm.method, str(found.n), with_half(found, 100.0), plain(100 * found.sd, ".2f"),
            plain(100 * min(values, default=math.nan), ".2f"),
            plain(100 * max(values, default=math.nan), ".2f"),
            with_half(final(arm, "macro_f1"), 100.0), with_half(final(arm, "loss"), 1.0, 3),
        ])  # fmt: skip
    head = ["method", "seeds", "accuracy, %", "sd", "lowest", "highest", "macro-F1, %", "loss"]
    notes = ["± is half the 95 % interval of the mean over seeds (Student's t); sd the deviation."]
    if any(final(arm).n == 1 for arm in case.there):
        notes.append("A method with one seed has no interval.")
    return Table("Final scores on the evaluation set", head, rows, notes)


def paired_table(baseline: str, versus: Sequence[Versus]) -> Table:
    """Each method against the baseline, seed by seed."""
    rows = [[one.arm.method, *paired_cells(one)] for one in versus]
    tests = sum(not math.isnan(one.paired.p) for one in versus)
    notes = [
        f"Paired t test over the seeds that the method and {baseline} share; p corrected by Holm's "
        f"method for the {tests} tests of this case. d is Cohen's d_z (mean difference "
        "over the deviation of the differences), g the same with Hedges' correction for few pairs.",
        *paired_notes(versus),
    ]
    return Table(f"Differences to {baseline}", ["method", *PAIRED], rows, notes, texts=1)


PAIRED = ("pairs", "difference, points", "95 % interval", "t", "p", "p (Holm)", "d", "g")


def paired_cells(one: Versus) -> list[str]:
    """The cells under PAIRED."""
    found, difference = one.paired, one.paired.difference
    low, high = difference.mean - difference.half, difference.mean + difference.half
    span = f"{100 * low:+.2f} to {100 * high:+.2f}" if math.isfinite(low) else "-"
    return [
        str(found.n), plain(100 * difference.mean, "+.2f"), span, plain(found.t, ".2f"),
        p_text(found.p), p_text(one.corrected), plain(found.d, "+.2f"), plain(found.g, "+.2f"),
    ]  # fmt: skip


def paired_notes(versus: Sequence[Versus]) -> list[str]:
    """What the reader has to know about too few pairs and about tests that cannot be made."""
    notes = []
    few = sorted({one.paired.n for one in versus if 0 < one.paired.n < DECIDES})
    if few:
        what = " and ".join(str(n) for n in few)
        notes.append(
            f"With {what} pair{'' if few == [1] else 's'} a test decides nothing: "
            f"this takes {DECIDES} or more."
        )
    if any(one.paired.n > 1 and math.isnan(one.paired.p) for one in versus):
        notes.append("No p where all pairs differ by the same amount.")
    return notes


def early_table(case: Case, target: float) -> Table:
    """Rounds and megabytes to the target, and the area under the curve."""
    rows = []
    for arm in case.there:
        found = speed(arm, target)
        rows.append([
            arm.method, f"{found.arrived} of {found.seeds}" if found.seeds else "-",
            ever(found.rounds, ".3g"), ever(found.megabytes, ",.1f"),
            with_half(estimate([area(run) for run in arm.all]), 100.0),
        ])  # fmt: skip
    head = ["method", "reached by", "rounds, median", "MB, median", "area, %"]
    notes = [
        "The first evaluated round at or above the target, not smoothed; MB both ways until then. "
        "A seed that never got there counts as later than all others; where the median says not "
        "reached, half of the seeds or more did not.",
        "Area: the mean height of the accuracy curve from its first to its last evaluated round.",
    ]
    return Table(f"Time to {target:.1%} accuracy", head, rows, notes)


def overfitting_table(case: Case) -> Table:
    """Losses in the last round, the gap, and how far evaluation loss rose from its lowest."""
    rows = []
    for arm in case.there:
        best = [lowest_loss(run) for run in arm.all]
        rows.append([
            arm.method,
            with_half(estimate([last_known(run.train_loss()) for run in arm.all]), 1.0, 3),
            with_half(final(arm, "loss"), 1.0, 3),
            with_half(estimate([run.gap for run in arm.all]), 1.0, 3, sign="+"),
            plain(float(np.median([round for round, _ in best])), ".3g"),
            with_half(estimate([rise for _, rise in best]), 1.0, 3, sign="+"),
        ])  # fmt: skip
    head = ["method", "training loss", "evaluation loss", "gap", "lowest in round", "rise since"]
    notes = [
        "Last round. Lowest in round: where evaluation loss was lowest (median over seeds); rise "
        "since: last minus lowest."
    ]
    return Table("Training against evaluation loss", head, rows, notes)


def cost_table(case: Case) -> Table:
    """What is sent, against full fine-tuning, and the server's time."""
    rows = []
    for arm in case.there:
        up, down = sent(arm, "up"), sent(arm, "down")
        full = estimate([_full(run) for run in arm.all]).mean
        share = (up + down) / full if full > 0 else math.nan
        rows.append([
            arm.method, plain(up, ",.2f"), plain(down, ",.2f"), plain(up + down, ",.2f"),
            plain(100 * share, ".2f"), with_half(estimate(server_milliseconds(arm)), 1.0, 1),
            plain(estimate([_trainable(run) for run in arm.all]).mean, ",.0f"),
            _error(estimate([merge_error(run) for run in arm.all]).mean),
        ])  # fmt: skip
    head = [
        "method", "MB up", "MB down", "MB both", "of full model, %", "server, ms a round",
        "trainable parameters", "merge error",
    ]  # fmt: skip
    notes = [
        "Of full model: against sending every weight of the base both ways. Merge error: "
        "distance of the merged adapter to the mean increment in the last round, relative to it."
    ]
    return Table("Cost of a run", head, rows, notes)


def change_table(base: Arm, changes: Sequence[Change]) -> Table:
    """One setting changed at a time, against the method `base`."""
    found = final(base)
    rows = [[base.method, "baseline", with_half(found, 100.0), str(found.n), *["-"] * 4]]
    for change in changes:
        cells = paired_cells(change.versus)
        rows.append([
            change.versus.arm.method,
            f"{change.key}: {value(change.before)} to {value(change.after)}",
            with_half(final(change.versus.arm), 100.0), *cells[:3], cells[4], cells[5],
        ])  # fmt: skip
    head = ["method", "changed", "accuracy, %", "pairs", *PAIRED[1:3], *PAIRED[4:6]]
    notes = [
        "Everything else is the same, but for values that were tuned for each method apart. Holm's "
        "correction is for this table.",
        *paired_notes([change.versus for change in changes]),
    ]
    return Table(f"One setting changed, from {base.method}", head, rows, notes, texts=2)


def chosen_table(case: Case) -> Table | None:
    """The values that tuning chose; None where nothing was tuned."""
    rows = []
    for arm in case.arms:
        for key in dict.fromkeys(key for tried in arm.tried for key in tried.grid):
            values = list({str(tried.grid[key]): tried.grid[key] for tried in arm.tried}.values())
            rows.append([
                arm.method, key, ", ".join(value(one) for one in values),
                value(arm.chosen[key]) if key in arm.chosen else "-",
                "yes" if _at_edge(arm.chosen.get(key), values) else "no",
            ])  # fmt: skip
    if not rows:
        return None
    notes = []
    if any(row[-1] == "yes" for row in rows):
        notes.append("At the edge: a better value may lie outside of what was tried.")
    head = ["method", "setting", "tried", "chosen", "at the edge"]
    return Table("Tuned settings", head, rows, notes, texts=5)


def budget_table(case: Case) -> Table | None:
    """Totals of the error budget in the last round; None where no run has one."""
    names = list(dict.fromkeys(
        name for arm in case.there for run in arm.all for name in total_names(run)
    ))  # fmt: skip
    if not names:
        return None
    rows = [
        [
            arm.method,
            *(_short_number([last_known(total(run, name)) for run in arm.all]) for name in names),
        ]
        for arm in case.there
    ]
    head = ["method", *(name.replace("_", " ") for name in names)]
    notes = [
        "Norms over all layers, to be compared with the wanted one; of ranks and angles (degrees, "
        "to the last round's subspace) the mean over layers; means over seeds.",
        "; ".join(f"{n.replace('_', ' ')}: {MEANINGS[n]}" for n in names if n in MEANINGS) + ".",
    ]
    return Table("Error budget in the last round", head, rows, notes)


def with_half(found: Estimate, scale: float, digits: int = 2, sign: str = "") -> str:
    """`84.20 ± 1.10`; without the interval where there is none."""
    text = plain(scale * found.mean, f"{sign},.{digits}f")
    return text if math.isnan(found.half) else f"{text} ± {scale * found.half:,.{digits}f}"


def p_text(p: float) -> str:
    """A p value to two digits, `< 0.001` below that."""
    return "< 0.001" if p < 0.001 else plain(p, ".3f" if p < 0.1 else ".2f")


def ever(number: float, pattern: str) -> str:
    """A number, or `not reached` for infinity."""
    return "not reached" if number == math.inf else plain(number, pattern)


def value(setting: Any) -> str:
    """A setting's value as in a config, short."""
    if setting is None:
        return "default"
    text = f"{setting:g}" if isinstance(setting, float) else str(setting)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _full(run: Run) -> float:
    """Megabytes that sending whole models would have moved."""
    return number(run.summary, ("full_finetuning_bytes_total",)) / 1e6


def _trainable(run: Run) -> float:
    return number(run.summary, ("trainable_parameters",))


def _error(error: float) -> str:
    return "exact" if error < EXACT else plain(error, ".2g")


def _short_number(values: Sequence[float]) -> str:
    """The mean to three digits; what is rounding of float64 is nothing."""
    mean = estimate(values).mean
    return "0" if abs(mean) < ROUNDING else plain(mean, ".3g")


def _at_edge(chosen: Any, values: Sequence[Any]) -> bool:
    """Whether the chosen number is the smallest or largest of two or more that were tried."""
    numbers = [one for one in values if isinstance(one, int | float)]
    return len(numbers) > 1 and chosen in (min(numbers), max(numbers))
