"""Runs methods x learning rates x seeds of one config, picks each method's rate on held-out
training
rows, and prints a table of final evaluation accuracy with paired differences to the first method.

    python experiments/compare.py experiments/sst2_balanced.toml --out runs/sst2 \
        --set data.train=train.tsv --set data.evaluate=dev.tsv

Finished runs are recognised by their summary.json and not done again.
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
from pathlib import Path

REFERENCES = ("central", "local")
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def folder(out: Path, method: str, rate: str, seed: int) -> Path:
    return out / f"{method}-lr{rate}-seed{seed}"


def run(config: Path, out: Path, method: str, rate: str, seed: int, sets: Sequence[str]) -> None:
    place = folder(out, method, rate, seed)
    if (place / "summary.json").is_file():
        return
    shutil.rmtree(place, ignore_errors=True)  # a run that was stopped half-way
    key = "run.mode" if method in REFERENCES else "merge.rule"
    own = [f"{key}={method}", f"run.seed={seed}", f"client.lr={rate}", f"run.out={place}"]
    own += [f"run.name={method}"]
    words = [word for setting in [*sets, *own] for word in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "fedlora", "run", str(config), *words],
        capture_output=True,
        text=True,
    )
    print(place.name, "done" if done.returncode == 0 else done.stderr[-800:], flush=True)


def last_record(place: Path) -> dict:
    return json.loads((place / "metrics.jsonl").read_text().splitlines()[-1])


def heldout(place: Path) -> float:
    """Accuracy on the held-out training rows in the last round: what the learning rate is chosen
    by.
    """
    clients = last_record(place)["clients"].values()
    scores = [client["global_heldout"] for client in clients]
    rows = sum(score["examples"] for score in scores)
    return sum(score["accuracy"] * score["examples"] for score in scores) / rows


def final(place: Path) -> float:
    return json.loads((place / "summary.json").read_text())["final"]["accuracy"]


def interval(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{100 * mean:.2f}"
    half = T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return (
        f"{100 * mean:+.2f} ± {100 * half:.2f}"
        if mean < 0.5
        else f"{100 * mean:.2f} ± {100 * half:.2f}"
    )


def table(out: Path, methods: Sequence[str], rates: Sequence[str], seeds: Sequence[int]) -> str:
    chosen = {}
    for method in methods:
        means = {
            rate: statistics.fmean(heldout(folder(out, method, rate, seed)) for seed in seeds)
            for rate in rates
        }
        chosen[method] = max(means, key=lambda rate: means[rate])
    accuracy = {m: [final(folder(out, m, chosen[m], seed)) for seed in seeds] for m in methods}
    lines = [
        f"| method | learning rate | accuracy, {len(seeds)} seeds | minus {methods[0]} | "
        "last merge error | MB, both ways |",
        "|---|---|---|---|---|---|",
    ]
    for method in methods:
        places = [folder(out, method, chosen[method], seed) for seed in seeds]
        pairs = [a - b for a, b in zip(accuracy[method], accuracy[methods[0]], strict=True)]
        errors = [last_record(place)["merge_error"] for place in places]
        error = "-" if None in errors else f"{statistics.fmean(errors):.1e}"
        summary = json.loads((places[0] / "summary.json").read_text())
        moved = (summary["bytes_up_total"] + summary["bytes_down_total"]) / 1e6
        difference = "-" if method == methods[0] else interval(pairs)
        row = [
            method,
            chosen[method],
            interval(accuracy[method]),
            difference,
            error,
            f"{moved:.1f}",
        ]
        lines.append("| " + " | ".join(row) + " |")
    lines += [
        "",
        "Held-out accuracy by learning rate (mean over seeds), which chose the rates:",
        "",
    ]
    lines += ["| method | " + " | ".join(rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for method in methods:
        cells = [
            f"{100 * statistics.fmean(heldout(folder(out, method, r, s)) for s in seeds):.2f}"
            for r in rates
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--no-table", action="store_true", help="only run")
    args = parser.parse_args()
    tasks = [(m, r, s) for s in args.seeds for m in args.methods for r in args.rates]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda task: run(args.config, args.out, *task, args.set), tasks))
    if not args.no_table:
        print(table(args.out, args.methods, args.rates, args.seeds))


if __name__ == "__main__":
    main()
