"""The best rank-r approximation of an increment that is given as factors, without forming it.

Two routes: `gram` (two R x R Gram matrices in float64, the fast one) and `qr` (QR of both stacks,
the one that is orthonormal and exact to the last digits). Knows Factors and linear algebra only.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.adapter import Factors, Merged, rescaled

Gauge: TypeAlias = Literal["balanced", "orthonormal", "aligned"]
Route: TypeAlias = Literal["auto", "gram", "qr"]

GRAM_FLOOR = 1e-7  # singular values below this share of the largest are noise in a Gram matrix
CANCELLED = 1e-5  # below this share of the terms' size the sum has cancelled: take the QR route
DEAD = 1e-9  # a row whose part outside the others is shorter, relative to itself, is no new one
EPSILON = torch.finfo(torch.float64).eps


def truncate(
    factors: Factors,
    rank: int,
    *,
    gauge: Gauge = "balanced",
    previous: Factors | None = None,
    route: Route = "auto",
) -> Factors:
    """The nearest increment of rank <= `rank` in Frobenius norm (Eckart-Young), as float64 factors.

    Gauge `balanced`: sqrt(S) on both factors; `orthonormal`: A = V^T, B = U S; `aligned`: balanced,
    then turned onto `previous` (see `align`). The result always
    has `rank` rows: where the increment has fewer directions, B's columns are zero and A's rows
    come from `previous`, made orthogonal to the new ones, so that they can train again (zero
    without `previous`). O((m + n) R^2) for factors of rank R. Route `auto` takes `gram`, and `qr`
    where the terms cancel or an orthonormal basis is promised. ValueError for a bad rank, gauge or
    route.
    """
    _check(factors, rank, gauge)
    if gauge == "orthonormal" and route == "auto":
        route = "qr"
    U, S, Vh = _svd(factors, rank, route)
    return _finished(_gauged(U, S, Vh, factors.scaling, gauge), rank, gauge, previous)


def split(
    factors: Factors,
    rank: int,
    *,
    gauge: Gauge = "balanced",
    previous: Factors | None = None,
    energy: float = 1.0,
) -> Merged:
    """`truncate` together with the tail of the same decomposition as residual (nothing subtracted).

    Takes the QR route, so that factors + residual is the increment to 1e-15. With `energy` below 1
    the tail ends where both together hold that share of the sum of squared singular values.
    """
    _check(factors, rank, gauge)
    U, S, Vh = _svd(factors, factors.rank, "qr")
    end = max(rank, rank_for_energy(S, energy))
    head = _gauged(U[:, :rank], S[:rank], Vh[:rank], factors.scaling, gauge)
    tail = _gauged(U[:, rank:end], S[rank:end], Vh[rank:end], factors.scaling, "balanced")
    return Merged(_finished(head, rank, gauge, previous), tail)


def compress(factors: Factors, rank: int | None = None, energy: float = 1.0) -> Merged:
    """The same increment in as few pairs as it has directions, balanced; what was cut is residual.

    Keeps the fewest directions that hold the share `energy` of the squared singular values, at most
    `rank` of them; by default all, exact to 1e-15 (QR route). Zero gives rank 0.
    """
    U, S, Vh = _svd(factors, factors.rank, "qr")
    end = rank_for_energy(S, energy)
    end = end if rank is None else min(end, rank)
    kept = _gauged(U[:, :end], S[:end], Vh[:end], factors.scaling, "balanced")
    tail = _gauged(U[:, end:], S[end:], Vh[end:], factors.scaling, "balanced")
    return Merged(kept, tail)


def rank_for_energy(S: Float[Tensor, " p"], energy: float) -> int:
    """How many of the falling singular values hold the share `energy` (0..1) of their squares."""
    if not 0 < energy <= 1:
        raise ValueError(f"a share of energy must be above 0 and at most 1, got {energy!r}")
    if energy == 1 or S.numel() == 0:
        return S.numel()
    squares = (S / S[0]).square()
    held = squares.cumsum(0) / squares.sum()
    return min(S.numel(), int(torch.count_nonzero(held < energy * (1 - 1e-12))) + 1)


def align(factors: Factors, reference: Factors) -> Factors:
    """The same increment with its pairs turned to lie nearest to the reference's (equal ranks).

    (B Q, Q^T A) with the orthogonal Q nearest to B^T B_ref + A A_ref^T (Procrustes; Schoenemann
    1966), so that optimiser state kept from the last round still fits. O((m + n) r^2).
    """
    if factors.rank != reference.rank:
        raise ValueError(f"rank {factors.rank} cannot be aligned with rank {reference.rank}")
    near = rescaled(reference, factors.scaling)
    Q = rotation(factors.B.mT @ near.B + factors.A @ near.A.mT)
    return Factors(Q.mT @ factors.A, factors.B @ Q, factors.scaling)


def rotation(M: Float[Tensor, "r r"]) -> Float[Tensor, "r r"]:
    """The orthogonal matrix nearest to M (its polar factor); the identity for a zero M."""
    if not bool(M.any()):
        return torch.eye(len(M), dtype=M.dtype, device=M.device)
    U, _, Vh = torch.linalg.svd(M / M.abs().max())
    Q: Tensor = U @ Vh
    return Q


def singular_values(factors: Factors) -> Float[Tensor, " p"]:
    """The singular values of the increment in falling order, by the QR route; no zeros."""
    return _qr_svd(_unit(factors), factors.rank)[1]


def _check(factors: Factors, rank: int, gauge: Gauge) -> None:
    if not 1 <= rank <= min(factors.shape):
        m, n = factors.shape
        raise ValueError(f"rank {rank} is outside 1..{min(m, n)} of a layer of shape {m} x {n}")
    if gauge not in get_args(Gauge):
        raise ValueError(f"unknown gauge {gauge!r}; known are {', '.join(get_args(Gauge))}")


def _svd(factors: Factors, rank: int, route: Route) -> tuple[Tensor, Tensor, Tensor]:
    """U (m x p), S (p), V^T (p x n) of the increment with p <= rank, signs fixed, all float64."""
    unit = _unit(factors)
    if not (bool(torch.isfinite(unit.A).all()) and bool(torch.isfinite(unit.B).all())):
        raise ValueError("the factors hold NaN or Inf: a merge of them is not defined")
    if route not in get_args(Route):
        raise ValueError(f"unknown route {route!r}; known are {', '.join(get_args(Route))}")
    if route == "qr":
        return _signed(*_qr_svd(unit, rank))
    U, S, Vh, cancelled = _gram_svd(unit, rank)
    if cancelled and route == "auto":
        U, S, Vh = _qr_svd(unit, rank)
    return _signed(U, S, Vh)


def _unit(factors: Factors) -> Factors:
    """The same increment in float64 with scaling 1."""
    A, B = factors.A.detach().double(), factors.B.detach().double()
    return rescaled(Factors(A, B, factors.scaling), 1.0)


def _gram_svd(unit: Factors, rank: int) -> tuple[Tensor, Tensor, Tensor, bool]:
    """The SVD of B A from G_B = B^T B and G_A = A A^T; also says whether the terms cancelled.

    With G_B = L L^T and L^T G_A L = Q S^2 Q^T: V^T = (L Q / S)^T A and U = B G_A (L Q / S) / S,
    once the rank rows are balanced (|b_i| = |a_i|) so that scales of 1e-18 to 1e15 do no harm.
    """
    length_b, length_a = unit.B.norm(dim=0), unit.A.norm(dim=1)
    kept = (length_b > 0) & (length_a > 0)
    if not bool(kept.any()):
        return (*_nothing(unit), False)
    A, B = unit.A[kept], unit.B[:, kept]
    d = (length_a[kept] / length_b[kept]).sqrt()
    gram_b = _gram(B.mT) * d * d[:, None]
    gram_a = _gram(A) / d / d[:, None]
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
    U = B @ ((gram_a @ P) / S * d[:, None])
    Vh = (P / d[:, None]).mT @ A
    lost = count == 0 or float(S[0]) < CANCELLED * size or float(S[-1]) < GRAM_FLOOR * size
    return U, S, Vh, lost


def _qr_svd(unit: Factors, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of B A by QR of both factors and a small SVD: relative error 1e-15, no squares."""
    Q_b, R_b = torch.linalg.qr(unit.B)
    Q_a, R_a = torch.linalg.qr(unit.A.mT)
    U, S, Vh = torch.linalg.svd(R_b @ R_a.mT, full_matrices=False)
    size = float((unit.B.norm(dim=0) * unit.A.norm(dim=1)).sum())
    count = min(rank, int(torch.count_nonzero(EPSILON * size < S)))
    return Q_b @ U[:, :count], S[:count], Vh[:count] @ Q_a.mT


def _gram(rows: Tensor) -> Tensor:
    """rows @ rows^T; on the CPU by NumPy, whose symmetric product is 1.6x as fast."""
    if rows.device.type == "cpu":
        array = rows.numpy()
        return torch.from_numpy(array @ array.T)
    return rows @ rows.mT


def _nothing(unit: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of a zero increment: no directions at all."""
    return unit.B[:, :0], unit.B.new_zeros(0), unit.A[:0]


def _signed(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fixes each pair's free sign: the largest entry of every left vector is positive."""
    if S.numel() == 0:
        return U, S, Vh
    largest = U.abs().argmax(dim=0)
    signs = U.gather(0, largest[None])[0].sign()
    return U * signs, S, Vh * signs[:, None]


def _gauged(U: Tensor, S: Tensor, Vh: Tensor, scaling: float, gauge: Gauge) -> Factors:
    """U S V^T written as scaling * B @ A in the wanted gauge."""
    if gauge == "orthonormal":
        return rescaled(Factors(Vh, U * S, 1.0), scaling)
    root = (S / scaling).sqrt()
    return Factors(root[:, None] * Vh, U * root, scaling)


def _finished(factors: Factors, rank: int, gauge: Gauge, previous: Factors | None) -> Factors:
    """Filled up to `rank`; filled rows orthonormal or the whole aligned, as the gauge promises."""
    known = factors.rank
    full = _fill(factors, rank, previous)
    if gauge == "orthonormal" and known < full.rank and previous is not None:
        rows = torch.linalg.qr(full.A[known:].mT)[0].mT
        return Factors(torch.cat([full.A[:known], rows]), full.B, full.scaling)
    if gauge == "aligned" and previous is not None and previous.rank == full.rank:
        return align(full, previous)
    return full


def _fill(factors: Factors, rank: int, previous: Factors | None) -> Factors:
    """Adds rows up to `rank`: the previous ones with the longest part outside the new ones.

    Where those do not suffice, rows of a fixed random draw follow, as long as the previous ones.
    """
    missing = rank - factors.rank
    if missing <= 0:
        return factors
    m, n = factors.shape
    rows = factors.A.new_zeros(missing, n)
    if previous is not None:
        old = previous.A.to(factors.A)
        length = old.norm(dim=1)
        drawn = torch.randn(missing, n, generator=torch.Generator().manual_seed(rank)).to(old)
        drawn *= (length.mean() or 1.0) / drawn.norm(dim=1, keepdim=True)
        free = _outside(torch.cat([old, drawn]), factors.A)
        alive = free.norm(dim=1) > DEAD * torch.cat([length, drawn.norm(dim=1)])
        order = free[: len(old)].norm(dim=1).argsort(descending=True, stable=True)
        order = order[alive[: len(old)][order]][:missing].sort().values
        extra = torch.arange(len(old), len(free), device=order.device)[: missing - len(order)]
        rows = free[torch.cat([order, extra])]
    A = torch.cat([factors.A, rows])
    B = torch.cat([factors.B, factors.B.new_zeros(m, missing)], dim=1)
    return Factors(A, B, factors.scaling)


def _outside(rows: Tensor, others: Tensor) -> Tensor:
    """The part of each row that is orthogonal to all of `others`."""
    basis: Tensor = torch.linalg.qr(others.mT)[0]
    return rows - (rows @ basis) @ basis.mT
