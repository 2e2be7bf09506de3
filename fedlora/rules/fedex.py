"""FedEx-LoRA: the means of A and of B, and their covariance as residual, folded into the model.

Formula: sum w_k B_k A_k = mean(B) mean(A) + sum w_k (B_k - mean B)(A_k - mean A).
Source: Singhal, Ponkshe, Vepakomma 2024, "FedEx-LoRA: Exact aggregation for federated and efficient
fine-tuning of foundation models" (2410.09432).
Keeps: the weighted mean of the increments, exactly; A and B stay in the clients' own coordinates.
Loses: nothing, while nothing is cut; but the folded part, of rank up to (k - 1) r more every round,
is trained no further and travels down again.
Cost per layer and client: r(m + n) up; r(m + n) + f(m + n) down, f the rank of what was folded.
DP: noise on both factors enters the increment as a product of noises, and the residual keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float64
from torch import Tensor

from fedlora.adapter import Factors, Merged, mean_factors, mix, rescaled
from fedlora.rules import rule


@rule(
    residual=["fold", "drop"],
    exact=True,
    linear="the residual is quadratic in the factors",
    mixed_ranks="means of factors need equal ranks",
    equivariant=True,
    weighted=True,
    idempotent=True,
    steady=True,
)
def fedex(prev: Factors, clients: Sequence[Factors], weights: Float64[Tensor, " k"]) -> Merged:
    """The mean of each factor, with the covariance of the factors as residual."""
    mean = mean_factors(clients, weights, prev.scaling)
    spread = (_apart(rescaled(client, prev.scaling), mean) for client in clients)
    return Merged(mean, mix(spread, weights, prev.scaling))


def _apart(client: Factors, mean: Factors) -> Factors:
    return Factors(client.A - mean.A, client.B - mean.B, mean.scaling)
