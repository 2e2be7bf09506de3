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
    inner_A = torch.einsum("krn,jsn->kjrs", A, A)  # A_k A_j^T
    inner_B = torch.einsum("kmr,jms->kjrs", B, B)  # B_k^T B_j
    w = weights.to(A)
    cross = torch.einsum("ijrs,kjrs,j->ik", inner_B, inner_A, w)  # <B_i A_k, the mean>
    norm = torch.einsum("ijrs,ijrs,i,j->", inner_B, inner_A, w, w)

    def error(a: Tensor, b: Tensor) -> Tensor:
        """||B A - mean||_F^2."""
        return (_summed(inner_A, a) * _summed(inner_B, b)).sum() - 2 * (b @ cross @ a) + norm

    a = b = w
    for _ in range(sweeps):
        new_b = _solved(torch.einsum("ijrs,rs->ij", inner_B, _summed(inner_A, a)), cross @ a)
        new_a = _solved(
            torch.einsum("ijrs,rs->ij", inner_A, _summed(inner_B, new_b)), cross.mT @ new_b
        )
        if not bool(error(a, b) - error(new_a, new_b) > GAIN * norm):
            break
        a, b = new_a, new_b
    if a is w:
        return start
    fitted_A, fitted_B = torch.einsum("k,krn->rn", a, A), torch.einsum("k,kmr->mr", b, B)
    return Factors(fitted_A * size_A, fitted_B * size_B, prev.scaling)


def _unit(stack: Tensor) -> tuple[Tensor, float]:
    size = float(stack.abs().max()) or 1.0
    return stack / size, size


def _summed(inner: Tensor, c: Tensor) -> Tensor:
    """sum_kj c_k c_j of the blocks: A A^T (or B^T B) of the weighted sum."""
    return torch.einsum("kjrs,k,j->rs", inner, c, c)


def _solved(gram: Tensor, right: Tensor) -> Tensor:
    """The least-norm least-squares solution of gram x = right."""
    solution: Tensor = torch.linalg.pinv(gram, hermitian=True, rtol=1e-10) @ right
    return solution
