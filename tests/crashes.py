"""Runs that are killed, and disks that fail: what the tests of crashes and the fault table share.

Knows runs and files; no messages and no clients.
"""

from __future__ import annotations

import io
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import Place, adapter_bytes, summary

from fedlora.recording import Job
from fedlora.resume import find
from fedlora.run import execute, prepare

ROUNDS = 3
SETTINGS = {"run__rounds": ROUNDS, "client__optimiser": "keep", "merge__rule": "fedex"}


def killed_at(job: Job, point: str) -> Path:
    """Runs in a child process that kills itself when it reaches a point for the n-th time.

    Points are `event:n` for the events of a run, `half:n` for the n-th checkpoint half written,
    and `fsync:n`, `replace:n`, `rename:n`, `mkdtemp:n` with, after the call, `fsyncd:n` and so on.
    """
    child = os.fork()
    if child == 0:
        try:
            _watch_for(job, point)
        finally:
            os._exit(0)  # whatever happens, the child must not go on as its parent
    if os.WTERMSIG(os.waitpid(child, 0)[1]) != signal.SIGKILL:
        raise RuntimeError(f"{point} was never reached")
    return job.folder


def killed_after(job: Job, seconds: float) -> Path:
    """Runs in a child process that is killed after so many seconds, or has ended by then."""
    child = os.fork()
    if child == 0:
        try:
            execute(job)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return job.folder


def finished(place: Place, folder: Path) -> bytes:
    """The adapter of a person who starts or resumes the run until it has ended."""
    if not folder.exists():  # killed before there was a run
        return adapter_bytes(place.run(folder.name, **SETTINGS))
    if not ended(folder):
        config, state = find(folder)
        execute(prepare(config, state))
    return adapter_bytes(folder)


def ended(folder: Path) -> bool:
    return (folder / "summary.json").exists() and not summary(folder)["interrupted"]


@contextmanager
def failing_sync(code: int, number: int) -> Iterator[None]:
    """A disk that takes nothing from the n-th sync on and says so with this error code."""
    calls, real = 0, os.fsync

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= number:
            raise OSError(code, os.strerror(code))
        real(handle)

    os.fsync = fsync
    try:
        yield
    finally:
        os.fsync = real


def _watch_for(job: Job, point: str) -> None:
    """Runs until the point; what it wraps stays wrapped: for a process that ends here."""
    where, _, number = point.partition(":")
    hits = 0

    def reached(place: str) -> None:
        nonlocal hits
        hits += place == where
        if place == where and hits == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    for module, function in ((os, "fsync"), (os, "replace"), (os, "rename"), (tempfile, "mkdtemp")):
        _tell(module, function, reached)
    _halve_checkpoints(reached)
    execute(job, lambda event, facts: reached(event))


def _tell(module: Any, function: str, reached: Callable[[str], None]) -> None:
    inner = getattr(module, function)

    def outer(*args: Any, **options: Any) -> Any:
        reached(function)
        result = inner(*args, **options)
        reached(f"{function}d")
        return result

    setattr(module, function, outer)


def _halve_checkpoints(reached: Callable[[str], None]) -> None:
    class Halved(io.FileIO):
        writes = 0

        def write(self, data: Any) -> int:
            self.writes += 1
            if self.writes != 2:  # the head is whole, the first tensor is not
                return super().write(data)
            half = super().write(data[: len(data) // 2])
            reached("half")
            return half + super().write(data[half:])

    inner = Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if path.name.endswith(".ckpt.tmp"):
            return Halved(path, mode)
        return inner(path, mode, *args, **options)

    Path.open = opened
