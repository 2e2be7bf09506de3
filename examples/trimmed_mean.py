"""The coordinate-wise trimmed mean: of every entry the extremes are dropped, the rest averaged.

Formula: A_ij = mean of the A_k,ij without the `cut` largest and the `cut` smallest; B likewise.
Source: Yin, Chen, Ramchandran, Bartlett 2018, "Byzantine-robust distributed learning: Towards
optimal statistical rates" (1803.01498), there for gradients.
Keeps: what most clients agree on, entry by entry.
Loses: the weights, which are not looked at; the covariance of the factors, as `fedavg`.
Cost per layer and client: r(m + n) up, r(m + n) down.
DP: noise on both factors enters the increment as a product of noises (quadratic noise).
"""

import torch

from fedlora import Factors, rule
from fedlora.adapter import equal_ranks, rescaled


@rule(
    exact="factors are averaged apart, and without their extremes",
    linear="a sorted entry is not linear in the factors",
    mixed_ranks="entries of other ranks cannot be compared",
    equivariant="what is extreme depends on the coordinates",
    weighted="the weights are not looked at",
    idempotent=True,
    steady=True,
)
def trimmed_mean(prev, clients, weights, *, cut: int = 1):
    """The mean of each entry of each factor without the largest and the smallest."""
    equal_ranks(prev, clients)
    cut = max(0, min(cut, (len(clients) - 1) // 2))
    same = [rescaled(client, prev.scaling) for client in clients]  # B in one scaling
    A = torch.stack([client.A for client in same]).sort(dim=0).values
    B = torch.stack([client.B for client in same]).sort(dim=0).values
    kept = slice(cut, len(clients) - cut)
    return Factors(A[kept].mean(dim=0), B[kept].mean(dim=0), prev.scaling)
