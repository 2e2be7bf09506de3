"""Figures of the error budget, where the runs' logs hold one: what a merge lost, layer by layer.

A line's `budget` holds norms under names such as `wanted`, `tail`, `cross`, and the same for each
layer under `layers`; whatever of it is there is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import Any, TypeGuard

import numpy as np

from fedlora.canvas import COLOURS, HATCHES, Axes, Style
from fedlora.rundir import Array, Run
from fedlora.sweep_report.cases import Arm, Case
from fedlora.sweep_report.content import Panel, Picture, seed_span
from fedlora.sweep_report.curves import Curve, curve
from fedlora.sweep_report.drawing import label_axes, last_round, percent_axis, round_axis

PARTS = ("cross", "tail", "folded", "carried")
WORDS = {
    "cross": "cross term of separate means",
    "tail": "cut off by the rank",
    "folded": "folded into the model",
    "carried": "carried to the next round",
}
LABELS = 14  # more layers than this name only some of them
DARKEST = 0.02  # the scale of a heat map goes up to this share at least


def budget_pictures(case: Case) -> list[Picture]:
    """The heat map over layers and rounds, and the shares over rounds; none without a budget."""
    found = [_heat_picture(case), _share_picture(case)]
    return [picture for picture in found if picture is not None]


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


def squared_share(part: str) -> Callable[[Run], Array]:
    """What reads the squared norm of a part relative to the squared norm of what was wanted."""

    def read(run: Run) -> Array:
        wanted, own = total(run, "wanted"), total(run, part)
        ratio = np.divide(own, wanted, out=np.full(len(own), np.nan), where=wanted > 0)
        squares: Array = ratio**2
        return squares

    return read


def short_layers(names: Sequence[str]) -> list[str]:
    """Layer names without what all have in common."""
    if len(names) < 2:
        return [name.split(".")[-1] for name in names]
    parts = [name.split(".") for name in names]
    if len({len(part) for part in parts}) == 1:
        varying = [len(set(column)) > 1 for column in zip(*parts, strict=True)]
        return [" ".join(compress(part, varying)) or ".".join(part) for part in parts]
    head, tail = _alike(parts), _alike([part[::-1] for part in parts])
    cut = [".".join(part[head : len(part) - tail]) for part in parts]
    return [own or name for own, name in zip(cut, names, strict=True)]


def _alike(parts: Sequence[Sequence[str]]) -> int:
    """How many words all begin with."""
    columns = enumerate(zip(*parts, strict=False))
    most = min(len(part) for part in parts)
    return next((place for place, words in columns if len(set(words)) > 1), most)


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


def _heat_picture(case: Case) -> Picture | None:
    grids = {}
    for arm in case.there:
        names = list(dict.fromkeys(name for run in arm.all for name in layer_names(run)))
        if names:
            x, shares = layer_shares(arm.all, names, "tail")
            if np.isfinite(shares).any() and np.nanmax(shares) > 0:
                grids[arm.method] = (arm, names, x, shares)
    if not grids:
        return None
    top = max(DARKEST, *(float(np.nanmax(shares)) for *_, shares in grids.values()))

    def panel(arm: Arm, names: Sequence[str], x: Array, shares: Array) -> Panel:
        return Panel(arm.method, lambda ax: _draw_heat(ax, names, x, shares, top))

    spans = [len(arm.runs) for arm, *_ in grids.values()]
    caption = (
        "How much of the wanted increment the rank could not hold, in each layer and round: the "
        f"norm of the tail relative to the wanted one, mean over {seed_span(spans)}. Methods that "
        "cut nothing are left out."
    )
    tall = max(len(names) for _, names, *_ in grids.values())
    return Picture(
        f"{case.slug}-tail", f"What was cut off, by layer and round, {case.title}", caption,
        [panel(*grid) for grid in grids.values()], height=min(5.0, 1.6 + 0.16 * tall),
    )  # fmt: skip


def _draw_heat(ax: Axes, names: Sequence[str], x: Array, shares: Array, top: float) -> None:
    box = (x[0] - 0.5, x[-1] + 0.5, len(names) - 0.5, -0.5)
    look = {"cmap": "cividis", "vmin": 0.0, "vmax": top, "interpolation": "none"}
    image = ax.imshow(shares, aspect="auto", extent=box, **look)
    step = -(-len(names) // LABELS)
    rows, words = range(0, len(names), step), short_layers(names)
    ax.set_yticks(rows, [words[row][-18:] for row in rows], fontsize=7.5)
    ax.grid(visible=False)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
    percent_axis(bar.ax)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    ax.locator_params(axis="x", integer=True, min_n_ticks=1, nbins=6)
    label_axes(ax, "round", "layer")


def _share_picture(case: Case) -> Picture | None:
    found: dict[str, dict[str, Curve]] = {}
    for arm in case.there:
        curves = {part: curve(arm.all, squared_share(part)) for part in PARTS}
        own = {part: one for part, one in curves.items() if len(one.x) and one.mean.max() > 0}
        if own:
            found[arm.method] = own
    if not found:
        return None
    last = last_round(case)

    def panel(method: str, own: Mapping[str, Curve]) -> Panel:
        def draw(ax: Axes) -> None:
            _draw_shares(ax, own)
            round_axis(ax, last)
            percent_axis(ax)

        return Panel(method, draw)

    shown = [part for part in PARTS if any(part in own for own in found.values())]
    legend: list[tuple[str, Style]] = [(WORDS[part], _fill(part)) for part in shown]
    spans = [one.n for own in found.values() for one in own.values()]
    caption = (
        "The squared norm of each part of the error relative to that of the wanted increment, one "
        f"on top of the other, by round; means over {seed_span(spans)}. The parts need not be "
        "orthogonal, and what is cut off may be what is folded or carried, so the sum is not a "
        "share of a whole. Each panel has a scale of its own."
    )
    return Picture(
        f"{case.slug}-budget", f"Error budget, {case.title}", caption,
        [panel(*pair) for pair in found.items()], legend,
    )  # fmt: skip


def _draw_shares(ax: Axes, own: Mapping[str, Curve]) -> None:
    rounds = sorted(set.intersection(*(set(one.x) for one in own.values())))
    base = np.zeros(len(rounds))
    for part, one in own.items():
        value = one.mean[np.isin(one.x, rounds)]
        ax.fill_between(rounds, base, base + value, **_fill(part))
        base = base + value
    ax.set_ylim(bottom=0)


def _fill(part: str) -> Style:
    """The look of a part: colour and hatching."""
    place = PARTS.index(part)
    look = {"facecolor": COLOURS[place], "hatch": HATCHES[place]}
    return look | {"alpha": 0.85, "linewidth": 0.6, "edgecolor": "white"}
