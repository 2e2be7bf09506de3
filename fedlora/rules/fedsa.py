"""FedSA-LoRA: clients share A alone, A = sum w_k A_k; B and the head stay with each client.

Source: Guo et al. 2024, "Selective aggregation for low-rank adaptation in federated learning"
(2410.01463).
Keeps: what A learns in common; every client's own B and head, so that each has its own model.
Loses: a common model: there is one adapter per client, B_k A, and none for a newcomer (B = 0).
Exact means here what the server sees, A alone.
Cost per layer and client: r n up, r n down.
DP: noise enters what is shared linearly, through A alone; B never leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float64
from torch import Tensor

from fedlora.adapter import PARTS, Factors, mean_factors
from fedlora.rules import Plan, rule


def share_A(round: int, memory: Mapping[str, float]) -> Plan:  # noqa: N802 (A is the matrix)
    """All is trained, A alone travels; the head stays with the client whatever the head policy."""
    return Plan(PARTS, frozenset({"A"}), frozenset({"A"}))


@rule(
    plan=share_A,
    exact=True,
    linear=True,
    mixed_ranks="means of factors need equal ranks",
    equivariant=True,
    weighted=True,
    idempotent=True,
    steady=True,
)
def fedsa(prev: Factors, clients: Sequence[Factors], weights: Float64[Tensor, " k"]) -> Factors:
    """The weighted mean of A; the global B stays at its start."""
    return Factors(mean_factors(clients, weights, prev.scaling).A, prev.B, prev.scaling)
