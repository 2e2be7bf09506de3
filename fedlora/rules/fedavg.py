"""FedAvg of the factors: A = sum w_k A_k and B = sum w_k B_k, apart.

Source: McMahan et al. 2017 (1602.05629), for LoRA as FedIT, Zhang et al. 2023 (2305.05644).
Keeps: the means of A and of B.
Loses: the covariance of the factors, since mean(B) mean(A) differs from mean(BA) by sum w_k (B_k -
mean B)(A_k - mean A); the loss grows as clients drift apart.
Cost per layer and client: r(m + n) up, r(m + n) down.
DP: noise on both factors enters the increment as a product of noises (quadratic noise).
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float64
from torch import Tensor

from fedlora.adapter import Factors, mean_factors
from fedlora.rules import rule


@rule(
    exact="the product of means leaves out the covariance of the factors",
    linear=True,
    mixed_ranks="means of factors need equal ranks",
    equivariant=True,
    weighted=True,
    idempotent=True,
    steady=True,
)
def fedavg(prev: Factors, clients: Sequence[Factors], weights: Float64[Tensor, " k"]) -> Factors:
    """The weighted mean of each factor."""
    return mean_factors(clients, weights, prev.scaling)
