"""What the federation machinery costs: all that is not forward, backward, step or evaluation.

    python benchmarks/overhead.py [RUN...]

Reads the seconds that every run logs about itself, from the start of round 1 to the end of the
last; without arguments it runs the built-in demo first.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib import resources
from pathlib import Path

from fedlora.config import load_config
from fedlora.run import execute, prepare

PARTS = ("compute", "evaluate", "aggregate", "overhead")


def shares(run: Path) -> dict[str, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    spent = [record["seconds"] for record in records if record["round"] > 0]
    total = sum(seconds["total"] for seconds in spent)
    parts = {
        key: sum(seconds[key] for seconds in spent) / total
        for key in ("compute", "evaluate", "aggregate")
    }
    overhead = 1 - parts["compute"] - parts["evaluate"]
    return {**parts, "overhead": overhead, "seconds": total}


def main() -> None:
    runs = [Path(argument) for argument in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        if not runs:
            runs = [Path(folder) / "demo"]
            with resources.as_file(resources.files("fedlora") / "demo.toml") as path:
                execute(prepare(load_config(path, [f"run.out={runs[0]}"])))
        print("| run | seconds | compute | evaluation | merging | overhead (merging included) |")
        print("|---|---|---|---|---|---|")
        for run in runs:
            found = shares(run)
            cells = [f"{found[key]:.2%}" for key in PARTS]
            print(f"| {run.name} | {found['seconds']:.0f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
