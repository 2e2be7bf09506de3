"""Memory and time as clients grow: one base model for all, one adapter more per client.

    python benchmarks/clients.py [--clients 2 20 100]

Each number of clients runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", nargs="+", type=int, default=[2, 20, 100])
    args = parser.parse_args()
    print("| clients | peak memory, MB | over the first, MB a client | merge, s a round |")
    print("|---|---|---|---|")
    first: tuple[int, float] | None = None
    for clients in args.clients:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            sets = {
                "run.out": out,
                "run.rounds": 2,
                "run.threads": 1,
                "partition.clients": clients,
                "client.steps": 1,
                "client.batch": 8,
                "evaluate.clients": "false",
                "evaluate.every": 100,
                "evaluate.limit": 50,
            }
            words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
            command = [sys.executable, "-m", "fedlora", "demo", *words]
            subprocess.run(command, check=True, capture_output=True)
            summary = json.loads((out / "summary.json").read_text())
        peak = summary["peak_memory_bytes"] / 1e6
        first = first or (clients, peak)
        grown = (peak - first[1]) / (clients - first[0]) if clients > first[0] else 0.0
        merge = summary["seconds"]["aggregate"] / summary["rounds"]
        print(f"| {clients} | {peak:.0f} | {grown:.2f} | {merge:.3f} |", flush=True)


if __name__ == "__main__":
    main()
