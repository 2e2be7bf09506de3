"""A project that `flwr run` takes, written from a config; and the deployment notes beside it."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from fedlora.config import Config, to_toml
from fedlora.files import new_folder, write_text

PACKAGE = "federation"
COMPONENT = '''"""The {what} of this federation; all of it is in fedlora."""

from fedlora.flower.app import {what}

app = {what}
'''


def write_project(folder: Path, config: Config) -> None:
    """Writes pyproject.toml, the app's two components and README.md; `folder` must be new.

    The settings stand in [tool.flwr.app.config], where `flwr run --run-config` may change them.
    ValueError for settings that make no federation across machines.
    """
    if config.run.mode != "federated":
        raise ValueError(f"run.mode = {config.run.mode!r} needs no other machines")
    if ".py:" in config.merge.rule:
        raise ValueError("a rule of your own file does not travel: put it into fedlora/rules")
    with new_folder(folder) as temporary:
        package = temporary / PACKAGE
        package.mkdir()
        write_text(package / "__init__.py", '"""A federation on Flower."""\n')
        write_text(package / "server_app.py", COMPONENT.format(what="server"))
        write_text(package / "client_app.py", COMPONENT.format(what="client"))
        write_text(temporary / "pyproject.toml", pyproject(config))
        notes = resources.files("fedlora.flower") / "deployment.md"
        write_text(temporary / "README.md", notes.read_text(encoding="utf-8"))


def pyproject(config: Config) -> str:
    """The project file: no dependencies, so that nothing is installed while it runs."""
    name = re.sub("[^a-z0-9]", "-", config.run.name.lower()).strip("-")
    lines = [
        "[build-system]", 'requires = ["hatchling"]', 'build-backend = "hatchling.build"', "",
        "[project]", f'name = "{name or "federation"}"', 'version = "1.0.0"',
        'description = "A federation of fedlora on Flower"', 'license = "Apache-2.0"',
        "dependencies = []", "",
        "[tool.hatch.build.targets.wheel]", 'packages = ["."]', "",
        "[tool.flwr.app]", 'publisher = "fedlora"', "",
        "[tool.flwr.app.components]", f'serverapp = "{PACKAGE}.server_app:app"',
        f'clientapp = "{PACKAGE}.client_app:app"', "",
        "[tool.flwr.app.config]",
    ]  # fmt: skip
    lines += [f"{key} = {to_toml(value)}" for key, value in config.flat().items()]
    return "\n".join([*lines, ""])
