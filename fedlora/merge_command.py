"""`fedlora merge` behind its arguments: text to values, then the merge, its card and its figure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from fedlora.files import write_text
from fedlora.hints import near
from fedlora.merge_card import model_card
from fedlora.merging import DTYPES, Outcome, Watch, merge_folders
from fedlora.rules import Option, get_rule

FIGURE = "spectra"


def merged(
    adapters: Sequence[Path],
    out: Path | None,
    *,
    rule: str,
    options: Sequence[str] = (),
    rank: str = "",
    weights: str = "",
    dtype: str = "float32",
    other_base: bool = False,
    report: bool = False,
    dry_run: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Merges as the command line says; `out` also gets a card and, with `report`, the figure.

    ValueError for every argument that makes no sense, before anything is read; with `dry_run` all
    is done but the writing, and `out` may be left out.
    """
    if out is None and not dry_run:
        raise ValueError("--out is missing: name the new folder to write, or say --dry-run")
    if out is not None and out.exists():
        raise ValueError(f"{out} exists already; nothing was written: name another folder")
    if dtype not in DTYPES:
        raise ValueError(
            f"unknown dtype {dtype!r}{near(dtype, DTYPES)}; known: {', '.join(DTYPES)}"
        )
    _check_distinct(adapters)
    chosen = get_rule(rule, **dict(_option(text) for text in options))
    if report and not dry_run:
        _check_can_draw()

    def finish(folder: Path, outcome: Outcome) -> None:
        figure = f"{FIGURE}.png" if report else ""
        write_text(folder / "README.md", model_card(outcome, figure=figure))
        if report:
            from fedlora.canvas import save_figure
            from fedlora.spectra import draw_spectra

            drawn = draw_spectra(outcome)
            for kind in ("png", "svg"):
                save_figure(drawn, folder / f"{FIGURE}.{kind}")

    with _one_thread(), _progress(console) as watch:
        return merge_folders(
            adapters,
            chosen,
            None if dry_run else out,
            rank=rank or None,
            weights=_weights(weights) if weights else None,
            dtype=DTYPES[dtype],
            other_base=other_base,
            finish=finish,
            watch=watch,
        )


def _check_distinct(adapters: Sequence[Path]) -> None:
    """ValueError where one folder is given twice, under whatever names."""
    seen: dict[Path, Path] = {}
    for folder in adapters:
        first = seen.setdefault(folder.resolve(), folder)
        if first is not folder:
            same = "" if first == folder else f" (as {first} before)"
            raise ValueError(
                f"adapter {folder} is given twice{same}: name each folder once, and say with "
                "--weights how much it counts"
            )


def _option(text: str) -> tuple[str, Option]:
    """`key=value` with the value read as JSON where it is some, else as text."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--option {text!r} is not of the form KEY=VALUE")
    try:
        found = json.loads(value)
    except json.JSONDecodeError:
        found = value.strip()
    if isinstance(found, list | dict):
        raise ValueError(f"--option {text!r}: a rule's option is a number, a text, true or false")
    return key.strip(), found


def _weights(text: str) -> list[float]:
    parts = [part.strip() for part in text.split(",")]
    try:
        return [float(part) for part in parts]
    except ValueError:
        raise ValueError(
            f"--weights {text!r} is no list of numbers: write one per adapter, as 3,1,1"
        ) from None


def _check_can_draw() -> None:
    from fedlora.canvas import new_figure

    try:
        new_figure(1.0, 1.0)
    except ImportError as error:
        raise ValueError(f"--report: {error}") from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Two threads of a linear algebra library on shared cores are slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress(console: Console | None) -> Iterator[Watch | None]:
    """A bar over the layers on a terminal, nothing elsewhere."""
    if console is None or not console.is_terminal:
        yield None
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("merging layers", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
