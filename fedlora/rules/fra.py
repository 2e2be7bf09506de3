"""FRA-LoRA: the mean of the full increments, brought to rank r: SVD_r(sum w_k s_k B_k A_k).

Source: Trautmann, Hales, Volk 2024, "Aggregating Low Rank Adapters in Federated Fine-tuning"
(2501.06332); with mixed ranks it is FlexLoRA, Bai et al. 2024 (2402.11505).
Keeps: the r strongest directions of the averaged increment, which no other rank-r adapter beats.
Loses: the tail, ||E||_F^2 = sum of sigma_i^2 beyond r, never more than FedAvg loses; and the gauge
of the last round: the new A and B are other coordinates for (nearly) the same increment. With mixed
ranks a client counts as zero in the pairs that it was not sent, and a round of small clients alone
erases them (rank 2 of 8, a random
start, nobody trains: 32 % of the energy in one round): see `unsent` in the log; `raflora` keeps
them.
Cost per layer and client: r(m + n) up, r(m + n) down; on the server O((m + n) R^2) for R = sum r_k.
DP: the SVD is post-processing and costs nothing; noise on both factors still meets in the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float64
from torch import Tensor

from fedlora.adapter import Factors, Merged, mix
from fedlora.lowrank import Gauge, split, truncate
from fedlora.rules import rule


@rule(
    residual=["drop", "fold", "carry"],
    exact=True,
    linear="a truncated SVD is not linear in the factors",
    mixed_ranks=True,
    equivariant=True,
    weighted=True,
    idempotent=True,
    steady=True,
)
def fra(
    prev: Factors,
    clients: Sequence[Factors],
    weights: Float64[Tensor, " k"],
    *,
    rank: int | None = None,
    gauge: Gauge = "balanced",
    residual: Literal["drop", "keep"] = "drop",
) -> Factors | Merged:
    """The truncated SVD of the averaged increments, to `rank` (None: as before)."""
    mixed = mix(clients, weights, prev.scaling)
    wanted = prev.rank if rank is None else rank
    if residual == "keep":
        return split(mixed, wanted, gauge=gauge, previous=prev)
    return truncate(mixed, wanted, gauge=gauge, previous=prev)
