"""Figures over rounds: accuracy of clients and global adapter, early convergence, losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fedlora.canvas import BLACK, GREY, Axes, Style, line_style
from fedlora.rundir import Array, Run
from fedlora.sweep_report.cases import Arm, Case, was_followed
from fedlora.sweep_report.content import Panel, Picture, seed_span
from fedlora.sweep_report.curves import Curve, accuracy, curve, median, moved, reached
from fedlora.sweep_report.drawing import (
    BEHIND,
    CROWDED,
    arm_style,
    client_style,
    common_limits,
    dots,
    draw_curve,
    label_axes,
    last_round,
    legend_of,
    level,
    method_rows,
    percent_axis,
    round_axis,
)

MANY = 8  # more clients than this are one band from the lowest to the highest, and their median
GLOBAL = {"linewidth": 2.6, "markersize": 5.5, "zorder": 5}
TRAINING = {"color": GREY, "linestyle": (0, (4, 2)), "marker": "", "linewidth": 1.6}


def accuracy_picture(case: Case, rolling: int) -> Picture:
    """Accuracy of each client and of the global adapter by round, a panel for each method."""
    arms = case.followed
    whole = {arm.method: curve(arm.all, accuracy, rolling) for arm in arms}
    apart = {arm.method: _clients(arm, rolling) for arm in arms}
    limit = common_limits(
        [*whole.values(), *(c for found in apart.values() for c in found.values())]
    )
    last = last_round(case)

    def panel(arm: Arm) -> Panel:
        def draw(ax: Axes) -> None:
            for place, found in enumerate(apart[arm.method].values()):
                draw_curve(ax, found, client_style(place), shade=BEHIND)
            draw_curve(ax, whole[arm.method], arm_style(arm) | GLOBAL)
            limit(ax)
            round_axis(ax, last)
            percent_axis(ax)

        return Panel(arm.method, draw)

    smooth = (
        f"Rolling mean of {rolling} rounds; the points behind are not smoothed. "
        if rolling > 1
        else ""
    )
    caption = (
        "Accuracy on the shared evaluation set after each round. The thick line in the method's "
        "colour is the global adapter after the merge (local: the mean of the clients), grey lines "
        "are the clients' own adapters after local training, before the merge. "
        f"{smooth}Lines are means over seeds ({_span(arms)}), bands their 95 % intervals, "
        "cut where they leave the panel."
    )
    return Picture(
        f"{case.slug}-accuracy", case.entitled("Accuracy by round"), caption,
        [panel(arm) for arm in arms], _client_legend(apart),
    )  # fmt: skip


def early_picture(case: Case, target: float, rolling: int) -> Picture:
    """Accuracy of all methods by round and by megabytes, and when each seed reached the target."""
    arms = case.followed
    found = {arm.method: curve(arm.all, accuracy, rolling) for arm in arms}
    sent = {arm.method: curve(arm.all, _moved_where_known) for arm in arms}
    last, limit = last_round(case), common_limits(list(found.values()))

    def by_round(ax: Axes) -> None:
        for arm in arms:
            draw_curve(ax, found[arm.method], arm_style(arm), shade=CROWDED)
        level(ax, target)
        limit(ax)
        round_axis(ax, last)
        percent_axis(ax)

    def by_traffic(ax: Axes) -> None:
        for arm in arms:
            _draw_traffic(ax, found[arm.method], sent[arm.method].mean, arm_style(arm))
        level(ax, target)
        limit(ax)
        percent_axis(ax)
        label_axes(ax, "megabytes, up and down, all clients")

    def when(ax: Axes) -> None:
        _draw_reached(ax, arms, target, last)

    caption = (
        f"The dotted line is the target, {target:.1%}. Right: the round in which each seed first "
        "reached it (a dot a seed, the larger mark the median); a cross stands for a seed that "
        f"never did. Means over {_span(arms)}, bands 95 % intervals; level lines against megabytes "
        "send nothing."
    )
    panels = [
        Panel("Accuracy by round", by_round),
        Panel("Accuracy by megabytes", by_traffic),
        Panel("Rounds to the target", when),
    ]
    return Picture(
        f"{case.slug}-early", case.entitled("Early convergence"), caption, panels, legend_of(arms)
    )


def loss_picture(case: Case, rolling: int) -> Picture:
    """Training against evaluation loss by round, and the gap between them for all methods."""
    arms = case.there
    train = {arm.method: curve(arm.all, Run.train_loss, rolling) for arm in arms}
    tested = {arm.method: curve(arm.all, _evaluation_loss, rolling) for arm in arms}
    gaps = {arm.method: curve(arm.all, loss_gap, rolling) for arm in arms}
    limit, last = common_limits([*train.values(), *tested.values()]), last_round(case)

    def gap(ax: Axes) -> None:
        for arm in arms:
            draw_curve(ax, gaps[arm.method], arm_style(arm), shade=CROWDED)
        level(ax, 0.0)
        round_axis(ax, last)

    def panel(arm: Arm) -> Panel:
        def draw(ax: Axes) -> None:
            draw_curve(ax, train[arm.method], TRAINING)
            draw_curve(ax, tested[arm.method], arm_style(arm))
            limit(ax)
            round_axis(ax, last)

        return Panel(arm.method, draw)

    caption = (
        "First panel: evaluation loss minus training loss; a gap that grows while evaluation loss "
        "rises is overfitting. Others: evaluation loss (the method's colour) and training loss "
        "(grey dashes; the mean over clients and local steps, so of the round's course and not of "
        f"its end), in nats. Means over {_span(arms)}, bands 95 % intervals."
    )
    legend = [*legend_of(arms), ("training loss", TRAINING)]
    panels = [Panel("Gap: evaluation minus training", gap), *(panel(arm) for arm in arms)]
    return Picture(
        f"{case.slug}-loss", case.entitled("Training and evaluation loss"), caption, panels, legend
    )


def loss_gap(run: Run) -> Array:
    """Evaluation loss minus training loss by round."""
    return run.evaluation("loss") - run.train_loss()


def _evaluation_loss(run: Run) -> Array:
    return run.evaluation("loss")


def _moved_where_known(run: Run) -> Array:
    """Megabytes in the rounds whose accuracy is known."""
    return np.where(np.isfinite(accuracy(run)), moved(run), np.nan)


def _span(arms: Sequence[Arm]) -> str:
    return seed_span([len(arm.runs) for arm in arms])


def _clients(arm: Arm, rolling: int) -> dict[str, Curve]:
    """Each client's curve; of many the lowest, the median and the highest; none for one model."""
    if arm.mode == "central":
        return {}
    names = [run.clients for run in arm.all]
    common = [client for client in names[0] if all(client in other for other in names)]
    readers: dict[str, Callable[[Run], Array]]
    if len(common) > MANY:
        readers = {
            f"{word} of {len(common)} clients": _across(share)
            for word, share in (("lowest", 0.0), ("median", 50.0), ("highest", 100.0))
        }
    else:
        readers = {_named(client): _client(client) for client in common}
    found = {name: curve(arm.all, read, rolling) for name, read in readers.items()}
    return {name: one for name, one in found.items() if len(one.x)}


def _named(client: str) -> str:
    return f"client {client}" if client.isdecimal() else client


def _client(client: str) -> Callable[[Run], Array]:
    return lambda run: run.series("clients", client, "evaluation", "accuracy")


def _across(share: float) -> Callable[[Run], Array]:
    """The accuracy below which `share` percent of the clients evaluated in a round are."""

    def read(run: Run) -> Array:
        rows = np.stack([_client(client)(run) for client in run.clients])
        some = np.isfinite(rows).any(axis=0)
        values = np.full(rows.shape[1], np.nan)
        values[some] = np.nanpercentile(rows[:, some], share, axis=0)
        return values

    return read


def _client_legend(apart: dict[str, dict[str, Curve]]) -> list[tuple[str, Style]]:
    longest = max(apart.values(), key=len, default={})
    look = line_style(0) | GLOBAL | {"color": BLACK, "marker": ""}
    named = [(name, client_style(place)) for place, name in enumerate(longest)]
    return [("global adapter, in the method's colour", look), *named]


def _draw_traffic(ax: Axes, found: Curve, megabytes: Array, style: Style) -> None:
    if len(megabytes) and megabytes[-1] > 0:
        draw_curve(ax, found, style, x=megabytes, shade=CROWDED)
    elif len(found.mean):
        ax.axhline(found.mean[-1], **(style | {"marker": ""}))


def _draw_reached(ax: Axes, arms: Sequence[Arm], target: float, last: float) -> None:
    """Per method a dot for each seed at its round; seeds that never got there are crosses."""
    never = last * 1.12 + 0.5
    for place, arm in zip(method_rows(ax, arms), arms, strict=True):
        style = arm_style(arm)
        rounds = [reached(run, target).round for run in arm.all if was_followed(run)]
        dots(ax, [value for value in rounds if np.isfinite(value)], place, style)
        lost = [value for value in rounds if not np.isfinite(value)]
        look = {"color": style["color"], "marker": "x", "linestyle": "", "markersize": 6}
        ax.plot(never + 0.02 * last * np.arange(len(lost)), [place] * len(lost), **look)
        middle = median(rounds)
        if np.isfinite(middle):
            ax.plot([middle], [place], **(style | {"linestyle": "", "markersize": 7}))
    ax.axvline(last * 1.06 + 0.25, color=GREY, linewidth=0.8)
    ax.set_xlim(-0.02 * last, never + 0.12 * last)
    ax.locator_params(axis="x", integer=True, min_n_ticks=1, nbins=6)
    label_axes(ax, "round; right of the line: never")
