"""What a merge rule is given and what it answers, checked at once: an error names the rule, its
file and line, the layer, and the remedy. Knows no rule and no registry.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter import Factors, Merged

REMEDY = "return Factors or Merged"


def checked_weights(weights: Sequence[float] | Tensor, clients: int) -> Tensor:
    """The weights as a float64 vector; ValueError unless one per client, >= 0, of sum one."""
    given = weights.tolist() if isinstance(weights, Tensor) else list(weights)
    for value in given:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"weight {value!r} is not a number")
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"weight {value!r} is not a finite number >= 0")
    if len(given) != clients:
        raise ValueError(f"{len(given)} weights for {clients} clients: give one per client")
    if not math.isclose(math.fsum(given), 1.0, rel_tol=1e-9):
        raise ValueError(
            f"the weights sum to {math.fsum(given):.9g}, not to 1: divide by their sum"
        )
    return torch.tensor(given, dtype=torch.float64)


def check_given(prev: Factors, clients: Sequence[Factors]) -> None:
    """ValueError, with its place, for a client that is no Factors or of another shape than prev."""
    for place, client in enumerate(clients):
        if not isinstance(client, Factors):
            raise ValueError(f"clients[{place}] is {_a(client)}: give Factors, one for each client")
        if client.shape != prev.shape:
            raise ValueError(
                f"clients[{place}] is an increment of {_size(client)}, prev is one of "
                f"{_size(prev)}: a rule merges one layer, of one shape"
            )


def check_answer(
    answer: Factors | Merged, prev: Factors, rule: str, merge: Callable[..., Any], layer: str
) -> None:
    """ValueError unless a rule answered with finite factors of the shape of prev's layer.

    `merge` is the rule's function, whose file and line are named; `layer` may be empty.
    """
    problem, remedy = answer_problem(answer, prev)
    if problem:
        where = f" for layer {layer!r}" if layer else ""
        raise ValueError(f"rule {rule!r} ({source(merge)}) returned {problem}{where}: {remedy}")


def source(function: Callable[..., Any]) -> str:
    """Where a function begins, as `mine.py, line 18`."""
    code = inspect.unwrap(function).__code__
    try:
        lines, first = inspect.getsourcelines(code)
    except (OSError, TypeError):  # typed in, or its file is gone
        lines, first = [], code.co_firstlineno
    decorated = (at for at, line in enumerate(lines) if line.lstrip().startswith("def "))
    return f"{Path(code.co_filename).name}, line {first + next(decorated, 0)}"


def answer_problem(answer: object, prev: Factors) -> tuple[str, str]:
    """What is wrong with an answer, and the remedy; both empty where nothing is."""
    if isinstance(answer, Merged):
        for name, part in (("factors", answer.factors), ("residual", answer.residual)):
            if not isinstance(part, Factors):
                return f"a Merged with {_a(part)} as {name}", "both are Factors"
        residual = _wrong_numbers(answer.residual, prev)
        if residual[0]:
            return f"a residual: {residual[0]}", residual[1]
        answer = answer.factors
    if not isinstance(answer, Factors):
        return _a(answer), REMEDY
    return _wrong_numbers(answer, prev)


def _wrong_numbers(factors: Factors, prev: Factors) -> tuple[str, str]:
    for name, part in (("A", factors.A), ("B", factors.B)):
        if not isinstance(part, Tensor) or not part.is_floating_point():
            kind = f"{part.dtype} numbers" if isinstance(part, Tensor) else _a(part)
            return f"{kind} as {name}", "A and B are tensors of floating-point numbers"
    if factors.shape != prev.shape:
        return f"an increment of {_size(factors)}", f"the layer is {_size(prev)}"
    for name, part in (("A", factors.A), ("B", factors.B)):
        if not _finite(part):
            return f"NaN or Inf in {name}", "look for a division by zero or a number too large"
    return "", ""


def _finite(part: Tensor) -> bool:
    """Whether all numbers are: one pass, for a sum is finite only then; or it overflowed."""
    return math.isfinite(float(part.sum())) or bool(torch.isfinite(part).all())


def _size(factors: Factors) -> str:
    """`7 x 5 (A 3 x 5, B 7 x 3)`."""
    (m, n), r = factors.shape, factors.rank
    return f"{m} x {n} (A {r} x {n}, B {m} x {r})"


def _a(thing: object) -> str:
    """`None`, or the type with an article."""
    return "None" if thing is None else f"a {type(thing).__name__}"
