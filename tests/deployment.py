"""A deployment as the guide has it, on loopback: SuperLink, proxy and SuperNodes, started by the
guide's own commands but for addresses, ports and paths.

A test file says `pytest_plugins = ["tiny", "deployment"]` to get the fixture `deployment`, which
its tests share. (PYTEST_DONT_REWRITE: the names below are imported before the plugin is.)
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from bench import adapter_bytes
from tiny import toy_config, toy_rows, write_csv

from fedlora.config import Config, make_config
from fedlora.run import execute, prepare

NODES = ("north", "south", "west")
GUIDE = (resources.files("fedlora.flower") / "deployment.md").read_text(encoding="utf-8")
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
TICKS = os.sysconf("SC_CLK_TCK")
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed: the guide's proxy needs it"),
]


def step(name: str) -> str:
    """The code block of the guide behind `<!-- step: NAME -->`."""
    found = re.search(rf"<!-- step: {name} -->\n```\w+\n(.*?)```", GUIDE, flags=re.S)
    assert found, f"the guide has no step {name!r}"
    return found[1]


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@dataclass(frozen=True)
class Process:
    """What /proc says of a process: its command line, its parent, and when it began."""

    line: str
    parent: int
    began: float


class Deployment:
    """SuperLink, proxy and SuperNodes of the guide as processes of this machine."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.link, self.proxy, *self.ports = free_ports(2 + len(NODES))
        bin = str(Path(sys.executable).parent)
        self.environment = os.environ | {
            "FLWR_HOME": str(home / "flwr"),
            "PATH": os.pathsep.join([bin, os.environ.get("PATH", ""), "/usr/sbin"]),
            "OMP_NUM_THREADS": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def here(self, text: str) -> str:
        """A step with this machine's addresses and paths; a port is no part of a run's id."""
        for old, new in {
            "orchestrator.example.org:9443": f"localhost:{self.proxy}",
            "9443": str(self.proxy), "9091": str(self.link),
            "/etc/federation": str(self.home), "/srv/private": str(self.home),
            "/var/lib/fedlora": str(self.home / "state"), "/srv/federation": str(self.home),
        }.items():  # fmt: skip
            text = re.sub(rf"(?<!\d){re.escape(old)}(?!\d)", new, text)
        return text

    def shell(self, command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.here(command)], cwd=self.home, check=False,
            env=self.environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done

    def start(self, name: str, command: str) -> None:
        with (self.home / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                ["bash", "-c", self.here(command)], cwd=self.home, env=self.environment,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def family(self, name: str) -> dict[int, Process]:
        """A process started here and all that it started, by process id."""
        running = dict[int, Process]()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                stat = (path / "stat").read_text().rpartition(")")[2].split()
                line = (path / "cmdline").read_text(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended meanwhile
            running[int(path.name)] = Process(line, int(stat[1]), int(stat[19]) / TICKS)
        own = self.processes[name]
        found = {own.pid} & running.keys() if own.poll() is None else set()
        while more := {pid for pid, one in running.items() if one.parent in found} - found:
            found |= more
        return {pid: running[pid] for pid in found}

    def child(self, name: str, program: str, since: float = 0.0) -> int | None:
        """The process id of a program that SuperLink or SuperNode started after `since` (seconds
        since boot) and that still runs.
        """
        family = self.family(name).items()
        found = [pid for pid, one in family if program in one.line and one.began >= since]
        return found[0] if found else None

    def stop(self, name: str, how: int = signal.SIGTERM) -> None:
        """A signal to a process started here and to all that it started, and waits for its end."""
        for pid in self.family(name):
            with suppress(ProcessLookupError):
                os.kill(pid, how)
        process = self.processes.pop(name)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=20)

    def node(self, name: str) -> None:
        """Starts a SuperNode with its own port for its own processes."""
        port = self.ports[NODES.index(name)]
        command = step("supernode").replace("north", name).rstrip()
        self.start(name, f"{command} --host 127.0.0.1 --port {port}")

    def superlink(self) -> None:
        """Starts the SuperLink and waits until it answers."""
        self.start("superlink", step("superlink"))
        self.wait_for(lambda: self.answers(self.link, "/v1/control/list-runs") not in (0, 502))

    def flwr(self, *arguments: str) -> Any:
        text = self.shell(shlex.join(["flwr", *arguments, "--format", "json"])).stdout
        return json.loads(text[text.index("{") :])

    def run(self, project: str = "project") -> str:
        """Starts a run of a project, as the guide has it; its id."""
        return str(self.flwr("run", project, "federation")["run-id"])

    def status(self, run: str) -> str:
        """The run's status.

        What `flwr list` says instead while a busy SuperLink does not answer.
        """
        found = self.flwr("list", "federation", "--run-id", run)
        return str(found["runs"][0]["status"]) if found.get("runs") else f"unanswered: {found}"

    def answers(self, port: int, path: str, *options: str) -> int:
        """The HTTP status of a POST to a path, over TLS, with the guide's CA."""
        done = self.shell(
            f"curl -s -o /dev/null -w '%{{http_code}}' --cacert ca.crt -X POST "
            f"{shlex.join(options)} https://localhost:{port}{path}", check=False,
        )  # fmt: skip
        return int(done.stdout or 0)

    def wait_for(self, what: Callable[[], Any], seconds: float = 60, pause: float = 0.5) -> None:
        until = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < until, self.logs()
            time.sleep(pause)

    def in_round(self, name: str, run: str, round: int) -> int:
        """Waits until a node trains this round of this run; the process id of its ClientApp."""
        log, begun, before = self.home / f"{name}.log", f"[RUN {run}, ROUND {round}]", 0.0

        def received() -> bool:
            nonlocal before
            now = time.clock_gettime(time.CLOCK_BOOTTIME)
            found = begun in log.read_text()
            before = before if found else now - 1 / TICKS
            return found

        def clientapp() -> int | None:  # not that of the message before, which may still be ending
            return self.child(name, "flwr-clientapp", before)

        self.wait_for(received, 240, 0.1)
        self.wait_for(clientapp, pause=0.1)
        pid = clientapp()
        assert pid
        maps = Path(f"/proc/{pid}/maps")  # once torch is loaded it has its order
        self.wait_for(lambda: "libtorch" in maps.read_text(), pause=0.1)
        return pid

    def wait_for_run(self, run: str, seconds: float = 240) -> str:
        """How the run ended, such as `finished:completed`."""
        seen: list[str] = []

        def ended() -> bool:
            if self.child("superlink", "flwr-serverapp"):  # asking takes two seconds of a core
                return False
            seen.append(self.status(run))
            return seen[-1].startswith("finished")

        self.wait_for(ended, seconds, 4)
        return seen[-1]

    def logs(self) -> str:
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}"
            for path in sorted(self.home.glob("*.log"))
        )


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The guide's steps 2 to 6."""
    home = tmp_path_factory.mktemp("deployment")
    made = Deployment(home)
    try:
        made.shell(step("certificates"))
        (home / "flwr").mkdir()
        (home / "flwr" / "config.toml").write_text(made.here(step("connection")))
        made.superlink()
        for name in NODES:
            made.shell(step("key").replace("north", name))
            made.shell(step("register").replace("north", name))
        (home / "nginx.conf").write_text(
            f"daemon off; pid {home}/nginx.pid; error_log {home}/nginx.log;\n"
            + made.here(step("proxy"))
        )
        made.start("nginx", f"{NGINX} -p {home} -c {home}/nginx.conf")
        made.wait_for(lambda: made.answers(made.proxy, "/") == 403)
        for name in NODES:
            made.node(name)
        yield made
    finally:
        for name in [*made.processes]:
            made.stop(name)


def federation(base: Path, home: Path, name: str = "triage", **changes: Any) -> Config:
    """A run over the nodes' files, as the guide's step 7 has it."""
    rows = toy_rows(60)
    for number, node in enumerate(NODES):
        write_csv(home / f"{node}.csv", rows[20 * number : 20 * number + 20])
    shared = write_csv(home / "shared.csv", toy_rows(20, seed=9))
    flat: dict[str, Any] = {
        "data__labels": ["neg", "pos"], "data__evaluate": str(shared),
        "flower__clients": list(NODES), "flower__wait": 120.0, "flower__deadline": 150.0,
        "run__name": name, "run__out": str(home / "runs" / name),
    }  # fmt: skip
    return toy_config(base, "", **flat | changes)


def plain_bytes(config: Config, home: Path, absent: Collection[tuple[str, int]] = ()) -> bytes:
    """The same federation in one process, which has all files; these (client, round) fail there."""
    flat = config.flat() | {"flower.clients": "[]", "run.out": f"{config.run.out}-plain"}
    flat["data.clients"] = json.dumps({name: str(home / f"{name}.csv") for name in NODES})

    def watch(event: str, facts: Any) -> None:
        if event == "fit" and (facts["client"], facts["round"]) in absent:
            raise ValueError("absent")

    return adapter_bytes(execute(prepare(make_config(flat)), watch))
