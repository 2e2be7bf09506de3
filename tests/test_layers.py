"""The house: which file may import what, where `scaling` is multiplied, which names are public."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedlora

FOLDER = Path(fedlora.__file__).parent
HEAVY = (
    "accelerate", "datasets", "flwr", "matplotlib", "opacus", "peft", "rich", "safetensors",
    "transformers", "typer",
)  # fmt: skip

# Each may import the ones before it; rules may not import each other.
ORDER = (
    "hints", "sources", "seeding", "partition", "adapter", "routes", "budget", "krylov", "lowrank",
    "answers",
    "rules", "robust", "policy", "settings", "config", "server", "rounds", "simulation",
)  # fmt: skip
LIBRARIES = {
    "hints": set(),
    "sources": set(),
    "seeding": {"numpy", "torch"},
    "partition": {"numpy"},
    "settings": set(),
    "config": set(),
    "rounds": {"torch"},
    "simulation": {"torch"},
}  # the other core files: torch, numpy and jaxtyping
PUBLIC = {
    "Config", "load_config", "Factors", "Merged", "Adapter", "mean_factors", "mix", "truncate",
    "rule", "get_rule", "rule_names", "ClientResult", "ServerState", "aggregate", "simulate",
    "partition",
}  # fmt: skip


def core_files() -> list[tuple[str, Path]]:
    """(place in the order, file) of each file of the core."""
    files = [(name, FOLDER / f"{name}.py") for name in ORDER if name != "rules"]
    return files + [("rules", path) for path in sorted((FOLDER / "rules").glob("*.py"))]


def imports(source: str) -> Iterator[str]:
    """The dotted names of all modules imported anywhere in the source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            if node.module == "fedlora":
                yield from (f"fedlora.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def multiplied_scalings(source: str) -> list[int]:
    """The lines that multiply or divide by something called `.scaling`."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp):
            operands: list[ast.expr] = [node.left, node.right]
        elif isinstance(node, ast.AugAssign):
            operands = [node.target, node.value]
        else:
            continue
        by = isinstance(node.op, ast.Mult | ast.Div | ast.MatMult | ast.Pow)
        if by and any(isinstance(o, ast.Attribute) and o.attr == "scaling" for o in operands):
            lines.append(node.lineno)
    return sorted(lines)


@pytest.mark.parametrize(
    ("place", "path"), core_files(), ids=[str(p.relative_to(FOLDER)) for _, p in core_files()]
)
def test_a_core_file_imports_the_core_below_it_and_few_libraries(place: str, path: Path) -> None:
    below = {f"fedlora.{name}" for name in ORDER[: ORDER.index(place)]}
    if place == "rules" and path.name != "__init__.py":
        below |= {"fedlora.rules"}
    libraries = LIBRARIES.get(place, {"torch", "numpy", "jaxtyping"}) | sys.stdlib_module_names
    for name in imports(path.read_text(encoding="utf-8")):
        if name.startswith("fedlora"):
            assert name in below, f"{place} must not import {name}"
        else:
            assert name.split(".")[0] in libraries, f"{place} must not import {name}"


def test_the_package_itself_imports_only_the_core() -> None:
    names = set(imports((FOLDER / "__init__.py").read_text(encoding="utf-8")))
    assert names - sys.stdlib_module_names <= {f"fedlora.{name}" for name in ORDER}


def test_the_package_waits_with_torch_until_a_name_is_used() -> None:
    """The command line must be able to set how torch's threads wait before torch is loaded."""
    lines = [
        "import sys, fedlora",
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules",
        "import fedlora.simulation, fedlora.server, fedlora.rules",
        "assert {name for name in fedlora.__all__ if not hasattr(fedlora, name)} == set()",
        "from fedlora import partition, rule, simulate",
        "assert simulate is fedlora.simulation.simulate and rule is fedlora.rules.rule",
        "assert partition is sys.modules['fedlora.partition']",
    ]
    subprocess.run([sys.executable, "-W", "error", "-c", "; ".join(lines)], check=True)


def test_the_command_line_lets_threads_sleep_while_they_wait() -> None:
    """Spinning threads beside a busy neighbour made a step twenty times slower."""
    lines = [
        "import os, sys",
        "os.environ.pop('OMP_WAIT_POLICY', None)",
        "import fedlora.cli",
        "assert 'torch' not in sys.modules",
        "sys.argv = ['fedlora', '--help']",
        "import atexit",
        "atexit.register(lambda: os._exit(0 if os.environ['OMP_WAIT_POLICY'] == 'PASSIVE' else 1))",
        "fedlora.cli.main()",
    ]
    subprocess.run([sys.executable, "-c", "; ".join(lines)], check=True, capture_output=True)


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(FOLDER.rglob("*.py")) if p.name != "adapter.py"],
    ids=lambda path: str(path.relative_to(FOLDER)),
)
def test_scaling_is_multiplied_in_adapter_alone(path: Path) -> None:
    assert multiplied_scalings(path.read_text(encoding="utf-8")) == []


def test_the_search_for_scaling_finds_what_it_looks_for() -> None:
    source = "a = f.scaling * B\nb = B / f.scaling\nx.y *= f.g.scaling\nc = s(f.scaling, 2 * B)\n"
    assert multiplied_scalings(source) == [1, 2, 3]
    assert len(multiplied_scalings((FOLDER / "adapter.py").read_text(encoding="utf-8"))) >= 4


def test_importing_fedlora_loads_no_heavy_library() -> None:
    code = (
        "import sys, fedlora; "
        f"print([n for n in {HEAVY!r} if n in sys.modules], "
        "sorted(n for n in sys.modules if n.startswith('fedlora.')))"
    )
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=FOLDER.parent,
    ).stdout
    assert out.startswith("[] ")
    for border in ("model", "data", "client", "evaluate", "report", "cli"):
        assert f"'fedlora.{border}'" not in out


def test_the_public_names_are_those_of_the_design_and_each_is_explained() -> None:
    assert set(fedlora.__all__) == PUBLIC
    assert list(fedlora.__all__) == sorted(fedlora.__all__)
    for name in PUBLIC:
        doc = getattr(fedlora, name).__doc__ or ""
        assert len(doc.split()) > 4, f"{name} has no docstring"
        assert not doc.startswith(f"{name}("), f"{name} has only the docstring of dataclasses"


def test_no_file_of_the_core_is_longer_than_350_lines() -> None:
    for _, path in core_files():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, path.name
