"""FLoRA-NA: factors averaged apart with fitted weights, so that their product is nearest the mean.

Formula: A = sum a_k A_k, B = sum b_k B_k, with a and b minimising ||B A - sum w_k B_k A_k||_F, by
alternating least squares from a = b = w; all from inner products of r x r size.
Source: "FLoRA-NA" 2025 (2509.26399).
Keeps: the clients' coordinates, and never more error than `fedavg`, where the search starts.
Loses: what no pair of weighted sums can reach.
Cost per layer and client: r(m + n) up, r(m + n) down; on the server O(k^2 r^2 (m + n)).
DP: noise on both factors enters the increment as a product of noises (quadratic noise).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from fedlora.adapter import Factors, mean_factors, rescaled
from fedlora.rules import rule

GAIN = 1e-12  # a sweep that gains less of the target's squared norm is rounding: stop


@rule(
    exact="two sums of factors can only come near the mean of the products",
    linear="the weights are fitted to the factors",
    mixed_ranks="sums of factors need equal ranks",
    equivariant=True,
    weighted=True,
    idempotent=True,
    steady=True,
)
def florana(
    prev: Factors, clients: Sequence[Factors], weights: Float64[Tensor, " k"], *, sweeps: int = 20
) -> Factors:
    """Weighted sums of A and of B, the weights fitted to the mean of the increments."""
    start = mean_factors(clients, weights, prev.scaling)
    plain = [rescaled(client, prev.scaling) for client in clients]
    A, size_A = _unit(torch.stack([client.A for client in plain]))
    B, size_B = _unit(torch.stack([client.B for client in plain]))
    inner_A, inner_B = _products(A), _products(B.mT)
    w = weights.to(A)
    cross = _cross(A, inner_A, inner_B, w)
    norm = w @ (inner_A * inner_B).sum(dim=(2, 3)) @ w

    def error(a: Tensor, b: Tensor) -> Tensor:
        """||B A - mean||_F^2."""
        return (_summed(inner_A, a) * _summed(inner_B, b)).sum() - 2 * (b @ cross @ a) + norm

    a = b = w
    last = error(a, b)
    for _ in range(sweeps):
        new_b = _solved(_weighted(inner_B, _summed(inner_A, a)), cross @ a)
        new_a = _solved(_weighted(inner_A, _summed(inner_B, new_b)), cross.mT @ new_b)
        new = error(new_a, new_b)
        if not bool(last - new > GAIN * norm):
            break
        a, b, last = new_a, new_b, new
    if a is w:
        return start
    fitted_A, fitted_B = torch.einsum("k,krn->rn", a, A), torch.einsum("k,kmr->mr", b, B)
    return Factors(fitted_A * size_A, fitted_B * size_B, prev.scaling)


def _products(rows: Tensor) -> Tensor:
    """X_k X_j^T of all pairs, k x j x r x r, in one piece: every sweep reads it whole."""
    k, r, n = rows.shape
    flat = rows.reshape(k * r, n)
    return (flat @ flat.mT).reshape(k, r, k, r).transpose(1, 2).contiguous()


def _cross(A: Tensor, inner_A: Tensor, inner_B: Tensor, w: Tensor) -> Tensor:
    """<B_i A_k, the mean> in O(k^2 r^2 min(k, n)): all sums at once, or the one over j first."""
    k, r, n = A.shape
    if k <= n:
        return inner_B.reshape(k, -1) @ (w[:, None, None] * inner_A).reshape(k, -1).mT
    blocks = inner_B.transpose(1, 2).reshape(k * r, k * r)
    mean_seen = blocks @ (w[:, None, None] * A).reshape(k * r, n)  # B_i^T sum_j w_j B_j A_j
    return mean_seen.reshape(k, -1) @ A.reshape(k, -1).mT


def _unit(stack: Tensor) -> tuple[Tensor, float]:
    size = float(stack.abs().max()) or 1.0
    return stack / size, size


def _summed(inner: Tensor, c: Tensor) -> Tensor:
    """sum_kj c_k c_j of the blocks: A A^T (or B^T B) of the weighted sum."""
    k, _, r, _ = inner.shape
    return (torch.outer(c, c).reshape(-1) @ inner.reshape(k * k, r * r)).reshape(r, r)


def _weighted(inner: Tensor, M: Tensor) -> Tensor:
    """sum_rs M_rs of each block, k x k."""
    k = len(inner)
    return (inner.reshape(k * k, -1) @ M.reshape(-1)).reshape(k, k)


def _solved(gram: Tensor, right: Tensor) -> Tensor:
    """The least-norm least-squares solution of gram x = right."""
    solution: Tensor = torch.linalg.pinv(gram, hermitian=True, rtol=1e-10) @ right
    return solution
