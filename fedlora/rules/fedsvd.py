"""FedSVD: clients train B; the server turns (mean B) A = U S V^T into A = V^T and B = U S.

Source: Lee et al. 2025, "FedSVD: Adaptive orthogonalization for private federated learning with
LoRA" (2505.12805).
Keeps: the weighted mean of the increments, exactly; A follows what was learned and stays
orthonormal, unlike in `ffa`.
Loses: A is never trained by gradients, only turned: its row space stays that of the start, as in
`ffa`.
Cost per layer and client: r m up, r(m + n) down.
DP: noise enters through B alone, linearly, and the orthonormal A does not amplify it; the SVD is
post-processing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float64
from torch import Tensor

from fedlora.adapter import Factors, mean_factors
from fedlora.lowrank import truncate
from fedlora.rules import Plan, rule


def train_B(round: int, memory: Mapping[str, float]) -> Plan:  # noqa: N802 (B is the matrix)
    """B is trained and shared; A is sent, since the server turns it."""
    return Plan(frozenset({"B"}), frozenset({"B"}))


@rule(
    plan=train_B,
    exact=True,
    linear="an SVD is not linear in the factors",
    mixed_ranks="all clients share one A, so they share its rank",
    equivariant=True,
    weighted=True,
    idempotent=True,
    steady=True,
)
def fedsvd(prev: Factors, clients: Sequence[Factors], weights: Float64[Tensor, " k"]) -> Factors:
    """The mean of B on the common A, refactored so that A is orthonormal."""
    B = mean_factors(clients, weights, prev.scaling).B
    mean = Factors(prev.A, B, prev.scaling)
    return truncate(mean, prev.rank, gauge="orthonormal", previous=prev)
