"""FedMomentum: FRA with what rank r cannot hold folded into the model, up to the energy `tau`.

Formula: U S V^T = sum w_k s_k B_k A_k; the adapter takes the first r directions, the residual the
next ones until both hold the share `tau` of the squared singular values.
Source: "FedMomentum" 2026 (2603.08014).
Keeps: the weighted mean of the increments, exactly at tau = 1.
Loses: below tau = 1 the weakest directions; what is folded is trained no further. With mixed ranks,
as in `fra`, the pairs that the clients of a round were not sent.
Cost per layer and client: r(m + n) up; r(m + n) + f(m + n) down, f the rank of what was folded.
DP: the SVD is post-processing and costs nothing; noise on both factors still meets in the product.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float64
from torch import Tensor

from fedlora.adapter import Factors, Merged, mix
from fedlora.lowrank import Gauge, split
from fedlora.rules import rule


@rule(
    residual=["fold"],
    exact=True,
    linear="an SVD is not linear in the factors",
    mixed_ranks=True,
    equivariant=True,
    weighted=True,
    idempotent=True,
    steady=True,
)
def fedmomentum(
    prev: Factors,
    clients: Sequence[Factors],
    weights: Float64[Tensor, " k"],
    *,
    tau: float = 1.0,
    gauge: Gauge = "balanced",
) -> Merged:
    """The truncated SVD of the averaged increments, its tail up to `tau` as residual."""
    mixed = mix(clients, weights, prev.scaling)
    return split(mixed, prev.rank, gauge=gauge, previous=prev, energy=tau)
