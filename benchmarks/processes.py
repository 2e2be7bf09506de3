"""All processes that a script starts, whoever their parent became: their memory, and their end.

Imported by the scripts beside it; reads /proc, so Linux only.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: orphans below this process become its children


@contextmanager
def ended_with_this() -> Iterator[None]:
    """Ends every process that was started below this one in the block, those set free included.

    Also where this one is ended by Ctrl-C or SIGTERM.
    """
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    try:
        yield
    finally:
        for how in (signal.SIGTERM, signal.SIGKILL):
            until = time.monotonic() + 10
            for pid in below(os.getpid()):
                with suppress(ProcessLookupError):
                    os.kill(pid, how)
            while below(os.getpid()) and time.monotonic() < until:
                reap()
                time.sleep(0.1)


class Memory:
    """The largest memory that all processes below one had together, in bytes, and their number.

    What is private to each, and once the largest part that one shares: nearly all of that are the
    same libraries. (PSS would divide them by the neighbours' processes as well.)
    """

    def __init__(self, root: int, *, itself: bool) -> None:
        self.root, self.itself = root, itself
        self.peak, self.processes = 0, 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self) -> Memory:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.over.wait(0.5):
            found = [self.root] * self.itself + below(self.root)
            sizes = [size for size in map(private_and_shared, found) if any(size)]
            total = sum(own for own, _ in sizes) + max((shared for _, shared in sizes), default=0)
            if total > self.peak:
                self.peak, self.processes = total, len(sizes)


def below(root: int) -> list[int]:
    """The living descendants of a process."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:  # gone meanwhile
                continue
            if state != "Z":
                children.setdefault(int(parent), []).append(int(folder.name))
    found, next_ones = [], [root]
    while next_ones:
        next_ones = [child for parent in next_ones for child in children.get(parent, [])]
        found += next_ones
    return found


def private_and_shared(pid: int) -> tuple[int, int]:
    """Resident bytes of a process that nobody else maps, and the others; zeros if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    sizes = {name: 1024 * int(size) for name, size, *_ in map(str.split, lines)}
    private = sizes["Private_Clean:"] + sizes["Private_Dirty:"]
    return private, sizes["Rss:"] - private


def spent_below() -> float:
    """Processor seconds of all processes below this one that have ended."""
    reap()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
