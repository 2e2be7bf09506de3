"""The same tiny federation on four engines: rounds a second, memory, bytes on the wire.

    python benchmarks/engines.py [--rounds 20] [--deployed 4] [--engines plain deployment]

Three clients, the demo's MiniLM and adapter, one step of four rows a client and round. "plain" is
fedlora's own loop; "strategy" Flower's strategy loop with its messages handed over in one process;
"simulation" Flower's own; "deployment" a SuperLink and three SuperNodes as processes on 127.0.0.1,
without TLS (fewer rounds: each message there starts a process). Rounds a second are those of the
median round; the last one, which evaluates on all there is, does not count. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from processes import Watch, ended_with_this

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("plain", "strategy", "simulation", "deployment")
CLIENTS, LOG = 3, "run/metrics.jsonl"


def config(folder: Path, rounds: int):
    from fedlora.config import load_config

    sets = {
        "run.out": folder / "run", "run.rounds": rounds, "run.threads": 1, "client.steps": 1,
        "client.batch": 4, "evaluate.every": 10_000, "evaluate.limit": 20,
        "evaluate.clients": "false", "data.holdout": 0,
    }  # fmt: skip
    words = [f"{key}={value}" for key, value in sets.items()]
    return load_config(ROOT / "fedlora" / "demo.toml", words)


def measured(engine: str, rounds: int, folder: Path) -> dict[str, Any]:
    """One engine, started by this process; what it says of itself, and the bytes where counted."""
    settings, wire = config(folder, rounds), {}
    began = time.perf_counter()
    if engine == "plain":
        from fedlora.run import execute, prepare

        execute(prepare(settings))
    elif engine == "strategy":
        wire = messages(settings)
    elif engine == "simulation":
        from fedlora.flower.engine import run_on_flower

        run_on_flower(settings)
    else:
        from loopback import run_on_loopback

        wire = run_on_loopback(settings, folder, CLIENTS)
    total = time.perf_counter() - began
    log = [json.loads(line) for line in (folder / LOG).open()]
    summary = json.loads((folder / "run/summary.json").read_text())
    spent = [record["seconds"]["total"] for record in log[1:]]
    arrays = {way: summary[f"bytes_{way}_total"] for way in ("down", "up")}
    return {"rounds": 1 / median(spent[:-1]), "start": total - sum(spent), "wire": wire,
            "server": summary["peak_memory_bytes"], "arrays": arrays}  # fmt: skip


def messages(settings: Any) -> dict[str, float]:
    """Runs Flower's strategy loop; bytes of encoded messages over those of their arrays, less 1."""
    sys.path.insert(0, str(ROOT / "tests"))
    from flower_grid import LocalGrid

    from fedlora.flower.app import client
    from fedlora.flower.serving import serve

    overheads: dict[str, list[float]] = {"down": [], "up": []}
    parts: list[int] = []

    class Counting(LocalGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            messages = list(messages)
            replies = list(super().send_and_receive(messages, timeout=timeout))
            for way, sent in (("down", messages), ("up", replies)):
                for message in sent:
                    if message.metadata.message_type == "train":
                        sizes = {name: len(data) for name, data in objects(message.content)}
                        record = message.content.array_records["arrays"]
                        numbers = sum(len(array.data) for array in record.values())
                        overheads[way].append(sum(sizes.values()) / numbers - 1)
                        parts.append(len(sizes))
            return replies

    nodes = [{"partition-id": number} for number in range(CLIENTS)]
    serve(Counting(client, settings.flat(), nodes), settings.flat())
    worst = {way: max(found) for way, found in overheads.items()}
    return worst | {"first": overheads["down"][0], "parts": max(parts)}


def objects(record: Any) -> Iterator[tuple[str, bytes]]:
    """What Flower sends of a record, by its hash: it sends what is there twice once."""
    yield record.object_id, record.deflate()
    for child in (record.children or {}).values():
        yield from objects(child)


def run(engine: str, rounds: int) -> dict[str, Any]:
    """One engine in a process of its own, and what it and all that it starts use."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--only", engine, "--rounds", str(rounds), folder]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env)
        # who starts a deployment takes no memory of it
        alone = engine == "deployment"
        with Watch(process.pid, Path(folder) / LOG, without_root=alone) as watch:
            told, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{engine} failed: {errors[-3000:]}")
    found = json.loads(told.splitlines()[-1])
    return found | {"all": watch.peak, "count": watch.count, "spent": watch.seconds_a_line(rounds)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--deployed", type=int, default=4, help="rounds of the deployment")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--only", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("folder", nargs="?", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with ended_with_this():
        if args.only:
            print(json.dumps(measured(args.only, args.rounds, args.folder)))
        else:
            compare(args)


def compare(args: argparse.Namespace) -> None:
    columns = [
        "engine", "rounds", "rounds a second", "processor time a round, s", "start and end, s",
        "processes", "peak memory of all together, MB", "of the server's process alone, MB",
    ]  # fmt: skip
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    found = {}
    for engine in args.engines:
        rounds = args.deployed if engine == "deployment" else args.rounds
        one = found[engine] = run(engine, rounds)
        times = f"{one['rounds']:.2f} | {one['spent']:.1f} | {one['start']:.0f}"
        memory = f"{one['count']} | {one['all'] / 1e6:,.0f} | {one['server'] / 1e6:,.0f}"
        print(f"| {engine} | {rounds} | {times} | {memory} |", flush=True)
    print("\n| bytes beyond the adapter's | first message down | later ones down | up |")
    print("|---|---|---|---|")
    if wire := found.get("strategy", {}).get("wire"):
        cells = f"{wire['first']:+.2%} | {wire['down']:+.2%} | {wire['up']:+.2%}"
        print(f"| messages, {wire['parts']} parts | {cells} |")
    if deployed := found.get("deployment"):
        through = {
            way: deployed["wire"][way] / sent - 1 for way, sent in deployed["arrays"].items()
        }
        print(f"| connections | | {through['down']:+.1%} | {through['up']:+.1%} |")


if __name__ == "__main__":
    main()
