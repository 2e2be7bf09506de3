"""FedRot-LoRA: each client's pairs turned onto the last global ones, then averaged apart.

Formula: B_k Q_k, Q_k^T A_k with the orthogonal Q_k nearest to A_k A_ref^T (odd rounds) or to
B_k^T B_ref (even rounds), taken `strength` of the way: the orthogonal matrix nearest to
(1 - strength) I + strength Q_k; then the means of A and of B. Q_k is a proper rotation (Kabsch
1976): half of the way to a reflection there is no nearest orthogonal matrix.
Source: Zhang, Kim, Cha, Vikalo 2026, "FedRot-LoRA: Mitigating rotational misalignment in federated
LoRA" (2602.23638).
Keeps: each client's increment, which no turn changes; the coordinates of the last round.
Loses: what is left of the factors' covariance after turning, usually much less than `fedavg`.
Cost per layer and client: r(m + n) up, r(m + n) down; on the server O(k (m + n) r^2).
DP: noise on both factors enters the increment as a product of noises (quadratic noise).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from fedlora.adapter import Factors, equal_ranks, mean_factors
from fedlora.lowrank import rotation
from fedlora.rules import rule


@rule(
    exact="the product of means leaves out the covariance of the turned factors",
    linear="the turns depend on the factors",
    mixed_ranks="means of factors need equal ranks",
    equivariant=True,
    weighted=True,
    idempotent=True,
    steady=True,
)
def fedrot(
    prev: Factors,
    clients: Sequence[Factors],
    weights: Float64[Tensor, " k"],
    *,
    strength: float = 0.5,
    round: int = 1,
) -> Factors:
    """The weighted mean of each factor after turning every client's pairs onto the last ones."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {strength!r} is outside 0..1: it is a share of the way")
    equal_ranks(prev, clients)
    turned = [_turned(client, prev, strength, by_A=round % 2 == 1) for client in clients]
    return mean_factors(turned, weights, prev.scaling)


def _turned(client: Factors, reference: Factors, strength: float, *, by_A: bool) -> Factors:
    overlap = client.A @ reference.A.mT if by_A else client.B.mT @ reference.B
    whole = _proper_rotation(overlap)
    identity = torch.eye(len(whole), dtype=whole.dtype, device=whole.device)
    Q = rotation((1 - strength) * identity + strength * whole)
    return Factors(Q.mT @ client.A, client.B @ Q, client.scaling)


def _proper_rotation(M: Tensor) -> Tensor:
    """The rotation (determinant 1) nearest to M; the identity for a zero M."""
    if not bool(M.any()):
        return torch.eye(len(M), dtype=M.dtype, device=M.device)
    U, _, Vh = torch.linalg.svd(M / M.abs().max())
    U[:, -1] *= torch.linalg.det(U @ Vh).sign()
    Q: Tensor = U @ Vh
    return Q
