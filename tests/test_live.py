"""Processes of a real deployment that are killed or hang in the middle of a round, on loopback."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from bench import adapter_bytes, records
from deployment import MARKS, Deployment, federation, plain_bytes

from fedlora.config import Config

pytest_plugins = ["tiny", "deployment"]
pytestmark = MARKS
Tiny = Callable[[str], Path]


def project(deployment: Deployment, config: Config) -> str:
    """The name of a new project of this config."""
    name = config.run.name
    (deployment.home / f"{name}.toml").write_text(config.toml())
    deployment.shell(f"fedlora flower init {name} {name}.toml")
    return name


def test_a_client_that_hangs_is_left_out_of_its_round_and_takes_part_again_later(
    tiny: Tiny, deployment: Deployment
) -> None:
    """SIGSTOP to a ClientApp until the round is closed at its deadline, then SIGCONT.

    Flower gives a ClientApp up that gave no sign for 60 s: the deadline comes before. On a busy
    machine other clients may miss it as well; the log says who.
    """
    config = federation(
        tiny("bert"), deployment.home, "hangs", run__rounds=3, run__min_clients=2,
        run__max_failed_rounds=3, flower__deadline=45.0,
    )  # fmt: skip
    run = deployment.run(project(deployment, config))
    done = Path(config.run.out)
    clientapp = deployment.in_round("west", run, 1)
    os.kill(clientapp, signal.SIGSTOP)
    try:
        deployment.wait_for(lambda: len(records(done)) > 1, 120)
    finally:
        os.kill(clientapp, signal.SIGCONT)
    assert deployment.wait_for_run(run) == "finished:completed", deployment.logs()
    failures = [failure | record for record in records(done) for failure in record["failures"]]
    assert {failure["code"] for failure in failures} == {"missing"}
    absent = {(failure["client"], failure["round"]) for failure in failures}
    assert ("west", 1) in absent
    assert ("west", 3) not in absent
    said = (deployment.home / "west.log").read_text()
    assert said.count(f"[RUN {run}, ROUND 1]") == 2  # the order and, too late, the answer
    assert adapter_bytes(done) == plain_bytes(config, deployment.home, absent)


def test_a_killed_serverapp_costs_time_and_no_bit(tiny: Tiny, deployment: Deployment) -> None:
    """SIGKILL of the ServerApp alone in the middle of a round, and at once the guide's `flwr run`
    again; the SuperLink takes about a minute to notice that the first run is dead.
    """
    config = federation(tiny("bert"), deployment.home, "serverapp", client__optimiser="keep")
    name = project(deployment, config)
    first = deployment.run(name)
    deployment.in_round("north", first, 2)
    serverapp = deployment.child("superlink", "flwr-serverapp")
    assert serverapp
    os.kill(serverapp, signal.SIGKILL)
    assert deployment.status(first) == "running"
    assert "not ended" in deployment.shell(f"fedlora status {config.run.out}").stdout
    second = deployment.run(name)
    assert deployment.wait_for_run(second) == "finished:completed", deployment.logs()
    assert adapter_bytes(Path(config.run.out)) == plain_bytes(config, deployment.home)
    assert deployment.wait_for_run(first) == "finished:failed"


def test_a_killed_superlink_and_a_killed_node_cost_time_and_no_bit(
    tiny: Tiny, deployment: Deployment
) -> None:
    """SIGKILL in the middle of a round, to all that they have started too; then a supervisor starts
    them again, and the guide's `flwr run`.
    """
    config = federation(
        tiny("bert"), deployment.home, "superlink", run__rounds=3, client__optimiser="keep",
        flower__wait=240.0,
    )  # fmt: skip
    name = project(deployment, config)
    deployment.in_round("south", deployment.run(name), 2)
    deployment.stop("superlink", signal.SIGKILL)
    deployment.stop("south", signal.SIGKILL)
    assert "not ended" in deployment.shell(f"fedlora status {config.run.out}").stdout
    deployment.superlink()
    run = deployment.run(name)
    until = time.monotonic() + 150
    while "south" not in deployment.processes or deployment.processes["south"].poll() is not None:
        assert time.monotonic() < until, deployment.logs()
        deployment.node("south")  # as a supervisor would, with a pause
        time.sleep(10)
    assert deployment.wait_for_run(run, 300) == "finished:completed", deployment.logs()
    assert adapter_bytes(Path(config.run.out)) == plain_bytes(config, deployment.home)
