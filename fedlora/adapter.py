"""What travels in a federation, and its algebra: factors, adapters, results of clients.

Knows tensors and nothing else: no model, no rule, no file. The only home of `scaling`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Part: TypeAlias = Literal["A", "B", "head", "frozen"]
PARTS: frozenset[Part] = frozenset({"A", "B", "head"})  # what can be trained
WHOLE: frozenset[Part] = PARTS | {"frozen"}
STRIP = 64  # columns at a time, where a product is formed piece by piece
BLOCK = 1024  # rank rows at a time, where a product of all with all would fill the memory


@dataclass(frozen=True, eq=False)
class Factors:
    """The low-rank increment of one layer, delta W = scaling * B @ A; W is m x n (out x in).

    `scaling` is alpha / r, or alpha / sqrt(r) for rsLoRA. ValueError where shapes do not fit.
    """

    A: Float[Tensor, "r n"]
    B: Float[Tensor, "m r"]
    scaling: float

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise ValueError(
                f"A of shape {tuple(self.A.shape)} and B of shape {tuple(self.B.shape)} do not "
                "make a product B @ A: A must be r x n and B must be m x r"
            )
        if not (math.isfinite(self.scaling) and self.scaling > 0):
            raise ValueError(f"scaling must be a positive finite number, got {self.scaling!r}")

    @property
    def rank(self) -> int:
        """r, the number of rows of A."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of the layer's weight."""
        return self.B.shape[0], self.A.shape[1]


@dataclass(frozen=True, eq=False)
class Merged:
    """A rule's answer with what it left out: the wanted increment is `factors` + `residual`."""

    factors: Factors
    residual: Factors


@dataclass(frozen=True, eq=False)
class Adapter:
    """All that is trained: low-rank `layers` and fully trained `dense` tensors (the head).

    `frozen` holds what earlier merges folded: for some layers a second increment (scaling 1), which
    the model adds to its weight and nobody trains. The base itself is never written to.
    """

    layers: Mapping[str, Factors]
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    frozen: Mapping[str, Factors] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ClientState:
    """What a client keeps for itself between rounds; it never leaves its owner.

    `adapter` is the client's own adapter after its last round (source of the parts it trains but
    does not share); `optimiser` holds the optimiser's tensors when they are kept.
    """

    adapter: Adapter | None = None
    optimiser: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ClientResult:
    """What one client sends back after a round; `state` stays with the client in every engine."""

    client: str
    adapter: Adapter
    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    state: ClientState = field(default_factory=ClientState)


def lora_scaling(alpha: float, rank: int, rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023, 2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


# ---------------------------------------------------------------- the algebra of one layer


def mean_factors(
    clients: Sequence[Factors], weights: Float[Tensor, " k"], scaling: float
) -> Factors:
    """The weighted means of A and of B, apart: A = sum w_k A_k, B = sum w_k (s_k / s) B_k.

    Not the mean of the increments: that is `mix`. Each client's s_k is folded into its B_k first.
    All ranks must be equal (ValueError). `clients` may be lazy: it is read once, in order.
    """
    A: Tensor | None = None
    B: Tensor | None = None
    for weight, client in zip(weights, clients, strict=True):
        if (
            A is not None
            and B is not None
            and (A.shape, B.shape) != (client.A.shape, client.B.shape)
        ):
            raise ValueError(
                f"a mean of factors needs equal ranks and shapes, got A {tuple(A.shape)}, "
                f"B {tuple(B.shape)} beside A {tuple(client.A.shape)}, B {tuple(client.B.shape)}: "
                "use a rule for mixed ranks (fra)"
            )
        term_A = weight * client.A
        term_B = (weight * (client.scaling / scaling)) * client.B
        A = term_A if A is None else A + term_A
        B = term_B if B is None else B + term_B
    if A is None or B is None:
        raise ValueError("a mean of no clients is not defined: give at least one")
    return Factors(A, B, scaling)


def mix(clients: Iterable[Factors], weights: Iterable[Tensor | float], scaling: float) -> Factors:
    """sum_k w_k s_k B_k A_k as stacked factors of rank sum r_k; exact, nothing is multiplied out.

    A weight is a number, or a vector of length r_k that weighs each rank row of its client apart.
    """
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    for weight, client in zip(weights, clients, strict=True):
        rows.append(client.A)
        columns.append(client.B * (weight * (client.scaling / scaling)))
    if not rows:
        raise ValueError("a mix of no clients is not defined: give at least one")
    return Factors(torch.cat(rows), torch.cat(columns, dim=1), scaling)


def change(before: Factors, after: Factors) -> Factors:
    """What became of an increment: s (B A - B_0 A_0) = s [B - B_0, B_0] [A; A - A_0], of rank 2 r.

    Nothing cancels: the norm of a small change is as exact as that of a large one.
    """
    equal_ranks(before, [after])
    start = rescaled(before, after.scaling)
    A = torch.cat([after.A, after.A - start.A])
    B = torch.cat([after.B - start.B, start.B], dim=1)
    return Factors(A, B, after.scaling)


def equal_ranks(prev: Factors, clients: Sequence[Factors]) -> None:
    """ValueError unless every client's factors have the rank of the previous ones."""
    for client in clients:
        if client.rank != prev.rank:
            raise ValueError(
                f"factors of rank {client.rank} beside the previous ones of rank {prev.rank}: "
                "equal ranks are needed here; use a rule for mixed ranks (fra)"
            )


def inner(left: Factors, right: Factors) -> float:
    """<delta W, delta W'> = s s' sum (B^T B') o (A A'^T) in O(r^2 (m + n)); wants float64."""
    blocks = zip(torch.split(left.B, BLOCK, dim=1), torch.split(left.A, BLOCK), strict=True)
    products = (float(((B.mT @ right.B) * (A @ right.A.mT)).sum()) for B, A in blocks)
    return left.scaling * right.scaling * sum(products)


def frobenius(factors: Factors) -> float:
    """||delta W||_F from two r x r Gram matrices, or strip by strip where r is large; delta W
    itself
    is never formed.

    Where terms cancel, absolute accuracy is 1e-8 of the largest term (float64).
    """
    m, n = factors.shape
    if factors.rank * (m + n) <= m * n:
        return math.sqrt(max(inner(factors, factors), 0.0))
    strips = torch.split(factors.A, STRIP, dim=1)
    return factors.scaling * math.hypot(*(float((factors.B @ strip).norm()) for strip in strips))


def sketched_frobenius(
    terms: Iterable[Factors], weights: Iterable[Tensor | float], vectors: int = 64
) -> float:
    """||sum_k w_k delta W_k||_F estimated from what it does to fixed random vectors.

    Within a few percent (Hutchinson 1989), in O(r (m + n)) a vector and term: for ranks at which
    `frobenius` of the mix costs more than a merge. `terms` may be lazy: they are read once.
    """
    drawn: Tensor | None = None
    total: Tensor | None = None
    for weight, term in zip(weights, terms, strict=True):
        if drawn is None:
            stream = torch.Generator().manual_seed(0)
            drawn = torch.randn(term.shape[1], vectors, generator=stream, dtype=torch.float64)
            drawn = drawn.to(term.A)
        moved = (weight * term.scaling) * (term.B @ (term.A @ drawn))
        total = moved if total is None else total + moved
    return 0.0 if total is None else float(total.norm()) / math.sqrt(vectors)


def scaled_columns(factors: Sequence[Factors], rows: slice) -> Float[Tensor, "k h r"]:
    """Some rows of s_k B_k of factors of one shape, one behind another, in float64."""
    B = torch.stack([part.B[rows] for part in factors]).double()
    scalings = torch.tensor([part.scaling for part in factors], dtype=B.dtype, device=B.device)
    return B.mul_(scalings[:, None, None])


def rescaled(factors: Factors, scaling: float) -> Factors:
    """The same increment written with another scaling (B takes the ratio)."""
    return Factors(factors.A, factors.B * (factors.scaling / scaling), scaling)


def cut(factors: Factors, rank: int, scaling: float, *, keep_A: bool = False) -> Factors:
    """The first `rank` pairs for a receiver with another scaling: s' B' A' = s B[:, :r] A[:r].

    Both factors take sqrt(s / s'), so that a balanced gauge stays balanced; with `keep_A` B alone
    takes the ratio, so that an orthonormal A stays orthonormal.
    """
    part = Factors(factors.A[:rank], factors.B[:, :rank], factors.scaling)
    if keep_A:
        return rescaled(part, scaling)
    root = math.sqrt(part.scaling / scaling)
    return Factors(root * part.A, root * part.B, scaling)


def stacked(first: Factors, second: Factors) -> Factors:
    """The sum of two increments as one pair of factors, in the first one's scaling; exact."""
    return mix([first, second], [1.0, 1.0], first.scaling)


def padded(factors: Factors, rank: int) -> Factors:
    """The same increment with zero pairs added up to `rank`."""
    missing = rank - factors.rank
    A = torch.cat([factors.A, factors.A.new_zeros(missing, factors.A.shape[1])])
    B = torch.cat([factors.B, factors.B.new_zeros(factors.B.shape[0], missing)], dim=1)
    return Factors(A, B, factors.scaling)


def restarted(prev: Factors) -> Factors:
    """The zero increment that a client trains on from: A as it was, B = 0."""
    return Factors(prev.A, prev.B.new_zeros(prev.B.shape), prev.scaling)


def increment(factors: Factors) -> Float[Tensor, "m n"]:
    """delta W as a dense m x n matrix: for an exported merged model and for tests only."""
    return factors.scaling * (factors.B @ factors.A)


def converted(factors: Factors, dtype: torch.dtype, device: torch.device | str) -> Factors:
    """The same factors in another dtype or on another device (tensors shared where equal).

    Rows lie one after another: sums must not depend on how a message or a file was laid out.
    """
    A, B = (part.to(device=device, dtype=dtype).contiguous() for part in (factors.A, factors.B))
    return Factors(A, B, factors.scaling)


def precise(factors: Factors) -> Factors:
    """The same factors in float64, where they are: what sums and decompositions are made of."""
    return converted(factors, torch.float64, factors.A.device)


# ---------------------------------------------------------------- an adapter as named tensors


def flatten(adapter: Adapter, parts: Iterable[Part] = PARTS) -> dict[str, Tensor]:
    """The named tensors of the wanted parts, sorted by name: what a message or a file holds."""
    wanted = frozenset(parts)
    tensors: dict[str, Tensor] = {}
    for name, factors in adapter.layers.items():
        if "A" in wanted:
            tensors[f"{name}.lora_A"] = factors.A
        if "B" in wanted:
            tensors[f"{name}.lora_B"] = factors.B
    if "head" in wanted:
        tensors.update(adapter.dense)
    if "frozen" in wanted:
        for name, factors in adapter.frozen.items():
            plain = rescaled(factors, 1.0)
            tensors[f"{name}.frozen_A"], tensors[f"{name}.frozen_B"] = plain.A, plain.B
    return dict(sorted(tensors.items()))


def overlay(tensors: Mapping[str, Tensor], base: Adapter) -> Adapter:
    """`base` with the named tensors in place of its own; the inverse of `flatten`.

    Raises ValueError for a name that `base` does not have.
    """
    layers = {
        name: Factors(
            tensors.get(f"{name}.lora_A", factors.A),
            tensors.get(f"{name}.lora_B", factors.B),
            factors.scaling,
        )
        for name, factors in base.layers.items()
    }
    frozen = dict(base.frozen)
    for name in base.layers:
        if f"{name}.frozen_A" in tensors and f"{name}.frozen_B" in tensors:
            frozen[name] = Factors(tensors[f"{name}.frozen_A"], tensors[f"{name}.frozen_B"], 1.0)
    dense = {name: tensors.get(name, tensor) for name, tensor in base.dense.items()}
    overlaid = Adapter(layers, dense, dict(sorted(frozen.items())))
    unknown = sorted(set(tensors) - set(flatten(overlaid, WHOLE)))
    if unknown:
        raise ValueError(f"tensor {unknown[0]!r} belongs to no layer of this adapter")
    return overlaid


def copied(adapter: Adapter) -> Adapter:
    """The same adapter in tensors of its own: a change in place reaches nobody else."""
    tensors = flatten(adapter, WHOLE)
    return overlay({name: t.detach().clone() for name, t in tensors.items()}, adapter)


def byte_count(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the arrays alone, without any envelope."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
