"""Many clients: replies wait on disk, layers are read one client after another; the bits stay."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import pytest
import torch
from bench import adapter_bytes
from conftest import random_adapter, random_factors, same_adapters
from tiny import toy_config, toy_rows, write_csv

from fedlora import server
from fedlora.adapter import ClientResult, Factors, flatten
from fedlora.rules import get_rule, rule_names
from fedlora.run import execute, prepare
from fedlora.server import ServerState, aggregate
from fedlora.shelf import on_disk, shelf

pytest_plugins = ["tiny"]


def test_what_waits_on_disk_comes_back_to_the_bit_and_leaves_no_file(tmp_path: Path) -> None:
    tensors = flatten(random_adapter(1))
    kept = on_disk(tensors, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert kept.keys() == tensors.keys()
    assert all(torch.equal(kept[name], tensors[name]) for name in tensors)
    empty = {"none": torch.zeros(0, 3)}
    assert on_disk(empty, tmp_path)["none"].shape == (0, 3)
    with pytest.raises(TypeError, match=r"'x' is torch.float64"):
        on_disk({"x": torch.zeros(2).double()}, tmp_path)


def test_replies_go_to_disk_only_beyond_the_limit(tmp_path: Path) -> None:
    tensors = {"x": torch.ones(3)}
    assert shelf(tmp_path, 1000, 1000)(tensors) is tensors
    moved = shelf(tmp_path, 1001, 1000)(tensors)
    assert moved["x"].data_ptr() != tensors["x"].data_ptr()


def test_a_run_whose_replies_wait_on_disk_gives_the_same_bytes(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    data = str(write_csv(tmp_path / "rows.csv", toy_rows(60)))
    config = toy_config(tiny("bert"), data, run__out=str(tmp_path / "memory"))
    moved = replace(config, run=replace(config.run, out=str(tmp_path / "disk"), replies_mb=0))
    assert adapter_bytes(execute(prepare(config))) == adapter_bytes(execute(prepare(moved)))
    assert not list((tmp_path / "disk").glob(".reply-*"))


@pytest.mark.parametrize("name", rule_names())
def test_layers_that_are_read_lazily_merge_to_the_same_bits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = random_adapter(0)
    results = [ClientResult(f"c{k}", random_adapter(k + 1), k + 1) for k in range(4)]
    if name in ("ffa", "fedsvd"):  # A never changes
        results = [
            replace(result, adapter=replace(result.adapter, layers={
                layer: Factors(start.layers[layer].A, factors.B, factors.scaling)
                for layer, factors in result.adapter.layers.items()
            })) for result in results
        ]  # fmt: skip
    whole = aggregate(get_rule(name), ServerState(start), results, 1)
    monkeypatch.setattr(server, "HELD", 0)
    lazy = aggregate(get_rule(name), ServerState(start), results, 1)
    assert same_adapters(lazy.adapter, whole.adapter)
    error = whole.memory["merge_error"]
    assert lazy.memory["merge_error"] == pytest.approx(error, rel=0.5, abs=1e-6)
    if error > 1e-3:  # sketched, since exact norms need the stack of all clients
        assert lazy.memory["merge_error"] != error


class Watched(Sequence[Factors]):
    """Factors made when they are asked for; how many are alive at once at most."""

    def __init__(self, clients: int) -> None:
        self.clients, self.alive, self.most = clients, weakref.WeakSet[Factors](), 0

    def __len__(self) -> int:
        return self.clients

    @overload
    def __getitem__(self, index: int) -> Factors: ...
    @overload
    def __getitem__(self, index: slice) -> list[Factors]: ...
    def __getitem__(self, index: int | slice) -> Factors | list[Factors]:
        if isinstance(index, slice):
            raise TypeError("one at a time")
        if index >= self.clients:
            raise IndexError(index)
        made = random_factors(index, 7, 5, 2)
        self.alive.add(made)
        self.most = max(self.most, len(self.alive))
        return made


@pytest.mark.parametrize("name", ["fedavg", "ffa", "rolora", "fedsa"])
def test_means_of_factors_hold_one_client_at_a_time(name: str) -> None:
    clients = Watched(20)
    get_rule(name)(random_factors(99, 7, 5, 2), clients, [0.05] * 20)
    assert clients.most <= 2
