"""FRA first, then A is frozen where it stands and B alone is averaged, as in FFA-LoRA.

Formula: while A moves, SVD_r(sum w_k s_k B_k A_k); afterwards A as it is, B = sum w_k B_k.
Source: Trautmann, Hales, Volk 2024, "Aggregating Low Rank Adapters in Federated Fine-tuning"
(2501.06332) propose it; the criterion of `switch = "auto"` is ours. It freezes A once, for
`patience` rounds in a row, the new directions were mostly the clients' own noise: with N_k the part
of client k's change outside the rows of A and q = sum w_k^2, once
||sum w_k N_k||^2 <= 2 q / (1 - q) sum w_k ||N_k - mean||^2 over all layers, not counting the first
merge. If N_k = N + e_k with independent noise e_k of one size, the right side is twice the noise of
the mean, and the two are equal where N is as large as that noise (docs/budget.md).
Keeps: the r strongest directions of the mean at first, and exactly the mean of the increments once
A is frozen.
Loses: `fra`'s tail at first; after the switch, half of the trainable numbers and every new
direction. The criterion never holds with one client; clients who disagree for good (label skew)
look like noise and freeze A early; of many clients the mean has little noise, so that A is frozen
late or never.
Cost per layer and client: r(m + n) up, then r m; r(m + n) down throughout, so that a client that
joins late has A.
DP: as `fra` at first; then noise enters the increment linearly, through B alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from fedlora.adapter import Factors, Part, equal_ranks, mean_factors, mix
from fedlora.lowrank import truncate
from fedlora.rules import SETTLED, Plan, rule


def both_then_B(  # noqa: N802 (B is the matrix)
    round: int, memory: Mapping[str, float], *, switch: int | str, patience: int
) -> Plan:
    """A and B, and B alone once A is frozen."""
    settled = memory.get(SETTLED, 0.0) >= patience
    frozen = settled if isinstance(switch, str) else round > switch
    parts: frozenset[Part] = frozenset({"B"}) if frozen else frozenset({"A", "B"})
    return Plan(parts, parts)


@rule(
    plan=both_then_B,
    exact="while A moves, what rank r cannot hold is dropped",
    linear="while A moves, the result is a truncated SVD",
    mixed_ranks="once A is frozen all clients share it, and so its rank",
    equivariant=True,
    weighted=True,
    idempotent=True,
    steady=True,
)
def hybrid(
    prev: Factors,
    clients: Sequence[Factors],
    weights: Float64[Tensor, " k"],
    *,
    switch: int | Literal["auto"] = "auto",
    patience: int = 2,
) -> Factors:
    """FRA for `switch` rounds or until A has settled; then A as it is, the mean of B."""
    if isinstance(switch, int) and switch < 0:
        raise ValueError(f"switch {switch!r} is below 0: it is a number of rounds, or 'auto'")
    if patience < 1:
        raise ValueError(f"patience {patience!r} is below 1: it is a number of rounds")
    equal_ranks(prev, clients)
    if all(torch.equal(client.A, prev.A) for client in clients):  # also where nobody trained
        return Factors(prev.A, mean_factors(clients, weights, prev.scaling).B, prev.scaling)
    return truncate(mix(clients, weights, prev.scaling), prev.rank, previous=prev)
