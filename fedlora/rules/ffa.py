"""FFA-LoRA: A stays frozen at its random start, clients train B only; B = sum w_k B_k.

Source: Sun et al. 2024, "Improving LoRA in privacy-preserving federated learning" (2403.12313).
Keeps: the weighted mean of the increments, exactly, since mean(B) A = mean(BA) for a common A.
Loses: half of the trainable numbers; every increment keeps the row space drawn at the start.
Cost per layer and client: r m up, r m down (A is drawn from the common seed and never travels).
DP: noise enters the increment linearly, through B alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float64
from torch import Tensor

from fedlora.adapter import Factors, mean_factors
from fedlora.rules import rule


@rule(
    trains=["B"],
    receives=["B"],
    exact=True,
    linear=True,
    mixed_ranks="all clients share one A, so they share its rank",
    equivariant=True,
    weighted=True,
    idempotent=True,
    steady=True,
)
def ffa(prev: Factors, clients: Sequence[Factors], weights: Float64[Tensor, " k"]) -> Factors:
    """The previous A with the weighted mean of the clients' B."""
    return Factors(prev.A, mean_factors(clients, weights, prev.scaling).B, prev.scaling)
