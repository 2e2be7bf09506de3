"""FedRPCA: the updates of A and of B parted into common and sparse; the sparse part is amplified.

Formula: for A and for B apart, the columns vec(A_k - A_0) are parted by robust PCA, D = L + S with
L of low rank and S sparse (min ||L||_* + ||S||_1 / sqrt(max of D's sides)); the new factor is A_0 +
sum w_k L_k + beta sum w_k S_k.
Source: Jhunjhunwala et al. 2025, "FedRPCA: Enhancing federated LoRA aggregation using robust PCA"
(2506.01194); robust PCA by the inexact augmented Lagrangian of Lin, Chen, Ma 2010 (1009.5055).
Keeps: what clients have in common, and more (beta > 1) of what only some of them learned.
Loses: the covariance of the factors, as `fedavg`, which beta = 1 is; the mean itself for other
beta.
Cost per layer and client: r(m + n) up, r(m + n) down; on the server some fifty SVDs of r n x k.
DP: noise on both factors enters as a product, and noise is not sparse: it blurs the parting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from fedlora.adapter import Factors, equal_ranks, rescaled
from fedlora.rules import rule

CLOSE, STEPS, GROWTH = 1e-9, 200, 1.5


@rule(
    exact="factors are averaged apart, and their sparse part counts beta times",
    linear="robust PCA is not linear in the factors",
    mixed_ranks="updates of factors need equal ranks",
    equivariant="what is sparse depends on the coordinates",
    weighted="even a single client's sparse part counts beta times",
    idempotent="even a common update may have a part that counts as sparse",
    steady=True,
)
def fedrpca(
    prev: Factors, clients: Sequence[Factors], weights: Float64[Tensor, " k"], *, beta: float = 2.0
) -> Factors:
    """The last factors plus the mean common update plus `beta` times the mean sparse one."""
    equal_ranks(prev, clients)
    plain = [rescaled(client, prev.scaling) for client in clients]
    A = prev.A + _amplified([client.A - prev.A for client in plain], weights, beta)
    B = prev.B + _amplified([client.B - prev.B for client in plain], weights, beta)
    return Factors(A, B, prev.scaling)


def _amplified(updates: Sequence[Tensor], weights: Tensor, beta: float) -> Tensor:
    D = torch.stack([update.flatten() for update in updates], dim=1)
    size = float(D.abs().max())
    if size == 0:
        return torch.zeros_like(updates[0])
    sparse = D - size * common_part(D / size)
    mean, extra = D @ weights.to(D), (beta - 1) * (sparse @ weights.to(D))
    return (mean + extra).reshape(updates[0].shape)


def common_part(D: Float64[Tensor, "p k"]) -> Float64[Tensor, "p k"]:
    """L of the robust PCA D = L + S (principal component pursuit)."""
    threshold = 1 / math.sqrt(max(D.shape))
    spectral = float(torch.linalg.matrix_norm(D, 2))
    Y = D / max(spectral, float(D.abs().max()) / threshold)
    S, mu, L = torch.zeros_like(D), 1.25 / spectral, D
    for _ in range(STEPS):
        U, values, Vh = torch.linalg.svd(D - S + Y / mu, full_matrices=False)
        L = (U * (values - 1 / mu).clamp(min=0)) @ Vh
        rest = D - L + Y / mu
        S = rest.sign() * (rest.abs() - threshold / mu).clamp(min=0)
        gap = D - L - S
        if float(gap.norm()) <= CLOSE * float(D.norm()):
            break
        Y, mu = Y + mu * gap, mu * GROWTH
    return L
