"""One process at a time in a folder, and nothing left of it."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from itertools import count
from pathlib import Path

import pytest

from fedlora.files import check_free, locked, new_folder, owner


def test_a_folder_is_kept_for_one_at_a_time_and_says_who_has_it(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert str(owner(tmp_path)).startswith(f"process {os.getpid()} on ")
        with pytest.raises(ValueError, match=f"in use by another process .process {os.getpid()}"):
            locked(tmp_path).__enter__()
        with pytest.raises(ValueError, match="wait until it ends, or stop it there with Ctrl-C"):
            check_free(tmp_path)
    assert owner(tmp_path) == ""
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        pass


def test_what_a_killed_process_leaves_is_no_lock(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / ".lock").exists()
    assert owner(tmp_path) == ""
    check_free(tmp_path)
    with locked(tmp_path):
        assert str(os.getpid()) in str(owner(tmp_path))


def test_a_lock_on_a_file_that_its_last_owner_removed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next one would make a new file, and both would have the folder."""
    real, calls = fcntl.flock, []

    def flock(handle: int, how: int) -> None:
        if not calls:
            (tmp_path / ".lock").unlink()  # between our opening and our locking
        calls.append(how)
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        assert str(os.getpid()) in str(owner(tmp_path))


def test_a_process_that_was_held_up_still_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine its time may be over before its first try: the folder is free, though."""
    clock = count(0.0, 100.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with locked(tmp_path):
        assert str(os.getpid()) in str(owner(tmp_path))


def test_a_folder_that_another_made_meanwhile_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "run"
    making = new_folder(path)
    making.__enter__()
    path.mkdir()
    (path / "theirs").touch()
    with pytest.raises(ValueError, match="made by another process just now"):
        making.__exit__(None, None, None)
    assert [file.name for file in tmp_path.rglob("*")] == ["run", "theirs"]
