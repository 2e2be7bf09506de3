"""What the server does around a rule: who counts how much, what clients are cut to, what is cut
off.

Turns a round's results into the terms of one sum, each an adapter with its coefficient; the merge
itself is elsewhere. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedlora.adapter import Adapter, ClientResult, Factors, cut, frobenius, precise
from fedlora.answers import checked_weights
from fedlora.robust import Robust, robust_coefficients, update_gram
from fedlora.rules import Residual, Rule, option_types

Head: TypeAlias = Literal["average", "freeze", "local"]
Weighting: TypeAlias = Literal["examples", "uniform"]


@dataclass(frozen=True)
class Receiver:
    """A client with a rank of its own: it is sent the first `rank` pairs in its own scaling.

    `keep_A` leaves the rows of A as long as they are (an orthonormal gauge); else the change of
    scaling is shared by both factors.
    """

    rank: int
    scaling: float
    keep_A: bool = False  # noqa: N815 (A is the matrix)


@dataclass(frozen=True)
class Policy:
    """What the server does around the rule: weights, head, what is cut, how far it steps.

    `residual` None takes the rule's own way. `fold_rank` caps the rank of folded and of carried
    residuals (0: no cap). `server_lr` is the share of the way from what was sent to what the rule
    says (above 1: beyond). `min_clients` good replies make a round (0: all that were asked), and
    `max_failed_rounds` rounds in a row with fewer end the run. `robust_bound` and `robust_faulty`
    as in `robust.robust_coefficients`.
    `receivers` names the clients with a rank of their own. `whoever` merges what came back, be it
    nothing: where going on or not would tell who answered.
    """

    weighting: Weighting = "examples"
    head: Head = "average"
    residual: Residual | None = None
    fold_rank: int = 0
    server_lr: float = 1.0
    robust: Robust = "none"
    robust_bound: float = 0.0
    robust_faulty: int = 0
    min_clients: int = 0
    max_failed_rounds: int = 1
    whoever: bool = False
    receivers: Mapping[str, Receiver] = field(default_factory=dict)


PLAIN = Policy()
ROUNDING = 1e-12  # a coefficient below it is what is left of a difference that should be zero


@dataclass(frozen=True, eq=False)
class Term:
    """One adapter in the sum with its coefficient; `receiver` as whom it was sent."""

    coefficient: float
    adapter: Adapter
    receiver: Receiver | None = None

    def factors(self, name: str, scaling: float) -> Factors:
        """One layer in float64, the change of scaling that `cut_for` made undone.

        A rule that averages factors must find all clients in one gauge.
        """
        factors = self.adapter.layers[name]
        exact = precise(factors)
        if self.receiver is None:
            return exact
        return cut(exact, exact.rank, scaling, keep_A=self.receiver.keep_A)


def cut_for(adapter: Adapter, receiver: Receiver | None) -> Adapter:
    """The adapter as this receiver holds it; without one, as it is."""
    if receiver is None:
        return adapter
    layers = {
        name: cut(factors, receiver.rank, receiver.scaling, keep_A=receiver.keep_A)
        for name, factors in adapter.layers.items()
    }
    return replace(adapter, layers=layers)


def base_weights(results: Sequence[ClientResult], weighting: Weighting) -> Tensor:
    """The weights of the average, summing to one: by example counts, or all alike (float64)."""
    counts = [result.examples for result in results]
    for result in results:
        if isinstance(result.examples, bool) or result.examples <= 0:
            raise ValueError(
                f"client {result.client} reports {result.examples!r} examples: it must be above 0"
            )
    shares = torch.tensor(
        counts if weighting == "examples" else [1] * len(counts), dtype=torch.float64
    )
    return shares / shares.sum()


def terms(
    rule: Rule, sent: Sequence[Adapter], results: Sequence[ClientResult], policy: Policy
) -> list[Term]:
    """The clients' adapters with their coefficients, and what they were sent with the remainder.

    With robust coefficients a_k and a server learning rate the merge is of sum w_k sent_k + lr sum
    a_k (got_k - sent_k): what client k was sent stays with w_k - lr a_k, and all sum to one.
    """
    weights = base_weights(results, policy.weighting)
    if rule.reweigh is not None:
        weights = checked_weights(rule.reweigh(sent, results, weights), len(results))
    received = [result.adapter for result in results]
    receivers = [policy.receivers.get(result.client) for result in results]
    used, rest = weights, torch.zeros_like(weights)
    if policy.robust != "none":
        bound, faulty = policy.robust_bound, policy.robust_faulty
        gram = update_gram(sent, received)
        used = robust_coefficients(policy.robust, gram, weights, bound=bound, faulty=faulty)
        rest = weights - used
    if policy.server_lr != 1:
        rest = policy.server_lr * rest + (1 - policy.server_lr) * weights
        used = policy.server_lr * used
    each = zip(used.tolist(), received, receivers, strict=True)
    return [Term(*term) for term in each] + _remainders(sent, rest, receivers)


def _remainders(
    sent: Sequence[Adapter], rest: Tensor, receivers: Sequence[Receiver | None]
) -> list[Term]:
    """What was sent, once for each rank, with the remainders of its receivers."""
    groups: dict[int, Term] = {}
    for share, adapter, receiver in zip(rest.tolist(), sent, receivers, strict=True):
        if share:
            rank = next((factors.rank for factors in adapter.layers.values()), 0)
            before = groups[rank].coefficient if rank in groups else 0.0
            groups[rank] = Term(before + share, adapter, receiver)
    return [groups[rank] for rank in sorted(groups) if abs(groups[rank].coefficient) > ROUNDING]


def unsent(adapter: Adapter, parts: Sequence[Term]) -> float:
    """||sum_k c_k (W - W_k)||_F / ||W||_F over all layers of the adapter's increment W.

    W_k is its cut to the rank of term k, c_k the term's coefficient: the share of the last adapter
    that a mean of the increments forgets, because those who were asked do not hold it. 0 for W = 0.
    """
    missing, whole = [0.0], [0.0]
    for name, factors in adapter.layers.items():
        held = precise(factors)
        share = held.A.new_zeros(held.rank)
        for term in parts:
            rank = term.adapter.layers[name].rank
            share[rank:] += term.coefficient
        missing.append(frobenius(Factors(held.A, held.B * share, held.scaling)))
        whole.append(frobenius(held))
    return math.hypot(*missing) / (math.hypot(*whole) or math.inf)


def residual_policy(rule: Rule, wanted: Residual | None) -> Residual:
    """What becomes of the rule's residual; ValueError where the rule does not allow it."""
    own: Residual = rule.residual[0] if rule.residual else "drop"
    if wanted is None or wanted == own:
        return own
    if wanted not in rule.residual:
        allowed = f"it allows {', '.join(rule.residual)}" if rule.residual else "it leaves none"
        raise ValueError(f"residual = {wanted!r} does not go with rule {rule.name!r}: {allowed}")
    return wanted


def with_residual(rule: Rule, fate: Residual) -> Rule:
    """The rule told to give its residual where it has that option and the policy needs it."""
    if fate == "drop" or "residual" not in option_types(rule):
        return rule
    return replace(rule, options={**rule.options, "residual": "keep"})
