"""The algebra of factors, against matrices multiplied out in float64 and cases by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import (
    assert_near,
    dense,
    dense_mean,
    normal,
    random_adapter,
    random_factors,
    same_adapters,
)
from torch.testing import assert_close

from fedlora.adapter import (
    WHOLE,
    Adapter,
    Factors,
    byte_count,
    change,
    converted,
    copied,
    cut,
    equal_ranks,
    flatten,
    frobenius,
    increment,
    inner,
    lora_scaling,
    mean_factors,
    mix,
    overlay,
    padded,
    rescaled,
    sketched_frobenius,
    stacked,
)

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def three(scalings: tuple[float, ...] = (2.0, 2.0, 2.0)) -> list[Factors]:
    return [random_factors(seed, scaling=s) for seed, s in enumerate(scalings)]


def test_an_increment_is_scaling_times_b_times_a_by_hand() -> None:
    factors = Factors(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0], [5.0]]), 0.5)
    assert_close(increment(factors), torch.tensor([[2.0, 4.0, 6.0], [2.5, 5.0, 7.5]]))
    assert (factors.rank, factors.shape) == (1, (2, 3))


def test_averaging_factors_is_not_averaging_increments() -> None:
    """Two clients that agree on the increment but not on the sign of its factors cancel."""
    client = random_factors(0)
    flipped = Factors(-client.A, -client.B, client.scaling)
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert_close(dense(client), dense(flipped))
    assert frobenius(mean_factors([client, flipped], half, 2.0)) == 0.0
    assert_close(dense(mix([client, flipped], half, 2.0)), dense(client))


def test_what_fedavg_misses_is_the_weighted_covariance_of_the_factors() -> None:
    """sum w B A - Bbar Abar = sum w (B - Bbar)(A - Abar) = sum_{i<j} w_i w_j (B_i-B_j)(A_i-A_j)."""
    clients = three()
    mean = mean_factors(clients, WEIGHTS, 2.0)
    missed = dense_mean(clients, WEIGHTS) - dense(mean)
    centred = [Factors(c.A - mean.A, c.B - mean.B, 2.0) for c in clients]
    assert_close(missed, dense_mean(centred, WEIGHTS))
    pairs = list(itertools.combinations(range(3), 2))
    apart = [Factors(*(getattr(clients[i], p) - getattr(clients[j], p) for p in "AB"), 2.0)
             for i, j in pairs]  # fmt: skip
    assert_close(missed, dense_mean(apart, [WEIGHTS[i] * WEIGHTS[j] for i, j in pairs]))
    assert float(missed.norm()) > 0.1


def test_mean_factors_is_the_weighted_mean_of_each_factor_by_hand() -> None:
    one = Factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [0.0], [4.0]]), 1.0)
    two = Factors(torch.tensor([[3.0, 8.0]]), torch.tensor([[0.0], [4.0], [0.0]]), 1.0)
    mean = mean_factors([one, two], torch.tensor([0.75, 0.25]), 1.0)
    assert_close(mean.A, torch.tensor([[1.5, 2.0]]))
    assert_close(mean.B, torch.tensor([[1.5], [1.0], [3.0]]))


def test_mean_factors_folds_each_clients_scaling_into_its_b() -> None:
    common = normal(5, 3, 5)
    clients = [Factors(common, normal(k, 7, 3), s) for k, s in enumerate((0.5, 4.0, 1.0), start=20)]
    mean = mean_factors(clients, WEIGHTS, 3.0)
    assert mean.scaling == 3.0
    assert_close(dense(mean), dense_mean(clients, WEIGHTS))


def test_mean_factors_reads_lazy_clients_once_and_in_order() -> None:
    class Lazy(list):  # type: ignore[type-arg]
        reads = 0

        def __iter__(self):  # type: ignore[no-untyped-def]
            Lazy.reads += 1
            return super().__iter__()

    mean_factors(Lazy(three()), WEIGHTS, 2.0)
    assert Lazy.reads == 1


def test_mean_factors_refuses_unequal_ranks_and_points_to_a_rule() -> None:
    clients = [random_factors(0, r=2), random_factors(1, r=3)]
    with pytest.raises(ValueError, match=r"A \(2, 5\).*A \(3, 5\).*fra"):
        mean_factors(clients, WEIGHTS[:2], 2.0)


def test_mean_factors_refuses_another_layers_shape() -> None:
    with pytest.raises(ValueError, match="equal ranks and shapes"):
        mean_factors([random_factors(0, m=7), random_factors(1, m=8)], WEIGHTS[:2], 2.0)


def test_a_mean_or_mix_of_nobody_is_refused() -> None:
    nobody = torch.zeros(0, dtype=torch.float64)
    with pytest.raises(ValueError, match="at least one"):
        mean_factors([], nobody, 1.0)
    with pytest.raises(ValueError, match="at least one"):
        mix([], nobody, 1.0)


def test_a_weight_too_many_or_too_few_is_refused() -> None:
    for weights in (WEIGHTS[:2], torch.ones(4, dtype=torch.float64)):
        with pytest.raises(ValueError, match="zip"):
            mean_factors(three(), weights, 1.0)
        with pytest.raises(ValueError, match="zip"):
            mix(three(), weights, 1.0)


@pytest.mark.parametrize("scaling", [0.25, 2.0, 17.0])
def test_mix_is_the_weighted_mean_of_the_increments_with_mixed_ranks_and_scalings(
    scaling: float,
) -> None:
    clients = [random_factors(k, r=r, scaling=s) for k, (r, s) in enumerate(
        [(1, 16.0), (4, 4.0), (2, 0.5)])]  # fmt: skip
    mixed = mix(clients, WEIGHTS, scaling)
    assert (mixed.rank, mixed.scaling) == (7, scaling)
    assert_close(dense(mixed), dense_mean(clients, WEIGHTS))


def test_mix_takes_a_weight_for_each_rank_row() -> None:
    clients = [random_factors(0, r=2, scaling=3.0), random_factors(1, r=3, scaling=0.5)]
    rows = [torch.tensor([0.7, 0.0]).double(), torch.tensor([0.1, 0.2, 0.4]).double()]
    want = sum(
        w * c.scaling * torch.outer(c.B[:, row], c.A[row])
        for c, weights in zip(clients, rows, strict=True)
        for row, w in enumerate(weights)
    )
    assert_close(dense(mix(clients, rows, 2.0)), want)


def test_mix_takes_negative_weights() -> None:
    left, right = random_factors(0), random_factors(1, scaling=0.5)
    assert_close(dense(mix([left, right], [1.0, -1.0], 1.0)), dense(left) - dense(right))


def test_inner_and_frobenius_are_those_of_the_dense_increments() -> None:
    left, right = random_factors(0, r=2, scaling=3.0), random_factors(1, r=4, scaling=0.25)
    assert math.isclose(inner(left, right), float((dense(left) * dense(right)).sum()))
    assert math.isclose(inner(left, right), inner(right, left))
    assert math.isclose(frobenius(left), float(dense(left).norm()))


def test_frobenius_of_a_total_cancellation_is_zero_to_1e8_of_the_terms() -> None:
    client = random_factors(0, m=60, n=40, r=8)
    difference = mix([client, client], [1.0, -1.0], 2.0)
    assert 0.0 <= frobenius(difference) <= 1e-7 * frobenius(client)


def test_frobenius_of_no_rank_at_all_is_zero() -> None:
    assert frobenius(Factors(normal(0, 0, 5), normal(0, 7, 0), 2.0)) == 0.0


def test_rescaled_is_the_same_increment() -> None:
    factors = random_factors(0, scaling=16.0)
    other = rescaled(factors, 0.125)
    assert other.scaling == 0.125
    assert_near(dense(other), dense(factors))


def test_converted_to_the_same_dtype_shares_the_tensors_and_to_another_keeps_the_scaling() -> None:
    factors = random_factors(0, scaling=3.0)
    assert converted(factors, torch.float64, "cpu").A is factors.A
    single = converted(factors, torch.float32, "cpu")
    assert (single.A.dtype, single.B.dtype, single.scaling) == (torch.float32, torch.float32, 3.0)


@pytest.mark.parametrize("scaling", [0.0, -1.0, math.nan, math.inf])
def test_a_scaling_that_is_not_positive_and_finite_is_refused(scaling: float) -> None:
    with pytest.raises(ValueError, match="scaling must be a positive finite number"):
        Factors(normal(0, 2, 5), normal(1, 7, 2), scaling)


@pytest.mark.usefixtures("as_users_run_it")
def test_factors_that_make_no_product_are_refused_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(7, 3\)"):
        Factors(normal(0, 2, 5), normal(1, 7, 3), 1.0)
    with pytest.raises(ValueError, match=r"\(10,\)"):
        Factors(normal(0, 10), normal(1, 7, 3), 1.0)


def test_flatten_names_the_wanted_parts_in_sorted_order() -> None:
    adapter = random_adapter(0)
    assert list(flatten(adapter)) == [
        "block.query.lora_A", "block.query.lora_B", "block.value.lora_A", "block.value.lora_B",
        "head.bias", "head.weight",
    ]  # fmt: skip
    assert list(flatten(adapter, ["B"])) == ["block.query.lora_B", "block.value.lora_B"]
    assert list(flatten(adapter, ["head"])) == ["head.bias", "head.weight"]
    assert flatten(adapter, ["A"])["block.value.lora_A"] is adapter.layers["block.value"].A


def test_overlay_undoes_flatten_and_keeps_what_is_not_named() -> None:
    base, other = random_adapter(0), random_adapter(50)
    assert same_adapters(overlay(flatten(other), base), other)
    assert same_adapters(overlay({}, base), base)
    half = overlay(flatten(other, ["A"]), base)
    assert half.layers["block.query"].A is other.layers["block.query"].A
    assert half.layers["block.query"].B is base.layers["block.query"].B
    assert half.dense["head.bias"] is base.dense["head.bias"]


def test_overlay_refuses_a_tensor_of_no_layer_by_name() -> None:
    with pytest.raises(ValueError, match=r"'block\.key\.lora_A'"):
        overlay({"block.key.lora_A": normal(0, 2, 5)}, random_adapter(0))


def test_byte_count_is_the_arrays_alone() -> None:
    adapter = Adapter({"x": Factors(torch.zeros(2, 5), torch.zeros(7, 2), 1.0)})
    assert byte_count(flatten(adapter)) == 4 * 2 * (5 + 7)
    assert byte_count({"h": torch.zeros(3, dtype=torch.float64)}) == 24


def test_a_sketched_norm_is_within_a_few_percent_and_the_same_twice() -> None:
    for seed in range(10):
        factors = random_factors(seed, 40, 30, 12)
        other = random_factors(seed + 10, 40, 30, 3)
        exact = float((0.7 * dense(factors) - 0.2 * dense(other)).norm())
        found = sketched_frobenius(iter([factors, other]), [0.7, -0.2])
        assert found == pytest.approx(exact, rel=0.15)
        assert found == sketched_frobenius([factors, other], [0.7, -0.2])
    zero = Factors(factors.A, torch.zeros_like(factors.B), 2.0)
    assert sketched_frobenius([zero], [1.0]) == 0


# ---------------------------------------------------------------- other ranks, and what is frozen


@pytest.mark.parametrize("keep_A", [False, True])  # A is the matrix
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_cut_is_the_first_pairs_in_the_receivers_scaling(rank: int, keep_A: bool) -> None:
    factors = random_factors(0, scaling=1.0)
    got = cut(factors, rank, 4.0, keep_A=keep_A)
    assert (got.rank, got.scaling) == (rank, 4.0)
    assert_near(dense(got), factors.B[:, :rank] @ factors.A[:rank], 1e-14)
    ratio = float(got.A.norm() / factors.A[:rank].norm())
    assert ratio == pytest.approx(1.0 if keep_A else 0.5)


def test_stacking_adds_increments_and_padding_adds_nothing() -> None:
    left, right = random_factors(0, r=3, scaling=2.0), random_factors(1, r=2, scaling=0.5)
    both = stacked(left, right)
    assert (both.rank, both.scaling) == (5, 2.0)
    assert_near(dense(both), dense(left) + dense(right), 1e-14)
    assert torch.equal(both.A[:3], left.A)
    wide = padded(left, 5)
    assert wide.rank == 5
    assert_near(dense(wide), dense(left), 1e-15)
    assert not bool(wide.A[3:].any() or wide.B[:, 3:].any())


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-12])
def test_a_change_keeps_its_digits_however_small(size: float) -> None:
    """The difference of two products has lost them: 1e-16 of the product is 1e-4 of the change."""
    before = random_factors(0, scaling=0.5)
    moved = random_factors(1)
    after = Factors(before.A + size * moved.A, before.B + size * moved.B, 2.0)
    start = rescaled(before, 2.0)
    after = Factors(after.A, start.B + size * moved.B, 2.0)
    dA, dB = after.A - start.A, after.B - start.B
    want = 2.0 * (dB @ after.A + start.B @ dA)
    assert frobenius(change(before, after)) == pytest.approx(float(want.norm()), rel=1e-12)
    with pytest.raises(ValueError, match="rank 2 beside the previous ones of rank 3"):
        change(before, random_factors(2, r=2))
    with pytest.raises(ValueError, match="equal ranks are needed"):
        equal_ranks(before, [before, random_factors(2, r=4)])


def test_a_scaling_is_alpha_over_r_or_over_its_root() -> None:
    assert lora_scaling(16.0, 4, rslora=False) == 4.0
    assert lora_scaling(16.0, 4, rslora=True) == 8.0


def test_what_is_frozen_travels_with_an_adapter_and_is_asked_for_by_name() -> None:
    adapter = random_adapter(0)
    assert flatten(adapter, WHOLE) == flatten(adapter)
    folded = Factors(normal(1, 4, 5).float(), normal(2, 7, 4).float(), 3.0)
    whole = Adapter(adapter.layers, adapter.dense, {"block.query": folded})
    tensors = flatten(whole, WHOLE)
    extra = {"block.query.frozen_A", "block.query.frozen_B"}
    assert tensors.keys() - flatten(whole).keys() == extra
    assert_close(tensors["block.query.frozen_B"], 3.0 * folded.B)
    assert set(flatten(whole, {"frozen"})) == extra
    twin = copied(whole)
    assert twin.frozen["block.query"].A.data_ptr() != folded.A.data_ptr()
    for got in (overlay(tensors, adapter), twin):
        assert list(got.frozen) == ["block.query"]
        assert_close(dense(got.frozen["block.query"]), dense(folded), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"'other\.frozen_A' belongs to no layer"):
        overlay({"other.frozen_A": folded.A}, adapter)


def test_large_products_are_summed_in_blocks_to_the_same_value() -> None:
    left, right = random_factors(0, 12, 9, 2500), random_factors(1, 12, 9, 1100)
    want = float((dense(left) * dense(right)).sum())
    assert inner(left, right) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("r", [1, 3, 40, 300])
@pytest.mark.parametrize("shape", [(12, 9), (200, 7), (7, 200)])
def test_the_norm_of_few_and_of_many_pairs_is_that_of_the_matrix(
    shape: tuple[int, int], r: int
) -> None:
    factors = random_factors(r, *shape, r, scaling=0.5)
    assert frobenius(factors) == pytest.approx(float(dense(factors).norm()), rel=1e-12)
