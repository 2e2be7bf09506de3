"""Named random streams: pinned, apart from each other, and apart from every global generator."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
import torch

from fedlora.seeding import derive, generator, numpy_generator


def test_a_stream_is_the_head_of_sha256_over_seed_and_typed_names() -> None:
    text = b"0\x1fstr:client\x1fstr:a\x1fint:3"
    want = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
    assert derive(0, "client", "a", 3) == want


def test_streams_are_pinned_for_ever() -> None:
    """A change here changes every published run: it is a breaking change, never a refactoring."""
    assert derive(0) == 3456079177858693020
    assert derive(7, "client", "hospital-a", 2) == 1688790580845167370
    assert numpy_generator(0, "sample", 1).permutation(8).tolist() == [0, 6, 5, 7, 2, 1, 4, 3]
    assert torch.randint(1000, (4,), generator=generator(0, "init")).tolist() == [100, 38, 960, 782]


def test_a_seed_fits_63_bits_so_that_torch_and_numpy_take_it() -> None:
    assert all(0 <= derive(seed, "x") < 2**63 for seed in range(200))
    assert max(derive(seed, "x") for seed in range(200)) > 2**61


def test_names_of_different_types_order_or_cut_name_different_streams() -> None:
    names: list[tuple[str | int, ...]] = [
        (), ("1",), (1,), ("a", "b"), ("b", "a"), ("ab",), ("a", "b", ""), ("", "a", "b"),
        ("a", 11), ("a", 1, 1), ("a1", 1), ("client", "a", 12), ("client", "a1", 2), ("-1",), (-1,),
    ]  # fmt: skip
    for left, right in itertools.combinations(names, 2):
        assert derive(0, *left) != derive(0, *right), (left, right)


def test_no_name_can_pass_for_two() -> None:
    """Client ids are the user's text: one with the separator inside must not share a stream."""
    assert derive(0, "a\x1fstr:b") != derive(0, "a", "b")


def test_numpys_own_text_and_integers_name_the_same_stream_as_pythons() -> None:
    """Ids come out of NumPy arrays as numpy.str_: the same client must keep its stream."""
    assert derive(0, np.str_("a")) == derive(0, "a")


def test_the_seed_is_no_name() -> None:
    assert derive(1, 2) != derive(12)
    assert derive(0, "a") != derive(1, "a")


@pytest.mark.parametrize("make", [generator, numpy_generator])
def test_the_same_names_give_the_same_stream_and_others_another(make) -> None:  # type: ignore[no-untyped-def]
    def draws(*names: str | int) -> list[float]:
        stream = make(3, *names)
        if isinstance(stream, torch.Generator):
            return torch.rand(5, generator=stream).tolist()
        return stream.random(5).tolist()

    assert draws("client", "a", 1) == draws("client", "a", 1)
    assert draws("client", "a", 1) != draws("client", "a", 2)
    assert draws("client", "a", 1) != draws("client", "b", 1)


def test_streams_neither_read_nor_move_the_global_generators() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = torch.rand(3, generator=generator(0, "x"))
    torch.rand(3, generator=generator(0, "y"))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3, generator=generator(0, "x")), first)
