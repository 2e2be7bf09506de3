"""What a report is made of: sections of words, tables and pictures, before they become a page.

The page and the Markdown file are two ways to write the same sections down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from fedlora.canvas import Axes, Style


@dataclass(frozen=True)
class Words:
    """A paragraph, or a list where there are several."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table of cells as written; the first `texts` columns are words, the others numbers."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    texts: int = 1


@dataclass(frozen=True, eq=False)
class Panel:
    """One pair of axes: what is drawn into it, under which title."""

    title: str
    draw: Callable[[Axes], None]


@dataclass(frozen=True, eq=False)
class Picture:
    """Panels with one legend; `slug` names its files, sizes are inches of one panel, `columns` how
    many stand beside each other at most.
    """

    slug: str
    title: str
    caption: str
    panels: Sequence[Panel]
    legend: Sequence[tuple[str, Style]] = ()
    width: float = 4.2
    height: float = 3.0
    columns: int = 3


@dataclass(frozen=True, eq=False)
class Section:
    """A heading with what stands under it; sections inside it come last."""

    title: str
    blocks: Sequence[Block] = ()
    sections: Sequence[Section] = field(default_factory=tuple)


Block: TypeAlias = Words | Table | Picture


@dataclass(frozen=True, eq=False)
class Report:
    """A whole report; `command` is what makes it and its figures again."""

    title: str
    summary: Sequence[str]
    sections: Sequence[Section]
    command: str


@dataclass(frozen=True)
class Choices:
    """What the reader of a sweep chooses: smoothing, whom to compare to, the target's share."""

    rolling: int = 1
    baseline: str = ""
    target: float = 0.95


def seeds(number: int) -> str:
    """`1 seed`, `5 seeds`."""
    return f"{number} seed{'' if number == 1 else 's'}"


def seed_span(numbers: Sequence[int]) -> str:
    """The numbers of seeds that methods have: `5 seeds`, or `3 to 5 seeds`."""
    if not numbers:
        return "no seed"
    low, high = min(numbers), max(numbers)
    return seeds(high) if low == high else f"{low} to {high} seeds"
