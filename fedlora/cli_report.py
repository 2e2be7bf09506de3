"""The command line of reports: of runs, or of a whole sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlora.terminal import plain_console


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories, or one sweep's folder.")
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the report.")] = None,
    rolling: Annotated[
        int, typer.Option("--rolling", min=1, help="Rounds in the rolling mean.")
    ] = 1,
    baseline: Annotated[
        str,
        typer.Option(help="Of a sweep: compare to this method or rule; else fedavg, or first."),
    ] = "",
    target: Annotated[
        float, typer.Option(help="Of a sweep: the accuracy to reach, as a share of the best one.")
    ] = 0.95,
) -> None:
    """Draw one run, compare several, or make the page of a sweep: figures, tables, statistics."""
    from fedlora.sweepdir import PLAN

    sweeps = [path for path in runs if (path / PLAN).is_file()]
    if sweeps and len(runs) > 1:
        raise ValueError(f"{sweeps[0]} is a sweep: give it alone")
    if not sweeps and (baseline or target != 0.95):
        raise ValueError("--baseline and --target belong to the report of a sweep")
    console = plain_console()
    if sweeps:
        from fedlora.sweep_report.content import Choices
        from fedlora.sweep_report.write import write_sweep_report

        paths = write_sweep_report(sweeps[0], out, Choices(rolling, baseline, target))
        figures = paths[2:]
        for path in paths[:2]:
            console.print(str(path), soft_wrap=True)
        if figures:
            folder = figures[0].parent
            console.print(f"{folder}: {len(figures)} files", soft_wrap=True)
        return
    from fedlora.report import write_report

    for path in write_report(runs, out, rolling):
        console.print(str(path), soft_wrap=True)
