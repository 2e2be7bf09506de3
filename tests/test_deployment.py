"""The deployment guide, step by step, on loopback: every command in it is run as it stands, but for
addresses, ports and paths.
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
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from bench import adapter_bytes, records
from tiny import toy_config, toy_rows, write_csv

from fedlora.config import Config, make_config
from fedlora.run import execute, prepare

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]
NODES = ("north", "south", "west")
GUIDE = (resources.files("fedlora.flower") / "deployment.md").read_text(encoding="utf-8")
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = [
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
        """A step with this machine's addresses and paths."""
        for old, new in {
            "orchestrator.example.org:9443": f"localhost:{self.proxy}",
            "9443": str(self.proxy), "9091": str(self.link),
            "/etc/federation": str(self.home), "/srv/private": str(self.home),
            "/var/lib/fedlora": str(self.home / "state"), "/srv/federation": str(self.home),
        }.items():  # fmt: skip
            text = text.replace(old, new)
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

    def stop(self, name: str, how: int = signal.SIGTERM) -> None:
        process = self.processes.pop(name)
        try:
            os.killpg(process.pid, how)
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=20)
        except ProcessLookupError:
            pass

    def node(self, name: str) -> None:
        """Starts a SuperNode with its own port for its own processes."""
        port = self.ports[NODES.index(name)]
        command = step("supernode").replace("north", name).rstrip()
        self.start(name, f"{command} --host 127.0.0.1 --port {port}")

    def flwr(self, *arguments: str) -> Any:
        text = self.shell(shlex.join(["flwr", *arguments, "--format", "json"])).stdout
        return json.loads(text[text.index("{") :])

    def answers(self, port: int, path: str, *options: str) -> int:
        """The HTTP status of a POST to a path, over TLS, with the guide's CA."""
        done = self.shell(
            f"curl -s -o /dev/null -w '%{{http_code}}' --cacert ca.crt -X POST "
            f"{shlex.join(options)} https://localhost:{port}{path}", check=False,
        )  # fmt: skip
        return int(done.stdout or 0)

    def wait_for(self, what: Callable[[], bool], seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < until, self.logs()
            time.sleep(0.5)

    def logs(self) -> str:
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}"
            for path in sorted(self.home.glob("*.log"))
        )

    def wait_for_run(self, run: str, seconds: float = 240) -> str:
        status = ""

        def over() -> bool:
            nonlocal status
            status = self.flwr("list", "federation", "--run-id", run)["runs"][0]["status"]
            return status.startswith("finished")

        self.wait_for(over, seconds)
        return status


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    """The guide's steps 2 to 6."""
    made = Deployment(tmp_path)
    try:
        made.shell(step("certificates"))
        made.start("superlink", step("superlink"))
        (tmp_path / "flwr").mkdir()
        (tmp_path / "flwr" / "config.toml").write_text(made.here(step("connection")))
        made.wait_for(lambda: made.answers(made.link, "/v1/control/list-runs") not in (0, 502))
        for name in NODES:
            made.shell(step("key").replace("north", name))
            made.shell(step("register").replace("north", name))
        (tmp_path / "nginx.conf").write_text(
            f"daemon off; pid {tmp_path}/nginx.pid; error_log {tmp_path}/nginx.log;\n"
            + made.here(step("proxy"))
        )
        made.start("nginx", f"{NGINX} -p {tmp_path} -c {tmp_path}/nginx.conf")
        made.wait_for(lambda: made.answers(made.proxy, "/") == 403)
        for name in NODES:
            made.node(name)
        yield made
    finally:
        for name in [*made.processes]:
            made.stop(name)


def federation(tiny: Tiny, folder: Path, **changes: Any) -> Config:
    """A run over the nodes' files, as the guide's step 7 has it."""
    rows = toy_rows(60)
    for number, name in enumerate(NODES):
        write_csv(folder / f"{name}.csv", rows[20 * number : 20 * number + 20])
    shared = write_csv(folder / "shared.csv", toy_rows(20, seed=9))
    return toy_config(
        tiny("bert"), "", data__labels=["neg", "pos"], data__evaluate=str(shared),
        flower__clients=list(NODES), flower__wait=120.0, flower__deadline=150.0,
        run__out=str(folder / "runs" / "triage"), **changes,
    )  # fmt: skip


def plain_bytes(config: Config, folder: Path) -> bytes:
    """The same federation in one process, which has all files."""
    flat = config.flat() | {"flower.clients": "[]", "run.out": str(folder / "plain")}
    flat["data.clients"] = json.dumps({name: str(folder / f"{name}.csv") for name in NODES})
    return adapter_bytes(execute(prepare(make_config(flat))))


def test_the_guide_works_as_written_and_gives_the_plain_loops_bytes(
    tiny: Tiny, tmp_path: Path, deployment: Deployment
) -> None:
    """The proxy refuses what it should, and a fourth key without registration is not let in."""
    for path in ("/v1/control/start-run", "/v1/control/register-node", "/v1/control/list-runs",
                 "/v1/runtime/pull-messages", "/health", "/", "/v1/fleet", "/v1//control/list-runs",
                 "/v1/fleet/../control/list-runs"):  # fmt: skip
        assert deployment.answers(deployment.proxy, path, "--path-as-is") in (301, 403, 400), path
    (tmp_path / "large").write_bytes(b"0" * (65 << 20))
    options = ("--data-binary", "@large")
    assert deployment.answers(deployment.proxy, "/v1/fleet/push-object", *options) == 413
    assert deployment.answers(deployment.proxy, "/v1/fleet/pull-messages") in range(400, 500)
    deployment.shell(step("key").replace("north", "intruder"))
    deployment.start("intruder", step("supernode").replace("north", "intruder"))
    for rule in ("fra", "fedex", "ffa", "rolora"):
        config = federation(tiny, tmp_path, merge__rule=rule)
        shutil.rmtree(tmp_path / "project", ignore_errors=True)
        (tmp_path / "consortium.toml").write_text(config.toml())
        if rule == "fra":
            deployment.shell(step("run").splitlines()[0])
        else:
            deployment.shell(f"fedlora flower init project consortium.toml --set merge.rule={rule}")
        run = str(deployment.flwr("run", "project", "federation")["run-id"])
        status = deployment.wait_for_run(run)
        done = Path(config.run.out)
        if rule == "fedex":  # the nodes allow the other three only
            failed = [record["failures"] for record in records(done)]
            assert status == "finished:failed"
            assert failed == [[]]
            refused = "client north: rule 'fedex' is not one of fra, ffa, rolora allowed here"
            assert refused in deployment.shell(step("status").splitlines()[0]).stdout
        else:
            assert status == "finished:completed", deployment.logs()
            assert adapter_bytes(done) == plain_bytes(config, tmp_path)
            assert "ended" in deployment.shell(step("status")).stdout
        shutil.rmtree(tmp_path / "plain", ignore_errors=True)
        done.rename(tmp_path / f"done-{rule}")
    (nodes,) = [v for v in deployment.flwr("supernode", "list", "federation").values()
                if isinstance(v, list)]  # fmt: skip
    assert len(nodes) == len(NODES)
    assert "Connection attempt failed" in (tmp_path / "intruder.log").read_text()


def test_a_killed_superlink_and_a_killed_node_cost_time_and_no_bit(
    tiny: Tiny, tmp_path: Path, deployment: Deployment
) -> None:
    """SIGKILL in the middle of a round, ServerApp included; then the guide's `flwr run` again."""
    config = federation(tiny, tmp_path, run__rounds=3, client__optimiser="keep")
    (tmp_path / "consortium.toml").write_text(config.toml())
    deployment.shell(step("run").splitlines()[0])
    deployment.flwr("run", "project", "federation")
    log = Path(config.run.out) / "metrics.jsonl"
    deployment.wait_for(lambda: log.exists() and len(log.read_text().splitlines()) > 1, 150)
    time.sleep(3)  # round 2 is under way
    deployment.stop("superlink", signal.SIGKILL)
    deployment.stop("south", signal.SIGKILL)
    assert "not ended" in deployment.shell(step("status").splitlines()[0]).stdout
    deployment.start("superlink", step("superlink"))
    deployment.wait_for(lambda: deployment.answers(deployment.link, "/v1/control/list-runs") > 0)
    until = time.monotonic() + 150
    while "south" not in deployment.processes or deployment.processes["south"].poll() is not None:
        assert time.monotonic() < until, deployment.logs()
        deployment.node("south")  # as a supervisor would, with a pause
        time.sleep(10)
    run = str(deployment.flwr("run", "project", "federation")["run-id"])
    assert deployment.wait_for_run(run, 300) == "finished:completed", deployment.logs()
    assert adapter_bytes(Path(config.run.out)) == plain_bytes(config, tmp_path)
