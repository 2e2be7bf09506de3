"""Helpers shared by the tests: random factors, the dense float64 oracle, toy adapters, real text.

The oracle knows nothing of the library's own algebra: it multiplies out.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor

import fedlora.rules as registry
from fedlora.adapter import Adapter, ClientResult, Factors, Merged
from fedlora.own_rules import import_rule
from fedlora.privacy import noise

torch.set_num_threads(1)
pytest.register_assert_rewrite("laws")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rule", action="append", default=[], metavar="FILE.py:NAME",
        help="hold a rule of your own to the laws as well (tests/test_conformance.py)",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    for reference in config.getoption("--rule"):
        try:
            import_rule(reference)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are processors: slow tests wait for processes of their own mostly."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In processes side by side each file is of one; those with a deployment, which mostly wait
    for its processes, come first and one after another.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    deployed = {item.path for item in items if "deployment" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in deployed)
    for item in items:
        name = "deployments" if item.path in deployed else item.path.stem
        item.add_marker(pytest.mark.xdist_group(name))


@pytest.fixture(autouse=True)
def settled_noise(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise for privacy from the test's name, so that a test of its size always or never passes.

    Tests marked `real_noise` draw from the operating system, as users do.
    """
    if request.node.get_closest_marker("real_noise"):
        return
    source = np.random.default_rng(zlib.crc32(request.node.name.encode()))
    monkeypatch.setattr(
        noise, "_bits", lambda count: source.integers(2**53, size=count, dtype=np.uint64)
    )


@pytest.fixture
def data_folder() -> Path:
    """The folder of real text; tests that need it are skipped where FEDLORA_DATA is unset."""
    folder = os.environ.get("FEDLORA_DATA")
    if not folder:
        pytest.skip("FEDLORA_DATA is unset: it names the folder of real text")
    return Path(folder)


@pytest.fixture
def no_trace() -> Iterator[None]:
    """Takes rules out again that a test registers."""
    names = set(registry._RULES)
    yield
    for name in set(registry._RULES) - names:
        del registry._RULES[name]


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Without the tests' shape checks, which would refuse a wrong shape before the library does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_factors(
    seed: int, m: int = 7, n: int = 5, r: int = 3, scaling: float = 2.0, scale: float = 1.0
) -> Factors:
    """Factors of a non-square layer, float64; `scale` is put on B."""
    return Factors(normal(seed, r, n), normal(seed + 10_000, m, r) * scale, scaling)


def orthogonal(seed: int, size: int) -> Tensor:
    return torch.linalg.qr(normal(seed, size, size))[0]


def dense(factors: Factors) -> Tensor:
    """scaling * B A multiplied out in float64."""
    return factors.scaling * (factors.B.double() @ factors.A.double())


def dense_mean(clients: Iterable[Factors], weights: Iterable[float] | Tensor) -> Tensor:
    """sum_k w_k s_k B_k A_k multiplied out in float64: the only oracle of a merge."""
    terms = [float(w) * dense(client) for w, client in zip(weights, clients, strict=True)]
    return torch.stack(terms).sum(dim=0)


def nearest_of_rank(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank, from NumPy's SVD of the dense matrix."""
    U, S, Vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    return torch.from_numpy((U[:, :rank] * S[:rank]) @ Vh[:rank])


def merged_factors(answer: Factors | Merged) -> Factors:
    return answer.factors if isinstance(answer, Merged) else answer


def merged_whole(answer: Factors | Merged) -> Tensor:
    """Adapter + residual, multiplied out."""
    if isinstance(answer, Factors):
        return dense(answer)
    assert answer.residual.shape == answer.factors.shape, "the residual has another shape"
    return dense(answer.factors) + dense(answer.residual)


def assert_near(got: Tensor, want: Tensor, relative: float = 1e-12) -> None:
    """||got - want|| <= relative * ||want||, in Frobenius norm; an exact zero wants a zero."""
    assert got.shape == want.shape, f"{tuple(got.shape)} is not {tuple(want.shape)}"
    scale = float(want.abs().max())
    if scale == 0:
        assert not bool(got.any()), "a zero was expected"
        return
    error = float(((got - want) / scale).norm() / (want / scale).norm())
    assert error <= relative, f"relative error {error:.2e} is above {relative:.0e}"


def same_bits(left: Factors, right: Factors) -> bool:
    return (
        torch.equal(left.A, right.A)
        and torch.equal(left.B, right.B)
        and left.A.dtype == right.A.dtype
        and left.scaling == right.scaling
    )


def same_adapters(left: Adapter, right: Adapter) -> bool:
    """Equal names, bits and dtypes throughout."""
    return (
        list(left.layers) == list(right.layers)
        and list(left.dense) == list(right.dense)
        and all(same_bits(left.layers[name], right.layers[name]) for name in left.layers)
        and all(torch.equal(left.dense[name], right.dense[name]) for name in left.dense)
        and all(left.dense[name].dtype == right.dense[name].dtype for name in left.dense)
    )


def random_adapter(seed: int, r: int = 2, scaling: float = 4.0) -> Adapter:
    """Two non-square layers and a head, float32, as they travel."""
    return Adapter(
        {
            "block.query": Factors(
                normal(seed, r, 5, dtype=torch.float32),
                normal(seed + 1, 7, r, dtype=torch.float32),
                scaling,
            ),
            "block.value": Factors(
                normal(seed + 2, r, 6, dtype=torch.float32),
                normal(seed + 3, 4, r, dtype=torch.float32),
                scaling,
            ),
        },
        {
            "head.bias": normal(seed + 4, 3, dtype=torch.float32),
            "head.weight": normal(seed + 5, 3, 6, dtype=torch.float32),
        },
    )


def random_results(seed: int, examples: Sequence[int] = (10, 30, 60)) -> list[ClientResult]:
    """One result per count of examples, from the clients c0, c1, ..."""
    return [
        ClientResult(f"c{index}", random_adapter(seed + 100 * index), count)
        for index, count in enumerate(examples)
    ]
