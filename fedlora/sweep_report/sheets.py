"""Pictures as files and as parts of a page: a sheet of panels, or each panel as an SVG of its own.

The SVG in a page takes its colours of text, axes and ground from the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from typing import Any

from fedlora.canvas import BLACK, GREY, LIGHT, Axes, Figure, Style, new_figure, short, tidy
from fedlora.sweep_report.content import Panel, Picture

PAGE_COLOURS = {
    BLACK: "currentColor", "#000000": "currentColor", GREY: "var(--soft)", LIGHT: "var(--line)",
    "#ffffff": "var(--ground)",
}  # fmt: skip
PLACES = re.compile(r'\b(?:d|x|y)="[^"]*"')
DECIMALS = re.compile(r"(\.\d\d)\d+")
ID = re.compile(r'(\bid="|url\(#|href="#)')


def draw_sheet(picture: Picture) -> Figure:
    """All panels of a picture on one white sheet, its title on top, its legend below."""
    columns = min(picture.columns, len(picture.panels)) or 1
    rows = -(-len(picture.panels) // columns)
    entries = len(picture.legend)
    width = max(columns * picture.width, 6.0)
    across = _legend_columns(picture.legend, width)
    below = 0.24 * -(-entries // across) + 0.1 if entries else 0.0
    height = rows * (picture.height + 0.25) + 0.45
    figure = new_figure(width, height + below)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    figure.get_layout_engine().set(
        rect=(0, below / (height + below), 1, 1 - (below + 0.4) / (height + below))
    )
    look = {"fontsize": 14, "fontweight": "bold", "color": BLACK, "va": "top"}
    figure.text(0.012, 1 - 0.1 / (height + below), short(picture.title, 80), **look)
    for place, panel in enumerate(picture.panels):
        ax = figure.add_subplot(rows, columns, place + 1)
        _fill(ax, panel)
        title = short(" ".join(panel.title.split()), 36)
        ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=BLACK)
    if entries:
        handles = [_handle(name, style) for name, style in picture.legend]
        corner = {"loc": "lower left", "bbox_to_anchor": (0.005, 0.0), "ncols": across}
        figure.legend(handles=handles, frameon=False, fontsize=9.5, labelcolor=BLACK, **corner)
    return figure


def panel_svg(picture: Picture, place: int) -> str:
    """One panel as an SVG element for a page: scalable, named, its ids its own."""
    panel = picture.panels[place]
    figure = new_figure(picture.width, picture.height)
    figure.set_layout_engine("constrained", w_pad=0.04, h_pad=0.04)
    _fill(figure.add_subplot(1, 1, 1), panel)
    return inline_svg(figure, f"{picture.slug}-{place}", f"{picture.title}: {panel.title}")


def sample_svg(style: Style, prefix: str) -> str:
    """The look of a legend's entry as a small SVG element; said by the words beside it."""
    return inline_svg(_sample(tuple(sorted(style.items(), key=lambda pair: pair[0]))), prefix, "")


def inline_svg(figure: Figure, prefix: str, label: str) -> str:
    """The figure as an SVG element whose text, axes and ground follow the page's colours.

    `prefix` goes before every id, so that figures of one page cannot mix theirs up.
    """
    import matplotlib

    figure.patch.set_alpha(0)
    for ax in figure.axes:
        ax.patch.set_alpha(0)
    options = {"svg.fonttype": "none", "svg.hashsalt": "fedlora"}
    with matplotlib.rc_context(options), io.StringIO() as stream:
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
        text = stream.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    for colour, name in PAGE_COLOURS.items():
        text = text.replace(colour, name)
    text = PLACES.sub(lambda found: DECIMALS.sub(r"\1", found[0]), text)  # a third of the size
    text = ID.sub(lambda found: f"{found[1]}{prefix}-", text)
    box = re.search(r'viewBox="[^"]*"', text)
    head = box[0] if box else ""
    said = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
    title = f"<title>{escape(label)}</title>" if label else ""
    return re.sub(r"<svg[^>]*>", lambda _: f"<svg {head} {said}>{title}", text, count=1)


def _fill(ax: Axes, panel: Panel) -> None:
    tidy(ax)
    ax.tick_params(labelsize=9)
    panel.draw(ax)


def _handle(name: str, style: Style) -> Any:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    label = short(" ".join(name.split()), 40)
    label = f" {label}" if label.startswith("_") else label  # matplotlib hides such names
    return Patch(label=label, **style) if "hatch" in style else Line2D([], [], label=label, **style)


def _legend_columns(legend: Sequence[tuple[str, Style]], width: float) -> int:
    longest = max((min(len(name), 40) for name, _ in legend), default=1)
    return max(1, min(len(legend) or 1, int(width / (0.6 + 0.085 * longest))))


@lru_cache(maxsize=64)
def _sample(look: tuple[tuple[str, Any], ...]) -> Figure:
    """A small figure of one line with its marker, or of one filled box."""
    from matplotlib.patches import Rectangle

    style = dict(look)
    figure = new_figure(0.42, 0.17)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    if "hatch" in style:
        ax.add_patch(Rectangle((0.15, 0.1), 0.7, 0.8, **style))
    else:
        ax.plot([0.06, 0.5, 0.94], [0.5] * 3, **(style | {"markevery": [1]}))
    return figure
