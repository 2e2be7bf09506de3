"""Block Krylov on an increment that is given as factors: the route for many terms.

Products with B and A in float32, the small problem in float64, and no result without a certificate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fedlora.routes import CHUNK, GRAM_FLOOR, Triplets, block_size, live_count, row_lengths

STEPS = 40  # blocks after which a search that has not settled gives up
PROBES = 8  # random columns that tell how much lies outside the space found
SETTLED = 1e-6  # of what is left out: the search ends where gains, shrinking as they do, add less
FLAT = 1e-13  # of the energy found: no step can be judged finer than this
SPARE = 8  # rows beyond the wanted ones, by which float64 undoes what float32 mixed up
TRUST = 1e-3  # float32 finds the best space where what it leaves out is above this share
UNSEEN = 1e-6  # below this share it sees nothing but its own rounding
WHOLE = 1e-12  # below this share (float64) a space holds everything
DEPENDENT = 1e-6  # a row of a block that keeps less than this of its length is rounding noise
SAFE = 2.0**30  # lengths within 1 / SAFE .. SAFE cannot overflow in float32


@dataclass(frozen=True, eq=False)
class Operator:
    """B diag(c) A in float32, its rows and columns near unit length and max c = 1; `size` is the
    root of the summed squares of its terms' norms."""

    A: Float[Tensor, "R n"]
    B: Float[Tensor, "m R"]
    c: Float[Tensor, " R"]
    size: float


def krylov_svd(
    A: Float[Tensor, "R n"],
    B: Float[Tensor, "m R"],
    rank: int,
    start: Float[Tensor, "p n"] | None = None,
) -> Triplets | None:
    """The strongest `rank` triplets by block Krylov in float32 and Rayleigh-Ritz in float64.

    Musco, Musco 2015 (1504.05477), with full reorthogonalisation. `start`: rows near the wanted
    right space. O(R (m + n) (rank + 4)) a step, 2 to 20 steps; beside the factors, their float32
    copy. Where little is left out, a last step in float64 finds what float32 cannot see, to 1e-7 of
    the norm (as the gram route). None where it cannot vouch for the result: where the terms cancel
    or the search did not settle.
    """
    lengths = row_lengths(A), row_lengths(B.mT)
    operator = _operator(A, B, *lengths)
    with _full_precision(A.device.type):
        rows, outside = _space(operator, rank, start)
    terms = lengths[0] * lengths[1]
    if outside > TRUST * operator.size:
        return _projected(A, B, rows[: rank + SPARE], rank, terms)
    return _refined(A, B, rows, rank, terms)


def _operator(A: Tensor, B: Tensor, length_a: Tensor, length_b: Tensor) -> Operator:
    """Float32 copies with powers of two taken out of each row, which are put into c.

    Factors in float32 with lengths that cannot overflow serve as they are.
    """
    lengths = torch.cat([length_a, length_b])
    if A.dtype == B.dtype == torch.float32 and 1 / SAFE < lengths.min() <= lengths.max() < SAFE:
        return Operator(
            A, B, torch.ones_like(length_a).float(), float((length_a * length_b).norm())
        )
    power_a = torch.frexp(length_a).exponent.double()
    power_b = torch.frexp(length_b).exponent.double()
    c = torch.exp2(power_a + power_b - (power_a + power_b).max())
    unit_a, unit_b = torch.exp2(-power_a), torch.exp2(-power_b)
    size = float((length_a * unit_a * length_b * unit_b * c).norm())
    return Operator(_scaled_rows(A, unit_a), _scaled_rows(B.mT, unit_b).mT, c.float(), size)


def _scaled_rows(rows: Tensor, factors: Tensor) -> Tensor:
    """Row i times factor i, rounded to float32 a few rows at a time."""
    scaled = torch.empty_like(rows, dtype=torch.float32)
    for part in _parts(rows):
        scaled[part] = rows[part] * factors[part, None]
    return scaled


def _space(operator: Operator, rank: int, start: Tensor | None) -> tuple[Tensor, float]:
    """Orthonormal rows (float64) near the strongest left space, and the norm of what is beyond
    the first `rank` of them (zero where the search did not settle)."""
    m, n = operator.B.shape[0], operator.A.shape[1]
    width = min(block_size(rank), m, n)
    images = _forward(operator, _start(width, operator.A, start))
    block, probes = images[:width], images[width:]
    basis: list[Tensor] = []
    mapped: list[Tensor] = []
    gram = torch.zeros(0, 0, dtype=torch.float64, device=block.device)
    vectors, left, energy, gained, settled = gram, 0.0, 0.0, math.inf, False
    while len(basis) < STEPS:
        block = _orthonormal(block, basis)[: m - len(gram)]
        if not len(block):  # the increment has no further directions
            settled = len(gram) > width
            break
        image = _backward(operator, block)
        basis.append(block)
        mapped.append(image.double())
        gram = _bordered(gram, mapped)
        probes = _beyond(probes, [block])
        squares, vectors = torch.linalg.eigh(gram)
        found = float(squares[-rank:].sum())
        left = float(squares[:-rank].clamp(min=0).sum()) + float(probes.square().sum()) / PROBES
        before, gained, energy = gained, found - energy, found
        to_come = gained * gained / (before - gained) if gained < before else math.inf
        settled = (
            max(to_come, gained / 10) <= SETTLED * left or gained <= FLAT * found or len(gram) == m
        )
        if settled or math.sqrt(left) <= UNSEEN * operator.size:
            break
        spare = _drawn(width - len(image), n, len(basis)).to(image)
        block = _forward(operator, torch.cat([_orthonormal(image, []), spare]))
    parts = torch.split(vectors.flip(1)[:, :width], [len(one) for one in basis])
    rows = torch.zeros(min(width, len(gram)), m, dtype=torch.float64, device=gram.device)
    for part, one in zip(parts, basis, strict=True):
        rows += part.mT @ one.double()
    return _orthonormal(rows, []), math.sqrt(left) if settled else 0.0


def _start(width: int, A: Tensor, rows: Tensor | None) -> Tensor:
    """`width` rows to begin with and the probes: the given rows, at unit length, then a fixed draw.

    At least four rows are drawn, so that a start at right angles to what is wanted still finds it.
    """
    n = A.shape[1]
    drawn = _drawn(width + PROBES, n).to(A)
    if rows is None:
        return drawn
    rows = rows.detach().to(device=A.device, dtype=torch.float64)
    length = row_lengths(rows)
    usable = (length > 0) & length.isfinite()
    given = (rows[usable] / length[usable, None])[: max(width - 4, 0)].to(A)
    return torch.cat([given * math.sqrt(n), drawn[len(given) :]])


def _drawn(count: int, n: int, step: int = 0) -> Tensor:
    """The same normal rows on every device and in every run; no global stream is touched."""
    generator = torch.Generator().manual_seed(n + count + (step << 20))
    return torch.randn(count, n, generator=generator, dtype=torch.float32, device="cpu")


def _orthonormal(rows: Tensor, basis: list[Tensor]) -> Tensor:
    """Orthonormal rows for the part of `rows` beyond the basis: project, QR, project, QR.

    A row of which rounding noise alone is left is dropped: its first QR direction may be any, one
    of the basis included, and the second projection shows it.
    """
    Q, R = torch.linalg.qr(_beyond(rows, basis).mT)
    rows = Q.mT[R.diagonal().abs() > DEPENDENT * row_lengths(rows)[: len(R)]]
    if not basis:
        return rows
    rest = _beyond(rows, basis)
    Q, _ = torch.linalg.qr(rest[row_lengths(rest) > 0.5].mT)
    outside: Tensor = Q.mT
    return outside


def _beyond(rows: Tensor, basis: list[Tensor]) -> Tensor:
    """The part of each row at right angles to a basis of orthonormal blocks."""
    for block in basis:
        rows = rows - (rows @ block.mT) @ block
    return rows


def _bordered(gram: Tensor, mapped: list[Tensor]) -> Tensor:
    """The Gram matrix of all rows mapped so far, from that without the newest block."""
    border = torch.cat([block @ mapped[-1].mT for block in mapped])
    above, corner = border[: len(gram)], border[len(gram) :]
    return torch.cat([torch.cat([gram, above], dim=1), torch.cat([above.mT, corner], dim=1)])


def _forward(operator: Operator, rows: Tensor) -> Tensor:
    """(W X)^T for the rows X^T."""
    return ((rows @ operator.A.mT) * operator.c) @ operator.B.mT


def _backward(operator: Operator, rows: Tensor) -> Tensor:
    """(W^T Y)^T for the rows Y^T."""
    return ((rows @ operator.B) * operator.c) @ operator.A


def _projected(A: Tensor, B: Tensor, rows: Tensor, rank: int, terms: Tensor) -> Triplets:
    """The SVD of U U^T B A in float64 for the orthonormal rows U^T."""
    Q, R = torch.linalg.qr(_product(B.mT, A, rows).mT)
    left, S, right = torch.linalg.svd(R, full_matrices=False)
    count = live_count(S, rank, float(terms.sum()))
    return rows.mT @ right.mT[:, :count], S[:count], (Q @ left[:, :count]).mT


def _refined(A: Tensor, B: Tensor, rows: Tensor, rank: int, terms: Tensor) -> Triplets | None:
    """The SVD of B A by one more product with W^T and W in float64; None where it may be wrong.

    It is right where fresh probes find nothing beyond the space, or where another such product
    would win no more than a SETTLED share of what is left out, or than the gram route leaves out:
    a product shrinks what is missing of a direction by (first value beyond / its value)^2.
    """
    if not len(rows):
        return None
    Z, R = torch.linalg.qr(_product(B.mT, A, rows).mT)
    V, before = Z.mT, torch.linalg.svdvals(R)[:rank]
    drawn = _drawn(PROBES, V.shape[1]).to(V)
    both = torch.cat([V, drawn - (drawn @ V.mT) @ V])
    images = _product(A, B.mT, both)
    missed = float(images[len(V) :].square().sum().div(PROBES).sqrt())
    left, S, right = torch.linalg.svd(images[: len(V)].mT, full_matrices=False)
    size = float(terms.norm())
    gained = float((S[:rank] - before) @ (S[:rank] + before))
    tail = float(S[rank:].square().sum()) + missed**2
    beyond = min(2 * missed, float(S[-1])) if len(S) > rank else 2 * missed
    last, wanted = beyond**2, float(S[:rank][-1]) ** 2
    to_come = max(gained, 0.0) * last / (wanted - last) if last < wanted else math.inf
    settled = to_come <= max(SETTLED * tail, GRAM_FLOOR**2 * float(S @ S))
    if float(S[0]) < TRUST * size or not (settled or missed <= WHOLE * size):
        return None
    count = live_count(S, rank, float(terms.sum()))
    return left[:, :count], S[:count], right[:count] @ V


def _product(first: Tensor, second: Tensor, rows: Tensor) -> Tensor:
    """rows @ first.mT @ second in float64, where the two share R, a few of their rows at a time."""
    total: Tensor = rows.new_zeros(len(rows), second.shape[1])
    for part in _parts(second):
        total += (rows @ first[part].double().mT) @ second[part].double()
    return total


@contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """Float32 products with all their digits, whatever the process has chosen; put back after.

    The settings behind `torch.set_float32_matmul_precision`, and autocast.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _parts(rows: Tensor) -> Iterator[slice]:
    """Slices of at most CHUNK numbers; one slice where nothing needs to be converted."""
    step = max(64, CHUNK // max(1, rows.shape[1]))
    if rows.dtype == torch.float64:
        step = max(step, 4096)
    for first in range(0, len(rows), step):
        yield slice(first, first + step)
