"""The server's half of a round as clients grow: seconds and memory, toy adapters.

    python benchmarks/aggregate.py [--clients 10 100 1000] [--rules fra fedavg fedex rolora]

Twelve layers of 64 x 96, rank 4, and a head; every case in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from time import perf_counter

import torch

from fedlora.adapter import Adapter, ClientResult, Factors
from fedlora.records import peak_memory
from fedlora.rules import get_rule
from fedlora.server import ServerState, aggregate

M, N, R, LAYERS = 64, 96, 4, 12


def adapter(seed: int) -> Adapter:
    stream = torch.Generator().manual_seed(seed)
    layers = {
        f"layer{index}": Factors(
            torch.randn(R, N, generator=stream), torch.randn(M, R, generator=stream), 2.0
        )
        for index in range(LAYERS)
    }
    return Adapter(layers, {"head": torch.randn(2, N, generator=stream)})


def measured(rule: str, clients: int) -> dict[str, float]:
    torch.set_num_threads(1)
    state = ServerState(adapter(0))
    results = [ClientResult(f"c{k:05d}", adapter(k + 1), 10) for k in range(clients)]
    before = peak_memory()
    began = perf_counter()
    aggregate(get_rule(rule), state, results, 1)
    return {"seconds": perf_counter() - began, "extra": (peak_memory() - before) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", nargs="+", type=int, default=[10, 100, 1000])
    parser.add_argument("--rules", nargs="+", default=["fra", "fedavg", "fedex", "raflora"])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        rule, _, clients = args.case.partition(":")
        print(json.dumps(measured(rule, int(clients))))
        return
    print("| rule | clients | seconds a round | extra memory, MB |")
    print("|---|---|---|---|")
    for rule in args.rules:
        for clients in args.clients:
            done = subprocess.run(
                [sys.executable, __file__, "--case", f"{rule}:{clients}"],
                check=True, capture_output=True, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            found = json.loads(done.stdout)
            cells = f"{found['seconds']:.3f} | {found['extra']:.0f}"
            print(f"| {rule} | {clients} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
