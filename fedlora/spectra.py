"""The figure of a merge: how fast each layer's singular values fall, and what the rank holds.

Readable for one layer and for hundreds: all layers are thin grey lines, the five that lost most
have a colour, a marker and a name. A pure function of the outcome; matplotlib through `canvas`.
"""

from __future__ import annotations

import torch

from fedlora.canvas import BLACK, COLOURS, GREY, Axes, Figure, new_figure, tidy
from fedlora.merge_card import SHARE, WORST, counted, natural, percent, shortened
from fedlora.merging import LayerOutcome, Outcome

MARKERS = ("o", "s", "^", "D", "v")
LOWEST = 1e-6  # of the largest singular value: what lies below is not drawn


def draw_spectra(outcome: Outcome) -> Figure:
    """Left: the singular values of each layer's averaged increment, relative to the largest.
    Right: the rank that holds 99 % of each layer's energy beside the rank written.
    """
    layers = sorted(outcome.layers, key=lambda layer: natural(layer.name))
    names = [layer.name for layer in layers]
    named = dict(zip(names, shortened(names), strict=True))
    worst = outcome.worst(WORST)
    figure = new_figure(11.0, 4.9)
    left = figure.add_axes((0.07, 0.26, 0.41, 0.62))
    right = figure.add_axes((0.56, 0.26, 0.41, 0.62))
    _falls(left, layers, worst, named)
    _needs(right, layers, worst)
    handles, labels = left.get_legend_handles_labels()
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.0), "ncols": 3}
    title = {"title": "the layers that lost most (energy kept)", "title_fontsize": 8.5}
    figure.legend(handles, labels, frameon=False, fontsize=8.5, **place, **title)
    figure.text(
        0.07,
        0.945,
        f"{outcome.rule.name} of {len(outcome.adapters)} adapters, {len(layers)} layers: "
        f"{percent(outcome.kept)} of the energy kept",
        fontsize=11,
        color=BLACK,
    )
    return figure


def _falls(
    ax: Axes, layers: list[LayerOutcome], worst: list[LayerOutcome], named: dict[str, str]
) -> None:
    tidy(ax)
    for layer in layers:
        if layer not in worst:
            places, values = _relative(layer)
            ax.plot(places, values, color=GREY, linewidth=0.8, alpha=0.35, zorder=2)
    for layer, colour, marker in zip(worst, COLOURS, MARKERS, strict=False):
        places, values = _relative(layer)
        label = f"{named[layer.name]} ({percent(layer.kept)})"
        style = {"color": colour, "linewidth": 1.6, "marker": marker, "markersize": 4, "zorder": 4}
        ax.plot(places, values, markevery=max(1, len(places) // 8), label=label, **style)
    for rank in {min(layer.rank for layer in layers), max(layer.rank for layer in layers)}:
        ax.axvline(rank + 0.5, color=BLACK, linestyle="--", linewidth=1.2, zorder=3)
    ax.set_yscale("log")
    ax.set_title(
        f"singular value / largest; dashed: rank written, {counted(la.rank for la in layers)}",
        fontsize=9.5,
        color=GREY,
        loc="left",
    )
    ax.set_xlabel("number of the singular value", fontsize=9.5, color=GREY)


def _needs(ax: Axes, layers: list[LayerOutcome], worst: list[LayerOutcome]) -> None:
    tidy(ax)
    places = list(range(1, len(layers) + 1))
    ranks = [layer.rank for layer in layers]
    ax.step(places, ranks, where="mid", color=BLACK, linestyle="--", linewidth=1.2, zorder=3)
    needs = [layer.rank_for(SHARE) for layer in layers]
    ax.scatter(places, needs, s=14 if len(layers) > 60 else 28, color=GREY, alpha=0.6, zorder=2)
    for layer, colour, marker in zip(worst, COLOURS, MARKERS, strict=False):
        index = layers.index(layer)
        ax.scatter(places[index], needs[index], s=46, color=colour, marker=marker, zorder=4)
    ax.set_ylim(0, 1.08 * max(*needs, *ranks, 1))
    ax.set_title(
        f"rank for {SHARE:.0%} of a layer's energy; dashed: rank written",
        fontsize=9.5,
        color=GREY,
        loc="left",
    )
    ax.set_xlabel("layer, by its number and name", fontsize=9.5, color=GREY)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.yaxis.get_major_locator().set_params(integer=True)


def _relative(layer: LayerOutcome) -> tuple[list[int], list[float]]:
    """(1, 2, ..., singular values divided by the largest), without the smallest."""
    values = layer.values if len(layer.values) else torch.ones(1)
    shares = values / values[0]
    shares = shares[shares >= LOWEST]
    return list(range(1, len(shares) + 1)), shares.tolist()
