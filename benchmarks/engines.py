"""The same tiny federation in one process and on Flower: rounds a second, memory, bytes on the
wire.

    python benchmarks/engines.py [--rounds 20]

"strategy" is Flower's own strategy loop with its messages handed over in one process, "simulation"
its own simulation with all its processes (start-up included and given apart). Bytes are those of
encoded messages, beside the arrays' own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def config(folder: Path, rounds: int):
    from fedlora.config import load_config

    sets = {
        "run.out": folder / "run", "run.rounds": rounds, "run.threads": 1, "client.steps": 1,
        "client.batch": 4, "evaluate.every": 10_000, "evaluate.limit": 20,
        "evaluate.clients": "false", "data.holdout": 0,
    }  # fmt: skip
    words = [f"{key}={value}" for key, value in sets.items()]
    return load_config(ROOT / "fedlora" / "demo.toml", words)


def measured(engine: str, rounds: int) -> dict[str, float]:
    """One engine in this process; what it says of itself."""
    sys.path.insert(0, str(ROOT / "tests"))
    with tempfile.TemporaryDirectory() as name:
        settings = config(Path(name), rounds)
        began, wire, arrays = time.perf_counter(), 0, 1
        if engine == "plain":
            from fedlora.run import execute, prepare

            execute(prepare(settings))
        elif engine == "strategy":
            from flower_grid import LocalGrid

            from fedlora.flower.app import client
            from fedlora.flower.serving import serve

            class Counting(LocalGrid):
                def send_and_receive(self, messages, *, timeout=None):
                    messages = list(messages)
                    replies = list(super().send_and_receive(messages, timeout=timeout))
                    nonlocal wire, arrays
                    for message in [*messages, *replies]:
                        record = message.content.array_records.get("arrays")
                        if record is not None and message.metadata.message_type == "train":
                            wire += size(message.content)
                            arrays += sum(a.numpy().nbytes for a in record.values())
                    return replies

            nodes = [{"partition-id": number} for number in range(3)]
            serve(Counting(client, settings.flat(), nodes), settings.flat())
        else:
            from fedlora.flower.engine import run_on_flower

            run_on_flower(settings)
        total = time.perf_counter() - began
        log = [json.loads(line) for line in (Path(name) / "run/metrics.jsonl").open()]
        spent = sum(record["seconds"]["total"] for record in log[1:])
        from fedlora.records import peak_memory

        summary = json.loads((Path(name) / "run/summary.json").read_text())
        peak = max(peak_memory(), summary["peak_memory_bytes"])
    return {"rounds": rounds / spent, "start": total - spent, "peak": peak / 1e6,
            "overhead": wire / arrays - 1}  # fmt: skip


def size(record) -> int:
    """Bytes of a record as Flower sends it: every object with its children."""
    return len(record.deflate()) + sum(map(size, (record.children or {}).values()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", choices=["plain", "strategy", "simulation"])
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measured(args.only, args.rounds)))
        return
    print("| engine | rounds a second | start and end, s | peak memory of the server, MB | wire |")
    print("|---|---|---|---|---|")
    for engine in ("plain", "strategy", "simulation"):
        command = [sys.executable, __file__, "--rounds", str(args.rounds), "--only", engine]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])
        wire = f"{found['overhead']:+.2%}" if engine == "strategy" else ""
        figures = f"{found['rounds']:.2f} | {found['start']:.0f} | {found['peak']:.0f}"
        print(f"| {engine} | {figures} | {wire} |", flush=True)


if __name__ == "__main__":
    main()
