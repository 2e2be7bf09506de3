"""What a message costs beyond the numbers in it, and that these come through to the bit."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from fedlora.adapter import PARTS
from fedlora.flower.wire import Order, order_content, packed, reply_content, tensors_of
from fedlora.rules import Plan

ORDER = Order("demo/0", 1, "0", Plan(PARTS, PARTS, PARTS), "0123456789abcdef", "id")


def trained() -> dict[str, Tensor]:
    """The tensors of MiniLM's adapter of rank 8, no two alike."""
    stream = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"classifier.weight": (2, 384), "classifier.bias": (2,)}
    for layer in range(6):
        for part in ("query", "value"):
            name = f"bert.encoder.layer.{layer}.attention.self.{part}"
            shapes |= {f"{name}.lora_A": (8, 384), f"{name}.lora_B": (384, 8)}
    return {name: torch.randn(shape, generator=stream) for name, shape in shapes.items()}


def objects(record: Any) -> list[bytes]:
    """The parts that Flower sends, each in a request of its own."""
    below = (record.children or {}).values()
    return [record.deflate(), *(part for child in below for part in objects(child))]


@pytest.mark.parametrize("content", [
    order_content(ORDER, packed(trained())),
    reply_content(ORDER, trained(), 100, {"train_loss": 0.1, "seconds_compute": 1.0, "steps": 20}),
], ids=["down", "up"])  # fmt: skip
def test_a_message_is_at_most_two_percent_more_than_its_numbers_in_few_parts(
    content: RecordDict,
) -> None:
    parts = objects(content)
    assert sum(map(len, parts)) < 1.02 * sum(4 * tensor.numel() for tensor in trained().values())
    assert len(parts) <= 7


def test_tensors_come_through_to_the_bit_in_any_order_and_of_any_shape() -> None:
    """Empty and single ones too, signed zeros, and numbers that are none."""
    sent = {"b": torch.randn(3, 5).T, "a": torch.zeros(0, 4), "d": torch.tensor(-0.0),
            "c": torch.tensor([float("nan"), 1e-45, float("-inf")])}  # fmt: skip
    want = {name: tuple(tensor.shape) for name, tensor in sent.items()}
    names = list(sent)
    for seed in range(5):
        random.Random(seed).shuffle(names)
        content = order_content(ORDER, packed({name: sent[name] for name in names}))
        layout = content.config_records["layout"]
        content["layout"] = ConfigRecord({name: layout[name] for name in names})
        got = tensors_of(content, want)
        assert {name: tuple(tensor.shape) for name, tensor in got.items()} == want
        for name, tensor in got.items():
            assert tensor.numpy().tobytes() == sent[name].numpy().tobytes()
            assert tensor.untyped_storage().nbytes() == 4 * tensor.numel()
    assert tensors_of(order_content(ORDER, packed({})), {}) == {}
