"""Files that are there whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` at the end.

    ValueError if `path` exists.
    """
    if path.exists():
        raise ValueError(f"{path} exists already; nothing was written: name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        sync_folder(temporary)
        temporary.rename(path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file (UTF-8) in one step, in place of an older one if there is one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file in one step: temporary name, sync, rename, sync of the folder.

    OSError (a full or a broken disk) leaves an older file as it was and no temporary one.
    """
    write_pieces(path, [data])


def write_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """`write_bytes` of pieces that follow one another: nothing is joined in memory."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror or error}; nothing changed") from error
    temporary.replace(path)
    sync_folder(path.parent)


@contextmanager
def locked(folder: Path, seconds: float = 0.0) -> Iterator[None]:
    """Keeps the folder for this process until the end; ValueError where another one has it for
    longer than so many seconds.

    The system gives the lock back when the process ends, however it does.
    """
    try:
        import fcntl
    except ImportError:  # Windows: two at the same time are the user's own care
        yield
        return
    until = time.monotonic() + seconds
    with (folder / ".lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    reason = f"{folder} is in use by another process: wait for it"
                    raise ValueError(reason) from None
            time.sleep(0.05)
        yield


def sync_folder(folder: Path) -> None:
    """Makes a rename in the folder outlast a loss of power, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
