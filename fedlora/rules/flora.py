"""FLoRA: the clients' factors stacked and folded whole; B starts again at zero.

Formula: sum w_k s_k B_k A_k = [w_1 s_1 B_1, ..., w_k s_k B_k] [A_1; ...; A_k].
Source: Wang et al. 2024, "FLoRA: Federated fine-tuning large language models with heterogeneous
low-rank adaptations" (2409.05976).
Keeps: the weighted mean of the increments, exactly, for any mix of ranks.
Loses: the adapter itself: every round starts from B = 0 and the A of the start (the paper draws a
new one), and all that was learned lies in the folded part, which nobody trains again.
Cost per layer and client: r_k(m + n) up; r_k(m + n) + f(m + n) down, f the rank of what was folded,
at most sum r_k more every round.
DP: noise on both factors enters the increment as a product of noises (quadratic noise).
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float64
from torch import Tensor

from fedlora.adapter import Factors, Merged, mix, restarted
from fedlora.rules import rule


@rule(
    residual=["fold"],
    exact=True,
    linear="the stack is quadratic in the factors",
    mixed_ranks=True,
    equivariant=True,
    weighted=True,
    idempotent=True,
    steady=True,
)
def flora(prev: Factors, clients: Sequence[Factors], weights: Float64[Tensor, " k"]) -> Merged:
    """B = 0 again, with the stack of all increments as residual."""
    return Merged(restarted(prev), mix(clients, weights, prev.scaling))
