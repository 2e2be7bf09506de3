"""Border to a user's own rules: runs a Python file that registers them. For local command lines.

The file uses `@rule` as those in `fedlora/rules` do. Never call this with a name that came from a
server or from somebody else's config: the file's code runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from fedlora.answers import source
from fedlora.hints import near
from fedlora.rules import add_file, guard, rule_names


def import_rule(reference: str) -> None:
    """Runs the file of `path.py:name`, once, so that `get_rule(reference)` finds the rule.

    ValueError where there is no such file, it cannot be run, or it registers no rule of that name,
    and for `path.py` alone, with the rules that it registers. Whatever the rule's own functions
    raise later becomes a ValueError with the line in the file.
    """
    place, _, name = (reference + ":" * reference.endswith(".py")).rpartition(":")
    path = Path(place).resolve()
    if not path.is_file():
        raise ValueError(f"rule {reference!r}: there is no file {path}")
    module_name = f"fedlora_own_rules.{path.stem}_{abs(hash(str(path)))}"
    module = sys.modules.get(module_name)
    if module is None:
        before = set(rule_names())
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"rule {reference!r}: {path} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # a rule's page is its module's docstring
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever a user's file may raise is a mistake of that file
            del sys.modules[module_name]
            raise ValueError(f"rule {reference!r}: {path} failed: {_told(error, path)}") from error
        found = sorted(set(rule_names()) - before)
        guard(found, _guarded)
        module.fedlora_rules = found  # type: ignore[attr-defined]
    names: list[str] = module.fedlora_rules
    known = ", ".join(names) or "none at all"
    if not name and names:
        raise ValueError(
            f"rule {reference!r} names a file and no rule in it; it registers {known}: write "
            f"{reference}:{names[0]}"
        )
    if name not in names:
        raise ValueError(
            f"rule {reference!r}: {path} registers no rule {name!r}{near(name, names)}; it "
            f"registers {known}: put @rule(...) on a function of that name"
        )
    add_file(place, names)


def rule_file(rule: str) -> Path | None:
    """The file of a rule named `path.py:name`; None for a rule of the registry."""
    place, _, name = rule.rpartition(":")
    return Path(place) if name and place.endswith(".py") else None


def rule_digest(rule: str) -> str:
    """A SHA-256 of the bytes of the rule's file; empty for a rule of the registry, or no file."""
    path = rule_file(rule)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path and path.is_file() else ""


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with every error of it told in one line, as the server tells a refusal."""

    @wraps(function)
    def guarded(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except Exception as error:  # as above
            path = Path(function.__code__.co_filename)
            raise ValueError(_told(error, path, source(function))) from error

    return guarded


def _told(error: Exception, path: Path, place: str = "") -> str:
    """What a file of the user's raised, with the last line of it that was on the way."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    plain = type(error) is ValueError or isinstance(error, SyntaxError)  # say enough by themselves
    text = str(error) if plain else f"{type(error).__name__}: {error}"
    if lines:
        return f"{text} ({path.name}, line {lines[-1]})"
    return f"{text} ({place})" if place else text
