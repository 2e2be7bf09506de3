"""Draw the two concept figures of the docs: what LoRA is, and what travels in a federation.

Run as a script: `python docs/figures/draw_concepts.py [--out DIR]`. Same matplotlib, same bytes.
Lengths are in inches of the page, text sizes in points.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Arc, Circle, Ellipse, FancyBboxPatch, Rectangle

INK, GREY, PALE, WHITE = "#1a1a1a", "#5f5f5f", "#e9e9e9", "#ffffff"
BLUE, ORANGE = "#0072B2", "#E69F00"  # Okabe and Ito, 2008
Look: TypeAlias = dict[str, Any]
SMALL: Look = {"fontsize": 9.5, "color": GREY}
PLAIN: Look = {"fontsize": 10.5, "color": GREY}
LABEL: Look = {"fontsize": 10.5, "color": INK}
CLAIM: Look = {"fontsize": 13, "color": INK}
HEAD: Look = CLAIM | {"fontweight": "bold"}
TIMES, ALPHA = "\N{MULTIPLICATION SIGN}", "\N{GREEK SMALL LETTER ALPHA}"
LAYER, RANK = 384, 8


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw docs/figures/lora and architecture.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to fill")
    folder: Path = parser.parse_args(arguments).out
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in (("lora", draw_lora()), ("architecture", draw_architecture())):
        with matplotlib.rc_context({"svg.hashsalt": name}):
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
            figure.savefig(folder / f"{name}.png", metadata={"Software": None}, dpi=150)


def draw_lora() -> Figure:
    """h = W x + s B A x, each matrix in its shape: W stays, the thin B and A are trained."""
    figure, ax = card(10, 4.95)
    side, thin, middle = 2.3, 0.34, 2.65
    low, top = middle - side / 2, middle + side / 2
    title(ax, 4.48, "LoRA: leave W as it is, train two thin matrices beside it")

    w, b, a = 1.85, 5.7, 6.22
    vector(ax, 1.02, low, side, "h")
    matrix(ax, (w, low), (side, side), PALE, "W")
    lock(ax, w + side - 0.27, top - 0.42, 0.24)
    vector(ax, 4.33, low, side, "x")
    matrix(ax, (b, low), (thin, side), ORANGE, "B")
    matrix(ax, (a, middle - thin / 2), (side, thin), BLUE, "A")
    vector(ax, 8.7, low, side, "x")
    for x, sign in ((1.565, "="), (4.9, "+"), (5.35, "s ·")):
        ax.text(x, middle, sign, fontsize=19, color=INK, ha="center", va="center")

    note(ax, (w + side / 2, top + 0.16), f"m {TIMES} n")
    note(ax, (b + thin / 2, top + 0.16), f"m {TIMES} r")
    note(ax, (a + side / 2, middle + thin / 2 + 0.16), f"r {TIMES} n")
    whole, small = LAYER * LAYER, 2 * RANK * LAYER
    halves = f"{LAYER} {TIMES} {RANK} + {RANK} {TIMES} {LAYER}"
    for left, right, claim, sum_ in (
        (w, w + side, "frozen", f"{LAYER} {TIMES} {LAYER} = {whole:,}"),
        (
            b,
            a + side,
            f"trained and sent: {small / whole:.1%} of W",
            f"r = {RANK}:  {halves} = {small:,}",
        ),
    ):
        brace(ax, left, right, low - 0.16)
        note(ax, ((left + right) / 2, 1.08), claim, CLAIM)
        note(ax, ((left + right) / 2, 0.8), f"{sum_} parameters")
    start = "Training starts at B = 0, so at first h = W x."
    note(ax, (5, 0.36), f"{start}   s = {ALPHA} / r.   r is drawn wider than it is.", SMALL)
    return figure


def draw_architecture() -> Figure:
    """One round: the orchestrator above, clients below; nothing but adapters moves between them."""
    figure, ax = card(10, 7.2)
    title(ax, 6.75, "One round of a federation: adapters travel, data does not")
    panel(ax, (0.5, 4.5), (9, 1.95), "#f3f7fb", BLUE)
    note(ax, (0.8, 6.12), "Orchestrator", HEAD, "left")
    badge(ax, 2.55, 6.12, "4")
    note(ax, (2.78, 6.12), "merge what came back into the next global adapter", LABEL, "left")
    draw_merge(ax, 5.35)
    steps = ("send the global adapter", "train on the private data", "send back what was trained")
    for index, step in enumerate(steps):
        left = 0.5 + 3.1 * index
        draw_client(ax, left, index + 1)
        badge(ax, left + 0.2, 0.45, str(index + 1))
        note(ax, (left + 0.43, 0.45), step, LABEL, "left")
    return figure


def draw_merge(ax: Axes, middle: float) -> None:
    """The rule as pictures: thin pairs, their weighted sum, its cut to rank r."""
    below = middle - 0.5
    for k in (1, 2, 3):
        x = 0.85 + 1.05 * (k - 1)
        factors(ax, x, middle, 0.6)
        note(ax, (x + 0.32, below), f"$w_{k}\\,s_{k}\\,B_{k}A_{k}$", LABEL)
        if k > 1:
            note(ax, (x - 0.2, middle), "+", CLAIM)
    matrix(ax, (5.05, middle - 0.3), (0.6, 0.6), "#cfe0d8", "")
    note(ax, (5.35, middle), r"$\Delta W$", CLAIM)
    note(ax, (5.35, below), r"$\Sigma_k\,w_k\,s_k\,B_kA_k$", LABEL)
    factors(ax, 8.2, middle, 0.6)
    note(ax, (8.52, below), r"new global $B,\,A$", LABEL)
    for start, end, text in ((3.85, 4.85, "sum"), (5.85, 8.0, "SVD, cut to rank r")):
        arrow(ax, (start, middle), (end, middle))
        note(ax, ((start + end) / 2 - 0.05, middle + 0.17), text, LABEL)


def draw_client(ax: Axes, left: float, number: int) -> None:
    """A client's box with its locked data and its adapter, and the two ways to the orchestrator."""
    panel(ax, (left, 0.85), (2.8, 2.3), "#fbf8f2", GREY)
    note(ax, (left + 0.25, 2.86), f"Client {number}", HEAD, "left")
    database(ax, left + 0.62, 1.62, 0.74, 0.76)
    lock(ax, left + 0.62, 1.68, 0.27)
    note(ax, (left + 0.62, 1.29), "private data,", SMALL)
    note(ax, (left + 0.62, 1.08), "never leaves", SMALL)
    matrix(ax, (left + 1.45, 1.76), (0.48, 0.48), PALE, "")
    note(ax, (left + 2.02, 2.0), "+", LABEL)
    factors(ax, left + 2.11, 2.0, 0.48)
    note(ax, (left + 2.02, 1.29), "model frozen,", SMALL)
    note(ax, (left + 2.02, 1.08), "adapter trained", SMALL)
    arrow(ax, (left + 1.05, 2.0), (left + 1.39, 2.0))
    badge(ax, left + 1.21, 2.27, "2")
    down, up, middle = left + 0.95, left + 1.85, 3.825
    arrow(ax, (down, 4.45), (down, 3.2))
    arrow(ax, (up, 3.2), (up, 4.45))
    badge(ax, down, middle, "1")
    badge(ax, up, middle, "3")
    note(ax, (down - 0.24, middle), r"$B,\,A$", CLAIM, "right")
    note(ax, (up + 0.24, middle), f"$B_{number},\\,A_{number}$", CLAIM, "left")


def card(width: float, height: float) -> tuple[Figure, Axes]:
    """A white card with round corners on a transparent page, so that it reads on dark pages too."""
    figure = Figure(figsize=(width, height), facecolor="none")
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    ax.set_axis_off()
    panel(ax, (0.05, 0.05), (width - 0.1, height - 0.1), WHITE, "#d0d0d0")
    return figure, ax


def panel(
    ax: Axes, corner: tuple[float, float], size: tuple[float, float], fill: str, edge: str
) -> None:
    shape = "round,pad=0,rounding_size=0.14"
    look: Look = {"facecolor": fill, "edgecolor": edge, "linewidth": 1.2}
    ax.add_patch(FancyBboxPatch(corner, *size, boxstyle=shape, **look))


def title(ax: Axes, y: float, text: str) -> None:
    ax.text(5, y, text, fontsize=15, fontweight="bold", color=INK, ha="center", va="center")


def note(
    ax: Axes,
    at: tuple[float, float],
    text: str,
    look: Look = PLAIN,
    align: str = "center",
) -> None:
    """One line of text; its small letters, not its box, stand centred on the height given."""
    x, y = at
    ax.text(x, y - 0.0048 * look["fontsize"], text, ha=align, va="baseline", **look)


def matrix(
    ax: Axes, corner: tuple[float, float], size: tuple[float, float], fill: str, name: str
) -> None:
    look: Look = {"facecolor": fill, "edgecolor": INK, "linewidth": 1.1}
    ax.add_patch(Rectangle(corner, *size, **look))
    x, y = corner[0] + size[0] / 2, corner[1] + size[1] / 2
    ink = WHITE if fill == BLUE else INK
    ax.text(x, y, name, fontsize=17, color=ink, ha="center", va="center", fontweight="bold")


def vector(ax: Axes, x: float, low: float, length: float, name: str) -> None:
    matrix(ax, (x, low), (0.28, length), WHITE, "")
    ax.text(x + 0.14, low + length / 2, name, fontsize=15, ha="center", va="center", color=INK)


def factors(ax: Axes, left: float, middle: float, side: float) -> None:
    """A small B A: a tall strip and a flat one."""
    thin = 0.13
    matrix(ax, (left, middle - side / 2), (thin, side), ORANGE, "")
    matrix(ax, (left + thin + 0.05, middle - thin / 2), (side - thin, thin), BLUE, "")


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    look: Look = {
        "arrowstyle": "-|>,head_width=0.28,head_length=0.5",
        "linewidth": 1.8,
        "color": INK,
    }
    look |= {"shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops=look)


def badge(ax: Axes, x: float, y: float, number: str) -> None:
    ax.add_patch(Circle((x, y), 0.15, facecolor=INK, edgecolor=WHITE, linewidth=1.5, zorder=4))
    look: Look = {"color": WHITE, "fontweight": "bold", "fontsize": 10.5, "zorder": 5}
    ax.text(x, y - 0.053, number, ha="center", va="baseline", **look)


def lock(ax: Axes, x: float, y: float, width: float) -> None:
    """A closed padlock whose body stands at height `y`, centred on `x`."""
    body = 0.78 * width
    ring: Look = {"edgecolor": INK, "linewidth": 9 * width, "zorder": 3}
    ax.add_patch(Arc((x, y + body), 0.6 * width, 0.9 * width, theta1=0, theta2=180, **ring))
    shape = f"round,pad=0,rounding_size={0.12 * width}"
    look: Look = {"facecolor": INK, "edgecolor": INK, "linewidth": 0, "zorder": 3}
    ax.add_patch(FancyBboxPatch((x - width / 2, y), width, body, boxstyle=shape, **look))
    ax.add_patch(Circle((x, y + body / 2), 0.11 * width, facecolor=WHITE, zorder=4))


def database(ax: Axes, x: float, low: float, width: float, height: float) -> None:
    """A cylinder centred on `x`."""
    look: Look = {"facecolor": PALE, "edgecolor": INK, "linewidth": 1.1}
    flat = 0.28 * width
    ax.add_patch(Ellipse((x, low), width, flat, **look))
    ax.add_patch(Rectangle((x - width / 2, low), width, height, facecolor=PALE, linewidth=0))
    for edge in (x - width / 2, x + width / 2):
        ax.plot([edge, edge], [low, low + height], color=INK, linewidth=1.1)
    ax.add_patch(Ellipse((x, low + height), width, flat, **look))


def brace(ax: Axes, left: float, right: float, y: float) -> None:
    ax.plot([left, left, right, right], [y + 0.08, y, y, y + 0.08], color=GREY, linewidth=1.1)


if __name__ == "__main__":
    main()
