"""Robust weights: clients that send nonsense count less, judged by their updates' inner products.

An update is what a client changed in what it was sent, over all layers and the head. Every method
works on the k x k Gram matrix of the updates and returns coefficients; nothing is densified.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float64
from torch import Tensor

from fedlora.adapter import Adapter, Factors, change, precise, rescaled

Robust: TypeAlias = Literal[
    "none", "norm_clipping", "multi_krum", "geometric_median", "centred_clipping"
]
FEWEST = 5  # with fewer clients no majority can be told from its opposite
BLOCK = 2**22  # products at a time: 32 MB
SWEEPS, PASSES, CLOSE = 200, 3, 1e-10


def robust_coefficients(
    method: Robust,
    gram: Float64[Tensor, "k k"],
    weights: Float64[Tensor, " k"],
    *,
    bound: float = 0.0,
    faulty: int = 0,
) -> Float64[Tensor, " k"]:
    """Coefficients a_k of the updates in place of the weights; their sum is at most one.

    `norm_clipping`: w_k min(1, bound / ||D_k||). `multi_krum` (Blanchard et al. 2017): the weights
    of the k - f clients nearest to their k - f - 2 neighbours. `geometric_median` (Weiszfeld;
    Pillutla et al. 2019): the point with the least weighted sum of distances. `centred_clipping`
    (Karimireddy et al. 2021): three passes of v + sum w_k min(1, bound / ||D_k - v||) (D_k - v)
    from v = 0.
    `bound` 0 takes the median norm; `faulty` is f, 0 takes the most that can be borne, (k - 3) //
    2.
    """
    if method == "none":
        return weights
    if method == "multi_krum":
        return _multi_krum(gram, weights, faulty)
    if method == "geometric_median":
        return _geometric_median(gram, weights)
    norms = gram.diagonal().clamp(min=0).sqrt()
    limit = bound or float(norms.quantile(0.5))
    if method == "norm_clipping":
        return weights * _shrink(norms, limit)
    if method == "centred_clipping":
        return _centred_clipping(gram, weights, limit)
    raise ValueError(f"unknown robust method {method!r}")


def fewest(method: Robust, faulty: int) -> int:
    """The replies that a round needs for the method to be defined; 0: any number will do."""
    return 2 * faulty + 3 if method == "multi_krum" else 0


def update_gram(sent: Sequence[Adapter], received: Sequence[Adapter]) -> Float64[Tensor, "k k"]:
    """<D_k, D_j> of what each client changed in what it was sent; O(k^2 r^2 (m + n)) a layer."""
    clients = len(received)
    gram = torch.zeros(clients, clients, dtype=torch.float64)
    for name in received[0].layers:
        changes = (
            change(precise(before.layers[name]), precise(after.layers[name]))
            for before, after in zip(sent, received, strict=True)
        )
        _add_products(gram, changes, [2 * after.layers[name].rank for after in received])
    for name in received[0].dense:
        moved = torch.stack(
            [
                (after.dense[name].double() - before.dense[name].double()).flatten().cpu()
                for before, after in zip(sent, received, strict=True)
            ]
        )
        gram += (moved @ moved.mT).triu()
    return gram.triu() + gram.triu(1).mT


def _add_products(gram: Tensor, changes: Iterable[Factors], ranks: Sequence[int]) -> None:
    """Adds <D_k, D_j> of one layer for j >= k (below lies what the blocks bring along).

    All factors are stacked and multiplied by blocks of clients, each of at most `BLOCK` numbers or
    one client: k^2 / 2 products of their own take four times as long.
    """
    A, B = _stacked(changes, sum(ranks))
    owner = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
    starts = [0, *accumulate(ranks)]
    step = max(1, BLOCK // (max(ranks) * len(A)))
    for first in range(0, len(ranks), step):
        last = min(first + step, len(ranks))
        rows, rest = slice(starts[first], starts[last]), slice(starts[first], None)
        products = (A[rows] @ A[rest].mT).mul_(B[rows] @ B[rest].mT)
        by_client = products.new_zeros(len(products), len(ranks) - first)
        by_client.index_add_(1, owner[rest] - first, products)
        gram[first:last, first:].index_add_(0, owner[rows] - first, by_client)


def _stacked(changes: Iterable[Factors], rows: int) -> tuple[Tensor, Tensor]:
    """The rows of all A and, as rows, the columns of all s B, one client's at a time."""
    A = B = torch.empty(0)
    place = 0
    for each in changes:
        plain, (m, n) = rescaled(each, 1.0), each.shape
        if not place:
            A, B = (
                plain.A.new_empty(rows, n, device="cpu"),
                plain.B.new_empty(rows, m, device="cpu"),
            )
        A[place : place + plain.rank] = plain.A
        B[place : place + plain.rank] = plain.B.mT
        place += plain.rank
    return A, B


def warning(method: Robust, clients: int) -> str:
    """What to tell a user who robustly merges few clients; empty where there is nothing to say."""
    if method == "none" or clients >= FEWEST:
        return ""
    return (
        f"merge.robust = {method!r} with {clients} clients a round protects nobody: below {FEWEST} "
        "an honest minority looks like an attacker"
    )


def _multi_krum(gram: Tensor, weights: Tensor, faulty: int) -> Tensor:
    clients = len(weights)
    bad, needed = faulty or max(0, (clients - 3) // 2), fewest("multi_krum", faulty)
    if clients < needed:
        raise ValueError(
            f"multi_krum with {bad} faulty clients needs {needed} in a round, got {clients}: lower "
            "merge.robust_faulty, or 0 for as many as can be borne"
        )
    nearest = _distances(gram).sort(dim=1).values[:, 1 : clients - bad - 1]
    order = nearest.square().sum(dim=1).argsort(stable=True)
    chosen = torch.zeros_like(weights)
    chosen[order[: clients - bad]] = weights[order[: clients - bad]]
    return chosen / chosen.sum() if bool(chosen.any()) else chosen


def _geometric_median(gram: Tensor, weights: Tensor) -> Tensor:
    floor = 1e-9 * float(gram.diagonal().max().clamp(min=0).sqrt())
    a = weights
    if floor == 0:
        return a
    for _ in range(SWEEPS):
        pull = weights / _distances_to(gram, a).clamp(min=floor)
        new = pull / pull.sum()
        if float((new - a).abs().max()) < CLOSE:
            return new
        a = new
    return a


def _centred_clipping(gram: Tensor, weights: Tensor, limit: float) -> Tensor:
    a = torch.zeros_like(weights)
    for _ in range(PASSES):
        step = weights * _shrink(_distances_to(gram, a), limit)
        a = a * (1 - step.sum()) + step
    return a


def _shrink(norms: Tensor, limit: float) -> Tensor:
    return torch.where(norms > limit, limit / norms, torch.ones_like(norms))


def _distances(gram: Tensor) -> Tensor:
    """||D_k - D_j||."""
    squares = gram.diagonal()
    return (squares[:, None] + squares - 2 * gram).clamp(min=0).sqrt().fill_diagonal_(0.0)


def _distances_to(gram: Tensor, a: Tensor) -> Tensor:
    """||D_k - sum_j a_j D_j||."""
    cross = gram @ a
    return (gram.diagonal() - 2 * cross + a @ cross).clamp(min=0).sqrt()
