"""LoRA-FAIR: the means of A and of B, and a correction of B that brings their product nearer.

Formula: B = mean B + dB, dB = argmin ||(mean B + dB) mean A - mean(B A)||_F^2 + ridge ||dB||_F^2
= C A^T (A A^T + ridge I)^-1 with A = mean A and C = sum w_k (B_k - mean B)(A_k - mean A).
Source: Bian, Wang, Zhang, Xu 2024, "LoRA-FAIR: Federated LoRA fine-tuning with aggregation and
initialization refinement" (2411.14961), which finds dB by gradient steps; here in closed form.
Keeps: the means of the factors, and the part of their covariance that lies in A's row space.
Loses: the part of the covariance outside that row space.
Cost per layer and client: r(m + n) up, r(m + n) down.
DP: noise on both factors enters the increment as a product of noises (quadratic noise).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from fedlora.adapter import Factors, mean_factors, rescaled
from fedlora.rules import rule


@rule(
    exact="what lies outside the row space of the mean A is left out",
    linear="the correction is quadratic in the factors",
    mixed_ranks="means of factors need equal ranks",
    equivariant=True,
    weighted=True,
    idempotent=True,
    steady=True,
)
def lorafair(
    prev: Factors,
    clients: Sequence[Factors],
    weights: Float64[Tensor, " k"],
    *,
    ridge: float = 0.01,
) -> Factors:
    """The weighted mean of each factor, B corrected towards the mean of the increments."""
    if ridge < 0:
        raise ValueError(f"ridge {ridge!r} is below 0: it weighs the size of the correction")
    mean = mean_factors(clients, weights, prev.scaling)
    towards = torch.zeros_like(mean.B)  # C A^T, m x r
    for weight, client in zip(weights, clients, strict=True):
        B = rescaled(client, prev.scaling).B - mean.B
        towards = towards + weight * (B @ ((client.A - mean.A) @ mean.A.mT))
    gram = mean.A @ mean.A.mT
    gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    correction = (torch.linalg.pinv(gram, hermitian=True) @ towards.mT).mT
    return Factors(mean.A, mean.B + correction, prev.scaling)
