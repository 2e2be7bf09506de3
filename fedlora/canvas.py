"""Sheets to draw on: one place for matplotlib, colours, and files that come out the same.

Never touches pyplot's global state; matplotlib is imported when a sheet is made.
"""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import Any, TypeAlias

from fedlora.files import write_bytes

Axes: TypeAlias = Any  # matplotlib's; imported only where something is drawn
Figure: TypeAlias = Any
Style: TypeAlias = dict[str, Any]

BLACK, GREY, LIGHT = "#1a1a1a", "#666666", "#dddddd"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # Okabe and Ito, 2008
LINES = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1.2, 1.2)), (0, (9, 2)))
MARKERS = "sD^vPXo"
HATCHES = ("", "///", "...", "xx", "\\\\\\", "++")


def new_figure(width: float, height: float) -> Figure:
    """An empty white sheet in inches; ImportError names the extra where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Sheet
    except ImportError as error:
        raise ImportError(
            f"figures need matplotlib ({error}); run: pip install 'fedlora[report]'"
        ) from error
    figure = Sheet(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def tidy(ax: Axes) -> None:
    """The common look of a panel: light grid behind, two spines."""
    ax.grid(color=LIGHT, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(labelsize=9.5, color=GREY, labelcolor=BLACK)


def line_style(index: int) -> Style:
    """The look of line `index`: colour, dashes and marker each tell it apart, also in grey."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
        "linewidth": 1.7,
        "markersize": 5,
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
    }


def short(text: str, room: int) -> str:
    """`text` cut to `room` characters; a dollar sign would start a formula in matplotlib."""
    return (text if len(text) <= room else text[: room - 1] + "…").replace("$", r"\$")


def wrapped(text: str, room: int) -> str:
    """`text` on one line or two of at most `room` characters, cut where that is not enough."""
    first, *rest = textwrap.wrap(text, room) or [""]
    return "\n".join(short(line, room) for line in [first, " ".join(rest)] if line)


def render(figure: Figure, kind: str) -> bytes:
    """The figure as `png` (150 dpi) or `svg`: same figure, same bytes."""
    import matplotlib

    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}[kind]
    with matplotlib.rc_context({"svg.hashsalt": "fedlora"}), io.BytesIO() as stream:
        figure.savefig(stream, format=kind, dpi=150, metadata=metadata)
        return stream.getvalue()


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a .png or .svg, whole or not at all; ValueError for another ending."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ValueError(f"{path}: a figure is written as .png or .svg")
    write_bytes(path, render(figure, kind))


def draw_partition(counts: dict[str, list[int]], labels: list[str]) -> Figure:
    """Who holds which labels: one bar a client, one stacked piece a label, in rows."""
    clients = list(counts)
    figure = new_figure(8.0, 1.6 + 0.36 * len(clients))
    height = figure.get_figheight()
    ax = figure.add_axes((0.16, 0.7 / height, 0.8, 1 - 1.4 / height))
    tidy(ax)
    ax.grid(visible=False, axis="y")
    places, left = range(len(clients)), [0] * len(clients)
    for index, label in enumerate(labels):
        rows = [counts[client][index] for client in clients]
        style = {"color": COLOURS[index % len(COLOURS)], "edgecolor": "white", "linewidth": 0.8}
        hatch = HATCHES[index % len(HATCHES)]
        ax.barh(places, rows, left=left, height=0.72, label=label, hatch=hatch, **style)
        left = [start + count for start, count in zip(left, rows, strict=True)]
    ax.set_yticks(places, clients)
    ax.invert_yaxis()
    ax.set_xlabel("rows", fontsize=9.5, color=GREY)
    ax.set_ylabel("client", fontsize=9.5, color=GREY)
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "ncols": min(len(labels), 6)}
    ax.legend(frameon=False, fontsize=9.5, **place)
    return figure
