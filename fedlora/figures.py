"""Figures of runs: one run as a page of panels, or several runs side by side.

A function of what `rundir` read and of nothing else; matplotlib is imported when a page is drawn.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedlora.canvas import BLACK, GREY, Axes, Figure, Style, line_style, new_figure, short, tidy
from fedlora.rundir import (
    EXACT,
    Array,
    Run,
    group_runs,
    last_known,
    mean_final,
    number,
    percent,
    plain,
    smoothed,
    stacked,
)

LEVEL = 0.01  # nats: a loss that moves by less is drawn as level as it is
MANY = 8  # more clients than this are drawn as a faint bundle with its median
LEGEND = {"frameon": False, "fontsize": 9.5, "handlelength": 2.6, "handletextpad": 0.6}
SETTING = {
    "federated": "federated, merge rule {rule}",
    "central": "central: all data in one place",
    "local": "local: each client alone",
}
CAPTION = {
    "federated": "clients after local training, before the merge; global after the merge",
    "central": "the one model",
    "local": "every client's own adapter; nothing is merged",
}


def draw_run(run: Run, rolling: int = 1) -> Figure:
    """One run: accuracy of clients and global, loss, merge error, bytes, and the confusion matrix.

    `rolling` is the window of the rolling mean in rounds; raw values stay behind it as points, and
    round 0, before any training, stays out of every window.
    """
    done, wanted = run.rounds[-1]["round"], run.config["run"].get("rounds", 0)
    facts = [
        SETTING[run.mode].format(rule=run.rule_text),
        _count(len(run.clients), "client"),
        f"{done} of {wanted} rounds so far" if done < wanted else _count(done, "round"),
        f"seed {run.config['run'].get('seed', '?')}",
        f"final accuracy {percent(run.final('accuracy'))}",
    ]
    confusion = run.summary.get("confusion")
    figure, main, small = _page(run.name, facts, 4 if confusion else 3)
    x, error = run.series("round"), run.series("merge_error")
    _draw_accuracy(main, run, x, rolling)
    _draw_loss(small[0], run, x, rolling)
    last = line_style(5) | {"label": f"last round {plain(last_known(error), '.2g')}"}
    _draw_merge_error(small[1], [(x, error[None], last)], rolling)
    _legend_above(small[1])
    _title(small[1], "Merge error", "distance to the mean increment, relative", 23)
    _draw_bytes(small[2], run, x)
    if confusion:
        _draw_confusion(small[3], np.array(confusion, np.int64), run.summary.get("labels") or [])
    for ax in [main, *small[:3]]:
        _round_axis(ax, x)
    return figure


def draw_comparison(runs: Sequence[Run], rolling: int = 1) -> Figure:
    """Several runs: accuracy, loss and merge error a round, and accuracy against megabytes moved.

    Runs that differ in nothing but name and seed are one line, their mean over the rounds that all
    of them evaluated, with a band from lowest to highest. `rolling` as in `draw_run`.
    """
    groups = group_runs(runs)
    x = np.unique(np.concatenate([run.series("round") for run in runs]))
    facts = [_count(len(runs), "run"), _count(int(x[-1]), "round")]
    figure, main, small = _page(f"Comparison of {_count(len(groups), 'method')}", facts, 3)
    errors = []
    for label, members, index in groups:
        final = mean_final(members)
        named = line_style(index) | {"label": _entry(final, label)}
        accuracy = stacked(x, members, lambda run: run.evaluation("accuracy"))
        _draw(main, x, accuracy, named, rolling)
        _draw(small[0], x, stacked(x, members, lambda run: run.evaluation("loss")), named, rolling)
        errors.append((x, stacked(x, members, lambda run: run.series("merge_error")), named))
        moved = stacked(x, members, lambda run: run.megabytes("up") + run.megabytes("down"))
        if np.nanmax(moved) > 0:
            _draw(small[2], moved.mean(axis=0), accuracy, named, rolling)
        elif math.isfinite(final):
            small[2].axhline(final, **(named | {"marker": ""}))
    _draw_merge_error(small[1], errors, rolling)
    caption = "global adapter; local: mean of clients"
    spread = "; band: lowest to highest seed" if len(groups) < len(runs) else ""
    sets = sorted({run.evaluated_on for run in runs}, reverse=True)
    _title(main, f"Accuracy on {', or on '.join(sets)}", _smoothing(caption + spread, rolling))
    _title(small[0], "Evaluation loss", caption)
    _title(small[1], "Merge error", "distance to the mean increment, relative")
    _title(small[2], "Accuracy against traffic", "up and down; level line: nothing sent")
    _legend_beside(main, "at the end")
    for ax in [main, *small[:2]]:
        _round_axis(ax, x)
    for ax in [main, small[2]]:
        _percent_axis(ax)
    small[2].set_xlabel("megabytes, cumulative", fontsize=9.5, color=GREY)
    return figure


def _page(title: str, facts: Sequence[str], panels: int) -> tuple[Figure, Axes, list[Axes]]:
    """A figure with its heading, one wide panel with room for a legend, and a row of small ones."""
    figure = new_figure(12.0, 8.2)
    left, right, gap = 0.055, 0.985, 0.05 if panels > 3 else 0.06
    figure.text(0.02, 0.955, short(title, 60), fontsize=18, fontweight="bold", color=BLACK)
    figure.text(0.02, 0.922, "   ·   ".join(facts), fontsize=11, color=GREY)
    main = figure.add_axes((left, 0.47, 0.7, 0.375))
    width = (right - left - gap * (panels - 1)) / panels
    small = [figure.add_axes((left + n * (width + gap), 0.07, width, 0.225)) for n in range(panels)]
    for ax in [main, *small]:
        tidy(ax)
    return figure, main, small


def _title(ax: Axes, title: str, caption: str, height: int = 8) -> None:
    """Two lines of text, `height` points above the panel: room for a legend in between."""
    for text, lift, size, colour, weight in (
        (title, 14, 11.5, BLACK, "bold"),
        (caption, 0, 9, GREY, "normal"),
    ):
        place = {"xycoords": "axes fraction", "textcoords": "offset points", "fontweight": weight}
        ax.annotate(text, (0, 1), (0, height + lift), fontsize=size, color=colour, **place)


def _draw(ax: Axes, x: Array, rows: Array, style: Style, rolling: int) -> None:
    """The mean of `rows` where all have a value; behind it raw points and the min-max band."""
    seen = np.isfinite(x) & np.isfinite(rows).all(axis=0)
    smooth = np.stack([smoothed(x, row, rolling) for row in rows])[:, seen]
    if rolling > 1:
        faint = {"linestyle": "", "alpha": 0.35, "markersize": 4, "label": "_raw", "zorder": 1}
        ax.plot(x[seen], rows[:, seen].mean(axis=0), **(style | faint))
    if len(rows) > 1:
        low, high = smooth.min(axis=0), smooth.max(axis=0)
        ax.fill_between(x[seen], low, high, color=style["color"], alpha=0.15, linewidth=0)
    ax.plot(x[seen], smooth.mean(axis=0), markevery=max(1, int(seen.sum()) // 15), **style)


def _draw_accuracy(ax: Axes, run: Run, x: Array, rolling: int) -> None:
    each = [run.series("clients", c, "evaluation", "accuracy") for c in run.clients]
    whole, merged = run.evaluation("accuracy"), run.series("global", "accuracy")
    label = "central" if run.mode == "central" else "global"
    label = label if np.isfinite(merged[x > 0]).any() or not run.clients else "mean of clients"
    thick = {"color": "black", "marker": "o", "linewidth": 2.8, "markersize": 7, "zorder": 5}
    thick |= {"label": _entry(last_known(whole), label), "markeredgecolor": "white"}
    _draw(ax, x, whole[None], thick, rolling)
    if len(each) > MANY:
        _draw_bundle(ax, x, np.stack(each), rolling)
    elif run.mode != "central":
        for index, (client, row) in enumerate(zip(run.clients, each, strict=True)):
            name = f"client {client}" if client.isdecimal() else client
            _draw(
                ax,
                x,
                row[None],
                line_style(index) | {"label": _entry(last_known(row), name)},
                rolling,
            )
    caption = _smoothing(CAPTION[run.mode], rolling)
    _title(ax, f"Accuracy on {run.evaluated_on}", caption)
    _legend_beside(ax, "last evaluation")
    _percent_axis(ax)


def _draw_bundle(ax: Axes, x: Array, rows: Array, rolling: int) -> None:
    """Many clients as faint lines, and their median a round over those evaluated in it."""
    faint = {"color": GREY, "linewidth": 0.7, "alpha": 0.3, "marker": ".", "markersize": 2}
    for index, row in enumerate(rows):
        label = "_client" if index else f"{len(rows)} clients"
        _draw(ax, x, smoothed(x, row, rolling)[None], faint | {"label": label}, 1)
    some = np.isfinite(rows).any(axis=0)
    median = np.full(len(x), np.nan)
    median[some] = np.nanmedian(rows[:, some], axis=0)
    label = _entry(last_known(median), "median of clients")
    _draw(ax, x, median[None], line_style(1) | {"label": label}, rolling)


def _draw_loss(ax: Axes, run: Run, x: Array, rolling: int) -> None:
    train, evaluation = run.train_loss(), run.evaluation("loss")
    both = np.isfinite(train) & np.isfinite(evaluation)
    low, high = smoothed(x, train, rolling)[both], smoothed(x, evaluation, rolling)[both]
    ax.fill_between(x[both], low, high, color=GREY, alpha=0.15, linewidth=0)
    if np.isfinite(train).any():  # private runs tell none
        _draw(ax, x, train[None], line_style(1) | {"label": "training"}, rolling)
    _draw(ax, x, evaluation[None], line_style(0) | {"label": "evaluation"}, rolling)
    bottom, top = ax.get_ylim()
    room = max(0.0, LEVEL - (top - bottom)) / 2
    ax.set_ylim(bottom - room, top + room)
    _legend_above(ax)
    caption = f"gap in the last round {run.gap:+.3f}" if math.isfinite(run.gap) else ""
    _title(ax, "Loss", caption, 23)


def _draw_merge_error(ax: Axes, curves: Sequence[tuple[Array, Array, Style]], rolling: int) -> None:
    known = np.concatenate([rows[np.isfinite(rows)] for _, rows, _ in curves])
    worst = known.max(initial=0.0)
    if not known.size or worst < EXACT:
        return _note(ax, f"exact\n(below {EXACT:.0e})" if known.size else "nothing merged")
    for x, rows, style in curves:
        _draw(ax, x, rows, style, rolling)
    if known.min() < EXACT:
        ax.set_yscale("symlog", linthresh=EXACT)
        ax.set_yticks([0.0, *(10.0**power for power in range(-5, 2) if 10.0**power < 2 * worst)])
    elif worst > 30 * known.min():
        ax.set_yscale("log")
    if ax.get_yscale() != "linear":
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}" if value else "exact")
        ax.yaxis.set_minor_formatter("")
    return None


def _draw_bytes(ax: Axes, run: Run, x: Array) -> None:
    up, down = run.megabytes("up"), run.megabytes("down")
    full = number(run.summary, ("full_finetuning_bytes_total",)) / 1e6
    sent = up[-1] + down[-1] > 0
    caption = f"full fine-tuning would move {full:,.0f}" if sent and math.isfinite(full) else ""
    _title(ax, "Megabytes moved", caption, 23)
    if not sent:
        return _note(ax, "nothing sent")
    wide = {"linewidth": 5, "marker": "", "zorder": 1, "solid_capstyle": "round"}
    wide |= {"linestyle": "-", "label": f"down {down[-1]:,.1f}"}
    _draw(ax, x, down[None], line_style(1) | wide, 1)
    _draw(ax, x, up[None], line_style(0) | {"label": f"up {up[-1]:,.1f}"}, 1)
    ax.set_ylim(bottom=0)
    return _legend_above(ax)


def _draw_confusion(ax: Axes, counts: NDArray[np.int64], labels: Sequence[str]) -> None:
    size, few = len(counts), len(counts) < 4
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ax.pcolormesh(share, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
    ax.grid(visible=False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.invert_yaxis()
    names = [short(str(label), 10 if few else 7) for label in labels] or [*map(str, range(size))]
    names = names if size <= MANY else [""] * size
    ax.set_xticks(np.arange(size) + 0.5, names, rotation=0 if few else 90)
    ax.set_yticks(np.arange(size) + 0.5, names, rotation=90 if few else 0, va="center")
    ax.tick_params(length=0, labelsize=9.5 if few else 8)
    for row, column in np.ndindex(*counts.shape) if size <= MANY else ():
        text = f"{counts[row, column]:,}" + (f"\n{share[row, column]:.0%}" if few else "")
        look = {"color": "white" if share[row, column] > 0.55 else BLACK, "ha": "center"}
        ax.text(column + 0.5, row + 0.5, text, va="center", fontsize=10 if few else 8, **look)
    _title(ax, "Confusion at the end", f"{counts.sum():,} examples", 23)
    _title(ax, "", "rows: true, columns: predicted", 8)


def _note(ax: Axes, text: str) -> None:
    """Words in the middle of a panel that has nothing to draw."""
    look = {"ha": "center", "va": "center", "fontsize": 13, "color": GREY, "linespacing": 1.6}
    ax.text(0.5, 0.5, text, transform=ax.transAxes, **look)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.grid(visible=False)


def _round_axis(ax: Axes, x: Array) -> None:
    room = max(0.02 * (x[-1] - x[0]), 0.1)
    ax.set_xlim(x[0] - room, x[-1] + room)
    ax.locator_params(axis="x", integer=True, min_n_ticks=1)
    ax.set_xlabel("round", fontsize=9.5, color=GREY)


def _percent_axis(ax: Axes) -> None:
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")  # 42.5%, but 40%


def _legend_above(ax: Axes) -> None:
    if ax.get_legend_handles_labels()[0]:
        place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.98), "borderaxespad": 0}
        ax.legend(ncols=2, columnspacing=1, **place, **LEGEND)


def _legend_beside(ax: Axes, title: str) -> None:
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.03), "labelspacing": 0.6}
    legend = ax.legend(title=title, alignment="left", **place, **LEGEND)
    legend.get_title().set(fontsize=9.5, color=GREY)


def _entry(value: float, name: str) -> str:
    """A legend's line: the value first, so that values stand in a column; long names are folded."""
    text = f"{percent(value)}  {short(name, 60)}"
    return textwrap.fill(text, 31, subsequent_indent=" " * 11)


def _smoothing(caption: str, rolling: int) -> str:
    return caption + (f"; rolling mean of {rolling} rounds over raw points" if rolling > 1 else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
