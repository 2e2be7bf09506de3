"""Every route to the truncated SVD against NumPy's SVD of the dense float64 matrix, and the choice.

Layers are large enough for several blocks of `krylov`; "excess" is the error beyond the best one.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import assert_near, dense, dense_mean, normal, random_factors, same_bits
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fedlora.adapter import Factors, mix
from fedlora.krylov import krylov_svd
from fedlora.lowrank import Route, truncate
from fedlora.routes import block_size, chosen_route, exact_route

M, N = 130, 90
ROUTES: tuple[Route, ...] = ("auto", "gram", "krylov", "exact", "qr", "dense")
every_route = pytest.mark.parametrize("route", ROUTES)
KINDS = ("flat", "decaying", "shared A", "near", "more than min(m, n)", "far more")


def stack(kind: str, seed: int = 0, m: int = M, n: int = N) -> Factors:
    """What a mix of many clients looks like: R is 70, or above min(m, n)."""
    count = {"more than min(m, n)": 120, "far more": 700}.get(kind, 70)
    A, B = normal(seed, count, n), normal(seed + 1, m, count)
    if kind == "decaying":
        B = B * 0.9 ** torch.arange(count)
    if kind == "shared A":
        A = A[:7].repeat(10, 1)
    if kind == "near":
        A = A[:7].repeat(10, 1) + 0.3 * A
        B = B[:, :7].repeat(1, 10) + 0.3 * B
    return Factors(A, B, 0.5)


def best_error(matrix: Tensor, rank: int) -> float:
    sigma = np.linalg.svd(matrix.numpy(), compute_uv=False)
    return float(np.sqrt((sigma[rank:] ** 2).sum()))


def assert_best(result: Factors, matrix: Tensor, rank: int, floor: float = 1e-12) -> None:
    """No further from the matrix than the best one of that rank, but for 1e-6 of that error."""
    missed = float((matrix - dense(result)).norm())
    assert missed <= best_error(matrix, rank) * (1 + 1e-6) + floor * float(matrix.norm())


def flops(factors: Factors, rank: int, previous: Factors | None = None, route: Route = "krylov"):
    with FlopCounterMode(display=False) as counter:
        truncate(factors, rank, previous=previous, route=route)
    return counter.get_total_flops()


@every_route
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(M, N), (60, 200)])
def test_every_route_finds_the_best_approximation(
    kind: str, shape: tuple[int, int], route: Route
) -> None:
    factors = stack(kind, 0, *shape)
    for rank in (1, 5, 12):
        assert_best(truncate(factors, rank, route=route), dense(factors), rank)


@pytest.mark.parametrize("kind", KINDS)
def test_krylov_gives_orthonormal_vectors_and_the_singular_values(kind: str) -> None:
    factors = stack(kind)
    found = krylov_svd(factors.A, factors.B, 6)
    assert found is not None
    U, S, Vh = found
    eye = torch.eye(6, dtype=torch.float64)
    assert float((U.mT @ U - eye).abs().max()) < 1e-13
    assert float((Vh @ Vh.mT - eye).abs().max()) < 1e-13
    sigma = np.linalg.svd((factors.B @ factors.A).numpy(), compute_uv=False)[:6]
    assert_close(S, torch.from_numpy(sigma), rtol=1e-7, atol=0)  # the square of float32's angle
    assert U.dtype == S.dtype == Vh.dtype == torch.float64


@pytest.mark.parametrize("spread", [1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-9])
def test_krylov_vouches_for_clients_that_are_close_to_each_other(spread: float) -> None:
    """Late rounds: float32 sees little of what is left out, and float64 has the last word."""
    A = normal(0, 5, N).repeat(40, 1) + spread * normal(1, 200, N)
    B = normal(2, M, 5).repeat(1, 40) + spread * normal(3, M, 200)
    found = krylov_svd(A, B, 5)
    assert found is not None
    U, S, Vh = found
    assert_best(Factors(Vh, U * S, 1.0), B @ A, 5, floor=1e-9)


def test_a_spectrum_too_steep_for_float32_is_cut_to_1e7_of_its_norm() -> None:
    steep = Factors(
        torch.linalg.qr(normal(0, N, 60))[0].mT,
        torch.linalg.qr(normal(1, M, 60))[0] * 0.5 ** torch.arange(60, dtype=torch.float64),
        1.0,
    )
    for rank in (3, 5, 8, 12):
        assert_best(truncate(steep, rank, route="krylov"), dense(steep), rank)
    for rank in (14, 16, 20, 26, 50):
        assert_best(truncate(steep, rank, route="krylov"), dense(steep), rank, floor=1e-7)


@pytest.mark.parametrize("size", [1e3, 1e5, 1e8, 1e12])
def test_krylov_falls_back_where_terms_cancel(size: float) -> None:
    kept, large = stack("flat", 0), stack("flat", 2)
    factors = mix([kept, large, large], [1.0, size, -size], 0.5)
    matrix = dense(kept)
    result = truncate(factors, 5, route="krylov")
    missed = float((matrix - dense(result)).norm())
    assert missed <= best_error(matrix, 5) * (1 + 1e-6) + 1e-15 * size * 100 * float(matrix.norm())


def test_a_total_cancellation_of_many_terms_has_rank_zero() -> None:
    factors = stack("more than min(m, n)")
    gone = mix([factors, factors], [1.0, -1.0], 0.5)
    for route in ("auto", "krylov"):
        assert not bool(truncate(gone, 5, route=route).B.any())


@every_route
def test_zero_and_low_rank_sums_of_many_terms_keep_their_rank(route: Route) -> None:
    """Clients that share A have the rank of A, however many: no direction of noise joins."""
    zero = Factors(normal(0, 300, N), torch.zeros(M, 300).double(), 1.0)
    assert not bool(truncate(zero, 5, route=route, previous=random_factors(1, M, N, 5)).B.any())
    shared = stack("shared A")
    result = truncate(shared, 9, route=route)
    assert_near(dense(result), dense(shared), 1e-12)
    assert int((result.B.norm(dim=0) > 0).sum()) == 7
    client = random_factors(3, M, N, 4)
    many = mix([client] * 60, [1 / 60] * 60, 2.0)
    result = truncate(many, 5, route=route)
    assert_near(dense(result), dense(client), 1e-12)
    assert int((result.B.norm(dim=0) > 0).sum()) == 4


def test_pairs_that_carry_nothing_do_not_count_as_terms() -> None:
    """With B = 0 for nearly all of 700 pairs the sum is that of the others, by their route."""
    few = stack("flat")
    padded = Factors(
        torch.cat([few.A, normal(5, 700, N)]), torch.cat([few.B, torch.zeros(M, 700)], dim=1), 0.5
    )
    assert same_bits(truncate(padded, 5), truncate(few, 5, route="gram"))


@every_route
@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1e15])
@pytest.mark.parametrize("kind", ["flat", "shared A", "far more"])
def test_scales_do_no_harm_to_many_terms(kind: str, scale: float, route: Route) -> None:
    factors = stack(kind)
    for one in (
        Factors(factors.A * scale, factors.B, 0.5),
        Factors(factors.A / scale, factors.B * scale, 0.5),
    ):
        assert_best(truncate(one, 5, route=route), dense(one), 5)


@every_route
def test_pairs_of_very_different_size_do_no_harm(route: Route) -> None:
    factors = stack("flat")
    sizes = 10.0 ** torch.linspace(-18, 15, 70, dtype=torch.float64)
    skewed = Factors(factors.A * sizes[:, None], factors.B / sizes, 0.5)
    assert_best(truncate(skewed, 5, route=route), dense(factors), 5)


@every_route
def test_mixed_ranks_and_scalings_of_many_clients(route: Route) -> None:
    clients = [random_factors(k, M, N, 1 + k % 5, scaling=0.5 + k % 3) for k in range(50)]
    weights = torch.arange(1, 51, dtype=torch.float64) / 1275
    result = truncate(mix(clients, weights, 4.0), 6, route=route)
    assert_best(result, dense_mean(clients, weights), 6)
    assert result.scaling == 4.0


@every_route
def test_factors_in_float32_are_merged_with_the_same_care(route: Route) -> None:
    factors = stack("near")
    single = Factors(factors.A.float(), factors.B.float(), 0.5)
    result = truncate(single, 5, route=route)
    assert_best(result, dense(single), 5)
    assert result.A.dtype == torch.float64


def test_factors_of_one_hot_rows_leave_no_block_empty_handed() -> None:
    """Products that end in exact zeros must not bring the same direction twice."""
    A, B = torch.eye(N, dtype=torch.float64), torch.eye(M, N, dtype=torch.float64)
    for values in (torch.arange(1.0, N + 1), (torch.arange(N) < 20).float() + 1e-3):
        factors = Factors(A, B * values.double(), 1.0)
        assert_best(truncate(factors, 6, route="krylov"), dense(factors), 6)


# ---------------------------------------------------------------- the start


def warm(factors: Factors, rank: int) -> Factors:
    return truncate(factors, rank, route="dense")


def test_a_start_near_the_answer_saves_work_and_finds_the_same() -> None:
    factors = stack("decaying", m=400, n=300)
    near = Factors(*(t + 1e-3 * normal(9, *t.shape) for t in (stack("decaying", m=400, n=300).A,
                     stack("decaying", m=400, n=300).B)), 0.5)  # fmt: skip
    previous = warm(near, 12)
    assert flops(factors, 12, previous) < flops(factors, 12)
    assert_best(truncate(factors, 12, previous=previous, route="krylov"), dense(factors), 12)


@pytest.mark.parametrize("scale", [1e-40, 1.0, 1e40])
@pytest.mark.parametrize("kind", ["flat", "near", "far more"])
def test_no_start_misleads(kind: str, scale: float) -> None:
    """Not one of wild scale, not the weakest directions, not one of zeros, nor too many rows."""
    factors = stack(kind)
    _, _, Vh = torch.linalg.svd(factors.B @ factors.A, full_matrices=False)
    for rows in (Vh[:5], Vh[-5:], Vh[20:60], torch.zeros(5, N).double()):
        found = krylov_svd(factors.A, factors.B, 5, rows * scale)
        assert found is not None
        U, S, V = found
        assert_best(Factors(V, U * S, 0.5), dense(factors), 5)


def test_a_start_of_unusable_rows_is_no_start() -> None:
    factors = stack("flat")
    bad = torch.full((5, N), math.nan)
    plain, other = (krylov_svd(factors.A, factors.B, 5, start) for start in (None, bad))
    assert plain is not None
    assert other is not None
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


# ---------------------------------------------------------------- precision


class Precisions(TorchDispatchMode):
    """What was set while float32 products ran: small ones look alike on some processors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default and args[0].dtype == torch.float32:
            backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
            self.seen |= {backend.fp32_precision for backend in backends}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("chosen", ["highest", "high", "medium"])
def test_krylov_uses_all_digits_of_float32_and_restores_the_setting(chosen: str) -> None:
    """`medium` made garbage of float32 products elsewhere in the process."""
    factors = stack("flat")
    want = truncate(factors, 5, route="krylov")
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    torch.set_float32_matmul_precision(chosen)
    try:
        before = [backend.fp32_precision for backend in backends]
        with Precisions() as used:
            got = truncate(factors, 5, route="krylov")
        assert used.seen == {"ieee"}
        assert torch.get_float32_matmul_precision() == chosen
        assert [backend.fp32_precision for backend in backends] == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert same_bits(got, want)


def test_krylov_is_the_same_inside_autocast() -> None:
    """autocast would make bfloat16 of its products."""
    factors = stack("flat")
    want = truncate(factors, 5, route="krylov")
    with torch.autocast("cpu"):
        assert same_bits(truncate(factors, 5, route="krylov"), want)


def test_a_run_draws_from_no_global_stream_and_ends_in_the_same_bits() -> None:
    factors, previous = stack("far more"), random_factors(1, M, N, 5)
    torch.manual_seed(1)
    first = truncate(factors, 5, previous=previous)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert same_bits(first, truncate(factors, 5, previous=previous))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------- the choice


def test_the_choice_is_gram_for_few_terms_and_krylov_for_many() -> None:
    assert [block_size(rank) for rank in (1, 12, 13, 16, 64)] == [16, 16, 32, 32, 80]
    for rank in (1, 8, 16, 64):
        edge = 12 * block_size(rank)
        assert chosen_route(edge, rank) == "gram"
        assert chosen_route(edge + 1, rank) == "krylov"
    assert exact_route(100, 4096, 11008) == "qr"
    assert exact_route(71, M, N) == "qr"
    assert exact_route(72, M, N) == exact_route(700, M, N) == "dense"


@pytest.mark.parametrize(("pairs", "taken"), [(192, "gram"), (193, "krylov"), (700, "krylov")])
def test_truncate_takes_the_chosen_route(pairs: int, taken: Route) -> None:
    factors = Factors(normal(0, pairs, N), normal(1, M, pairs), 1.0)
    assert chosen_route(pairs, 5) == taken
    assert same_bits(truncate(factors, 5), truncate(factors, 5, route=taken))
    other: Route = "krylov" if taken == "gram" else "gram"
    assert not same_bits(truncate(factors, 5), truncate(factors, 5, route=other))


@pytest.mark.parametrize(("pairs", "taken"), [(60, "qr"), (300, "dense")])
def test_exactness_takes_qr_or_the_dense_matrix(pairs: int, taken: Route) -> None:
    factors = Factors(normal(0, pairs, N), normal(1, M, pairs), 1.0)
    wanted = truncate(factors, 5, route=taken)
    assert same_bits(truncate(factors, 5, route="exact"), wanted)
    wanted = truncate(factors, 5, gauge="orthonormal", route=taken)
    assert same_bits(truncate(factors, 5, gauge="orthonormal"), wanted)


def test_many_terms_cost_krylov_less_than_their_gram_matrices_would() -> None:
    """By count of floating-point operations: R^2 (m + n) against R (m + n) (rank + 4) a step."""
    factors = stack("near", m=300, n=300)
    many = Factors(factors.A.repeat(40, 1), factors.B.repeat(1, 40), 0.5)
    assert flops(many, 5) < 2800**2 * 600 / 4


@pytest.mark.usefixtures("as_users_run_it")
def test_an_unknown_route_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown route 'fast'; known are auto, gram, krylov"):
        truncate(random_factors(0), 2, route="fast")  # type: ignore[arg-type]
