"""What privacy costs: final accuracy against epsilon, and the noise that the budget takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median_high

from fedlora.canvas import Axes
from fedlora.privacy.ledger import LEDGERS, opened_ledgers, read_ledger
from fedlora.rundir import Run, number, plain
from fedlora.sweep_report.cases import Arm, Case
from fedlora.sweep_report.content import Panel, Picture, Section, Table, Words
from fedlora.sweep_report.drawing import arm_style, label_axes, legend_of, percent_axis
from fedlora.sweep_report.findings import final, setting
from fedlora.sweep_report.tables import with_half

NONE = math.inf  # the epsilon of a run without privacy
EPSILON = ("privacy.unit", "privacy.epsilon")
WIDTH = 0.5  # how far apart the methods of one epsilon stand, in steps of the axis
FAR = 0.1  # of accuracy: a mean so far from the others' would press them together


@dataclass(frozen=True, eq=False)
class Level:
    """A case as one epsilon among others; `rest` is what else tells cases apart.

    `noise` is the largest noise multiplier of its runs.
    """

    epsilon: float
    rest: tuple[str, ...]
    case: Case
    noise: float


def privacy_section(cases: Sequence[Case], varied: Sequence[str]) -> Section:
    """Figures and tables over all cases that differ in their epsilon; empty where none do.

    `varied` are the settings in which the sweep's runs differ.
    """
    there = [case for case in cases if case.there]
    told = [key for key in varied if key not in EPSILON and all(_shared(c, key) for c in there)]
    levels = [_level(case, told) for case in there]
    groups: dict[tuple[str, ...], list[Level]] = {}
    for level in sorted(levels, key=lambda one: one.epsilon):
        groups.setdefault(level.rest, []).append(level)
    several = {
        rest: found for rest, found in groups.items() if len({one.epsilon for one in found}) > 1
    }
    if not several:
        return Section("Privacy")
    tables = [_table(rest, found) for rest, found in several.items()]
    words = Words([
        "Epsilon is each client's over the whole run, at the run's delta, for adding or removing "
        "one example (or zeroing one client). The choice of settings is not in it."
    ])  # fmt: skip
    return Section("Privacy", [words, _picture(several), *tables])


def run_epsilon(run: Run) -> float:
    """The budget of a run; infinite without privacy."""
    if setting(run, "privacy.unit") in (None, "none"):
        return NONE
    return number(run.config, ("privacy", "epsilon"))


def run_noise(run: Run) -> float:
    """The largest noise multiplier in the run's ledgers; 0 where there are none."""
    ledgers = [read_ledger(path) for path in opened_ledgers(run.path / LEDGERS)]
    drawn = [one.noise for ledger in ledgers for i in ledger.intents for one in i.mechanisms]
    return max(drawn, default=0.0)


def _level(case: Case, varied: Sequence[str]) -> Level:
    """The case as a level; `varied` are settings that all of its methods share."""
    run = case.there[0].all[0]
    rest = [_short(key, setting(run, key)) for key in varied]
    noise = max(run_noise(run) for arm in case.there for run in arm.all)
    return Level(run_epsilon(run), tuple(rest), case, noise)


def _shared(case: Case, key: str) -> bool:
    """Whether the methods of a case have one value; where they differ, it says nothing of it."""
    first, *others = (setting(arm.all[0], key) for arm in case.there)
    return all(other == first for other in others)


def _arms(levels: Sequence[Level]) -> list[Arm]:
    return list({arm.method: arm for level in levels for arm in level.case.there}.values())


def _picture(groups: Mapping[tuple[str, ...], Sequence[Level]]) -> Picture:
    panels = []
    for rest, levels in groups.items():
        title = ", ".join(rest) or "all clients"
        panels += [
            Panel(title, partial(_draw_accuracy, levels=levels)),
            Panel(f"Noise, {title}", partial(_draw_noise, levels=levels)),
        ]
    arms = _arms([level for levels in groups.values() for level in levels])
    caption = (
        "Left of each pair: final accuracy on the shared evaluation set, means over seeds with "
        "95 % intervals, methods side by side at each epsilon. Right: the noise multiplier "
        "(deviation over the clip, per step) that the budget takes, the largest of all clients and "
        f"runs. A mean over {100 * FAR:g} points off the middle one of its epsilon is at the edge, "
        "in figures."
    )
    look = [(name, style | {"linestyle": ""}) for name, style in legend_of(arms)]
    return Picture("privacy", "Accuracy against epsilon", caption, panels, look, columns=2)


def _draw_accuracy(ax: Axes, levels: Sequence[Level]) -> None:
    arms, ends = _arms(levels), list[float]()
    usual = usual_range([[final(arm).mean for arm in one.case.there] for one in levels])
    for index, arm in enumerate(arms):
        aside = (index - (len(arms) - 1) / 2) * WIDTH / max(len(arms), 1)
        look = arm_style(arm) | {"linestyle": ""}
        width = {"ecolor": arm_style(arm)["color"], "elinewidth": 1.4, "capsize": 2}
        for place, level in enumerate(levels):
            own = level.case.arm(arm.method)
            if own is None or not math.isfinite((found := final(own)).mean):
                continue
            if not usual[0] <= found.mean <= usual[1]:
                above = found.mean > usual[1]
                _note_far(ax, place + aside, found.mean, above, look["color"])
                continue
            half = found.half if math.isfinite(found.half) else 0.0
            ends += [found.mean - half, found.mean + half]
            ax.errorbar([place + aside], [found.mean], yerr=[half], **look, **width)
    if ends:
        room = 0.06 * (max(ends) - min(ends)) or 0.01
        ax.set_ylim(min(ends) - room, max(ends) + room)
    _epsilon_axis(ax, levels)
    percent_axis(ax)


def usual_range(levels: Sequence[Sequence[float]]) -> tuple[float, float]:
    """From the lowest to the highest of the means of methods at some levels, but for those that are
    far from the others at their own level: `FAR` from its median, and fewer than half of them.
    """
    kept = list[float]()
    for means in levels:
        known = [mean for mean in means if math.isfinite(mean)]
        near = [mean for mean in known if abs(mean - median_high(known)) <= FAR]
        kept += near if 2 * len(near) >= len(known) else known
    return min(kept, default=-math.inf), max(kept, default=math.inf)


def _note_far(ax: Axes, x: float, mean: float, above: bool, color: str) -> None:
    """The mean in figures at the upper or lower edge, with an arrow out of the picture."""
    edge, inside = (1.0, 0.9) if above else (0.0, 0.1)
    ax.annotate(
        f"{100 * mean:.1f}%", (x, edge), (x, inside), xycoords=ax.get_xaxis_transform(),
        textcoords=ax.get_xaxis_transform(), arrowprops={"arrowstyle": "->", "color": color},
        color=color, ha="center", va="center", fontsize=8,
    )  # fmt: skip


def _draw_noise(ax: Axes, levels: Sequence[Level]) -> None:
    for place, level in enumerate(levels):
        ax.bar([place], [level.noise], width=0.5, color="#999999")
        text = plain(level.noise, ".2g") if level.noise else "none"
        ax.annotate(text, (place, level.noise), (0, 2), textcoords="offset points", ha="center",
                    fontsize=8)  # fmt: skip
    _epsilon_axis(ax, levels)
    label_axes(ax, "epsilon", "noise multiplier")


def _epsilon_axis(ax: Axes, levels: Sequence[Level]) -> None:
    ax.set_xticks(range(len(levels)), [_name(level.epsilon) for level in levels])
    ax.set_xlim(-0.6, len(levels) - 0.4)
    ax.grid(visible=False, axis="x")
    label_axes(ax, "epsilon")


def _table(rest: tuple[str, ...], levels: Sequence[Level]) -> Table:
    rows = []
    for arm in _arms(levels):
        own = [level.case.arm(arm.method) for level in levels]
        cells = [with_half(final(one), 100.0) if one else "-" for one in own]
        rows.append([arm.method, *cells])
    rows.append(["noise multiplier", *(plain(level.noise, ".3g") for level in levels)])
    title = f"Final accuracy by epsilon, %{': ' if rest else ''}{', '.join(rest)}"
    return Table(title, ["method", *(_name(level.epsilon) for level in levels)], rows)


def _short(key: str, value: object) -> str:
    """`clients 3` for partition.clients = 3."""
    return f"{key.rpartition('.')[2]} {value}"


def _name(epsilon: float) -> str:
    return "none" if epsilon == NONE else f"{epsilon:g}"
