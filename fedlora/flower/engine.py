"""Flower's own simulation on this machine: a SuperLink of our own, one run, and its end.

The same config as in one process gives the same adapter; it takes more time and memory, and tests
what a deployment does. Starts processes, and stops what it started.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedlora.checks import check_has_data
from fedlora.config import Config
from fedlora.data import read_silos
from fedlora.flower.project import write_project
from fedlora.runlog import run_folder
from fedlora.stopped import check_new

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
START, LOOK = 60.0, 2.0  # seconds: for a SuperLink to answer; between two looks at a run


def run_on_flower(config: Config) -> Path:
    """Runs the config in Flower's simulation and returns the run directory.

    RuntimeError, with the end of Flower's log, where the run does not end well.
    """
    if find_spec("ray") is None:
        raise ValueError("Flower's simulation is not installed: pip install 'fedlora[simulation]'")
    folder = run_folder(config).absolute()
    check_new(folder)
    check_has_data(config)
    clients = len(read_silos(config).parts)
    config = replace(config, run=replace(config.run, out=str(folder)))
    with tempfile.TemporaryDirectory(prefix="fedlora-flower-") as name:
        home = Path(name)
        write_project(home / "project", config)
        with superlink(home, clients) as environment:
            told = _flwr(environment, "run", str(home / "project"), "here", "--format", "json")
            run = str(told["run-id"])
            status = wait_for(environment, run)
        log = (home / "superlink.log").read_text(encoding="utf-8", errors="replace")
    if status != "finished:completed":
        tail = "\n".join(log.splitlines()[-20:])
        raise RuntimeError(f"Flower's run {run} ended as {status}; its log says:\n{tail}")
    return folder


@contextmanager
def superlink(home: Path, clients: int) -> Iterator[dict[str, str]]:
    """A SuperLink in simulation mode on a free port of this machine; yields the environment."""
    port = _free_port()
    path = os.pathsep.join([str(Path(_tool("flwr")).parent), os.environ.get("PATH", "")])
    environment = os.environ | QUIET | {"FLWR_HOME": str(home), "PATH": path}
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\n'
        f"insecure = true\noptions.num-supernodes = {clients}\n"
        "options.backend.client-resources.num-cpus = 1\n",
        encoding="utf-8",
    )
    command = [
        _tool("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1",
        "--port", str(port), "--isolation", "subprocess",
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    with (home / "superlink.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, cwd=home, start_new_session=True
        )
        try:
            _wait_for_port(process, port)
            yield environment
        finally:
            _stop(process)


def wait_for(environment: dict[str, str], run: str) -> str:
    """The status of a run once it has ended, such as `finished:completed`."""
    while True:
        listed = _flwr(environment, "list", "--run-id", run, "--format", "json")
        status = str(listed["runs"][0]["status"])
        if status.startswith("finished"):
            return status
        time.sleep(LOOK)


def _flwr(environment: dict[str, str], *arguments: str) -> Any:
    """What a command of `flwr` answers, as JSON; RuntimeError where it fails."""
    done = subprocess.run(
        [_tool("flwr"), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    try:
        answer = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError as error:
        said = (done.stdout + done.stderr).strip()[-600:]
        raise RuntimeError(f"flwr {arguments[0]} failed: {said}") from error
    if not answer.get("success", False):
        raise RuntimeError(f"flwr {arguments[0]} failed: {answer.get('error-message', answer)}")
    return answer


def _tool(name: str) -> str:
    """The program beside this Python, or on the path."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise ValueError(f"{name} is not installed: pip install 'fedlora[simulation]'")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(process: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + START
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"flower-superlink ended with code {process.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise RuntimeError(f"flower-superlink did not answer within {START:.0f} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the SuperLink and all that it started."""
    for signal in (15, 9):
        try:
            os.killpg(process.pid, signal)
            process.wait(timeout=15)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
