"""FLoRIST: the SVD of the stacked factors, cut where the energy `tau` is reached, folded; B = 0.

Formula: sum w_k s_k B_k A_k = U S V^T, cut to the smallest rank p with sum_(i <= p) S_i^2 at least
`tau` of the whole; all clients get these p directions.
Source: Ramesh, Dass 2025, "FLoRIST: Singular value thresholding for efficient and accurate
federated fine-tuning of large language models" (2506.09199). How clients go on from there is
FLoRA's way here: they fold it and start again.
Keeps: the share `tau` of the averaged increment's energy, in the fewest directions that hold it.
Loses: the rest; and, as in `flora`, what is folded is trained no further.
Cost per layer and client: r_k(m + n) up; r_k(m + n) + f(m + n) down, f the rank of what was
folded, p more in every round at most.
DP: the SVD is post-processing and costs nothing; noise on both factors still meets in the product.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float64
from torch import Tensor

from fedlora.adapter import Factors, Merged, mix, restarted
from fedlora.lowrank import compress
from fedlora.rules import rule


@rule(
    residual=["fold"],
    exact="the directions beyond the energy threshold tau are cut",
    linear="an SVD is not linear in the factors",
    mixed_ranks=True,
    equivariant=True,
    weighted="even one client's weakest directions are cut below tau",
    idempotent="even identical clients lose their weakest directions below tau",
    steady="below tau the weakest directions of what was sent are cut too",
)
def florist(
    prev: Factors, clients: Sequence[Factors], weights: Float64[Tensor, " k"], *, tau: float = 0.9
) -> Merged:
    """B = 0 again, with the strongest directions of the stacked increments as residual."""
    mixed = mix(clients, weights, prev.scaling)
    return Merged(restarted(prev), compress(mixed, energy=tau).factors)
