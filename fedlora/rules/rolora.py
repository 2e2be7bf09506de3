"""RoLoRA: B in odd rounds, A in even rounds; the other factor stands still, so the mean is exact.

Formula: odd rounds B = sum w_k B_k with A fixed; even rounds A = sum w_k A_k with B fixed.
Source: Chen, Guo, Ju, Dalal, Zhu, Khisti 2025, "Robust federated finetuning of LLMs via alternating
optimization of LoRA" (2502.01755).
Keeps: the weighted mean of the increments, exactly; A learns as well, unlike in `ffa`.
Loses: half of the trainable numbers in any one round.
Cost per layer and client: r m (odd) or r n (even) up; r(m + n) down, so that a client that was
not in the last round has both.
DP: one factor at a time carries noise, which enters the increment linearly within a round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from fedlora.adapter import Factors, Part, mean_factors, rescaled
from fedlora.rules import Plan, rule


def in_turn(round: int, memory: Mapping[str, float]) -> Plan:
    """B in odd rounds, A in even ones."""
    part: Part = "B" if round % 2 else "A"
    return Plan(frozenset({part}), frozenset({part}))


@rule(
    plan=in_turn,
    exact=True,
    linear=True,
    mixed_ranks="means of factors need equal ranks",
    equivariant=True,
    weighted=True,
    idempotent=True,
    steady=True,
)
def rolora(prev: Factors, clients: Sequence[Factors], weights: Float64[Tensor, " k"]) -> Factors:
    """The weighted mean of the factor whose turn it was; the other one to the bit as before."""
    mean = mean_factors(clients, weights, prev.scaling)
    same_A = all(torch.equal(client.A, prev.A) for client in clients)
    same_B = all(torch.equal(rescaled(client, prev.scaling).B, prev.B) for client in clients)
    return Factors(prev.A if same_A else mean.A, prev.B if same_B else mean.B, prev.scaling)
