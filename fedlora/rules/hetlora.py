"""HetLoRA: factors of any rank padded with zeros and averaged apart, weights by the updates' norms.

Formula: A = sum w_k [A_k; 0], B = sum w_k [B_k, 0] with w_k proportional to the client's weight
times ||s_k (B_k A_k - B_0 A_0)||_F over all layers, B_0 A_0 what it was sent; client k gets the
first r_k pairs of the result. Pairs that no client of the round has stay as they were (ours:
partial participation).
Source: Cho, Liu, Xu, Fahrezi, Joshi 2024, "Heterogeneous LoRA for federated fine-tuning of
on-device foundation models" (2401.06432). Its figure 2 has the norm of B_k A_k whole, which is the
same in round 1 and later tends to weigh all alike, and no weights by rows (`merge.weights =
"uniform"`); its self-pruning of ranks on the client is left out.
Keeps: the means of the factors; more of the clients that have learned more.
Loses: the covariance of the factors, as `fedavg`; and pairs that few clients have shrink every
round, since the others count as zero there.
Cost per layer and client: r_k(m + n) up, r_k(m + n) down.
DP: noise on both factors enters as a product; the norms would need a share of the budget of their
own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from fedlora.adapter import (
    Adapter,
    ClientResult,
    Factors,
    change,
    frobenius,
    mean_factors,
    padded,
    precise,
)
from fedlora.rules import rule


def by_norm(
    sent: Sequence[Adapter], results: Sequence[ClientResult], weights: Tensor
) -> Float64[Tensor, " k"]:
    """Weights times the norms of the updates, to a sum of one; as they were where nobody moved."""
    norms = [update_norm(own, got.adapter) for own, got in zip(sent, results, strict=True)]
    raised = weights * torch.tensor(norms, dtype=torch.float64)
    return raised / raised.sum() if float(raised.sum()) > 0 else weights


def update_norm(sent: Adapter, got: Adapter) -> float:
    """||s (B A - B_0 A_0)||_F over all layers, against what this client was sent."""
    return math.hypot(
        *(_changed(factors, got.layers[name]) for name, factors in sent.layers.items())
    )


def _changed(before: Factors, after: Factors) -> float:
    """||after - before||_F in float64: in float32 the Gram matrices' terms cancel to noise."""
    start, end = (precise(x) for x in (before, after))
    return frobenius(change(start, end))


@rule(
    reweigh=by_norm,
    exact="the product of means leaves out the covariance of the factors",
    linear=True,
    mixed_ranks=True,
    equivariant=True,
    weighted=True,
    idempotent=True,
    steady=True,
)
def hetlora(prev: Factors, clients: Sequence[Factors], weights: Float64[Tensor, " k"]) -> Factors:
    """The weighted mean of each factor after padding with zeros; pairs that nobody has stay."""
    wide = max(prev.rank, *(client.rank for client in clients))
    mean = mean_factors([padded(client, wide) for client in clients], weights, prev.scaling)
    counting = zip(weights.tolist(), clients, strict=True)
    reached = max((client.rank for weight, client in counting if weight), default=0)
    A = torch.cat([mean.A[:reached], prev.A[reached:]])
    B = torch.cat([mean.B[:, :reached], prev.B[:, reached:]], dim=1)
    return Factors(A[: prev.rank], B[:, : prev.rank], prev.scaling)
