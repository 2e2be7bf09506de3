"""Benches: one client's training with a plain loop beside it, and a place for whole runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tiny import drawn_like, load_tiny, plain_base, toy_config, toy_rows, write_csv
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlora.adapter import PARTS, Adapter, ClientResult, ClientState, Part, flatten
from fedlora.client import batches, learning_rate, make_fit
from fedlora.config import Config
from fedlora.data import Data, read_silos, tokenised
from fedlora.model import Model, read_adapter
from fedlora.recording import Job
from fedlora.rules import Plan
from fedlora.run import execute, prepare
from fedlora.seeding import derive

Watch = Callable[[str, Mapping[str, Any]], None]


def plan_of(trains: Iterable[Part] = PARTS, shares: Iterable[Part] | None = None) -> Plan:
    parts = frozenset(trains)
    return Plan(parts, parts if shares is None else frozenset(shares), PARTS)


ALL = plan_of()


class Bench:
    """A model, three clients' data and the fit over them, ready to be called."""

    def __init__(
        self, base: Path, folder: Path, load: dict[str, Any] | None = None, **changes: Any
    ) -> None:
        train = write_csv(folder / "train.csv", toy_rows(45))
        self.config: Config = toy_config(base, train, **changes)
        self.model: Model = load_tiny(base, **(load or {}))
        silos = read_silos(self.config)
        self.data: Data = tokenised(self.config, silos, self.model.tokenizer)
        self.start: Adapter = drawn_like(read_adapter(self.model))

    def fit(
        self,
        client: str = "0",
        round: int = 1,
        plan: Plan = ALL,
        adapter: Adapter | None = None,
        state: ClientState | None = None,
        ledgers: Path | None = None,
    ) -> ClientResult:
        run = make_fit(self.model, self.data, self.config, ledgers)
        return run(client, round, plan, adapter or self.start, state or ClientState())

    def reference(self, client: str = "0", rounds: int = 1, parts: Iterable[Part] = PARTS,
                  keep: bool = False) -> tuple[dict[str, Tensor], list[float]]:  # fmt: skip
        """Trained tensors and losses of a loop over functional calls: no PEFT, W + s B A."""
        config, settings, data = self.config, self.config.client, self.data
        base = plain_base(Path(config.model.name), self.start).requires_grad_(False).train()
        weights = dict(base.state_dict())
        tensors = {name: tensor.clone() for name, tensor in flatten(self.start).items()}
        moving = [tensors[name].requires_grad_() for name in flatten(self.start, parts)]
        losses: list[float] = []
        steps = settings.steps
        for round in range(1, rounds + 1):
            if round == 1 or not keep:
                optimiser = torch.optim.AdamW(
                    moving, weight_decay=settings.weight_decay, foreach=False
                )
            torch.manual_seed(derive(config.run.seed, "client", client, round))
            stream = batches(
                data.rows[client], data.train.lengths, settings.batch, config.run.seed, client,
                (round - 1) * steps,
            )  # fmt: skip
            for step, rows in enumerate(islice(stream, steps)):
                layers = {
                    f"{name}.weight": weights[f"{name}.weight"]
                    + factors.scaling * (tensors[f"{name}.lora_B"] @ tensors[f"{name}.lora_A"])
                    for name, factors in self.start.layers.items()
                }
                head = {name: tensors[name] for name in self.start.dense}
                inputs, labels = data.train.batch(rows, torch.device("cpu"))
                output = torch.func.functional_call(base, weights | layers | head, (), inputs)
                loss = cross_entropy(output.logits, labels)
                optimiser.zero_grad()
                total = loss
                for name in flatten(self.start, parts) if settings.prox else ():
                    apart = tensors[name] - flatten(self.start)[name]
                    total = total + settings.prox / 2 * apart.square().sum()
                total.backward()
                if settings.clip:
                    norm = math.sqrt(sum(float((t.grad.double() ** 2).sum()) for t in moving))
                    for tensor in moving:
                        tensor.grad *= min(1.0, settings.clip / norm)
                rate = learning_rate(settings, round, config.run.rounds, step, steps)
                optimiser.param_groups[0]["lr"] = rate
                optimiser.step()
                losses.append(float(loss.detach()))
        return {name: tensor.detach() for name, tensor in tensors.items()}, losses


class Place:
    """A folder with training and evaluation files, where runs get names."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = base, folder
        self.train = write_csv(folder / "train.csv", toy_rows(48))
        self.dev = write_csv(folder / "dev.csv", toy_rows(20, seed=9))

    def config(self, name: str = "run", **changes: Any) -> Config:
        flat = {"data__evaluate": str(self.dev), "run__name": name} | changes
        return toy_config(self.base, self.train, run__out=str(self.folder / name), **flat)

    def job(self, name: str = "run", **changes: Any) -> Job:
        return prepare(self.config(name, **changes))

    def run(self, name: str = "run", watch: Watch = lambda event, facts: None, **changes: Any):
        return execute(self.job(name, **changes), watch)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def adapter_bytes(folder: Path, kind: str = "adapter") -> bytes:
    return (folder / kind / "adapter_model.safetensors").read_bytes()
