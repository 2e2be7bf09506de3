"""The best rank-r approximation of an increment that is given as factors, and what is made of it:
gauge, residual, alignment. Knows Factors and linear algebra; how the SVD is found is in `routes`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.adapter import Factors, Merged, rescaled
from fedlora.krylov import krylov_svd
from fedlora.routes import (
    Triplets,
    chosen_route,
    dense_svd,
    exact_route,
    gram_svd,
    qr_svd,
    row_lengths,
)

Gauge: TypeAlias = Literal["balanced", "orthonormal", "aligned"]
Route: TypeAlias = Literal["auto", "gram", "krylov", "exact", "qr", "dense"]

DEAD = 1e-9  # a row whose part outside the others is shorter, relative to itself, is no new one


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
    without `previous`). For factors of rank R, route `auto` takes `gram`, O((m + n) R^2), while R
    is small and `krylov`, O((m + n) R r) a step, beyond it (see `chosen_route`); krylov begins with
    the rows of `previous`. It takes `exact` where the terms cancel, where krylov cannot vouch for
    its result, or where an orthonormal basis is promised: `qr`, and for R near min(m, n) or above
    it `dense`, the one route that forms the m x n matrix. ValueError for a bad rank, gauge, route.
    """
    _check(factors, rank, gauge)
    if gauge == "orthonormal" and route == "auto":
        route = "exact"
    U, S, Vh = _svd(factors, rank, route, None if previous is None else previous.A)
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

    Takes an exact route, so that factors + residual is the increment to 1e-15. With `energy` below
    1 the tail ends where both together hold that share of the sum of squared singular values.
    """
    _check(factors, rank, gauge)
    U, S, Vh = _svd(factors, factors.rank, "exact")
    end = max(rank, rank_for_energy(S, energy))
    head = _gauged(U[:, :rank], S[:rank], Vh[:rank], factors.scaling, gauge)
    tail = _gauged(U[:, rank:end], S[rank:end], Vh[rank:end], factors.scaling, "balanced")
    return Merged(_finished(head, rank, gauge, previous), tail)


def compress(factors: Factors, rank: int | None = None, energy: float = 1.0) -> Merged:
    """The same increment in as few pairs as it has directions, balanced; what was cut is residual.

    Keeps the fewest directions that hold the share `energy` of the squared singular values, at most
    `rank` of them; by default all, exact to 1e-15. Zero gives rank 0.
    """
    U, S, Vh = _svd(factors, factors.rank, "exact")
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
    """The singular values of the increment in falling order, by an exact route; no zeros."""
    return _svd(rescaled(factors, 1.0), factors.rank, "exact")[1]


def _check(factors: Factors, rank: int, gauge: Gauge) -> None:
    if not 1 <= rank <= min(factors.shape):
        m, n = factors.shape
        raise ValueError(f"rank {rank} is outside 1..{min(m, n)} of a layer of shape {m} x {n}")
    if gauge not in get_args(Gauge):
        raise ValueError(f"unknown gauge {gauge!r}; known are {', '.join(get_args(Gauge))}")


def _svd(factors: Factors, rank: int, route: Route, start: Tensor | None = None) -> Triplets:
    """U (m x p), S (p), V^T (p x n) of B A (without scaling), p <= rank, signs fixed, float64."""
    if route not in get_args(Route):
        raise ValueError(f"unknown route {route!r}; known are {', '.join(get_args(Route))}")
    A, B = _live(factors)
    pairs, (m, n) = len(A), factors.shape
    if pairs == 0:
        return B.double(), B.new_zeros(0, dtype=torch.float64), A.double()
    taken = chosen_route(pairs, rank) if route == "auto" else route
    if taken == "gram":
        U, S, Vh, cancelled = gram_svd(A, B, rank)
        if not cancelled or route == "gram":
            return _signed(U, S, Vh)
    if taken == "krylov" and (found := krylov_svd(A, B, rank, start)) is not None:
        return _signed(*found)
    if taken not in ("qr", "dense"):
        taken = exact_route(pairs, m, n)
    return _signed(*(qr_svd if taken == "qr" else dense_svd)(A, B, rank))


def _live(factors: Factors) -> tuple[Tensor, Tensor]:
    """A and B without the pairs that carry nothing; ValueError where something is not finite."""
    A, B = factors.A.detach(), factors.B.detach()
    lengths = torch.stack([row_lengths(A), row_lengths(B.mT)])
    if not bool(torch.isfinite(lengths).all()):
        raise ValueError("the factors hold NaN or Inf: a merge of them is not defined")
    kept = (lengths > 0).all(dim=0)
    return (A, B) if bool(kept.all()) else (A[kept], B[:, kept])


def _signed(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fixes each pair's free sign: the largest entry of every left vector is positive."""
    if S.numel() == 0:
        return U, S, Vh
    largest = U.abs().argmax(dim=0)
    signs = U.gather(0, largest[None])[0].sign()
    return U * signs, S, Vh * signs[:, None]


def _gauged(U: Tensor, S: Tensor, Vh: Tensor, scaling: float, gauge: Gauge) -> Factors:
    """U S V^T as B A in the wanted gauge; `scaling` multiplies both alike."""
    if gauge == "orthonormal":
        return Factors(Vh, U * S, scaling)
    root = S.sqrt()
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
