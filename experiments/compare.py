"""Compares methods on one config: a learning rate each, several seeds, paired differences.

    python experiments/compare.py experiments/sst2_balanced.toml --out runs/sst2 \
        --set data.train=train.tsv --set data.evaluate=dev.tsv

First every method runs with every rate on a tuning seed, and takes the rate with the best accuracy
on held-out training rows (never on the evaluation set). Then it runs with that rate on all seeds.
Runs that are done are recognised by their summary.json and not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REFERENCES = ("central", "local")
CHEAP = ["evaluate.clients=false", "evaluate.every=1000"]  # while tuning: the last round only
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Task:
    method: str
    rate: str
    seed: int
    folder: Path

    @property
    def done(self) -> bool:
        return (self.folder / "summary.json").is_file()

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def last_round(self) -> dict[str, Any]:
        return json.loads((self.folder / "metrics.jsonl").read_text().splitlines()[-1])

    @property
    def heldout_accuracy(self) -> float:
        scores = [client["global_heldout"] for client in self.last_round["clients"].values()]
        rows = sum(score["examples"] for score in scores)
        return sum(score["accuracy"] * score["examples"] for score in scores) / rows


def task(out: Path, method: str, rate: str, seed: int) -> Task:
    return Task(method, rate, seed, out / f"{method}-lr{rate}-seed{seed}")


def execute(config: Path, tasks: Sequence[Task], sets: Sequence[str], jobs: int) -> None:
    def run(task: Task) -> None:
        if task.done:
            return
        shutil.rmtree(task.folder, ignore_errors=True)  # a run that was stopped half-way
        key = "run.mode" if task.method in REFERENCES else "merge.rule"
        own = [f"{key}={task.method}", f"run.seed={task.seed}", f"client.lr={task.rate}"]
        own += [f"run.out={task.folder}", f"run.name={task.method}"]
        words = [word for setting in [*sets, *own] for word in ("--set", setting)]
        command = [sys.executable, "-m", "fedlora", "run", str(config), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        print(task.folder.name, "done" if done.returncode == 0 else done.stderr[-800:], flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, tasks))


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval (Student's t) in points."""
    mean, half = statistics.fmean(values), math.nan
    if len(values) > 1:
        half = T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{100 * mean:.2f} ± {100 * half:.2f}"


def row(tasks: Sequence[Task], first: Sequence[Task]) -> str:
    accuracy = [task.summary["final"]["accuracy"] for task in tasks]
    pairs = [a - b.summary["final"]["accuracy"] for a, b in zip(accuracy, first, strict=True)]
    errors = [task.last_round["merge_error"] for task in tasks]
    gap = statistics.fmean(task.summary["gap"] or math.nan for task in tasks)
    moved = tasks[0].summary["bytes_up_total"] + tasks[0].summary["bytes_down_total"]
    cells = [
        tasks[0].method,
        tasks[0].rate,
        interval(accuracy),
        "-" if tasks is first else interval(pairs),
        f"{gap:.3f}",
        "-" if None in errors else f"{statistics.fmean(errors):.1e}",
        f"{moved / 1e6:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--methods", nargs="+", default=["fra", "fedavg", "ffa", "central", "local"]
    )
    parser.add_argument("--rates", nargs="+", default=["5e-4", "1e-3", "2e-3", "4e-3"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tuning-seed", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()

    tuning = {
        method: [task(args.out / "tuning", method, rate, args.tuning_seed) for rate in args.rates]
        for method in args.methods
    }
    execute(
        args.config, [t for row in tuning.values() for t in row], [*args.set, *CHEAP], args.jobs
    )
    print("\nHeld-out accuracy in the last round, by learning rate\n")
    print("| method | " + " | ".join(args.rates) + " |\n" + "|---" * (len(args.rates) + 1) + "|")
    final = {}
    for method, tasks in tuning.items():
        print(
            f"| {method} | " + " | ".join(f"{100 * t.heldout_accuracy:.1f}" for t in tasks) + " |"
        )
        best = max(tasks, key=lambda task: task.heldout_accuracy)
        final[method] = [task(args.out, method, best.rate, seed) for seed in args.seeds]

    execute(args.config, [t for tasks in zip(*final.values()) for t in tasks], args.set, args.jobs)
    print(f"\nFinal accuracy over {len(args.seeds)} seeds, mean and 95 % interval in points\n")
    print(f"| method | rate | accuracy | minus {args.methods[0]} | gap | merge error | MB |")
    print("|---" * 7 + "|")
    for method in args.methods:
        print(row(final[method], final[args.methods[0]]))


if __name__ == "__main__":
    main()
