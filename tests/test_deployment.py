"""The deployment guide, step by step, on loopback: every command in it is run as it stands, but for
addresses, ports and paths.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from bench import adapter_bytes, records
from deployment import MARKS, NODES, Deployment, federation, plain_bytes, step

pytest_plugins = ["tiny", "deployment"]
pytestmark = MARKS
Tiny = Callable[[str], Path]


def test_a_run_of_any_number_is_asked_for(tmp_path: Path) -> None:
    """Ports of the guide's commands are this machine's, also beside a run's id that holds one."""
    here = Deployment(tmp_path).here("flwr list --run-id 719263190918726654 # 127.0.0.1:9091")
    assert "--run-id 719263190918726654" in here
    assert not here.endswith(":9091")


def test_the_guide_works_as_written_and_gives_the_plain_loops_bytes(
    tiny: Tiny, deployment: Deployment
) -> None:
    """The proxy refuses what it should, and a fourth key without registration is not let in."""
    home = deployment.home
    for path in ("/v1/control/start-run", "/v1/control/register-node", "/v1/control/list-runs",
                 "/v1/runtime/pull-messages", "/health", "/", "/v1/fleet", "/v1//control/list-runs",
                 "/v1/fleet/../control/list-runs"):  # fmt: skip
        assert deployment.answers(deployment.proxy, path, "--path-as-is") in (301, 403, 400), path
    (home / "large").write_bytes(b"0" * (65 << 20))
    options = ("--data-binary", "@large")
    assert deployment.answers(deployment.proxy, "/v1/fleet/push-object", *options) == 413
    assert deployment.answers(deployment.proxy, "/v1/fleet/pull-messages") in range(400, 500)
    deployment.shell(step("key").replace("north", "intruder"))
    deployment.start("intruder", step("supernode").replace("north", "intruder"))
    for rule in ("fra", "fedex", "ffa", "rolora"):
        config = federation(tiny("bert"), home, merge__rule=rule)
        shutil.rmtree(home / "project", ignore_errors=True)
        (home / "consortium.toml").write_text(config.toml())
        if rule == "fra":
            deployment.shell(step("run").splitlines()[0])
        else:
            deployment.shell(f"fedlora flower init project consortium.toml --set merge.rule={rule}")
        status = deployment.wait_for_run(deployment.run())
        done = Path(config.run.out)
        if rule == "fedex":  # the nodes allow the other three only
            failed = [record["failures"] for record in records(done)]
            assert status == "finished:failed"
            assert failed == [[]]
            refused = "client north: rule 'fedex' is not one of fra, ffa, rolora allowed here"
            assert refused in deployment.shell(step("status").splitlines()[0]).stdout
        else:
            assert status == "finished:completed", deployment.logs()
            assert adapter_bytes(done) == plain_bytes(config, home)
            assert "ended" in deployment.shell(step("status")).stdout
            shutil.rmtree(f"{done}-plain")
        done.rename(home / f"done-{rule}")
    (nodes,) = [v for v in deployment.flwr("supernode", "list", "federation").values()
                if isinstance(v, list)]  # fmt: skip
    assert len(nodes) == len(NODES)
    assert "Connection attempt failed" in (home / "intruder.log").read_text()
