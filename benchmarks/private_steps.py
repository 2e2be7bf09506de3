"""What example-level privacy costs a client in time, and what taking a batch in pieces saves.

    python benchmarks/private_steps.py [--data train.tsv] [--batch 64] [--repeats 5]

Rounds of two steps, interleaved in one process with one thread; the table gives medians of the
processor time beside that of a plain step (batches of like length, clipped as a whole).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from fedlora import client
from fedlora.adapter import ClientState
from fedlora.config import make_config
from fedlora.data import read_silos, tokenised
from fedlora.model import load_model, read_adapter
from fedlora.rules import Plan

ALL = frozenset({"A", "B", "head"})
PLAIN, WHOLE = "without privacy", "private, the whole batch at once"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", default="builtin:reviews", help="training file, or the built-in")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pieces", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shared = {
        "data.train": args.data, "data.limit": 3000, "partition.clients": 1, "client.steps": 2,
        "client.batch": args.batch, "run.rounds": 1, "run.device": "cpu", "evaluate.clients": False,
    }  # fmt: skip
    private = {"privacy.unit": "example", "privacy.delta": 1e-5, "privacy.rounds": 1000}
    config = make_config(shared)
    silos = read_silos(config)
    model = load_model(config.model, silos.labels, device="cpu")
    data = tokenised(config, silos, model.tokenizer)
    start, (name,) = read_adapter(model), data.rows
    sizes = {f"private, pieces of {size}": size for size in args.pieces}
    sizes |= {WHOLE: len(data.rows[name]), PLAIN: 0}
    spent: dict[str, list[float]] = {kind: [] for kind in sizes}
    with tempfile.TemporaryDirectory() as folder:
        noised, fits = make_config(shared | private), {PLAIN: client.make_fit(model, data, config)}
        for kind, size in sizes.items():
            if size:
                client.PIECE = size
                fits[kind] = client.make_fit(model, data, noised, Path(folder))
        for repeat in range(args.repeats):
            for kind, fit in fits.items():
                began = time.process_time()
                fit(name, repeat + 1, Plan(ALL, ALL, ALL), start, ClientState())
                spent[kind].append(time.process_time() - began)
    base = statistics.median(spent[PLAIN])
    print("| step | processor time beside a plain step |\n|---|---|")
    for kind, seconds in spent.items():
        print(f"| {kind} | {statistics.median(seconds) / base:.2f} |")


if __name__ == "__main__":
    main()
