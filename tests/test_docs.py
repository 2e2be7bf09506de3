"""The docs say what the code says now, and nothing about the place where it is written."""

from __future__ import annotations

import re
import runpy
import subprocess
import tomllib
from pathlib import Path

import pytest
from laws import CHECKS, Case

from fedlora.adapter import Factors
from fedlora.cli import app
from fedlora.config import make_config
from fedlora.privacy.plan import check as check_privacy
from fedlora.rules import LAWS, get_rule, rule_names

ROOT = Path(__file__).resolve().parent.parent


def test_generated_pages_are_fresh() -> None:
    stale = runpy.run_path(str(ROOT / "docs" / "generate.py"))["stale"]
    assert stale() == [], "run `make docs` and commit what changed"


def test_concept_drawings_are_what_their_script_draws(tmp_path: Path) -> None:
    draw = runpy.run_path(str(ROOT / "docs" / "figures" / "draw_concepts.py"))["main"]
    draw(["--out", str(tmp_path)])
    for name in ("lora.svg", "architecture.svg"):
        drawn, kept = (tmp_path / name).read_text(), (ROOT / "docs" / "figures" / name).read_text()
        assert _words(drawn) == _words(kept), f"draw {name} anew with docs/figures/draw_concepts.py"


def test_every_link_in_the_readme_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert len(links) > 5
    assert missing == []


def test_the_readme_names_every_command_and_rule() -> None:
    text = (ROOT / "README.md").read_text()
    callbacks = [command.callback for command in app.registered_commands]
    commands = [callback.__name__ for callback in callbacks if callback]
    assert len(commands) >= 8
    assert [name for name in commands if f"fedlora {name}" not in text] == []
    assert [name for name in rule_names() if f"`{name}`" not in text] == []


@pytest.mark.parametrize(("page", "count"), [("README.md", 2), ("docs/privacy.md", 2)])
def test_the_configs_of_a_page_are_valid(page: str, count: int) -> None:
    blocks = _blocks((ROOT / page).read_text(), "toml")
    assert len(blocks) == count
    for block in blocks:
        tables = tomllib.loads(block)
        flat = {f"{table}.{key}": v for table, keys in tables.items() for key, v in keys.items()}
        config = make_config(flat)
        assert config.merge.rule == "fra"
        check_privacy(config)


def test_the_readmes_python_runs() -> None:
    text = (ROOT / "README.md").read_text()
    python = [block for block in _blocks(text, "python") if "get_rule" in block]
    assert len(python) == 1
    names: dict[str, object] = {}
    exec(python[0], names)
    assert isinstance(names["merged"], Factors)
    assert (names["merged"].rank, names["merged"].shape) == (8, (768, 384))


@pytest.mark.usefixtures("no_trace")
def test_the_page_on_own_rules_shows_the_example_that_is_there_and_it_keeps_its_laws() -> None:
    shown, by_hand = _blocks((ROOT / "docs" / "own_rule.md").read_text(), "python")
    assert shown == (ROOT / "examples" / "trimmed_mean.py").read_text()
    exec(by_hand.replace("examples/", f"{ROOT}/examples/"), {})
    case = Case(get_rule("trimmed_mean"), 1)
    held = [law for law in LAWS if case.rule.laws[law] is True]
    assert held == ["idempotent", "steady"]
    for law in held:
        CHECKS[law](case, 0)


def test_nothing_in_the_project_names_a_private_place() -> None:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False
    ).stdout
    if not listed:  # an installed copy without its repository: nothing to check
        listed = "\0".join(str(path) for path in ROOT.rglob("*.py"))
    here = Path(__file__).name
    pattern = re.compile(r"(^|[^A-Za-z])/(work|opt|home|root)/")
    found = [
        name
        for name in listed.split("\0")
        if name.endswith((".py", ".md", ".toml", ".txt")) and Path(name).name != here
        if pattern.search((ROOT / name).read_text(encoding="utf-8"))
    ]
    assert found == []


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def _words(svg: str) -> list[str]:
    """The texts of a drawing, which do not depend on matplotlib's version."""
    return re.findall(r"<!-- (.*?) -->", svg)
