"""The figures of a run as plain records: one per round for metrics.jsonl, one summary at the end.

Turns what happened into numbers under fixed names; measures nothing and writes nothing itself.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from fedlora.budget import totals
from fedlora.evaluate import Scores
from fedlora.modes import GLOBAL, Step

Record: TypeAlias = dict[str, Any]
SECONDS = ("compute", "evaluate", "aggregate", "total")
FIGURES = (  # that every client reports of its training
    "steps", "trained", "learning_rate_first", "learning_rate_last", "seconds_evaluate",
)  # fmt: skip
OPTIONAL = ("train_loss", "seconds_compute", "epsilon")  # private, private, of private training
KINDS = ("evaluation", "heldout")  # what it may have evaluated on, each with all of the SCORES
SCORES = ("accuracy", "macro_f1", "loss", "examples")


@dataclass(frozen=True, eq=False)
class Scored:
    """What a round's adapters score: each by its name (the global one's is empty) on the shared set
    and on the subset that earlier rounds had, if that is another; and on each client's held-out
    rows.
    """

    shared: dict[str, Scores] = field(default_factory=dict)
    subset: dict[str, Scores] = field(default_factory=dict)
    heldout: dict[str, Scores] = field(default_factory=dict)


def round_record(
    round: int,
    scored: Scored,
    step: Step | None,
    *,
    seconds_evaluate: float,
    seconds_total: float,
) -> Record:
    """The line of one round, `scored` with the adapters that it ended with.

    `global` scores the global adapter on the shared set; where clients have adapters of their own,
    `personal` is the mean over them. Where clients keep what makes an adapter theirs on other
    machines, `personal` is the mean of what they say of their own, with `before_merge` true: each
    on its own evaluation rows, before the round's merge. `subset` is the same on the rows that
    earlier rounds were scored on, in a last round that has more. `heldout` is over the held-out
    rows of all clients, whether they took part or not, and `clients` of those who did; their
    `evaluation` and `heldout` are of the client's adapter before the merge.

    Losses are in nats, bytes are those of the arrays, seconds are wall-clock: `compute` is forward,
    backward and optimiser steps (None where a client does not let its own out), `total` the whole
    round with evaluation. `budget` as in `budget_record`.
    """
    results = step.results if step else []
    metrics = [result.metrics for result in results]
    evaluate = seconds_evaluate + sum(m["seconds_evaluate"] for m in metrics)
    clients = {
        result.client: {
            "examples": result.examples,
            "steps": int(result.metrics["steps"]),
            "trained": int(result.metrics["trained"]),
            "train_loss": result.metrics.get("train_loss"),
            **({"epsilon": result.metrics["epsilon"]} if "epsilon" in result.metrics else {}),
            "evaluation": _scores(result.metrics, "evaluation"),
            "heldout": _scores(result.metrics, "heldout"),
        }
        for result in results
    }
    shared = _shared(scored.shared)
    if step is not None and not step.adapters:
        shared["personal"] = _reported([_scores(own, "evaluation") for own in metrics])
    return {
        "round": round,
        **shared,
        "subset": next((one for one in _shared(scored.subset).values() if one), None),
        "heldout": _pooled(scored.heldout),
        "clients": clients,
        "merge_error": step.merge.get("merge_error") if step else None,
        "merge": dict(step.merge) if step else {},
        "budget": budget_record(step.budget) if step else {},
        "failures": [asdict(failure) for failure in step.failures] if step else [],
        "bytes_up": step.bytes_up if step else 0,
        "bytes_down": step.bytes_down if step else 0,
        "seconds": {
            "compute": _sum([m.get("seconds_compute") for m in metrics]),
            "evaluate": evaluate,
            "aggregate": step.seconds_aggregate if step else 0.0,
            "total": seconds_total,
        },
        "learning_rate": [metrics[0]["learning_rate_first"], metrics[0]["learning_rate_last"]]
        if metrics
        else None,
    }


def budget_record(layers: Mapping[str, Mapping[str, float]]) -> Record:
    """The error budget of a round: over all layers, and under `layers` of each by name.

    Norms are absolute, over all layers the root of the summed squares; `wanted` is what they are
    compared with. Ranks and angles (degrees) are means over the layers. Empty where nothing was
    merged.
    """
    each = {name: dict(figures) for name, figures in layers.items()}
    return {**totals(each), "layers": each} if each else {}


def summary_record(
    records: Sequence[Record],
    confusion: Scores | None,
    *,
    labels: Sequence[str],
    clients: Mapping[str, Mapping[str, int]],
    base: int,
    interrupted: bool,
) -> Record:
    """The end of a run: final scores, confusion matrix, sizes, cost beside full fine-tuning's.

    `trainable_parameters` is what a client trains in a round, the mean over all that did.
    Without a global adapter the final scores are the mean over the clients' own adapters.
    """
    last = records[-1] if records else {}
    seconds = [record["seconds"] for record in records if record["round"] > 0]
    exchanges = sum(len(record["clients"]) for record in records)
    return {
        "interrupted": interrupted,
        "rounds": last.get("round", 0),
        "labels": list(labels),
        "final": last.get("global") or last.get("personal"),
        "confusion": confusion.confusion.tolist() if confusion else None,
        "gap": _gap(last) if last else None,
        "clients": {client: dict(sizes) for client, sizes in clients.items()},
        "trainable_parameters": _trained(records),
        "base_parameters": base,
        "peak_memory_bytes": peak_memory(),
        "bytes_up_total": sum(record["bytes_up"] for record in records),
        "bytes_down_total": sum(record["bytes_down"] for record in records),
        "full_finetuning_bytes_total": 2 * 4 * base * exchanges,
        "seconds": {key: _sum([spent[key] for spent in seconds]) for key in SECONDS},
    }


def train_loss(record: Mapping[str, Any]) -> float | None:
    """The mean training loss of a round's clients, weighted by their examples; of those that let
    theirs out, None where none did.
    """
    each = [(client["train_loss"], client["examples"]) for client in record["clients"].values()]
    known = [(loss, examples) for loss, examples in each if loss is not None]
    total = sum(examples for _, examples in known)
    return sum(loss * examples for loss, examples in known) / total if total else None


def peak_memory() -> int:
    """The largest memory of the process so far, with the GPU's where there is one, in bytes."""
    status = Path("/proc/self/status")  # getrusage begins at the size of the parent process
    lines = status.read_text().splitlines() if status.is_file() else []
    own = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    unit = 1 if sys.platform == "darwin" else 1024
    peak = (own or [_peak_of_usage()])[0] * unit
    return peak + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def _peak_of_usage() -> int:
    """The largest memory as the system counts it; 0 on Windows, which does not."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _sum(values: Sequence[float | None]) -> float | None:
    """The sum, None where a value is not known."""
    known = [value for value in values if value is not None]
    return float(sum(known)) if len(known) == len(values) else None


def _trained(records: Sequence[Record]) -> int:
    each = [client["trained"] for record in records for client in record["clients"].values()]
    return round(sum(each) / len(each)) if each else 0


def _gap(record: Record) -> float | None:
    """Evaluation loss minus mean training loss of the last round: the sign of overfitting."""
    loss, shared = train_loss(record), record.get("global") or record.get("personal")
    if loss is None or not shared:
        return None
    return float(shared["loss"] - loss)


def _shared(scores: Mapping[str, Scores]) -> Record:
    """The global scores, and the mean over those of clients; None where there are none."""
    one = scores[GLOBAL].record() if GLOBAL in scores else None
    each = [own.record() for name, own in scores.items() if name != GLOBAL]
    mean = {key: sum(own[key] for own in each) / len(each) for key in each[0]} if each else None
    return {"global": one, "personal": mean}


def _reported(evaluations: Sequence[Record | None]) -> Record | None:
    """The mean of what clients say of their own adapters; None where none says anything."""
    each = [own for own in evaluations if own]
    mean = {key: sum(own[key] for own in each) / len(each) for key in each[0]} if each else None
    return {**mean, "before_merge": True} if mean else None


def _pooled(heldout: Mapping[str, Scores]) -> Record | None:
    """Accuracy and loss over all held-out rows, and each client's scores."""
    examples = sum(scores.examples for scores in heldout.values())
    if examples == 0:
        return None
    return {
        "accuracy": sum(one.accuracy * one.examples for one in heldout.values()) / examples,
        "loss": sum(one.loss * one.examples for one in heldout.values()) / examples,
        "examples": examples,
        "clients": {client: scores.record() for client, scores in heldout.items()},
    }


def _scores(metrics: Mapping[str, float], kind: str) -> Record | None:
    found = {
        name.removeprefix(f"{kind}."): value
        for name, value in metrics.items()
        if name.startswith(f"{kind}.")
    }
    return found or None
