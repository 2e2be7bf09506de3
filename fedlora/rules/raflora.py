"""raFLoRA: the mean of the increments with every rank row weighed over the clients that have it.

Formula: SVD_r(sum_k s_k B_k diag(c_k) A_k) with c_ki = w_k / sum_(j: r_j >= i) w_j for row i; rows
that no client of the round has stay as they were (ours: partial participation).
Source: "raFLoRA" 2026 (2602.13486).
Keeps: energy in the rows beyond the smallest rank, which plain weights lose within a few rounds
because clients of small rank count as zero there.
Loses: exactness for mixed ranks, on purpose; the tail beyond r.
Cost per layer and client: r_k(m + n) up, r_k(m + n) down.
DP: the SVD is post-processing and costs nothing; noise on both factors still meets in the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from jaxtyping import Float64
from torch import Tensor

from fedlora.adapter import Factors, mix
from fedlora.lowrank import Gauge, truncate
from fedlora.rules import rule


@rule(
    exact="rows that few clients have get more than their share",
    linear="a truncated SVD is not linear in the factors",
    mixed_ranks=True,
    equivariant=True,
    weighted=True,
    idempotent=True,
    steady=True,
)
def raflora(
    prev: Factors,
    clients: Sequence[Factors],
    weights: Float64[Tensor, " k"],
    *,
    gauge: Gauge = "balanced",
) -> Factors:
    """The truncated SVD of increments whose rank rows are averaged over those that have them."""
    reach = weights.new_zeros(max(prev.rank, *(client.rank for client in clients)))
    for weight, client in zip(weights, clients, strict=True):
        reach[: client.rank] += weight
    share = torch.where(reach != 0, 1 / reach, 0.0)
    rows = [w * share[: c.rank].to(c.B) for w, c in zip(weights, clients, strict=True)]
    idle = (reach[: prev.rank] == 0).to(
        prev.A.device
    )  # pairs that nobody had, or nobody who counts
    kept = Factors(prev.A[idle], prev.B[:, idle], prev.scaling)
    mixed = mix(chain(clients, [kept]), [*rows, 1.0], prev.scaling)
    return truncate(mixed, prev.rank, gauge=gauge, previous=prev)
