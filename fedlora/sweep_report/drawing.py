"""The strokes that all figures of a sweep share: bands, markers, rows of methods, axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedlora.canvas import BLACK, GREY, Axes, Style, line_style, wrapped
from fedlora.rundir import Array
from fedlora.sweep_report.cases import Arm, Case
from fedlora.sweep_report.curves import Curve

SIZE = 9.5
ALONE, CROWDED, BEHIND = 0.22, 0.12, 0.08  # how strong a band is: of one line, of many, of a client
REFERENCES: dict[str, Style] = {
    "central": {"color": BLACK, "linestyle": (0, (4, 1.5)), "marker": "h"},
    "local": {"color": GREY, "linestyle": (0, (6, 1.5, 1, 1.5)), "marker": "p"},
}
QUIET = {"color": GREY, "linewidth": 1.1, "markersize": 3.6}


def arm_style(arm: Arm) -> Style:
    """The look of a method, the same in all figures; the references are black and grey."""
    return line_style(max(arm.index, 0)) | (REFERENCES[arm.mode] if arm.index < 0 else {})


def client_style(place: int) -> Style:
    """The look of the client in this place: grey, told apart by dashes and marker."""
    return line_style(place + 1) | QUIET | {"markeredgewidth": 0.4}


def legend_of(arms: Sequence[Arm]) -> list[tuple[str, Style]]:
    """Each method's name beside its look."""
    return [(arm.method, arm_style(arm)) for arm in arms]


def draw_curve(
    ax: Axes, found: Curve, style: Style, *, x: Array | None = None, shade: float = ALONE
) -> None:
    """A mean with its band; alone and smoothed it has the raw mean as faint points behind it."""
    places = found.x if x is None else x
    if not len(places):
        return
    if shade == ALONE and not np.array_equal(found.raw, found.mean):
        faint = {"linestyle": "", "alpha": 0.35, "markersize": 3, "zorder": 1}
        ax.plot(places, found.raw, **(style | faint))
    if found.n > 1 and shade:
        look = {"color": style["color"], "alpha": shade, "linewidth": 0}
        ax.fill_between(places, found.low, found.high, **look)
    ax.plot(places, found.mean, markevery=max(1, len(places) // 8), **style)


def label_axes(ax: Axes, x: str, y: str = "") -> None:
    """Names the axes in grey."""
    ax.set_xlabel(x, fontsize=SIZE, color=GREY)
    ax.set_ylabel(y, fontsize=SIZE, color=GREY)


def round_axis(ax: Axes, last: float) -> None:
    """Rounds from the common start to the last one, at whole numbers."""
    ax.set_xlim(-0.02 * last - 0.05, last * 1.02 + 0.05)
    ax.locator_params(axis="x", integer=True, min_n_ticks=1, nbins=6)
    label_axes(ax, "round")


def percent_axis(ax: Axes, along: str = "y") -> None:
    """Shares as percentages, with as many decimals as they need."""
    axis = ax.yaxis if along == "y" else ax.xaxis
    axis.set_major_formatter(lambda value, place: f"{100 * value:.4g}%")


def method_rows(ax: Axes, arms: Sequence[Arm]) -> Array:
    """One row a method, the first on top, its name on up to two lines; returns their heights."""
    places = np.arange(len(arms), dtype=np.float64)
    look = {"linespacing": 0.95, "fontsize": 8.5}
    ax.set_yticks(places, [wrapped(arm.method, 19) for arm in arms], **look)
    ax.set_ylim(len(arms) - 0.4, -0.6)
    ax.grid(visible=False, axis="y")
    ax.tick_params(axis="y", length=0)
    return places


def row_height(arms: Sequence[Arm]) -> float:
    """Inches that a panel with one row a method takes."""
    return 1.0 + 0.3 * len(arms)


def dots(ax: Axes, x: Sequence[float], place: float, style: Style) -> None:
    """One faint dot a seed, a little below the row's middle."""
    look = {
        "color": style["color"],
        "alpha": 0.55,
        "markersize": 3.5,
        "linestyle": "",
        "marker": "o",
    }
    ax.plot(x, [place + 0.24] * len(x), markeredgewidth=0, **look)


def interval(ax: Axes, mean: float, half: float, place: float, style: Style) -> None:
    """A mean with its 95 % interval as a bar."""
    look: dict[str, Any] = style | {"linestyle": "", "markersize": 7}
    width = {"ecolor": style["color"], "elinewidth": 2, "capsize": 3}
    half = half if np.isfinite(half) else 0.0
    ax.errorbar([mean], [place], xerr=[half], **look, **width)


def level(ax: Axes, value: float, along: str = "y") -> None:
    """A dotted line at a value."""
    look = {"color": BLACK, "linewidth": 1.1, "linestyle": (0, (1, 2)), "zorder": 1.5}
    (ax.axhline if along == "y" else ax.axvline)(value, **look)


def last_round(case: Case) -> float:
    """The last round of any run of the case."""
    return max((float(run.rounds[-1]["round"]) for arm in case.there for run in arm.all), default=1)


def common_limits(curves: Sequence[Curve]) -> Callable[[Axes], None]:
    """What gives all panels the same vertical axis, wide enough for all these means.

    Bands have room for as much again on either side; those of two seeds may be wider than any use.
    """
    known = [found for found in curves if len(found.x)]
    if not known:
        return lambda ax: None
    least, most = min(c.mean.min() for c in known), max(c.mean.max() for c in known)
    span = float(most - least) or 0.1
    low = max(min(float(c.low.min()) for c in known), least - span)
    high = min(max(float(c.high.max()) for c in known), most + span)
    room = max(0.04 * (high - low), 1e-3)

    def limit(ax: Axes) -> None:
        ax.set_ylim(low - room, high + room)

    return limit
