"""The error budget of a round beside the merge that it describes: processor time, one thread.

    python benchmarks/budget.py [--rules fra fedavg ffa] [--repeats 5]

Twelve layers of 64 x 96, rank 4, and one of 4096 x 4096, rank 16; minima of interleaved repeats.
"""

from __future__ import annotations

import argparse
from time import process_time

import torch

from fedlora.adapter import Adapter, ClientResult, Factors
from fedlora.budget import round_budget
from fedlora.rules import get_rule
from fedlora.server import ServerState, aggregate

CASES = [((64, 96, 4, 12), (10, 100, 1000)), ((4096, 4096, 16, 1), (3, 10, 100))]


def moved(start: Adapter, client: int, rule: str) -> Adapter:
    stream = torch.Generator().manual_seed(client)
    layers = {}
    for name, factors in start.layers.items():
        A, B = (0.1 * torch.randn(x.shape, generator=stream) for x in (factors.A, factors.B))
        A = factors.A if rule == "ffa" else factors.A + A
        layers[name] = Factors(A, factors.B + B, factors.scaling)
    return Adapter(layers)


def measured(rule: str, size: tuple[int, int, int, int], clients: int, repeats: int) -> None:
    m, n, r, count = size
    zero = {
        f"x{index}": Factors(torch.zeros(r, n), torch.zeros(m, r), 2.0) for index in range(count)
    }
    start = moved(Adapter(zero), 0, "fra")
    got = [moved(start, client + 1, rule) for client in range(clients)]
    results = [ClientResult(f"c{k:05d}", adapter, 10) for k, adapter in enumerate(got)]
    whole, alone = [], []
    for _ in range(repeats):
        began = process_time()
        after = aggregate(get_rule(rule), ServerState(start), results, 1).adapter
        middle = process_time()
        round_budget(start, [start] * clients, got, [1 / clients] * clients, after)
        whole.append(middle - began)
        alone.append(process_time() - middle)
    budget = min(alone)
    merge = min(whole) - budget
    cells = f"{1e3 * merge:.0f} | {1e3 * budget:.0f} | {budget / merge:.2f}"
    print(f"| {count} of {m} x {n} | {rule} | {clients} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rules", nargs="+", default=["fra", "fedavg", "ffa"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| layers | rule | clients | merge, ms | budget, ms | budget / merge |")
    print("|---|---|---|---|---|---|")
    for size, counts in CASES:
        for rule in args.rules:
            for clients in counts:
                measured(rule, size, clients, args.repeats)


if __name__ == "__main__":
    main()
