"""Local training beside transformers.Trainer + PEFT: same model, data, batch, steps and precision.

    python benchmarks/throughput.py [--data train.tsv] [--rows 1800] [--repeats 5]

One epoch each. Runs are interleaved in one process with one thread; the table gives the median of
the ratios, by wall-clock and by processor time (the steadier of the two where cores are shared).
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from fedlora.adapter import ClientState
from fedlora.client import make_fit
from fedlora.config import make_config
from fedlora.data import read_silos, tokenised
from fedlora.model import load_model, read_adapter, train_only, write_adapter
from fedlora.rules import Plan

ALL = frozenset({"A", "B", "head"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", default="builtin:reviews", help="training file, or the built-in")
    parser.add_argument("--rows", type=int, default=1800, help="a tenth is held out of training")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")

    config = make_config(
        {
            "data.train": args.data,
            "data.limit": args.rows,
            "partition.clients": 1,
            "client.epochs": 1.0,
            "client.batch": args.batch,
            "run.rounds": 1,
            "run.device": "cpu",
            "evaluate.clients": False,
        }
    )
    silos = read_silos(config)
    model = load_model(config.model, silos.labels, device="cpu")
    data = tokenised(config, silos, model.tokenizer)
    start = read_adapter(model)
    (client,) = data.rows
    rows = data.rows[client]
    steps = math.ceil(len(rows) / args.batch)
    dataset = [
        {name: values[row].tolist() for name, values in data.train.inputs.items()}
        | {"labels": int(data.train.labels[row])}
        for row in rows
    ]

    def fedlora(repeat: int) -> None:
        seeded = replace(config, run=replace(config.run, seed=repeat))
        make_fit(model, data, seeded)(client, 1, Plan(ALL, ALL, ALL), start, ClientState())

    def trainer(strategy: str) -> Callable[[int], None]:
        def run(repeat: int) -> None:
            write_adapter(model, start)
            train_only(model, ALL)
            with tempfile.TemporaryDirectory() as folder:
                Trainer(
                    model=model.network,
                    args=TrainingArguments(
                        output_dir=folder,
                        per_device_train_batch_size=args.batch,
                        max_steps=steps,
                        learning_rate=config.client.lr,
                        max_grad_norm=config.client.clip,
                        train_sampling_strategy=strategy,
                        logging_strategy="no",
                        save_strategy="no",
                        report_to="none",
                        use_cpu=True,
                        disable_tqdm=True,
                        seed=repeat,
                    ),
                    train_dataset=dataset,
                    data_collator=DataCollatorWithPadding(model.tokenizer),
                ).train()

        return run

    contestants = {
        "fedlora": fedlora,
        "Trainer": trainer("random"),
        "Trainer, group_by_length": trainer("group_by_length"),
    }
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(args.repeats + 1):
        for name, run in contestants.items():
            began = time.perf_counter(), time.process_time()
            run(repeat)
            if repeat:  # the first round of all warms up
                wall[name].append(time.perf_counter() - began[0])
                cpu[name].append(time.process_time() - began[1])

    print(f"{args.data}, {len(rows)} rows, batch {args.batch}, {steps} steps, one thread")
    print("| training loop | examples / s | fedlora's speed-up, wall | processor time |")
    print("|---|---|---|---|")
    for name in contestants:
        rate = len(rows) / statistics.median(wall[name])
        ratios = [
            statistics.median(a / b for a, b in zip(times[name], times["fedlora"], strict=True))
            for times in (wall, cpu)
        ]
        print(f"| {name} | {rate:.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
