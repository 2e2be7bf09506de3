"""May these adapters be merged, with this rule, rank and weights? All is decided from settings and
headers, before any number is read; each refusal names adapter, layer and reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fedlora.adapter_folder import AdapterFolder, open_folder
from fedlora.answers import checked_weights
from fedlora.hints import near
from fedlora.rules import Rule, get_rule, rule_names

AUTO = "auto:"


def open_all(folders: Sequence[Path | str], *, other_base: bool = False) -> list[AdapterFolder]:
    """Opens the adapters and checks that they are of one base model, layer by layer.

    `other_base` lets the settings name different bases (a renamed or further trained copy); layers
    and shapes must agree even so. ValueError names adapter, layer and reason.
    """
    if not folders:
        raise ValueError("there is nothing to merge: name at least one adapter folder")
    opened = [open_folder(folder) for folder in folders]
    for other in opened[1:]:
        _check_pair(opened[0], other, other_base)
    return opened


def parsed_rank(rank: int | str | None) -> int | float | None:
    """The wanted rank: a whole number, a share of energy (a float, of "auto:0.99"), or None."""
    if rank is None or (type(rank) is int and rank > 0):
        return rank
    if isinstance(rank, str):
        if rank.isdecimal() and int(rank) > 0:
            return int(rank)
        try:
            share = float(rank.removeprefix(AUTO)) if rank.startswith(AUTO) else math.nan
        except ValueError:
            share = math.nan
        if 0 < share <= 1:
            return share
    raise ValueError(
        f"rank {rank!r} is neither a whole number above 0 nor {AUTO}SHARE with a share of the "
        f"energy above 0 and at most 1, such as {AUTO}0.99"
    )


def parsed_weights(weights: Sequence[int | float] | None, count: int) -> Tensor:
    """The weights divided by their sum (float64), all alike for None.

    ValueError for a count other than one each, a weight that is no number, NaN, infinite or
    negative, or a sum of zero.
    """
    given = [1.0] * count if weights is None else list(weights)
    for value in given:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"weight {value!r} is not a number")
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"weight {value!r} is not a finite number >= 0")
    if len(given) != count:
        raise ValueError(f"{len(given)} weights for {count} adapters: give one per adapter")
    total = sum(given)
    if not 0 < total < math.inf:
        raise ValueError(f"the weights sum to {total:g}: give a finite sum above 0")
    total = math.fsum(given)
    return checked_weights([value / total for value in given], count)


def check_rule(rule: Rule, adapters: Sequence[AdapterFolder], rank: int | float | None) -> None:
    """ValueError unless the rule can merge finished adapters of these ranks to that rank."""
    for round in (1, 2):
        plan = rule.plan(round, {})
        for verb, parts in (("train", plan.trains), ("share", plan.shares)):
            if missing := {"A", "B"} - parts:
                raise ValueError(
                    f"rule {rule.name!r} cannot merge finished adapters: in its round {round} "
                    f"clients {verb} no {min(missing)}, and finished adapters differ in it and "
                    f"want it merged; take {_some(_finishers())}"
                )
    if rank is not None and rule.options.get("rank") is not None:
        raise ValueError(f"the rank is given twice: {rank} and the rule's option rank")
    for layer, entry in adapters[0].layers.items():
        ranks = [adapter.layers[layer].rank for adapter in adapters]
        claim = rule.laws["mixed_ranks"]
        if claim is not True and len(set(ranks)) > 1:
            odd = next(index for index, other in enumerate(ranks) if other != ranks[0])
            mixed = [name for name in _finishers() if get_rule(name).laws["mixed_ranks"] is True]
            raise ValueError(
                f"rule {rule.name!r} takes one rank only ({claim}); layer {layer!r} has rank "
                f"{ranks[0]} in {adapters[0].folder} and {ranks[odd]} in {adapters[odd].folder}: "
                f"take {_some(mixed)}"
            )
        if type(rank) is int and rank > min(entry.shape):
            m, n = entry.shape
            raise ValueError(
                f"rank {rank} is above what layer {layer!r} of shape {m} x {n} can have: take at "
                f"most {min(m, n)}, or {AUTO}0.99"
            )


def _finishers() -> list[str]:
    """The rules that train both factors, and so can merge finished adapters."""
    rules = [get_rule(name) for name in rule_names()]
    whole = {"A", "B"}
    plans = {rule.name: [rule.plan(round, {}) for round in (1, 2)] for rule in rules}
    return [n for n, found in plans.items() if all(whole <= p.trains & p.shares for p in found)]


def _some(names: Sequence[str]) -> str:
    """`'a', 'b' or 'c'`, fra first where it is among them."""
    first = sorted(names, key=lambda name: (name != "fra", name))
    shown = [repr(name) for name in first[:4]]
    return " or ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


def _check_pair(first: AdapterFolder, other: AdapterFolder, other_base: bool) -> None:
    """ValueError unless both are adapters of one base, of the same layers and dense tensors."""
    for key, default in (("base_model_name_or_path", None), ("revision", "main")):
        left, right = (adapter.settings.get(key) or default for adapter in (first, other))
        if left != right and not other_base:
            raise ValueError(
                f"{other.folder} is an adapter of another base: {key} = {right!r}, in "
                f"{first.folder} {left!r}; if both are the same model under two names, say "
                "--other-base"
            )
    for key in ("layer_replication", "task_type"):
        left, right = (adapter.settings.get(key) for adapter in (first, other))
        if left != right:
            raise ValueError(
                f"{other.folder} has {key} = {right!r}, {first.folder} has {left!r}: they do not "
                "adapt the same model"
            )
    _check_names(first, other, "layer", first.layers, other.layers)
    _check_names(first, other, "tensor", first.dense, other.dense)
    for layer, entry in other.layers.items():
        want = first.layers[layer]
        if entry.shape != want.shape or entry.embedding != want.embedding:
            (m, n), (p, q) = entry.shape, want.shape
            raise ValueError(
                f"{other.folder}: layer {layer!r} is {m} x {n}{' (embedding)' * entry.embedding}, "
                f"in {first.folder} {p} x {q}{' (embedding)' * want.embedding}: another base model"
            )
    for name, held in other.dense.items():
        if held.shape != first.dense[name].shape:
            raise ValueError(
                f"{other.folder}: tensor {name!r} has shape {held.shape}, in {first.folder} "
                f"{first.dense[name].shape}: another head or base model"
            )


def _check_names(
    first: AdapterFolder,
    other: AdapterFolder,
    kind: str,
    left: Mapping[str, object],
    right: Mapping[str, object],
) -> None:
    if missing := sorted(left.keys() - right.keys()):
        raise ValueError(
            f"{other.folder} lacks {kind} {missing[0]!r} ({len(missing)} missing), which "
            f"{first.folder} has{near(missing[0], right.keys() - left.keys())}"
        )
    if extra := sorted(right.keys() - left.keys()):
        raise ValueError(
            f"{other.folder} has {kind} {extra[0]!r} ({len(extra)} more), which {first.folder} "
            "does not have"
        )
