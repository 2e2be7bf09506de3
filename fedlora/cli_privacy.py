"""The command line of privacy: a run's statement."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora.terminal import plain_console


def privacy(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or one ledger.")],
) -> None:
    """Say what a run protects, from whom, at which epsilon, and what it does not."""
    from fedlora.privacy.statement import statement

    console = plain_console()
    for line in statement(run):
        console.print(line, soft_wrap=True)
