"""Flower's own simulation, all its processes included: one run, the plain loop's bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bench import Place, adapter_bytes, summary

pytest_plugins = ["tiny"]
Tiny = Callable[[str], Path]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "client"), [({"merge__rule": "fedex"}, ""), ({"merge__head": "local"}, "1")]
)
def test_flowers_simulation_gives_the_bytes_of_the_plain_loop(
    tiny: Tiny, tmp_path: Path, changes: dict[str, str], client: str
) -> None:
    """Also where every client has an adapter of its own."""
    place = Place(tiny("bert"), tmp_path)
    plain = place.run("plain", **changes)
    config = place.config("flower", **changes)
    (tmp_path / "c.toml").write_text(config.toml())
    done = subprocess.run(
        [sys.executable, "-m", "fedlora", "run", str(tmp_path / "c.toml"), "--engine", "flower"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    flower = tmp_path / "flower"
    kind = f"adapter/{client}"
    assert adapter_bytes(flower, kind) == adapter_bytes(plain, kind)
    assert summary(flower)["final"] == summary(plain)["final"]
    assert (flower / "report.png").is_file()
    assert json.dumps(str(flower / "adapter")).strip('"') in done.stdout.replace("\n", "")
