"""Exact routes to the strongest singular triplets of B A, given B (m x R) and A (R x n), and the
choice between all routes. Knows tensors only: no scaling, no gauge, no client.

`gram`: two R x R Gram matrices in float64, for small R; `qr` and `dense`: orthonormal and exact to
the last digits; `krylov`, for large R, has a file of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Name: TypeAlias = Literal["gram", "krylov", "qr", "dense"]
Triplets: TypeAlias = tuple[Tensor, Tensor, Tensor]  # U (m x p), S (p) falling, V^T (p x n)

GRAM_FLOOR = 1e-7  # singular values below this share of the largest are noise in a Gram matrix
CANCELLED = 1e-5  # below this share of the terms' size the sum has cancelled: take an exact route
DENSE_SHARE = 0.8  # of min(m, n): from this R on a dense SVD beats QR of both factors
EPSILON = torch.finfo(torch.float64).eps
BLOCKS = 12  # up to so many blocks of pairs two Gram matrices are faster (measured on CPUs)
CHUNK = 2**18  # numbers converted at once


def chosen_route(pairs: int, rank: int) -> Name:
    """The route that `truncate(route="auto")` takes for R = `pairs` terms that do not cancel.

    `gram` while R is at most 12 blocks (a block is rank + 4, rounded up to 16); else `krylov`.
    """
    return "gram" if pairs <= BLOCKS * block_size(rank) else "krylov"


def exact_route(pairs: int, m: int, n: int) -> Name:
    """The route where exactness or an orthonormal basis is promised: `qr` while R is small."""
    return "qr" if pairs < DENSE_SHARE * min(m, n) else "dense"


def block_size(rank: int) -> int:
    """Columns that are multiplied at once: some more than wanted, in whole vector registers."""
    return 16 * math.ceil((rank + 4) / 16)


# ---------------------------------------------------------------- exact routes


def gram_svd(
    A: Float[Tensor, "R n"], B: Float[Tensor, "m R"], rank: int
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """The SVD of B A from G_B = B^T B and G_A = A A^T; also says whether the terms cancelled.

    With G_B = L L^T and L^T G_A L = Q S^2 Q^T: V^T = (L Q / S)^T A and U = B G_A (L Q / S) / S,
    once the rank rows are balanced (|b_i| = |a_i|) so that scales of 1e-18 to 1e15 do no harm. No
    row of A and no column of B may be zero.
    """
    gram_b, gram_a = _gram(B.mT), _gram(A)
    length_b, length_a = gram_b.diagonal().sqrt(), gram_a.diagonal().sqrt()
    d = (length_a / length_b).sqrt()
    gram_b, gram_a = gram_b * d * d[:, None], gram_a / d / d[:, None]
    L, failed = torch.linalg.cholesky_ex(gram_b)
    if bool(failed):
        values, vectors = torch.linalg.eigh(gram_b)
        L = vectors * values.clamp(min=0).sqrt()
    squares, Q = torch.linalg.eigh(L.mT @ gram_a @ L)
    S = squares.flip(0).clamp(min=0).sqrt()
    size = float((length_a * length_b).sum())
    floor = max(GRAM_FLOOR * float(S[0]), EPSILON * size)
    count = min(rank, int(torch.count_nonzero(floor < S)))
    S, P = S[:count], (L @ Q.flip(1)[:, :count]) / S[:count]
    U = _combined(B.mT, (gram_a @ P) / S * d[:, None]).mT
    Vh = _combined(A, P / d[:, None])
    lost = count == 0 or float(S[0]) < CANCELLED * size or float(S[-1]) < GRAM_FLOOR * size
    return U, S, Vh, lost


def qr_svd(A: Float[Tensor, "R n"], B: Float[Tensor, "m R"], rank: int) -> Triplets:
    """The SVD of B A by QR of both factors and a small SVD: relative error 1e-15, no squares."""
    A, B = A.double(), B.double()
    Q_b, R_b = torch.linalg.qr(B)
    Q_a, R_a = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_b @ R_a.mT, full_matrices=False)
    count = live_count(S, rank, total_length(A, B))
    return Q_b @ U[:, :count], S[:count], Vh[:count] @ Q_a.mT


def dense_svd(A: Float[Tensor, "R n"], B: Float[Tensor, "m R"], rank: int) -> Triplets:
    """The SVD of the product, multiplied out in float64: the one place that forms an m x n matrix.

    As exact as `qr_svd`, and the faster of the two where R is near min(m, n) or above it.
    """
    A, B = A.double(), B.double()
    if A.shape[1] > len(B):  # LAPACK is twice as fast on a tall matrix as on a wide one
        V, S, Uh = torch.linalg.svd(A.mT @ B.mT, full_matrices=False)
        U, Vh = Uh.mT, V.mT
    else:
        U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    noise = math.sqrt(len(S)) * float(S[0])  # an SVD of this size rounds by more than the terms do
    count = live_count(S, rank, max(noise, total_length(A, B)))
    return U[:, :count], S[:count], Vh[:count]


# ---------------------------------------------------------------- helpers of all routes


def row_lengths(rows: Tensor) -> Tensor:
    """The length of each row, in float64, read in the order in which the numbers lie."""
    if rows.stride(1) <= rows.stride(0):
        parts = torch.split(rows, max(64, CHUNK // max(1, rows.shape[1])))
        return torch.cat([torch.linalg.vector_norm(part.double(), dim=1) for part in parts])
    squares = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for part in torch.split(rows.mT, max(64, CHUNK // max(1, len(rows)))):
        squares += part.double().square().sum(dim=0)
    return squares.sqrt()


def total_length(A: Tensor, B: Tensor) -> float:
    """The sum of the norms of the terms b_i a_i^T."""
    return float((row_lengths(A) * row_lengths(B.mT)).sum())


def live_count(S: Tensor, rank: int, size: float) -> int:
    """How many of the first `rank` values stand above the rounding noise of the terms."""
    return min(rank, int(torch.count_nonzero(EPSILON * size < S)))


def _gram(rows: Tensor) -> Tensor:
    """rows @ rows^T in float64; on the CPU by NumPy, whose symmetric product is 1.6x as fast."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for part in _strips(rows):
        if rows.device.type == "cpu":
            array = part.numpy()
            total += torch.from_numpy(array @ array.T)
        else:
            total += part @ part.mT
    return total


def _combined(rows: Tensor, coefficients: Tensor) -> Tensor:
    """coefficients^T @ rows in float64."""
    return torch.cat([coefficients.mT @ part for part in _strips(rows)], dim=1)


def _strips(rows: Tensor) -> Iterator[Tensor]:
    """A few columns of all rows at a time, in float64: no second stack is ever held."""
    width = max(256, 2 * CHUNK // max(1, len(rows)))
    for part in torch.split(rows, width, dim=1):
        yield part.double()
