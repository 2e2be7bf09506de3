"""What a checkpoint costs: writing it and the round's line of the log, beside the round itself.

    python benchmarks/checkpoint.py [KEY=VALUE...]

Runs the built-in demo, with settings changed if wanted, and times both inside it: each is written,
synced to the disk (file and folder), renamed, and the checkpoint before the last removed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from importlib import resources
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from fedlora import recording
from fedlora.config import load_config
from fedlora.run import execute, prepare


def timed(work: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        began = perf_counter()
        try:
            return work(*arguments)
        finally:
            spent.append(perf_counter() - began)

    return run


def main() -> None:
    lines: list[float] = []
    checkpoints: list[float] = []
    ends: list[float] = []
    sizes: list[int] = []

    def watch(event: str, facts: Any) -> None:
        if event == "round":
            ends.append(perf_counter())
            sizes.extend(path.stat().st_size for path in sorted(run.glob("checkpoints/*"))[-1:])

    Path("runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="runs") as folder:  # on the disk where runs are
        run = Path(folder) / "demo"
        recording.append_record = timed(recording.append_record, lines)
        recording.save_checkpoint = timed(recording.save_checkpoint, checkpoints)
        with resources.as_file(resources.files("fedlora") / "demo.toml") as path:
            execute(prepare(load_config(path, [f"run.out={run}", *sys.argv[1:]])), watch)
    rounds = [after - before for before, after in pairwise(ends)]
    print("| round | seconds | line of the log, ms | checkpoint, ms | size, kB | share |")
    print("|---|---|---|---|---|---|")
    shares = []
    for number, (whole, line, checkpoint, size) in enumerate(
        zip(rounds, lines[1:], checkpoints, sizes, strict=True), 1
    ):  # the start's line, round 0, is not of a round
        shares.append((line + checkpoint) / whole)
        cells = f"{1e3 * line:.1f} | {1e3 * checkpoint:.1f} | {size / 1e3:,.0f}"
        print(f"| {number} | {whole:.1f} | {cells} | {shares[-1]:.3%} |")
    print(f"\nmedian {median(shares):.3%}, worst {max(shares):.3%}")


if __name__ == "__main__":
    main()
