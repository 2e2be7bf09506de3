"""A federation of real processes on 127.0.0.1, without TLS: a SuperLink, a SuperNode a client.

Imported by the scripts beside it. The nodes reach the SuperLink through a relay that counts the
bytes of every connection, as a network would see them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedlora.config import Config
from fedlora.flower import engine
from fedlora.flower.project import write_project

Counted = dict[str, int]


def run_on_loopback(config: Config, home: Path, nodes: int) -> Counted:
    """Runs the config and returns the bytes `up` and `down`; RuntimeError where it fails."""
    write_project(home / "project", config)
    with deployment(home, nodes) as (environment, counted):
        told = engine._flwr(environment, "run", str(home / "project"), "here", "--format", "json")
        status = engine.wait_for(environment, str(told["run-id"]))
    if status != "finished:completed":
        log = (home / "processes.log").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"the deployment ended as {status}; its log says:\n{log[-3000:]}")
    return counted


@contextmanager
def deployment(home: Path, nodes: int) -> Iterator[tuple[dict[str, str], Counted]]:
    """Starts the processes and ends them, whatever happens; yields flwr's environment."""
    link, *ports = (engine._free_port() for _ in range(1 + nodes))
    bin = Path(engine._tool("flwr")).parent
    path = os.pathsep.join([str(bin), os.environ.get("PATH", "")])
    environment = os.environ | engine.QUIET | {"FLWR_HOME": str(home), "PATH": path}
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "here"\n\n[superlink.here]\n'
        f'address = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    with ExitStack() as stack:
        log = stack.enter_context((home / "processes.log").open("wb"))

        def start(*words: str, port: int) -> None:
            process = subprocess.Popen(
                [engine._tool(words[0]), *words[1:], "--insecure", "--host=127.0.0.1",
                 f"--port={port}"],
                cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
            stack.callback(engine._stop, process)
            engine._wait_for_port(process, port)

        start("flower-superlink", "--disable-runtime-dependency-installation", port=link)
        door, counted = stack.enter_context(relay(link))
        for number, port in enumerate(ports):
            config = f"partition-id={number}"
            start("flower-supernode", f"--superlink=127.0.0.1:{door}", f"--node-config={config}",
                  port=port)  # fmt: skip
        yield environment, counted


@contextmanager
def relay(target: int) -> Iterator[tuple[int, Counted]]:
    """A port that hands every connection on to the target port, and what went `up` and `down`."""
    counted = {"up": 0, "down": 0}
    lock = threading.Lock()

    def pump(source: socket.socket, sink: socket.socket, direction: str) -> None:
        try:
            while data := source.recv(1 << 16):
                with lock:
                    counted[direction] += len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # one side is gone: so is the connection
            source.close()
            sink.close()

    def accept(door: socket.socket) -> None:
        while True:
            try:
                near = door.accept()[0]
                far = socket.create_connection(("127.0.0.1", target))
            except OSError:
                return
            for ends in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=pump, args=ends, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as door:
        threading.Thread(target=accept, args=(door,), daemon=True).start()
        try:
            yield int(door.getsockname()[1]), counted
        finally:
            door.shutdown(socket.SHUT_RDWR)
