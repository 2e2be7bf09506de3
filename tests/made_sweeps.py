"""Made-up sweeps on disk, whose every figure is known: for tests of reports, and to look at one.

`python tests/made_sweeps.py FOLDER` writes one of eight methods, two cases and five seeds.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlora.sweepdir import Entry, run_path, write_plan

ROUNDS = 4
BASE = {"merge.rule": "fra", "merge.head": "average", "client.lr": 0.001, "run.mode": "federated"}


def line(
    round: int,
    accuracy: float | None,
    *,
    loss: float = 0.5,
    train: float = 0.4,
    clients: Sequence[str] = ("0", "1"),
    error: float | None = 0.03,
    sent: float = 1e6,
    budget: Mapping[str, Any] | None = None,
    rows: int = 200,
) -> dict[str, Any]:
    """One line of metrics.jsonl; client k is 0.01 (k + 1) below the global accuracy."""

    def scores(lower: float) -> dict[str, float] | None:
        if accuracy is None:
            return None
        own = accuracy - lower
        return {"accuracy": own, "macro_f1": own - 0.05, "loss": loss + lower, "examples": rows}

    each = {
        client: {
            "examples": 100,
            "steps": 5,
            "train_loss": train,
            "evaluation": scores(0.01 * (k + 1)),
            "heldout": None,
        }
        for k, client in enumerate(clients if round else ())
    }
    found = {
        "round": round, "global": scores(0.0), "personal": None, "subset": None,
        "heldout": heldout(dict.fromkeys(clients, 0.5)), "clients": each,
        "merge_error": error if round else None,
        "bytes_up": sent if round else 0, "bytes_down": 2 * sent if round else 0,
    }  # fmt: skip
    return found | ({"budget": budget} if budget and round else {})


def heldout(accuracy: Mapping[str, float]) -> dict[str, Any]:
    """The scores of a round on ten held-out rows of each client."""
    each = {c: {"accuracy": a, "loss": 0.6, "examples": 10} for c, a in accuracy.items()}
    mean = sum(accuracy.values()) / len(accuracy)
    return {"accuracy": mean, "loss": 0.6, "examples": 10 * len(each), "clients": each}


def write_run(path: Path, lines: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """A finished run directory of these lines; `settings` are dotted."""
    path.mkdir(parents=True)
    tables: dict[str, list[str]] = {}
    for key, value in {"run.rounds": len(lines) - 1, **BASE, **settings}.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, []).append(f"{name} = {json.dumps(value)}")
    text = "".join(f"[{name}]\n" + "\n".join(rows) + "\n" for name, rows in tables.items())
    (path / "config.toml").write_text(text)
    (path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    summary = {
        "interrupted": False, "rounds": len(lines) - 1, "final": lines[-1]["global"], "gap": 0.1,
        "clients": {"0": {"train": 100, "heldout": 10}, "1": {"train": 100, "heldout": 10}},
        "trainable_parameters": 1000, "full_finetuning_bytes_total": 3e8,
        "seconds": {"aggregate": 0.2, "total": 4.0},
    }  # fmt: skip
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "versions.json").write_text(json.dumps({"fedlora": "0.1.0", "commit": "abc123" * 6}))


def make_sweep(
    folder: Path,
    methods: Mapping[str, Mapping[str, Any]],
    lines: Callable[[str, str, int], Sequence[Mapping[str, Any]] | None],
    *,
    cases: Sequence[str] = ("balanced",),
    seeds: Sequence[int] = (0, 1, 2),
    tried: Mapping[str, Mapping[float, float]] | None = None,
) -> Path:
    """A sweep's folder; `lines(method, case, seed)` are a run's, None where it has not ended.

    `tried` holds, for each method, learning rates with the held-out accuracy that a tuning run
    got; the best is taken.
    """
    folder.mkdir()
    entries = []
    for case in cases:
        for method, settings in methods.items():
            rates = (tried or {}).get(method, {})
            grid = {"client.lr": max(rates, key=lambda rate: rates[rate])} if rates else {}
            for rate, accuracy in rates.items():
                entries.append(_entry(method, case, 1000, True, settings, {"client.lr": rate}))
                last = line(1, 0.5)
                last["heldout"] = heldout(dict.fromkeys(last["clients"], accuracy))
                values = {**settings, "client.lr": rate, "run.seed": 1000}
                write_run(run_path(folder, entries[-1].id), [line(0, 0.5), last], values)
            for seed in seeds:
                entries.append(_entry(method, case, seed, False, settings, grid))
                found = lines(method, case, seed)
                if found is not None:
                    values = {**settings, **grid, "run.seed": seed}
                    write_run(run_path(folder, entries[-1].id), found, values)
    write_plan(folder, "made", entries)
    return folder


def rising(final: float, error: float | None = 0.03) -> list[dict[str, Any]]:
    """Four rounds from 0.5 to `final` in even steps."""
    return [line(t, 0.5 + (final - 0.5) * t / ROUNDS, error=error) for t in range(ROUNDS + 1)]


def _entry(
    method: str,
    case: str,
    seed: int,
    tuning: bool,
    settings: Mapping[str, Any],
    grid: Mapping[str, Any],
) -> Entry:
    id = f"{method}-{case}-{seed}-{tuning}-{grid}"
    name = "".join(f"{ord(letter):x}" for letter in id)[-200:]
    return Entry(name, method, case, seed, tuning, {**settings, **grid}, dict(grid))


# ---------------------------------------------------------------- one to look at

SHOWN = {
    "fra": {"merge.rule": "fra"},
    "fedavg": {"merge.rule": "fedavg"},
    "ffa": {"merge.rule": "ffa"},
    "fra, head freeze": {"merge.rule": "fra", "merge.head": "freeze"},
    "fedex": {"merge.rule": "fedex"},
    "hybrid of fra and ffa, switched by the measured error": {"merge.rule": "hybrid"},
    "central": {"run.mode": "central"},
    "local": {"run.mode": "local"},
}
TOPS = (0.842, 0.834, 0.805, 0.83, 0.845, 0.85, 0.86, 0.79)
ERRORS = (8e-3, 3e-2, 6e-9, 9e-3, 4e-9, 6e-3, None, None)
LAYERS = [
    f"base.model.encoder.layer.{n}.attention.self.{p}" for n in range(6) for p in ("query", "value")
]


def shown_lines(method: str, case: str, seed: int, rounds: int = 30) -> list[dict[str, Any]]:
    """A run that looks like one: rises, levels off, overfits a little, differs by seed."""
    place, skew = list(SHOWN).index(method), case == "imbalanced"
    draw = random.Random(f"{method} {case} {seed}")
    shared = random.Random(f"{case} {seed}").gauss(0, 0.012)
    top, error = TOPS[place] - 0.04 * skew * (place != 6) + shared, ERRORS[place]
    mode, pace = SHOWN[method].get("run.mode", "federated"), 4 + 1.3 * place
    lines = []
    for t in range(rounds + 1):
        accuracy = 0.5 + (top - 0.5) * (1 - math.exp(-t / pace)) + draw.gauss(0, 0.006) * (t > 0)
        loss = 0.69 - 0.36 * (1 - math.exp(-t / pace)) + 0.004 * max(0, t - 12) * (1 + skew)
        train = 0.69 - 0.5 * (1 - math.exp(-t / 8))
        noise = draw.uniform(0.7, 1.4)
        made = line(
            t, accuracy, loss=loss, train=train, clients=("0", "1", "2"), rows=872,
            error=error and error * noise * (1 + 2 * math.exp(-t / 6)),
            sent=0 if mode != "federated" else 2.7e6 / (1 + (method == "ffa")),
            budget=_shown_budget(error, t, draw) if error and error > 1e-6 else None,
        )  # fmt: skip
        if mode == "local" and t:
            made["global"], made["personal"] = None, made["global"]
        if mode == "central":
            made["clients"] = {"central": made["clients"]["0"]} if t else {}
        lines.append(made)
    return lines


def _shown_budget(error: float, t: int, draw: random.Random) -> dict[str, Any]:
    layers = {
        name: {
            "wanted": 1.0, "tail": error * (1 + n / 4) * (1 + 2 * math.exp(-t / 6)),
            "cross": error * draw.uniform(2, 3), "effective_rank": 3 + n / 10,
            "update": 0.3, "drift": 0.2 + t / 100, "new": 0.3 / (1 + t / 4), "new_drift": 0.1,
        } for n, name in enumerate(LAYERS)
    }  # fmt: skip
    sums = {
        key: math.sqrt(sum(layer[key] ** 2 for layer in layers.values()))
        for key in ("wanted", "tail", "cross", "update", "drift", "new", "new_drift")
    }
    return sums | {"folded": sums["tail"] * 0.5, "effective_rank": 3.5, "layers": layers}


if __name__ == "__main__":
    make_sweep(
        Path(sys.argv[1]), SHOWN, shown_lines, cases=("balanced", "imbalanced"), seeds=range(5),
        tried={
            name: {0.001 * 2**k: TOPS[place] - 0.01 * abs(k - 3 + place / 3) for k in range(5)}
            for place, name in enumerate(SHOWN)
        },
    )  # fmt: skip
