"""A long federation on Flower's strategy loop: clients that come, go and fail.

Memory stays flat.
"""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_adapter, same_adapters
from flower_grid import LocalGrid
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora.adapter import WHOLE, flatten, overlay
from fedlora.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from fedlora.config import make_config
from fedlora.flower.strategy import FedloraStrategy
from fedlora.flower.wire import read_order, refusal_content, reply_content, tensors_of
from fedlora.modes import Step
from fedlora.records import FIGURES

ROUNDS = 500
CLIENTS = [f"c{number}" for number in range(10)]
START = random_adapter(0)
pytestmark = pytest.mark.slow
app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    values: dict[str, Any] = {"client": context.node_config["name"], "examples": 5, "base": "b"}
    return Message(RecordDict({"reply": ConfigRecord(values)}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """A small seeded step; one answer in ten fails, is late, or is rubbish."""
    order = read_order(message.content)
    shapes = {name: tuple(t.shape) for name, t in flatten(START, order.plan.receives).items()}
    sent = tensors_of(message.content, shapes, free=".frozen_")
    rng = random.Random(f"{order.client} {order.round}")
    turn = rng.random()
    if turn < 0.03:
        raise RuntimeError("the process died")
    if turn < 0.06:
        return Message(refusal_content(order.client, "raised", "diverged"), reply_to=message)
    stream = torch.Generator().manual_seed(rng.randrange(2**31))
    shared = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=stream)
        for name, tensor in flatten(overlay(sent, START), order.plan.shares).items()
    }
    content = reply_content(order, shared, rng.randrange(1, 50), dict.fromkeys(FIGURES, turn))
    if turn < 0.10:
        content["arrays"] = ArrayRecord()
    return Message(content, reply_to=message)


def resident() -> int:
    """Memory of this process now, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_five_hundred_rounds_leave_memory_flat_and_give_the_same_bytes_after_a_stop(
    tmp_path: Path,
) -> None:
    config = make_config({
        "run.rounds": ROUNDS, "run.min_clients": 3, "run.max_failed_rounds": 3,
        "merge.rule": "fedex", "merge.fold_rank": 2, "merge.participation": 0.6, "model.rank": 2,
        "partition.clients": 10,
    })  # fmt: skip
    sizes: dict[int, int] = {}
    failures = 0

    def run(rounds: int, stop: int = 0) -> FedloraStrategy:
        def note(step: Step) -> None:
            nonlocal failures
            failures += len(step.failures)
            save_checkpoint(tmp_path / "kept", Checkpoint(step.round, step.loops, {}, {}))
            if step.round in (100, 300, ROUNDS):
                gc.collect()
                sizes[step.round] = resident()
            if step.round == stop:
                raise KeyboardInterrupt

        folder, progress = tmp_path / "kept", None
        if folder.exists():
            progress = latest_checkpoint(folder)[0].loops[""]
        strategy = FedloraStrategy(
            config, START, CLIENTS, base="b", progress=progress, note=note
        )  # fmt: skip
        grid = LocalGrid(app, {}, [{"name": name} for name in CLIENTS])
        arrays = ArrayRecord(flatten(START, WHOLE))
        strategy.start(grid, arrays, num_rounds=rounds - strategy.done_before, timeout=10)
        return strategy

    whole = run(ROUNDS).progress
    assert failures > 100
    assert sizes[ROUNDS] - sizes[100] < 8e6, sizes
    assert whole.state.memory["frozen_rank"] <= 2
    for path in (tmp_path / "kept").iterdir():
        path.unlink()
    (tmp_path / "kept").rmdir()
    with pytest.raises(KeyboardInterrupt):
        run(60, stop=41)
    again = run(60).progress
    for path in (tmp_path / "kept").iterdir():
        path.unlink()
    (tmp_path / "kept").rmdir()
    assert same_adapters(run(60).progress.state.adapter, again.state.adapter)
