"""Files that are there whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"  # in the folder that it keeps, gone with its owner unless that was killed
SOON = 0.25  # seconds


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
        _move(temporary, path)
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

    The system gives the lock back when the process ends, however it does. Where the system or the
    disk knows no locks, two at the same time are the user's own care.
    """
    path = folder / LOCK
    handle = _lock(path, seconds)
    if handle is None:
        yield
        return
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is given back: nobody else can have it yet
        os.close(handle)


def check_free(folder: Path) -> None:
    """ValueError, with who has it, where another process keeps the folder by `locked`."""
    if keeper := owner(folder):
        raise ValueError(
            f"{folder} is in use by another process ({keeper}): wait until it ends, or stop it "
            "there with Ctrl-C"
        )


def owner(folder: Path) -> str | None:
    """The process that keeps the folder by `locked`, empty for none; None where none can tell."""
    try:
        import fcntl

        with (folder / LOCK).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read(200).decode(errors="replace") or "it has just begun"
        return ""
    except FileNotFoundError:
        return ""
    except (ImportError, OSError):  # Windows; a disk without locks; a file of somebody else's
        return None


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, each there to stay."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


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


def _move(temporary: Path, path: Path) -> None:
    """Gives a folder its name; ValueError where somebody else was faster."""
    try:
        temporary.rename(path)
    except OSError:
        if not path.exists():
            raise
        raise ValueError(f"{path} has been made by another process just now") from None


def _lock(path: Path, seconds: float) -> int | None:
    """An open handle of the locked file, None where there are no locks; ValueError as `locked`.

    Tried for a quarter of a second at least: `owner` holds the lock for a moment, and the file that
    was locked may be one that its last owner was about to remove.
    """
    try:
        import fcntl
    except ImportError:
        return None
    until = time.monotonic() + max(seconds, SOON)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BlockingIOError:
            pass
        except OSError:
            os.close(handle)
            return None
        os.close(handle)
        if time.monotonic() >= until:  # asked last: a process that was held up has tried, too
            check_free(path.parent)
            raise ValueError(f"{path.parent} is in use by another process: wait for it")
        time.sleep(SOON / 5)
