"""The registry of merge rules: one file per rule, a pure function of one layer plus attributes.

A rule sees `Factors` only: no model, no file, no other layer. Every module in this folder is read
at import, so that a new file is a new rule, in the command line, the docs and the tests at once.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from torch import Tensor

from fedlora.adapter import Adapter, ClientResult, Factors, Merged, Part
from fedlora.answers import check_answer, check_given, checked_weights
from fedlora.hints import near

Claim: TypeAlias = Literal[True] | str  # a law that holds, or the sentence why it does not
Option: TypeAlias = str | int | float | bool | None
Merge: TypeAlias = Callable[..., Factors | Merged]
Planner: TypeAlias = Callable[..., "Plan"]  # (round, memory), and options of the rule by keyword
Reweigh: TypeAlias = Callable[[Sequence[Adapter], Sequence[ClientResult], Tensor], Tensor]
Residual: TypeAlias = Literal["drop", "fold", "carry"]

SETTLED = "settled"  # in the server's memory, for planners (see `aggregate`)
END = 10**9  # a round by which any rule that changes its ways has done so

LAWS: Mapping[str, str] = {
    "exact": "adapter + residual is the weighted mean of the increments",
    "linear": "every factor of the result is a weighted sum of the clients' factors",
    "mixed_ranks": "clients may send different ranks",
    "equivariant": "turning every increment (P dW Q^T) turns the result alike",
    "weighted": "a client with all the weight decides",
    "idempotent": "identical clients come back",
    "steady": "clients that send back what they were sent change nothing",
}


@dataclass(frozen=True)
class Plan:
    """Who moves which parts in one round: what clients train, what they send, what they are sent.

    What a client trains and does not share it keeps for itself; what it is not sent it takes from
    the common, seeded start (so `receives` may leave out only what never changes).
    """

    trains: frozenset[Part]
    shares: frozenset[Part]
    receives: frozenset[Part] = frozenset({"A", "B"})


@dataclass(frozen=True)
class Rule:
    """A merge rule with its options bound: `rule(prev, clients, weights)` merges one layer."""

    name: str
    merge: Merge
    plan: Planner
    laws: Mapping[str, Claim]
    reweigh: Reweigh | None = None
    residual: Sequence[Residual] = ()
    options: Mapping[str, Option] = field(default_factory=dict)

    def __call__(
        self,
        prev: Factors,
        clients: Sequence[Factors],
        weights: Sequence[float] | Tensor,
        round: int = 1,
    ) -> Factors | Merged:
        """Merges what the clients sent for one layer; one weight per client, their sum one.

        `round` (from 1) matters to the rules whose merge changes with it, and to no other.
        ValueError for weights or shapes that do not fit, and as in `combine`.
        """
        shares = checked_weights(weights, len(clients))
        check_given(prev, clients)
        return self.combine(prev, clients, shares, round)

    def combine(
        self,
        prev: Factors,
        terms: Sequence[Factors],
        coefficients: Tensor,
        round: int,
        layer: str = "",
    ) -> Factors | Merged:
        """The merge of any terms with any coefficients: for the server, which adds terms of its own
        (what clients were sent, what was carried); what is given is not checked here.

        ValueError, with rule and `layer`, for what the rule refuses, and for an answer that is none
        for this layer: another type or shape, NaN or Inf.
        """
        timed = {"round": round} if "round" in inspect.signature(self.merge).parameters else {}
        try:
            answer = self.merge(prev, terms, coefficients, **self.options, **timed)
        except ValueError as error:
            where = f", layer {layer!r}" if layer else ""
            raise ValueError(f"rule {self.name!r}{where}: {error}") from error
        check_answer(answer, prev, self.name, self.merge, layer)
        return answer

    @property
    def doc(self) -> str:
        """The docstring of the rule's file: formula, source, what it keeps and loses, cost, DP."""
        return inspect.getdoc(sys.modules[self.merge.__module__]) or ""

    @property
    def summary(self) -> str:
        """What the rule does, in the one line of its function's docstring."""
        return (inspect.getdoc(self.merge) or "").partition("\n")[0]


_RULES: dict[str, Rule] = {}
_FILES: dict[str, str] = {}  # "path.py:name" -> name, of rules that came from files


def rule(
    *,
    trains: Iterable[Part] = ("A", "B"),
    receives: Iterable[Part] = ("A", "B"),
    plan: Planner | None = None,
    reweigh: Reweigh | None = None,
    residual: Sequence[Residual] = (),
    **laws: Claim,
) -> Callable[[Merge], Merge]:
    """Registers a one-layer function `f(prev, clients, weights, *, options...)` under its own name.

    Each law of `LAWS` is claimed with True or declined with the sentence why. `trains` is what
    clients train and share in every round and `receives` what they are sent; `plan(round, memory)`
    replaces both where rounds differ; keyword-only arguments of it that are named like options of
    the rule get their values. `reweigh(sent, results, weights)` may replace the weights,
    seeing all layers and what each client was sent. `residual` lists what may become of the
    residual that a rule leaves, its paper's way first; a function that takes `round` is told the
    round.
    """
    if set(laws) != set(LAWS):
        raise TypeError(
            f"a rule takes a stand on each law: {', '.join(LAWS)}; got {', '.join(laws)}"
        )
    fixed = Plan(frozenset(trains), frozenset(trains), frozenset(receives))

    def same_plan(round: int, memory: Mapping[str, float]) -> Plan:
        return fixed

    def register(merge: Merge) -> Merge:
        name = merge.__name__
        if name in _RULES:
            raise ValueError(
                f"rule {name!r} is there already, from {_RULES[name].merge.__module__}"
            )
        found = Rule(name, merge, plan or same_plan, laws, reweigh, tuple(residual))
        if unknown := [key for key in _keywords(found.plan) if key not in _keywords(merge)]:
            raise TypeError(f"the plan of rule {name!r} wants {unknown[0]!r}, which is no option")
        _check_options(merge)
        _RULES[name] = found
        return merge

    return register


def guard(names: Iterable[str], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Puts something around every function of these rules, for the border to users' files."""
    for name in names:
        found = _RULES[name]
        reweigh = wrap(found.reweigh) if found.reweigh is not None else None
        _RULES[name] = replace(
            found, merge=wrap(found.merge), plan=wrap(found.plan), reweigh=reweigh
        )


def add_file(path: str, names: Iterable[str]) -> None:
    """Makes the rules that a file registered known as `path:name` too."""
    _FILES.update({f"{path}:{name}": name for name in names})


def is_file(name: str) -> bool:
    """Whether a rule is named by a file: `./mine.py:name`, or the file alone."""
    return ".py:" in name or name.endswith(".py")


def rule_names() -> list[str]:
    """The names of all rules, sorted."""
    _discover()
    return sorted(_RULES)


def get_rule(name: str, **options: Option) -> Rule:
    """The rule of that name, options bound; ValueError names near misses and known options."""
    _discover()
    if name not in _RULES and is_file(name) and name not in _FILES:
        raise ValueError(
            f"rule {name!r} is a file: rules from files are run on the local command line only (in "
            "a program of your own: fedlora.own_rules.import_rule)"
        )
    name = _FILES.get(name, name)
    if name not in _RULES:
        raise ValueError(
            f"unknown rule {name!r}{near(name, _RULES)}; known are {', '.join(rule_names())}, "
            "or ./FILE.py:NAME"
        )
    found = _RULES[name]
    known = option_types(found)
    for key, value in options.items():
        if key not in known:
            listed = f"its options are {', '.join(known)}" if known else "it has no options"
            raise ValueError(f"rule {name!r} has no option {key!r}{near(key, known)}; {listed}")
        if not _fits(value, known[key]):
            raise ValueError(
                f"option {key!r} of rule {name!r} is {value!r}, expected {described(known[key])}"
            )
    return _planned(replace(found, options=dict(sorted(options.items()))))


def option_types(rule: Rule) -> dict[str, Any]:
    """The names and annotations of a rule's options: the keyword-only arguments of its function."""
    hints = get_type_hints(rule.merge)
    return {name: hints[name] for name in _keywords(rule.merge) if name != "round"}


def trained(rule: Rule) -> str:
    """What clients train, as a user reads it: `A and B`, `B, A in turn`, `A and B, then B`."""
    return _in_phases(rule, lambda plan: " and ".join(sorted(plan.trains - {"head"})))


def traffic(rule: Rule) -> tuple[str, str]:
    """Numbers sent up and down per layer, client and round, as formulas of m, n and the rank.

    f is the rank of what was folded so far. Read off the rule's plan, so it is what is sent.
    """
    r = "r_k" if rule.laws["mixed_ranks"] is True else "r"
    sizes = {"A": f"{r} n", "B": f"{r} m", "AB": f"{r} (m + n)"}
    up = _in_phases(rule, lambda plan: sizes["".join(sorted(plan.shares - {"head"}))])
    down = _in_phases(rule, lambda plan: sizes["".join(sorted(plan.receives - {"head"}))])
    return up, down + (" + f (m + n)" if rule.residual[:1] == ("fold",) else "")


def _in_phases(rule: Rule, read: Callable[[Plan], str]) -> str:
    """The plans of the first two rounds, read; then those of the end, where they are others."""
    first = [read(rule.plan(round, {})) for round in (1, 2)]
    last = [read(rule.plan(END + round, {SETTLED: math.inf})) for round in (1, 2)]
    while first != last and first[-1:] * 2 == last:  # the switch is within the first two
        del first[-1]
    return ", then ".join(dict.fromkeys(_in_turn(texts) for texts in (first, last)))


def _in_turn(texts: Sequence[str]) -> str:
    return texts[0] if len(set(texts)) == 1 else f"{', '.join(texts)} in turn"


def defaults(rule: Rule) -> dict[str, Option]:
    """The options with the values they have: those bound, else the function's own."""
    parameters = inspect.signature(rule.merge).parameters
    return {key: rule.options.get(key, parameters[key].default) for key in option_types(rule)}


def described(annotation: Any) -> str:
    """An annotation as a user reads it: `one of 'a', 'b'`, `int or None`."""
    if get_origin(annotation) is Literal:
        values = [repr(value) for value in get_args(annotation)]
        return "one of " * (len(values) > 1) + ", ".join(values)
    if get_args(annotation):
        return " or ".join(described(part) for part in get_args(annotation))
    return "None" if annotation is type(None) else str(annotation.__name__)


def _keywords(function: Callable[..., Any]) -> list[str]:
    """The names of a function's keyword-only arguments."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def _check_options(merge: Merge) -> None:
    """TypeError unless every option of a rule's function has a type and a default."""
    parameters = inspect.signature(merge).parameters
    for key in _keywords(merge):
        lacks = "type" if parameters[key].annotation is inspect.Parameter.empty else ""
        lacks = lacks or ("default" if parameters[key].default is inspect.Parameter.empty else "")
        if lacks and key != "round":
            raise TypeError(
                f"option {key!r} of rule {merge.__name__!r} has no {lacks}: write it as "
                f"{key}: int = 1"
            )


def _planned(rule: Rule) -> Rule:
    """The rule with a plan that knows the options it asks for."""
    wanted, values = _keywords(rule.plan), defaults(rule)
    if not wanted:
        return rule
    return replace(rule, plan=partial(rule.plan, **{key: values[key] for key in wanted}))


def _fits(value: Option, annotation: Any) -> bool:
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if get_args(annotation):
        return any(_fits(value, part) for part in get_args(annotation))
    if isinstance(value, bool):
        return annotation is bool
    if annotation is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, annotation)


def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
