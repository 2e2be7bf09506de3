"""All processes that a script starts, whoever their parent became: what they use, and their end.

Imported by the scripts beside it; reads /proc, so Linux only.
"""

from __future__ import annotations

import ctypes
import os
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
            for pid in below(os.getpid()).keys() - {os.getpid()}:
                with suppress(ProcessLookupError):
                    os.kill(pid, how)
            while len(below(os.getpid())) > 1 and time.monotonic() < until:
                reap()
                time.sleep(0.1)


class Watch:
    """What a process and all below it use together, looked at twice a second.

    `peak`: bytes, what is private to each and once the largest part that one shares (nearly all of
    that are the same libraries; PSS would divide them by the neighbours' processes as well), and
    `count` how many they were then. `seconds`: processor time by the number of lines in a log.
    """

    def __init__(self, root: int, log: Path, *, without_root: bool) -> None:
        self.root, self.log, self.without_root = root, log, without_root
        self.peak = self.count = 0
        self.seconds: dict[int, float] = {}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.over.wait(0.5):
            lines = len(self.log.read_text().splitlines()) if self.log.exists() else 0
            found = below(self.root)
            self.seconds.setdefault(lines, sum(found.values()))
            pids = found.keys() - ({self.root} if self.without_root else set())
            sizes = [size for size in map(private_and_shared, pids) if any(size)]
            total = sum(own for own, _ in sizes) + max((shared for _, shared in sizes), default=0)
            if total > self.peak:
                self.peak, self.count = total, len(sizes)

    def seconds_a_line(self, last: int) -> float:
        """Processor seconds of a line of the log, from the first that was seen to the last
        given.
        """
        seen = [lines for lines in self.seconds if 0 < lines <= last]
        first, last = min(seen), max(seen)
        return (self.seconds[last] - self.seconds[first]) / (last - first)


def below(root: int) -> dict[int, float]:
    """A process and its descendants, with the processor seconds of each and of its ended children.

    A zombie is among them until its parent has asked for it.
    """
    parents, seconds = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # gone meanwhile
            values = path.read_text().rpartition(")")[2].split()
            pid = int(path.parent.name)
            parents[pid] = int(values[1])
            seconds[pid] = sum(map(int, values[11:15])) / os.sysconf("SC_CLK_TCK")
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {pid: seconds[pid] for pid in found if pid in seconds}


def private_and_shared(pid: int) -> tuple[int, int]:
    """Resident bytes of a process that nobody else maps, and the others; zeros if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    sizes = {name: 1024 * int(size) for name, size, *_ in map(str.split, lines)}
    private = sizes["Private_Clean:"] + sizes["Private_Dirty:"]
    return private, sizes["Rss:"] - private


def reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
