"""The error budget of a round: what clients changed, how far apart, what the merge made of it.

Norms, angles and ranks of one layer from its factors alone; knows no rule, no policy and no server.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.adapter import Adapter, Factors, padded, precise, scaled_columns
from fedlora.routes import Triplets, qr_svd

COLUMNS = 64  # of the sketch of what lies outside the old rows; exact for layers up to so wide
LIVE = 1e-6  # of the longest: a direction below it is rounding of float32, part of no space
BLOCK, STRIP = 2048, 128  # rows of all B together at a time, and of each at least: what caches hold
ALONE = 1e-9  # a client whose weight is so near to one has no others beside it
MEANS = frozenset({"effective_rank", "row_angle", "column_angle"})  # the others are norms


def round_budget(
    before: Adapter,
    sent: Sequence[Adapter],
    got: Sequence[Adapter],
    weights: Sequence[float],
    after: Adapter,
) -> dict[str, dict[str, float]]:
    """`spread` and `turn` of every layer: what the clients made of what they were sent, and what
    the merge made of that.
    """
    budget = {}
    for name, layer in before.layers.items():
        had, has = ([adapter.layers[name] for adapter in adapters] for adapters in (sent, got))
        budget[name] = spread(layer, had, has, weights) | turn(layer, after.layers[name])
    return budget


def spread(
    before: Factors, sent: Sequence[Factors], got: Sequence[Factors], weights: Sequence[float]
) -> dict[str, float]:
    """What the clients changed in what they were sent, D_k, and how far apart they are.

    Weights are made to sum to one; what was sent may have a rank and a scaling of its own.

    `update` is ||D||, D = sum w_k D_k; `drift` sqrt(sum w_k ||D_k - D||^2); `new` and `new_drift`
    are the same of N_k = D_k (I - P), P the projector on the rows of `before`; `cross` is
    ||sum w_k (B_k - mean B)(A_k - mean A)||, s_k in B_k, where all were sent the same.
    D_k P and N_k = s_k B_k (A_k - A_0)(I - P) are kept apart, so that nothing large cancels. N_k is
    seen through 64 fixed columns: within a few percent, exact for n <= 64 and where it is zero.
    Clients are read a few at a time; O(r (m + n)) multiplications a column and client.
    """
    groups = _groups(sent, got, weights)
    if not groups:
        return dict.fromkeys(("update", "drift", "new", "new_drift", "cross"), 0.0)
    frame = _frame(before.A)
    whole = reduce(
        _joined,
        (
            _moments(sent[pile[0]], [got[k] for k in pile], [weights[k] for k in pile], frame)
            for pile in _piles(groups, got)
        ),
    )
    inside, outside = (float(part.norm()) for part in whole.means[:2])
    figures = {
        "update": math.hypot(inside, outside),
        "drift": math.sqrt(sum(whole.squares) / whole.weight),
        "new": outside,
        "new_drift": math.sqrt(whole.squares[1] / whole.weight),
    }
    if len(groups) == 1:
        figures["cross"] = _cross(sent[groups[0][0]], whole, frame)
    return figures


def turn(before: Factors, after: Factors) -> dict[str, float]:
    """`effective_rank` of an increment, and by how many degrees it turned since the last one.

    The effective rank is exp of the entropy of the normalised singular values (Roy, Vetterli 2007),
    0 for zero. `row_angle` and `column_angle` are the root mean square of the principal angles
    between the row (column) spaces, as many as the smaller has dimensions; none where one is zero.
    """
    (U_0, _, Vh_0), (U, S, Vh) = _pairs(before), _pairs(after)
    entropy = float(torch.special.entr(S / S.sum()).sum())
    figures = {"effective_rank": math.exp(entropy) if len(S) else 0.0}
    if U_0.shape[1] and len(S):
        figures["row_angle"] = _angle(Vh_0.mT, Vh.mT)
        figures["column_angle"] = _angle(U_0, U)
    return figures


def totals(layers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Over the layers that have a figure: the root of the summed squares, for ranks and angles the
    mean.
    """
    figures: dict[str, list[float]] = {}
    for layer in layers.values():
        for name, value in layer.items():
            figures.setdefault(name, []).append(value)
    return {
        name: math.fsum(values) / len(values) if name in MEANS else math.hypot(*values)
        for name, values in figures.items()
    }


def settled(
    layers: Mapping[str, Mapping[str, float]], weights: Sequence[float], before: float
) -> float:
    """Rounds in a row in which new directions were mostly the clients' own noise; `before` up to
    the last.

    Where N_k = N + e_k with independent noise of one size, sum w_k ||N_k - mean||^2 is on average
    its square times 1 - q, q = sum w_k^2, and the mean's own noise is q times that square. Signal
    is no more than noise while ||mean||^2 is at most twice the noise: always where A stood still.
    One client alone, and clients that changed nothing, tell nothing: the count stays.
    """
    figures, total = totals(layers), math.fsum(weights)
    if not figures.get("update"):
        return before
    q = math.fsum((weight / total) ** 2 for weight in weights)
    if q > 1 - ALONE:
        return before
    noise = figures["new_drift"] ** 2 * q / (1 - q)
    return before + 1 if figures["new"] ** 2 <= 2 * noise else 0.0


# ---------------------------------------------------------------- moments of the clients' changes


@dataclass(frozen=True, eq=False)
class _Moments:
    """Of some clients: the `means` of D_k P, N_k, dA_k P, dA_k (I - P), dB_k and sums about the
    first two, sum w_k ||D_k P - mean||^2 and sum w_k ||N_k - mean||^2.
    """

    weight: float
    means: tuple[Tensor, ...]
    squares: tuple[float, float]


@dataclass(frozen=True, eq=False)
class _Frame:
    """The columns in which changes are seen, and room for their products.

    The first `old` columns of the basis span the old rows; the others are the sketch of the rest.
    """

    basis: Tensor
    old: int
    room: Tensor

    @property
    def rows(self) -> Tensor:
        return self.basis[:, : self.old]


def _frame(A: Float[Tensor, "r n"]) -> _Frame:
    rows = _row_basis(A)
    old, columns = rows.shape[1], _columns(len(rows)).to(rows)
    room = rows.new_empty(BLOCK * max(COLUMNS, old))
    return _Frame(torch.cat([rows, _outside(rows, columns)], dim=1), old, room)


def _groups(
    sent: Sequence[Factors], got: Sequence[Factors], weights: Sequence[float]
) -> list[list[int]]:
    """The clients with weight, those together that were sent the same and answered in one rank."""
    groups: dict[tuple[int, int], list[int]] = {}
    for k, (before, after, weight) in enumerate(zip(sent, got, weights, strict=True)):
        if weight > 0:
            groups.setdefault((id(before), after.rank), []).append(k)
    return list(groups.values())


def _piles(groups: Sequence[Sequence[int]], got: Sequence[Factors]) -> Iterator[Sequence[int]]:
    """A few clients of one group at a time, the more the smaller the layer."""
    for group in groups:
        step = BLOCK // min(len(got[group[0]].B), STRIP)
        yield from (group[first : first + step] for first in range(0, len(group), step))


def _moments(
    sent: Factors, got: Sequence[Factors], weights: Sequence[float], frame: _Frame
) -> _Moments:
    """The moments of clients of one group: D_k = dB_k A_0 + B_k dA_k, with dA_k = A_k - A_0,
    dB_k = s_k B_k - s_0 B_0; a few rows of B_k and dB_k at a time.
    """
    sent, *got = _alike(sent, got)
    w = frame.room.new_tensor(weights)
    share = w / w.sum()
    A_0 = (sent.A.double() @ frame.rows).expand(len(got), -1, -1)
    dA = _row_changes(sent, got, frame)
    inside, outside, dB_mean = (w.new_zeros(len(sent.B), x.shape[-1]) for x in (*dA, sent.B))
    squares, moved = w.new_zeros(2), bool(dA[1].any())
    for strip in _strips(len(sent.B), BLOCK // len(got)):
        B_0, B = scaled_columns([sent], strip), scaled_columns(got, strip)
        dB = B - B_0
        dB_mean[strip] = torch.tensordot(share, dB, 1)
        within = torch.bmm(B, dA[0], out=_place(frame.room, B, dA[0])).baddbmm_(dB, A_0)
        inside[strip] = torch.tensordot(share, within, 1)
        squares[0] += w @ _squares(within.sub_(inside[strip]))
        if moved:
            beside = torch.bmm(B, dA[1], out=_place(frame.room, B, dA[1]))
            outside[strip] = torch.tensordot(share, beside, 1)
            squares[1] += w @ _squares(beside.sub_(outside[strip]))
    means = (inside, outside, *(torch.tensordot(share, part, 1) for part in dA), dB_mean)
    return _Moments(float(w.sum()), means, (float(squares[0]), float(squares[1])))


def _place(room: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The beginning of the room as the place of a product: fresh memory would cost more than it."""
    k, h, c = len(left), left.shape[1], right.shape[2]
    return room[: k * h * c].view(k, h, c)


def _alike(sent: Factors, got: Sequence[Factors]) -> list[Factors]:
    """What all were sent, then what came back, in one rank: zero pairs change nothing."""
    rank = max(sent.rank, got[0].rank)
    return [part if part.rank == rank else padded(part, rank) for part in (sent, *got)]


def _row_changes(sent: Factors, got: Sequence[Factors], frame: _Frame) -> list[Tensor]:
    """A_k - A_0 within the old rows and beside them, a few of its columns at a time."""
    r, n = sent.A.shape
    total = frame.room.new_zeros(len(got), r, frame.basis.shape[1])
    for strip in _strips(n, BLOCK * STRIP // (8 * r * len(got))):
        A = torch.stack([part.A[:, strip] for part in (sent, *got)]).double()
        total += (A[1:] - A[0]) @ frame.basis[strip]
    return [part.contiguous() for part in total.tensor_split([frame.old], dim=2)]


def _strips(size: int, width: int) -> list[slice]:
    step = max(STRIP, width)
    return [slice(first, first + step) for first in range(0, size, step)]


def _squares(X: Float[Tensor, "k h c"]) -> Float[Tensor, " k"]:
    norms: Tensor = torch.linalg.vector_norm(X, dim=(1, 2))
    return norms.square()


def _joined(left: _Moments, right: _Moments) -> _Moments:
    """The moments of both together (Chan, Golub, LeVeque 1979): sums of squares only add up.

    Means of factors of other shapes stay the left ones; nobody asks for them.
    """
    weight = left.weight + right.weight
    share = right.weight / weight
    pairs = list(zip(left.means, right.means, strict=True))
    added = (left.weight * share * float((y - x).norm()) ** 2 for x, y in pairs[:2])
    inside, outside = (sum(parts) for parts in zip(left.squares, right.squares, added, strict=True))
    means = (x + share * (y - x) if x.shape == y.shape else x for x, y in pairs)
    return _Moments(weight, tuple(means), (inside, outside))


def _cross(sent: Factors, whole: _Moments, frame: _Frame) -> float:
    """||mean(B A) - (mean B)(mean A)|| as D - dB A_0 - (B_0 + dB) dA, all of D's size."""
    inside, outside, *dA, dB = whole.means
    start = padded(sent, dB.shape[1])
    B = scaled_columns([start], slice(None))[0] + dB
    within = inside - dB @ (start.A.double() @ frame.rows) - B @ dA[0]
    beside = outside - B @ dA[1]
    return math.hypot(float(within.norm()), float(beside.norm()))


# ---------------------------------------------------------------- spaces


@lru_cache(maxsize=8)
def _columns(n: int) -> Float[Tensor, "n c"]:
    """The columns of the sketch, always the same: E ||X Omega||^2 = ||X||^2, Omega^T Omega = n / c.

    Orthonormal up to that factor; the identity where all n columns are taken.
    """
    if n <= COLUMNS:
        return torch.eye(n, dtype=torch.float64)
    drawn = torch.randn(n, COLUMNS, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    columns: Tensor = torch.linalg.qr(drawn)[0] * math.sqrt(n / COLUMNS)
    return columns


def _row_basis(A: Float[Tensor, "r n"]) -> Float[Tensor, "n p"]:
    """Orthonormal columns that span the rows of A, long and short ones alike (float64)."""
    rows = torch.nn.functional.normalize(A.double(), dim=1, eps=0.0)
    Q, R = torch.linalg.qr(rows[A.any(dim=1)].mT)
    U, S, _ = torch.linalg.svd(R)
    basis: Tensor = Q @ U[:, : _live(S)]
    return basis


def _pairs(factors: Factors) -> Triplets:
    """The directions of an increment and its singular values, without those that are rounding."""
    exact = precise(factors)
    U, S, Vh = qr_svd(exact.A, exact.B, exact.rank)
    count = _live(S)
    return U[:, :count], S[:count], Vh[:count]


def _live(S: Float[Tensor, " p"]) -> int:
    """How many of the falling values stand above the rounding of float32."""
    return int(torch.count_nonzero(LIVE * S[:1] < S))


def _outside(basis: Float[Tensor, "n p"], columns: Float[Tensor, "n q"]) -> Float[Tensor, "n q"]:
    """The part of each column that is orthogonal to an orthonormal basis."""
    return columns - basis @ (basis.mT @ columns)


def _angle(left: Float[Tensor, "n p"], right: Float[Tensor, "n q"]) -> float:
    """The root mean square of the principal angles between two orthonormal bases, in degrees.

    From sines and cosines both (Bjoerck, Golub 1973), so that small angles are as exact as large.
    """
    large, small = (left, right) if left.shape[1] >= right.shape[1] else (right, left)
    cosines = torch.linalg.svdvals(large.mT @ small)
    sines = torch.linalg.svdvals(_outside(large, small)).flip(0)
    return math.degrees(float(torch.atan2(sines, cosines).square().mean().sqrt()))
