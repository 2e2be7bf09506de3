"""The remedy in an error message: the known name nearest to a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SAME = {"gpu": "cuda", "GPU": "cuda"}  # other words for what is known


def near(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known name, empty where none is near."""
    known = list(known)
    if SAME.get(name) in known:
        return f"; did you mean {SAME[name]!r}?"
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
