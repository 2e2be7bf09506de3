"""The server's half of a round as clients grow: seconds and memory.

    python benchmarks/aggregate.py [--clients 10 100 1000] [--rules fra fedavg fedex rolora]
    python benchmarks/aggregate.py --shelf

Twelve layers of 64 x 96, rank 4, and a head; with `--shelf` two layers of 2048 x 2048, rank 16,
whose replies wait on disk as `run.replies_mb` lets them (1 MB a client). Every case in a process of
its own. Memory is what the process has for itself: pages of files that the system may drop at any
time do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Event, Thread
from time import perf_counter

import torch

from fedlora.adapter import Adapter, ClientResult, Factors, flatten, overlay
from fedlora.rules import get_rule
from fedlora.server import ServerState, aggregate
from fedlora.shelf import on_disk

TOY, LARGE = (64, 96, 4, 12), (2048, 2048, 16, 2)  # m, n, r, layers


def adapter(seed: int, size: tuple[int, int, int, int]) -> Adapter:
    m, n, r, layers = size
    stream = torch.Generator().manual_seed(seed)
    made = {
        f"layer{index}": Factors(
            torch.randn(r, n, generator=stream), torch.randn(m, r, generator=stream), 2.0
        )
        for index in range(layers)
    }
    return Adapter(made, {"head": torch.randn(2, n, generator=stream)})


def own_memory() -> int:
    """Bytes that this process has for itself (Linux), without pages of files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


class Peak(Thread):
    """The most that `own_memory` said, looked at every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.over = own_memory(), Event()

    def run(self) -> None:
        while not self.over.wait(0.002):
            self.most = max(self.most, own_memory())


def measured(rule: str, clients: int, shelf: bool) -> dict[str, float]:
    torch.set_num_threads(1)
    size = LARGE if shelf else TOY
    state = ServerState(adapter(0, size))
    with tempfile.TemporaryDirectory() as folder:

        def result(number: int) -> ClientResult:
            sent = adapter(number + 1, size)
            if shelf:
                sent = overlay(on_disk(flatten(sent), Path(folder)), state.adapter)
            return ClientResult(f"c{number:05d}", sent, 10)

        empty, peak = own_memory(), Peak()
        results = [result(number) for number in range(clients)]
        replies, peak.most = own_memory() - empty, own_memory()
        peak.start()
        before, began = own_memory(), perf_counter()
        aggregate(get_rule(rule), state, results, 1)
        seconds = perf_counter() - began
        peak.over.set()
    return {"seconds": seconds, "replies": replies / 1e6, "extra": (peak.most - before) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", nargs="+", type=int, default=[10, 100, 1000])
    parser.add_argument("--rules", nargs="+", default=["fra", "fedavg", "fedex", "raflora"])
    parser.add_argument("--shelf", action="store_true", help="replies that wait on disk")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        rule, _, clients = args.case.partition(":")
        print(json.dumps(measured(rule, int(clients), args.shelf)))
        return
    print("| rule | clients | seconds a round | memory of the replies, MB | of the merge, MB |")
    print("|---|---|---|---|---|")
    shelf = ["--shelf"] if args.shelf else []
    for rule in args.rules:
        for clients in args.clients:
            done = subprocess.run(
                [sys.executable, __file__, "--case", f"{rule}:{clients}", *shelf],
                check=True, capture_output=True, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            found = json.loads(done.stdout)
            cells = f"{found['seconds']:.3f} | {found['replies']:.0f} | {found['extra']:.0f}"
            print(f"| {rule} | {clients} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
