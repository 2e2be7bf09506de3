"""The deliberate bugs fit the code that they are to break; catching them is `make mutants`."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from mutants import ROOT, Mutant

TABLES = sorted(path.stem for path in Path(__file__).parent.glob("mutants*.py"))
MUTANTS: list[Mutant] = [
    mutant for table in TABLES for mutant in importlib.import_module(table).MUTANTS
]


def test_every_table_is_hunted() -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [table for table in TABLES if f"tests/{table}.py" not in recipe] == []


def test_every_mutant_has_its_own_name() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place_and_names_tests_that_are_there(mutant: Mutant) -> None:
    source = (ROOT / "fedlora" / mutant.file).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1
    assert mutant.old != mutant.new
    assert [name for name in mutant.tests if not (ROOT / f"tests/test_{name}.py").is_file()] == []
    assert mutant.tests
