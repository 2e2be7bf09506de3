"""Does an exact merge mean a better model? One figure over all runs of all sweeps that are kept.

    python experiments/exactness.py

Reads experiments/results, draws docs/figures/exactness.png, prints Spearman's correlations.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fedlora.canvas import GREY, Axes, Figure, line_style, new_figure, save_figure, tidy
from fedlora.rundir import EXACT
from fedlora.significance import centred
from fedlora.sweep_report.findings import Tie, tied

HERE = Path(__file__).parent
SWEEPS = {
    ("sst2", "balanced"): "SST-2, balanced",
    ("sst2", "imbalanced"): "SST-2, imbalanced",
    ("mnli", ""): "MNLI",
    ("many_clients", ""): "many clients",
    ("overfitting", ""): "few rows",
    ("mixed_ranks", ""): "mixed ranks",
    ("domains", ""): "natural clients",
}
KINDS = {
    "FRA": ("fra",),
    "FedAvg": ("fedavg",),
    "FRA, then FFA": ("hybrid",),
    "one factor at a time": ("ffa", "rolora", "fedsvd", "fedsa"),
    "others": ("raflora", "hetlora", "fedmomentum"),
}


class Point(NamedTuple):
    """A run: its method and seed, the merge error of its last round, its final accuracy."""

    method: str
    rule: str
    seed: str
    error: float
    accuracy: float


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Merge error against accuracy, over all sweeps.")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of .csv")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs/figures/exactness.png")
    given = parser.parse_args(arguments)
    found = {title: read(given.results, *key) for key, title in SWEEPS.items()}
    print("| runs | over runs | over methods' means |\n|---|---|---|")
    for title, points in found.items():
        print(row(title, tied([(p.method, p.seed, p.error, p.accuracy) for p in points])))
    save_figure(draw(found), given.out)


def read(folder: Path, sweep: str, case: str) -> list[Point]:
    """The federated runs that count of one case of a sweep."""
    with (folder / f"{sweep}.csv").open(newline="") as stream:
        return [
            Point(
                run["method"],
                run["merge.rule"],
                run["seed"],
                max(float(run["merge_error"]), EXACT),
                float(run["accuracy"]),
            )
            for run in csv.DictReader(stream)
            if (run["case"], run["tuning"]) == (case, "False") and run["merge_error"]
        ]


def row(title: str, found: Tie) -> str:
    """A line of the table of docs/experiments.md; four means or fewer have no p worth a look."""
    means = (
        f"{found.rho_methods:+.2f} (p = {found.p_methods:.2g})" if found.methods > 4 else "too few"
    )
    counts = f"{title}, {found.runs} runs, {found.methods} methods"
    return f"| {counts} | {found.rho:+.2f} | {means} |"


def draw(found: dict[str, list[Point]]) -> Figure:
    """A panel a sweep: the last round's merge error, and accuracy beside the seed's mean."""
    figure = new_figure(10, 5.6)
    edges = {"left": 0.07, "right": 0.975, "bottom": 0.1, "top": 0.94}
    grid = figure.add_gridspec(2, 4, hspace=0.42, wspace=0.3, **edges)
    for place, (title, points) in enumerate(found.items()):
        ax = figure.add_subplot(grid[place // 4, place % 4])
        tidy(ax)
        _panel(ax, points)
        ax.set_title(title, fontsize=10.5, loc="left")
        if place % 4 == 0:
            ax.set_ylabel("accuracy minus seed's mean (points)", fontsize=9, color=GREY)
        if place > 2:
            ax.set_xlabel("merge error in the last round", fontsize=9, color=GREY)
    empty = figure.add_subplot(grid[1, 3])
    empty.set_axis_off()
    for place, kind in enumerate(KINDS):
        empty.plot([], [], label=kind, **_look(place))
    empty.legend(frameon=False, fontsize=10, loc="center left")
    return figure


def _panel(ax: Axes, points: Sequence[Point]) -> None:
    scores = centred([point.accuracy for point in points], [point.seed for point in points])
    for place, rules in enumerate(KINDS.values()):
        own = [index for index, point in enumerate(points) if point.rule in rules]
        errors = [_shown(points[index].error, place) for index in own]
        ax.plot(errors, [100 * scores[index] for index in own], **_look(place))
    ax.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    ax.axvspan(EXACT / 3, EXACT * 3, color=GREY, alpha=0.14, linewidth=0)
    ax.set_xscale("log")
    ax.set_xlim(EXACT / 4, 1)
    ax.set_xticks([1e-6, 1e-4, 1e-2, 1], ["exact", "0.01%", "1%", "100%"], fontsize=8.5)
    ax.minorticks_off()


def _shown(error: float, place: int) -> float:
    """Where the error is drawn: kinds stand side by side in the strip of what is exact."""
    return EXACT * 1.5 ** (place - 2) if error <= EXACT else error


def _look(place: int) -> dict[str, object]:
    return line_style(place) | {"linestyle": "", "markersize": 6, "alpha": 0.85}


if __name__ == "__main__":
    main()
