"""A console for what users, files and nodes have written: printed as it is, cut nowhere."""

from __future__ import annotations

import os
import sys

from rich.console import Console

WIDE = 1000  # columns where no terminal has any: a table in a file keeps its figures


def plain_console() -> Console:
    """A console without markup or emoji, as wide as a table needs where it is no terminal."""
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE
    return Console(markup=False, emoji=False, highlight=False, width=wide)
