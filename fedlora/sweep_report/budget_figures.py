"""Figures of the error budget, where the runs' logs hold one; what is not there is not drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import compress

import numpy as np

from fedlora.canvas import BLACK, COLOURS, GREY, HATCHES, Axes, Style, line_style
from fedlora.rundir import EXACT, Array
from fedlora.sweep_report.budget import (
    CHANGES,
    change_share,
    layer_names,
    layer_shares,
    relative,
    total,
)
from fedlora.sweep_report.cases import Arm, Case
from fedlora.sweep_report.content import Panel, Picture, seed_span
from fedlora.sweep_report.curves import Curve, curve
from fedlora.sweep_report.drawing import (
    CROWDED,
    arm_style,
    draw_curve,
    label_axes,
    last_round,
    legend_of,
    percent_axis,
    round_axis,
)

LABELS = 14  # more layers than this name only some of them
DARKEST = 0.02  # the scale of a heat map goes up to this share at least
ERRORS: dict[str, tuple[str, Style]] = {  # besides `tail`, which has the method's own look
    "cross": (
        "what averaging A and B apart would lose",
        {"color": GREY, "linestyle": (0, (4, 2)), "marker": "", "linewidth": 1.6},
    ),
    "folded": ("folded into the model", line_style(2) | {"color": GREY, "linewidth": 1.2}),
    "carried": ("carried to the next round", line_style(3) | {"color": GREY, "linewidth": 1.2}),
    "noise": ("noise of client-level privacy", line_style(4) | {"color": GREY, "linewidth": 1.2}),
}

SPACE = {
    "effective_rank": "Effective rank",
    "row_angle": "Turn of A's rows, degrees",
    "column_angle": "Turn of B's columns, degrees",
}


def budget_pictures(case: Case) -> list[Picture]:
    """What was lost by round and by layer, how the clients' changes split, what became of the
    adapter's space; none without a budget.
    """
    found = [_error_picture(case), _heat_picture(case), _change_picture(case), _space_picture(case)]
    return [picture for picture in found if picture is not None]


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


def _known(case: Case, curves: Mapping[str, Mapping[str, Curve]]) -> list[Arm]:
    return [arm for arm in case.there if arm.method in curves]


def _error_picture(case: Case) -> Picture | None:
    found: dict[str, dict[str, Curve]] = {}
    for arm in case.there:
        curves = {part: curve(arm.all, relative(part)) for part in ("tail", *ERRORS)}
        own = {part: one for part, one in curves.items() if len(one.x) and one.mean.max() > EXACT}
        if own:
            found[arm.method] = own
    if not found:
        return None
    arms, last = _known(case, found), last_round(case)

    def panel(arm: Arm) -> Panel:
        def draw(ax: Axes) -> None:
            for part, one in found[arm.method].items():
                style = arm_style(arm) if part == "tail" else ERRORS[part][1]
                draw_curve(ax, one, style)
            ax.set_ylim(bottom=0)
            round_axis(ax, last)
            percent_axis(ax)

        return Panel(arm.method, draw)

    shown = [part for part in ERRORS if any(part in own for own in found.values())]
    look = line_style(0) | {"color": BLACK, "marker": ""}
    caption = (
        "What the model lacks of the wanted increment after the merge, by round: norms over all "
        "layers, relative. What averaging A and B apart would lose is the whole error of fedavg; "
        "rules that merge increments avoid it. Means over "
        f"{seed_span([len(arm.runs) for arm in arms])}, bands 95 % intervals; each panel "
        "has a scale of its own."
    )
    return Picture(
        f"{case.slug}-budget", case.entitled("Error budget"), caption,
        [panel(arm) for arm in arms],
        [("merge error, in the method's colour", look), *(ERRORS[part] for part in shown)],
    )  # fmt: skip


def _heat_picture(case: Case) -> Picture | None:
    grids = {}
    for arm in case.there:
        names = list(dict.fromkeys(name for run in arm.all for name in layer_names(run)))
        if names:
            x, shares = layer_shares(arm.all, names, "tail")
            if np.isfinite(shares).any() and np.nanmax(shares) > EXACT:
                grids[arm.method] = (arm, names, x, shares)
    if not grids:
        return None
    top = max(DARKEST, *(float(np.nanmax(shares)) for *_, shares in grids.values()))

    def panel(arm: Arm, names: Sequence[str], x: Array, shares: Array) -> Panel:
        return Panel(arm.method, lambda ax: _draw_heat(ax, names, x, shares, top))

    spans = [len(arm.runs) for arm, *_ in grids.values()]
    caption = (
        "What the model lacks of the wanted increment after the merge, in each layer and round: "
        f"relative norms, means over {seed_span(spans)}. Methods that lose nothing are left out."
    )
    tall = max(len(names) for _, names, *_ in grids.values())
    return Picture(
        f"{case.slug}-tail", case.entitled("What the model lacks, by layer and round"), caption,
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


def _change_picture(case: Case) -> Picture | None:
    found: dict[str, dict[str, Curve]] = {}
    for arm in case.there:
        curves = {part: curve(arm.all, change_share(part)) for part in CHANGES}
        if len(curves["shared"].x):
            found[arm.method] = curves
    if not found:
        return None
    arms, last = _known(case, found), last_round(case)

    def panel(arm: Arm) -> Panel:
        def draw(ax: Axes) -> None:
            _draw_shares(ax, found[arm.method])
            round_axis(ax, last)
            percent_axis(ax)

        return Panel(arm.method, draw)

    legend: list[tuple[str, Style]] = [(words, _fill(part)) for part, words in CHANGES.items()]
    caption = (
        "All that clients changed in a round (the weighted mean of their squared norms), split "
        "into orthogonal parts: their mean and what they differ in, each within the rows of the "
        "last global A (known directions) and beside them (new ones). Means over "
        f"{seed_span([len(arm.runs) for arm in arms])}."
    )
    return Picture(
        f"{case.slug}-changes", case.entitled("What clients changed"), caption,
        [panel(arm) for arm in arms], legend,
    )  # fmt: skip


def _space_picture(case: Case) -> Picture | None:
    panels, drawn = [], dict[str, Arm]()
    for figure, title in SPACE.items():
        curves = {arm.method: curve(arm.all, partial(total, name=figure)) for arm in case.there}
        known = [arm for arm in case.there if len(curves[arm.method].x)]
        if known:
            panels.append(_space_panel(title, {arm.method: curves[arm.method] for arm in known},
                                       known, last_round(case)))  # fmt: skip
            drawn |= {arm.method: arm for arm in known}
    if not panels:
        return None
    arms = list(drawn.values())
    caption = (
        "Effective rank: exp of the entropy of the merged increment's normalised singular values, "
        "at most the adapter's rank; where it falls, the adapter gives its room away. Turns: root "
        "mean square of the principal angles between the space of this round's increment and the "
        "last one's; near 0 the space stands still. Means over layers and over "
        f"{seed_span([len(arm.runs) for arm in arms])}, bands 95 % intervals."
    )
    return Picture(
        f"{case.slug}-space", case.entitled("Rank and turning of the adapter"), caption,
        panels, legend_of(arms),
    )  # fmt: skip


def _space_panel(
    title: str, curves: Mapping[str, Curve], arms: Sequence[Arm], last: float
) -> Panel:
    def draw(ax: Axes) -> None:
        for arm in arms:
            draw_curve(ax, curves[arm.method], arm_style(arm), shade=CROWDED)
        ax.set_ylim(bottom=0)
        round_axis(ax, last)

    return Panel(title, draw)


def _draw_shares(ax: Axes, own: Mapping[str, Curve]) -> None:
    rounds = sorted(set.intersection(*(set(one.x) for one in own.values())))
    base = np.zeros(len(rounds))
    for part, one in own.items():
        value = one.mean[np.isin(one.x, rounds)]
        ax.fill_between(rounds, base, base + value, step="mid", **_fill(part))
        base = base + value
    ax.set_ylim(0, 1)


def _fill(part: str) -> Style:
    """The look of a part: colour and hatching."""
    place = list(CHANGES).index(part)
    look = {"facecolor": COLOURS[place], "hatch": HATCHES[place]}
    return look | {"alpha": 0.85, "linewidth": 0.6, "edgecolor": "white"}
