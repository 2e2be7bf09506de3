"""Figures of what came out: final accuracy, differences, cost, tuning, exactness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedlora.canvas import GREY, Axes
from fedlora.rundir import EXACT, number
from fedlora.significance import estimate
from fedlora.sweep_report.cases import Arm, Case, Tried
from fedlora.sweep_report.content import Panel, Picture, seed_span
from fedlora.sweep_report.drawing import (
    arm_style,
    dots,
    interval,
    label_axes,
    legend_of,
    level,
    method_rows,
    percent_axis,
    row_height,
)
from fedlora.sweep_report.findings import Versus, final, mean_error


def final_picture(case: Case, baseline: str, versus: Sequence[Versus]) -> Picture:
    """Final accuracy with its interval, and the paired differences to the baseline."""
    arms = case.there

    def finals(ax: Axes) -> None:
        for place, arm in zip(method_rows(ax, arms), arms, strict=True):
            found = final(arm)
            interval(ax, found.mean, found.half, place, arm_style(arm))
            dots(ax, list(arm.finals().values()), place, arm_style(arm))
        percent_axis(ax, "x")
        label_axes(ax, "accuracy at the end")

    def differences(ax: Axes) -> None:
        level(ax, 0.0, "x")
        for place, one in zip(method_rows(ax, [one.arm for one in versus]), versus, strict=True):
            found = one.paired.difference
            interval(ax, 100 * found.mean, 100 * found.half, place, arm_style(one.arm))
        label_axes(ax, "percentage points")

    panels = [Panel("Mean and seeds", finals)]
    if versus:
        panels.append(Panel(f"Minus {baseline}, paired by seed", differences))
    caption = (
        f"After the last round, on the shared evaluation set. Marks are means over seeds "
        f"({seed_span([len(arm.runs) for arm in arms])}), bars 95 % intervals (Student's t), small "
        "dots the seeds. The paired interval is the one to look at: methods share a seed's data, "
        "so its ups and downs cancel. Each is for one comparison alone; with so many of them one "
        "may miss 0 by chance, which p (Holm) in the table allows for."
    )
    return Picture(
        f"{case.slug}-final", case.entitled("Final accuracy"), caption, panels,
        height=row_height(arms),
    )  # fmt: skip


def cost_picture(case: Case) -> Picture:
    """Megabytes both ways and seconds of the server, one row a method."""
    arms = case.there

    def traffic(ax: Axes) -> None:
        for place, arm in zip(method_rows(ax, arms), arms, strict=True):
            for lift, way, alpha in ((-0.17, "up", 1.0), (0.17, "down", 0.45)):
                value = sent(arm, way)
                look = {"height": 0.3, "color": arm_style(arm)["color"], "alpha": alpha}
                ax.barh([place + lift], [value], **look)
                words = f"{value:,.1f} {way}" if value else f"nothing {way}"
                off = {"textcoords": "offset points", "va": "center"}
                at = (value, place + lift)
                ax.annotate(words, at, (3, 0), fontsize=7.5, color=GREY, **off)
        ax.margins(x=0.32)
        ax.set_xlim(left=0)
        label_axes(ax, "megabytes a run, all clients")

    def server(ax: Axes) -> None:
        for place, arm in zip(method_rows(ax, arms), arms, strict=True):
            found = estimate(server_milliseconds(arm))
            interval(ax, found.mean, found.half, place, arm_style(arm))
            dots(ax, server_milliseconds(arm), place, arm_style(arm))
        ax.set_xlim(left=0)
        label_axes(ax, "milliseconds a round")

    caption = (
        "Left: megabytes (10^6 bytes) sent in a whole run, up (full colour) and down (faint). "
        "Right: wall-clock time of the server's half of a round, mean over seeds with 95 % "
        "intervals, on the machine that the runs were made on."
    )
    return Picture(
        f"{case.slug}-cost", case.entitled("Communication and server time"), caption,
        [Panel("Sent in a run", traffic), Panel("Server time", server)],
        height=row_height(arms) + 0.3,
    )  # fmt: skip


def sent(arm: Arm, way: str) -> float:
    """Megabytes a run sent `up` or `down`, mean over seeds."""
    return estimate([run.megabytes(way)[-1] for run in arm.all]).mean


def server_milliseconds(arm: Arm) -> list[float]:
    """Milliseconds of the server's half a round, one value a seed."""
    return [
        1000 * number(run.summary, ("seconds", "aggregate")) / max(run.rounds[-1]["round"], 1)
        for run in arm.all
    ]


def tuning_picture(case: Case) -> Picture | None:
    """Held-out accuracy against each tuned setting; None where nothing was tuned."""
    arms = [arm for arm in case.arms if arm.tried]
    keys = list(dict.fromkeys(key for arm in arms for tried in arm.tried for key in tried.grid))
    if not keys:
        return None

    def panel(key: str) -> Panel:
        def draw(ax: Axes) -> None:
            _draw_tuning(ax, [arm for arm in arms if key in arm.tried[0].grid], key)

        return Panel(key, draw)

    several = " Of several tuned settings the others are at their best." if len(keys) > 1 else ""
    tried = seed_span([len({one.seed for one in arm.tried}) for arm in arms])
    caption = (
        "Accuracy on training rows held out of the clients' training, in runs made for tuning only "
        f"({tried}, other ones than those that count). The ring marks the chosen value; the "
        f"evaluation set had no part in it.{several}"
    )
    return Picture(
        f"{case.slug}-tuning", case.entitled("Sensitivity to tuned settings"), caption,
        [panel(key) for key in keys], legend_of(arms),
    )  # fmt: skip


def tried_scores(tried: Sequence[Tried], key: str) -> dict[Any, float]:
    """For each value of a tuned setting its best mean held-out accuracy over the other settings."""
    points: dict[str, tuple[Mapping[str, Any], list[float]]] = {}
    for one in tried:
        points.setdefault(str(one.grid), (one.grid, []))[1].append(one.accuracy)
    best: dict[Any, float] = {}
    for grid, scores in points.values():
        mean = sum(scores) / len(scores)
        value = grid[key] if isinstance(grid[key], int | float | str) else str(grid[key])
        best[value] = float(np.fmax(best.get(value, math.nan), mean))
    return best


def _draw_tuning(ax: Axes, arms: Sequence[Arm], key: str) -> None:
    found = {arm.method: tried_scores(arm.tried, key) for arm in arms}
    values = list(dict.fromkeys(value for scores in found.values() for value in scores))
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in values)
    values = sorted(values) if numeric else values
    spots = {value: value if numeric else place for place, value in enumerate(values)}
    for arm in arms:
        scores = found[arm.method]
        shown = [value for value in values if value in scores]
        ax.plot([spots[v] for v in shown], [scores[v] for v in shown], **arm_style(arm))
        chosen = arm.chosen.get(key)
        chosen = chosen if isinstance(chosen, int | float | str) else str(chosen)
        if chosen in scores:
            ring = {"marker": "o", "markersize": 12, "linestyle": "", "fillstyle": "none"}
            look = ring | {"color": arm_style(arm)["color"], "markeredgewidth": 1.4}
            ax.plot([spots[chosen]], [scores[chosen]], **look)
    if numeric:
        ax.set_xscale("log")
        ax.minorticks_off()
    ax.set_xticks(
        [spots[v] for v in values], [f"{v:g}" if numeric else str(v)[:14] for v in values]
    )
    ax.margins(x=0.08)
    percent_axis(ax)
    label_axes(ax, key, "held-out accuracy")


def exactness_picture(cases: Sequence[Case]) -> Picture:
    """Mean merge error against final accuracy, one mark a run, a panel for each case."""

    def panel(case: Case) -> Panel:
        def draw(ax: Axes) -> None:
            merged = [(arm, *np.array(_points(arm)).T) for arm in case.there if _points(arm)]
            exact = [arm for arm, errors, _ in merged if errors.max() <= EXACT]
            for arm, errors, scores in merged:
                if arm in exact:  # side by side in the strip, not one upon the other
                    errors = errors * 4 ** ((exact.index(arm) + 0.5) / len(exact) - 0.5)
                look = {"linestyle": "", "markersize": 6, "alpha": 0.85}
                ax.plot(errors, scores, **(arm_style(arm) | look))
            ax.set_xscale("log")
            ax.axvspan(EXACT * 0.5, EXACT * 2, color=GREY, alpha=0.12, linewidth=0)
            ax.margins(x=0.08)
            percent_axis(ax)
            label_axes(ax, "merge error, mean over rounds", "final accuracy")

        return Panel(case.title, draw)

    known = [case for case in cases if any(_points(arm) for arm in case.there)]
    merged = list(
        {arm.method: arm for case in known for arm in case.there if _points(arm)}.values()
    )
    caption = (
        "One mark a run. Merge error: distance of the merged adapter from the mean of the clients' "
        f"increments, relative to it, mean over the rounds; runs at or below {EXACT:.0e}, which is "
        "the rounding of float32, stand side by side in the shaded strip as exact."
    )
    return Picture(
        "exactness", "Does an exact merge mean a better model?", caption,
        [panel(case) for case in known],
        [(name, style | {"linestyle": ""}) for name, style in legend_of(merged)],
    )  # fmt: skip


def _points(arm: Arm) -> list[tuple[float, float]]:
    found = [(mean_error(arm.runs[seed]), value) for seed, value in arm.finals().items()]
    return [point for point in found if math.isfinite(point[0])]
