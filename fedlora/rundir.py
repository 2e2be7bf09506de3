"""Run directories as read: their series, their means, and which runs belong together.

Knows the files of a run directory and nothing of how they came to be; imports no torch.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora.sources import evaluation_of

Array: TypeAlias = NDArray[np.float64]

EXACT = 1e-6  # a merge error below this is rounding of the float32 factors, not a loss
MODES = ("federated", "central", "local")


@dataclass(frozen=True, eq=False)
class Run:
    """One run directory as read: config, one mapping a round, summary ({} if there is none)."""

    path: Path
    config: Mapping[str, Any]
    rounds: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The run's own name, or that of its folder."""
        return str(self.config["run"].get("name") or self.path.resolve().name)

    @property
    def mode(self) -> str:
        """`federated`, `central` or `local`."""
        return str(self.config["run"]["mode"])

    @property
    def method(self) -> str:
        """The merge rule of a federated run, else the mode: `fra`, `central`, `local`."""
        rule = str(self.config["merge"]["rule"]).rpartition(".py:")[2]  # a file's rule: its name
        return rule if self.mode == "federated" else self.mode

    @property
    def evaluated_on(self) -> str:
        """In words, what the scores are of: a shared set, or rows that clients held out."""
        data = self.config.get("data")
        if not data or evaluation_of(
            data.get("train", ""), data.get("evaluate", ""), data.get("clients", {})
        ):
            return "the shared evaluation set"
        return "the clients' held-out rows"

    @property
    def rule_text(self) -> str:
        """The merge rule with the options that were set, such as `fra (gauge = aligned)`."""
        options = self.config["merge"].get("options") or {}
        text = ", ".join(f"{key} = {value}" for key, value in options.items())
        return f"{self.method} ({text})" if text else self.method

    @property
    def clients(self) -> list[str]:
        """Every client that took part in any round; numbers in numerical order, then names."""
        found = {client for line in self.rounds for client in line["clients"]}
        return sorted(found, key=by_number)

    def series(self, *keys: str) -> Array:
        """One value a round, at `keys` inside its line of the log; NaN where there is none."""
        return np.array([number(line, keys) for line in self.rounds], dtype=np.float64)

    def evaluation(self, metric: str) -> Array:
        """`metric` of the global adapter a round, or the mean over clients that have their own.

        On the same rows in every round: the last one's score on all rows is `final`. Round 0
        evaluates the common start, which is there in every mode.
        """
        found = [self.series(key, metric) for key in ("subset", "global", "personal")]
        return np.where(
            np.isfinite(found[0]), found[0], np.where(np.isfinite(found[1]), found[1], found[2])
        )

    def megabytes(self, way: str) -> Array:
        """Megabytes (10^6 bytes) sent `up` or `down` by all clients up to each round."""
        return np.cumsum(np.nan_to_num(self.series(f"bytes_{way}"))) / 1e6

    def train_loss(self) -> Array:
        """Mean training loss a round, clients weighted by their examples; NaN in round 0."""
        if not self.clients:
            return np.full(len(self.rounds), np.nan)
        loss = np.stack([self.series("clients", c, "train_loss") for c in self.clients])
        return _mean(loss, np.stack([self.series("clients", c, "examples") for c in self.clients]))

    @property
    def gap(self) -> float:
        """Evaluation loss minus training loss at the end; NaN where either is not known."""
        return self.final("loss") - last_known(self.train_loss())

    @property
    def settings(self) -> dict[str, Any]:
        """All settings but [run], of which only `rounds` changes what the run is."""
        tables = {table: values for table, values in self.config.items() if table != "run"}
        flat = {
            f"{table}.{key}": v for table, values in tables.items() for key, v in values.items()
        }
        return flat | {"run.rounds": self.config["run"].get("rounds")}

    def final(self, metric: str) -> float:
        """`metric` at the end: the summary's, or that of the last round evaluated; else NaN.

        Round 0, the untrained start, is nobody's result.
        """
        value, trained = number(self.summary, ("final", metric)), self.series("round") > 0
        return value if math.isfinite(value) else last_known(self.evaluation(metric)[trained])


def own_heldout(line: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Scores on each client's held-out rows, by client, of the adapter that it would use.

    That is the merged one, else its personal one, or its own. Empty where nothing was scored.
    """
    scores: Mapping[str, Mapping[str, Any]] = (line["heldout"] or {}).get("clients", {})
    return scores


def by_number(client: str) -> tuple[bool, int, str]:
    """The key to sort clients by: numbers in numerical order, then names."""
    return not client.isdecimal(), int(client) if client.isdecimal() else 0, client


def read_run(path: Path | str) -> Run:
    """Read a run directory; a last line cut short by a crash is left out.

    Raises FileNotFoundError where a file is missing and ValueError, with file and line, where one
    is damaged.
    """
    path = Path(path)
    for file in ("config.toml", "metrics.jsonl"):
        if not (path / file).is_file():
            near = sorted(str(found.parent) for found in path.glob("*/metrics.jsonl"))
            hint = f"; did you mean {', '.join(near[:3])}?" if near else ""
            raise FileNotFoundError(
                f"{str(path)!r} is not a run directory: it has no {file}; "
                f"give a folder that `fedlora run` wrote{hint}"
            )
    parsed = _parse(path / "config.toml", tomllib.loads)
    config = {table: values for table, values in parsed.items() if isinstance(values, dict)}
    mode = config.get("run", {}).get("mode")
    if mode not in MODES or (mode == "federated" and "rule" not in config.get("merge", {})):
        raise ValueError(
            f"{path / 'config.toml'}: [run] mode is {mode!r}; it must be one of "
            f"{', '.join(MODES)}, federated with [merge] rule; restore the file the run wrote"
        )
    summary = path / "summary.json"
    return Run(
        path=path,
        config=config,
        rounds=_read_rounds(path / "metrics.jsonl"),
        summary=_parse(summary, json.loads) if summary.is_file() else {},
    )


def rolling_mean(values: Array, window: int) -> Array:
    """Trailing mean over the last `window` rounds, NaN left out; where a round is NaN it stays so.

    The first rounds average what there is so far. Raises ValueError for a window below 1.
    """
    if window < 1:
        raise ValueError(f"rolling must be a number of rounds, 1 or more, got {window}")
    means = [_mean(values[max(0, t + 1 - window) : t + 1]) for t in range(len(values))]
    return np.where(np.isfinite(values), np.array(means, dtype=np.float64), np.nan)


def smoothed(x: Array, row: Array, rolling: int) -> Array:
    """The rolling mean, into which what came before any training (x = 0) is not mixed."""
    start = int(x[0] == 0)
    return np.concatenate([row[:start], rolling_mean(row[start:], rolling)])


def stacked(x: Array, runs: Sequence[Run], read: Callable[[Run], Array]) -> Array:
    """What `read` gives for each run, one row a run, in the rounds `x`; NaN where it has none."""
    rows = np.full((len(runs), len(x)), np.nan)
    for row, run in zip(rows, runs, strict=True):
        row[np.searchsorted(x, run.series("round"))] = read(run)
    return rows


def group_runs(runs: Sequence[Run]) -> list[tuple[str, list[Run], int]]:
    """Runs that differ in name and seed only, together; best first, each with label and number."""
    alike: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([run.method, run.settings], sort_keys=True, default=str)
        alike.setdefault(key, []).append(run)
    groups = []
    for index, members in enumerate(alike.values()):
        method, own = members[0].method, members[0].settings
        rivals = [other[0].settings for other in alike.values() if other[0].method == method]
        differing = [key for key in own if any(rival.get(key) != own[key] for rival in rivals)]
        label = ", ".join([method, *(f"{key.split('.')[-1]} {own[key]}" for key in differing)])
        if len(members) > 1:
            seeds = {str(run.config["run"].get("seed")) for run in members}
            label += f", {len(members)} {'seeds' if len(seeds) == len(members) else 'runs'}"
        groups.append((label, members, index))
    return sorted(groups, key=lambda group: -np.nan_to_num(mean_final(group[1])))


def mean_final(runs: Sequence[Run]) -> float:
    """Mean final accuracy of `runs`."""
    return float(np.mean([run.final("accuracy") for run in runs]))


def _parse(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        return dict(parse(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}; restore the file that the run wrote") from error


def _read_rounds(path: Path) -> tuple[Mapping[str, Any], ...]:
    rounds: list[Mapping[str, Any]] = []
    lines = path.read_bytes().splitlines()
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            if number == len(lines):
                break  # cut short by a crash, or still being written
            raise _damaged(path, number, text, str(error)) from error
        if not (isinstance(line, dict) and isinstance(line.get("clients"), dict)):
            raise _damaged(path, number, text, "not an object with clients")
        if not (
            isinstance(line.get("round"), int)
            and (not rounds or line["round"] > rounds[-1]["round"])
        ):
            raise _damaged(path, number, text, "its round does not follow the one before it")
        rounds.append(line)
    if not rounds:
        raise ValueError(f"{path} holds no whole round yet; report once the run has logged one")
    return tuple(rounds)


def _damaged(path: Path, number: int, text: bytes, reason: str) -> ValueError:
    return ValueError(
        f"{path}, line {number}: {reason}: {text[:40]!r}; a line is one round as JSON: "
        "delete this one, or restore the file"
    )


def number(line: Any, keys: Sequence[str]) -> float:
    """The number at `keys` inside a line of the log; NaN where there is none."""
    for key in keys:
        line = line.get(key) if isinstance(line, Mapping) else None
    return math.nan if line is None else float(line)


def _mean(values: Array, weights: Array | None = None) -> Array:
    """Mean over the rows of what is not NaN, column by column; NaN where a column has nothing."""
    known = np.isfinite(values)
    share = known * (1.0 if weights is None else np.nan_to_num(weights))
    total = share.sum(axis=0)
    sums = (np.where(known, values, 0.0) * share).sum(axis=0)
    mean: Array = np.divide(sums, total, out=np.full(total.shape, np.nan), where=total > 0)
    return mean


def last_known(values: Array) -> float:
    """The last value that is not NaN; NaN if there is none."""
    known = values[np.isfinite(values)]
    return float(known[-1]) if known.size else math.nan


def plain(value: float, pattern: str) -> str:
    """`value` formatted, a dash for NaN."""
    return format(value, pattern) if math.isfinite(value) else "-"


def percent(value: float) -> str:
    """A share as a percentage with one decimal, a dash for NaN."""
    return plain(value, ".1%")
