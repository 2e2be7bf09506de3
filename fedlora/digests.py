"""Which bytes a run was made with: a SHA-256 and the rows of each of its data files.

Reads files and knows no run directory; what comes from a hub or a package has a version instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fedlora.settings import DataSettings
from fedlora.sources import data_files

SHOWN = 19  # characters of `sha256 ...` in a message


def data_record(settings: DataSettings, rows: Mapping[str, int]) -> dict[str, str]:
    """For each data file, by its setting (`data.train`, `data.clients.NAME`): hash and rows.

    `rows` are the numbers of rows by the same names; OSError where a file cannot be read.
    """
    return {
        key: f"sha256 {digest(path)}" + (f", {rows[key]} rows" if key in rows else "")
        for key, path in data_files(settings.train, settings.evaluate, settings.clients).items()
    }


def changed_data(settings: DataSettings, known: Mapping[str, Any]) -> list[str]:
    """Each data file that is not what `known`, which holds an earlier `data_record`, says of it."""
    found = []
    files = data_files(settings.train, settings.evaluate, settings.clients)
    for key, path in files.items():
        then, _, rows = str(known.get(key, "")).partition(", ")
        now = f"sha256 {digest(path)}" if path.is_file() else "gone"
        if then not in ("", now):
            was = ", ".join(part for part in (then[:SHOWN], rows) if part)
            found.append(f"{path} ({key}) is {now[:SHOWN]} now, {was} then")
    return found


def digest(path: Path) -> str:
    """The SHA-256 of a file, read once in a process as long as its size and time stay."""
    state = path.stat()
    return _digest(path, state.st_size, state.st_mtime_ns)


@cache
def _digest(path: Path, size: int, time: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
