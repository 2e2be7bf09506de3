"""Killed at any moment, on a full disk, with damaged files: a run goes on to the same bytes."""

from __future__ import annotations

import errno
import os
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench import Place, adapter_bytes
from conftest import random_adapter, same_adapters
from crashes import SETTINGS, failing_sync, finished, killed_after, killed_at
from safetensors.torch import save

from fedlora.adapter import ClientState
from fedlora.checkpoint import (
    Checkpoint,
    NoCheckpointError,
    decoded,
    encoded,
    latest_checkpoint,
    save_checkpoint,
)
from fedlora.resume import find
from fedlora.run import execute
from fedlora.server import ServerState
from fedlora.simulation import Progress
from fedlora.tensorfile import file_image

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]
POINTS = [
    "start:1", "evaluate:1", "round:1", "fit:1", "fit:5", "fitted:1", "fitted:6", "evaluate:2",
    "round:2", "fsync:2", "fsync:4", "fsync:5", "fsync:6", "half:1", "half:2", "fsync:9",
    "fsync:11", "replace:1", "replace:3", "replace:4", "replaced:3", "replaced:4", "mkdtemp:1",
    "rename:1", "mkdtemp:2", "rename:2", "fsync:8", "fsync:13", "replace:5", "replaced:5",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, bytes, float]:
    """A place, the bytes of an uninterrupted run in it, and its seconds."""
    place = Place(tiny("bert"), tmp_path_factory.mktemp("crash"))
    job = place.job("whole", **SETTINGS)
    began = time.perf_counter()
    execute(job)
    return place, adapter_bytes(place.folder / "whole"), time.perf_counter() - began


def same_in_the_end(place: Place, folder: Path, want: bytes) -> None:
    assert finished(place, folder) == want
    with pytest.raises(ValueError, match="has ended"):
        find(folder)


@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_is_killed_at_a_step_goes_on_to_the_same_bytes(
    whole: tuple[Place, bytes, float], point: str
) -> None:
    place, want, _ = whole
    folder = killed_at(place.job(point.replace(":", "-"), **SETTINGS), point)
    same_in_the_end(place, folder, want)


@pytest.mark.slow
def test_a_run_that_is_killed_at_twenty_random_moments_goes_on_to_the_same_bytes(
    whole: tuple[Place, bytes, float],
) -> None:
    place, want, seconds = whole
    rng = random.Random(3)
    for number in range(20):
        job = place.job(f"random-{number}", **SETTINGS)
        same_in_the_end(place, killed_after(job, rng.random() * seconds), want)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("number", [5, 6, 8, 9])
def test_a_full_or_broken_disk_says_so_and_leaves_what_was_there(
    whole: tuple[Place, bytes, float], code: int, number: int
) -> None:
    place, want, _ = whole
    job = place.job(f"disk-{code}-{number}", **SETTINGS)
    with failing_sync(code, number), pytest.raises(OSError, match=os.strerror(code)):
        execute(job)
    same_in_the_end(place, job.folder, want)


def test_on_a_full_disk_the_first_error_is_the_one_that_is_raised(
    whole: tuple[Place, bytes, float],
) -> None:
    """What is saved at the end cannot be written either; that is noted, and hides nothing."""
    job = whole[0].job("first-error", **SETTINGS)
    with (
        failing_sync(errno.ENOSPC, 14),
        pytest.raises(OSError, match=r"checkpoints/round-000002\.ckpt: No space") as caught,
    ):
        execute(job)
    (note,) = caught.value.__notes__
    assert note.startswith("the results so far could not be saved either: cannot write")


def checkpoint(seed: int = 0) -> Checkpoint:
    state = ServerState(random_adapter(seed), {"merge_error": 0.1}, random_adapter(2).layers)
    own = {"a": ClientState(random_adapter(3), random_adapter(4).dense), "b": ClientState()}
    return Checkpoint(seed, {"": Progress(seed, state, own)}, {"": random_adapter(5)},
                      {"best": [0.5, 1]})  # fmt: skip


def test_a_checkpoint_is_read_back_bit_for_bit() -> None:
    got, want = decoded(encoded(checkpoint(7))), checkpoint(7)
    assert (got.round, got.notes) == (want.round, want.notes)
    mine, theirs = got.loops[""], want.loops[""]
    assert mine.round == theirs.round
    assert mine.state.memory == theirs.state.memory
    assert same_adapters(mine.state.adapter, theirs.state.adapter)
    assert same_adapters(got.best[""], want.best[""])
    assert list(mine.state.carried) == list(theirs.state.carried)
    assert mine.clients["a"].adapter is not None
    assert same_adapters(mine.clients["a"].adapter, random_adapter(3))
    assert mine.clients["a"].optimiser.keys() == theirs.clients["a"].optimiser.keys()
    assert mine.clients["b"].adapter is None
    assert encoded(got) == encoded(want)


def test_a_checkpoint_holds_the_bytes_that_the_safetensors_library_writes() -> None:
    """Older versions read it; wide numbers come first, then the order is that of the names."""
    odd = {
        "a": torch.arange(5),
        "b": torch.ones(2, 3, dtype=torch.bfloat16),
        "c": torch.zeros(0, 4),
        "d": torch.tensor(2.5),
        "e": torch.ones(3, dtype=torch.uint8),
        "\u00e9": torch.ones(6).reshape(2, 3).T,
    }
    opening, numbers = file_image(odd)
    assert opening + b"".join(numbers) == save({n: t.contiguous() for n, t in odd.items()})


def test_writing_a_checkpoint_copies_no_clients_state(tmp_path: Path) -> None:
    """The states of all clients may be most of what the process holds: here 16 MB."""
    states = {f"c{k}": ClientState(None, {"moment": torch.ones(10**6)}) for k in range(4)}
    big = Checkpoint(1, {"": Progress(1, ServerState(random_adapter(1)), states)}, {}, {})
    tracemalloc.start()
    save_checkpoint(tmp_path, big)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
    found = latest_checkpoint(tmp_path)[0].loops[""].clients
    assert torch.equal(found["c3"].optimiser["moment"], torch.ones(10**6))


def test_each_of_two_hundred_flipped_or_cut_files_is_noticed(tmp_path: Path) -> None:
    """With the one before to fall back on it is taken, without one the folder is refused."""
    rng = random.Random(11)
    data = encoded(checkpoint(2))
    save_checkpoint(tmp_path, checkpoint(1))
    newest = save_checkpoint(tmp_path, checkpoint(2))
    for number in range(200):
        if number % 2:
            place, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
            spoiled = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
        else:
            spoiled = data[: rng.randrange(len(data))]
        newest.write_bytes(spoiled)
        found, problems = latest_checkpoint(tmp_path)
        assert found.round == 1
        assert len(problems) == 1
        assert f"{newest} is damaged" in problems[0]
    for path in tmp_path.iterdir():
        path.write_bytes(spoiled)
    with pytest.raises(NoCheckpointError, match="no whole checkpoint"):
        latest_checkpoint(tmp_path)


def test_only_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    for seed in range(5):
        save_checkpoint(tmp_path, checkpoint(seed))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "round-000003.ckpt", "round-000004.ckpt"
    ]  # fmt: skip
