"""Merging finished adapters from disk with any rule, layer by layer: no model, no training.

One layer of all adapters is in memory at a time, and the result is written as it comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fedlora.adapter import (
    Adapter,
    ClientResult,
    Factors,
    Merged,
    converted,
    inner,
    mix,
    rescaled,
    stacked,
)
from fedlora.adapter_folder import AdapterFolder, write_parts
from fedlora.answers import checked_weights
from fedlora.files import new_folder
from fedlora.lowrank import compress, rank_for_energy, singular_values
from fedlora.merge_checks import check_rule, open_all, parsed_rank, parsed_weights
from fedlora.rules import Rule
from fedlora.tensorfile import finite

SMALL = 256  # stacks up to this rank have their spectrum from QR (1e-15), larger from Grams (1e-8)
BLOCK = 1024  # rows of an increment that are multiplied out at a time where its rank is full
PIECE = 2**18  # numbers of a dense tensor that are averaged at a time
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Item = TypeVar("Item")
Watch = Callable[[int, int], None]  # (layers done, layers in all)


@dataclass(frozen=True, eq=False)
class LayerOutcome:
    """What became of one layer.

    `values` are the singular values of the wanted increment, sum w_k dW_k; `energy` is the sum of
    their squares, `missed` that of the difference from what was written.
    """

    name: str
    shape: tuple[int, int]
    ranks: Sequence[int]
    rank: int
    scaling: float
    values: Tensor
    energy: float
    missed: float

    @property
    def kept(self) -> float:
        """The share of the energy that was kept, 1 - ||wanted - written||^2 / ||wanted||^2."""
        return 1 - self.missed / self.energy if self.energy > 0 else 1.0

    def rank_for(self, share: float) -> int:
        """The smallest rank that can hold this share of the layer's energy."""
        return max(1, rank_for_energy(self.values, share))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a merge did: its inputs, each layer, and where it was written (None: nowhere)."""

    adapters: Sequence[AdapterFolder]
    weights: Sequence[float]
    rule: Rule
    layers: Sequence[LayerOutcome]
    dtype: torch.dtype
    folder: Path | None

    @cached_property
    def kept(self) -> float:
        """The share of all layers' energy that was kept."""
        energy = sum(layer.energy for layer in self.layers)
        return 1 - sum(layer.missed for layer in self.layers) / energy if energy > 0 else 1.0

    def rank_for(self, share: float) -> int:
        """The smallest rank that, given to every layer, can hold this share of all energy."""
        longest = max(len(layer.values) for layer in self.layers)
        squares = torch.zeros(longest, dtype=torch.float64)
        for layer in self.layers:
            squares[: len(layer.values)] += layer.values.square()
        return max(1, rank_for_energy(squares.sqrt(), share))

    def worst(self, count: int) -> list[LayerOutcome]:
        """The layers that lost the largest shares of their energy, worst first."""
        return sorted(self.layers, key=lambda layer: (layer.kept, layer.name))[:count]


def merge_folders(
    folders: Sequence[Path | str],
    rule: Rule,
    out: Path | str | None = None,
    *,
    rank: int | str | None = None,
    weights: Sequence[int | float] | None = None,
    dtype: torch.dtype = torch.float32,
    other_base: bool = False,
    finish: Callable[[Path, Outcome], None] | None = None,
    watch: Watch | None = None,
) -> Outcome:
    """Merges adapter folders in PEFT's form into the new folder `out` (None: computes, no writing).

        merge_folders(["a", "b"], get_rule("fra"), "merged", rank=16, weights=[3, 1])

    `rank` is a number for all layers, "auto:0.99" (each layer's smallest that can hold 99 % of its
    energy) or None (the largest that an input has there). `weights` are divided by their sum. Dense
    tensors (heads) are averaged in float64. A residual is stacked onto the factors where the rule's
    paper folds it, which makes the result exact and of the summed rank (a wanted `rank` cuts the
    stack to its strongest directions), and else dropped; pairs that are zero are left out. `finish`
    may write further files beside the adapter before the folder gets its name. ValueError names
    adapter, layer and reason, and nothing is written.
    """
    wanted = parsed_rank(rank)
    shares = parsed_weights(weights, len(folders)) if folders else torch.empty(0)
    adapters = open_all(folders, other_base=other_base)
    check_rule(rule, adapters, wanted)
    if out is not None and Path(out).exists():
        raise ValueError(f"{out} exists already; nothing was written: name another folder")
    shares = _reweighed(rule, adapters, shares)
    layers: list[LayerOutcome] = []

    def parts() -> Iterator[tuple[str, Factors | Tensor]]:
        for name in adapters[0].layers:
            factors, outcome = _merge_layer(rule, adapters, name, shares, wanted, dtype)
            layers.append(outcome)
            yield name, factors
            if watch is not None:
                watch(len(layers), len(adapters[0].layers))
        for name in adapters[0].dense:
            yield name, _mean(adapters, name, shares, dtype)

    with ExitStack() as stack:
        folder = stack.enter_context(new_folder(Path(out))) if out is not None else None
        if folder is None:
            for _ in parts():
                pass
        else:
            embeddings = [name for name, entry in adapters[0].layers.items() if entry.embedding]
            write_parts(folder, parts(), _settings(adapters), embeddings=embeddings)
        place = Path(out) if out is not None else None
        outcome = Outcome(adapters, shares.tolist(), rule, layers, dtype, place)
        if folder is not None and finish is not None:
            finish(folder, outcome)
    return outcome


def _merge_layer(
    rule: Rule,
    adapters: Sequence[AdapterFolder],
    name: str,
    weights: Tensor,
    wanted: int | float | None,
    dtype: torch.dtype,
) -> tuple[Factors, LayerOutcome]:
    """One layer merged, in the dtype in which it is written, and what became of it."""
    clients = [converted(adapter.factors(name), torch.float64, "cpu") for adapter in adapters]
    m, n = clients[0].shape
    scalings = {client.scaling for client in clients}
    scaling = scalings.pop() if len(scalings) == 1 else 1.0
    mixed = mix(clients, weights, scaling)
    values = _spectrum(mixed)
    if isinstance(wanted, float):
        rank = max(1, rank_for_energy(values, wanted))
    else:
        rank = wanted or min(m, n, max(client.rank for client in clients))
    prev = Factors(mixed.A.new_zeros(rank, n), mixed.B.new_zeros(m, rank), scaling)
    most = min(m, n, mixed.rank) if wanted is None else rank  # no more pairs than directions
    factors = _whole(rule, rule.combine(prev, clients, weights, 1, name), most)
    if wanted is not None and factors.rank > rank:
        raise ValueError(
            f"rule {rule.name!r} gives layer {name!r} rank {factors.rank}, not {rank}: it does not "
            "cut; leave --rank out or take a rule that does (fra)"
        )
    written = _nonzero(converted(rescaled(factors, scaling), dtype, "cpu"))
    for before, after in ((factors.A, written.A), (factors.B, written.B)):
        _check_range(before, after, f"layer {name!r}")
    precise = converted(written, torch.float64, "cpu")
    energy = float(values.square().sum())
    missed = energy - 2 * inner(mixed, precise) + inner(precise, precise)
    ranks = [client.rank for client in clients]
    return written, LayerOutcome(
        name, (m, n), ranks, written.rank, scaling, values, energy, max(0.0, missed)
    )


def _whole(rule: Rule, answer: Factors | Merged, most: int) -> Factors:
    """What a rule gives, with what its paper folds stacked on top: in at most `most` pairs then."""
    if not isinstance(answer, Merged):
        return _nonzero(answer)
    if not rule.residual or rule.residual[0] != "fold":
        return _nonzero(answer.factors)
    factors = _nonzero(stacked(answer.factors, answer.residual))
    return factors if factors.rank <= most else _nonzero(compress(factors, most).factors)


def _spectrum(factors: Factors) -> Tensor:
    """The singular values of the increment in falling order, without those that are rounding.

    By QR for small ranks; else from the smaller one of the R x R core and the increment's own Gram
    matrix, whose rows are multiplied out in blocks: O(min(R, m, n)^2 (m + n)), values below 1e-8 of
    the largest are lost.
    """
    m, n = factors.shape
    if factors.rank <= min(SMALL, m, n):
        return singular_values(factors)
    unit = rescaled(factors, 1.0)
    length = unit.B.norm(dim=0)
    length = torch.where(length > 0, length, 1.0)
    B, A = unit.B / length, unit.A * length[:, None]
    if unit.rank < min(m, n):
        gram = _gram(B.mT)
        L, failed = torch.linalg.cholesky_ex(gram)
        if bool(failed):
            squares, vectors = torch.linalg.eigh(gram)
            L = vectors * squares.clamp(min=0).sqrt()
        core = L.mT @ _gram(A) @ L
    else:
        left, right = (B, A) if m >= n else (A.mT, B.mT)
        core = left.new_zeros(min(m, n), min(m, n))
        for start in range(0, max(m, n), BLOCK):
            rows = left[start : start + BLOCK] @ right
            core += _gram(rows.mT)
    values: Tensor = torch.linalg.eigvalsh(core).flip(0).clamp(min=0).sqrt()
    found: Tensor = values[values > 1e-8 * values[0]]
    return found


def _gram(rows: Tensor) -> Tensor:
    """rows @ rows^T by NumPy, which knows that it is symmetric and takes half the time."""
    array = rows.numpy()
    return torch.from_numpy(array @ array.T)


def _nonzero(factors: Factors) -> Factors:
    """The same increment without its zero pairs; a zero increment keeps one."""
    kept = (factors.A != 0).any(dim=1) & (factors.B != 0).any(dim=0)
    if not bool(kept.any()):
        (m, n), A, B = factors.shape, factors.A, factors.B
        return Factors(A.new_zeros(1, n), B.new_zeros(m, 1), factors.scaling)
    return Factors(factors.A[kept], factors.B[:, kept], factors.scaling)


def _mean(
    adapters: Sequence[AdapterFolder], name: str, weights: Tensor, dtype: torch.dtype
) -> Tensor:
    """The weighted mean of a dense tensor; whole numbers must be equal and stay (ValueError)."""
    entry = adapters[0].dense[name]
    if entry.dtype.is_floating_point:
        mean = torch.empty(math.prod(entry.shape), dtype=dtype)
        for start in range(0, len(mean), PIECE):
            piece = mean[start : start + PIECE]
            total = torch.zeros(len(piece), dtype=torch.float64)
            for weight, adapter in zip(weights, adapters, strict=True):
                total += weight * adapter.numbers(name, start, start + len(piece)).double()
            _check_range(total, piece.copy_(total), f"tensor {name!r}")
        return mean.reshape(entry.shape)
    first = adapters[0].tensor(name)
    for adapter in adapters[1:]:
        if not torch.equal(adapter.tensor(name), first):
            raise ValueError(
                f"{adapter.folder}: tensor {name!r} holds other whole numbers than in "
                f"{adapters[0].folder}: they have no mean"
            )
    return first


def _check_range(exact: Tensor, written: Tensor, place: str) -> None:
    """ValueError where numbers became infinite in the dtype in which they are to be written."""
    if not finite(written):
        raise ValueError(
            f"{place} has numbers up to {float(exact.abs().max()):.3g}, beyond {written.dtype}: it "
            "is not written; take the dtype bfloat16 or float32"
        )


def _settings(adapters: Sequence[AdapterFolder]) -> dict[str, object]:
    """The first adapter's settings; rsLoRA only where all have it."""
    rslora = all(adapter.settings.get("use_rslora", False) for adapter in adapters)
    return {**adapters[0].settings, "use_rslora": rslora}


@dataclass(frozen=True, eq=False)
class _Lazy(Mapping[str, Item], Generic[Item]):
    """Named things that are read when they are asked for, and not kept."""

    names: Sequence[str]
    read: Callable[[str], Item]

    def __getitem__(self, name: str) -> Item:
        if name not in self.names:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _reweighed(rule: Rule, adapters: Sequence[AdapterFolder], weights: Tensor) -> Tensor:
    """The weights as the rule's `reweigh` wants them, as if each adapter had started from zero."""
    if rule.reweigh is None:
        return weights
    sent: list[Adapter] = []
    results: list[ClientResult] = []
    for index, adapter in enumerate(adapters):
        layers, dense = list(adapter.layers), list(adapter.dense)
        sent.append(
            Adapter(
                _Lazy(layers, partial(_zero_factors, adapter)),
                _Lazy(dense, partial(_zero_tensor, adapter)),
            )
        )
        whole = Adapter(_Lazy(layers, adapter.factors), _Lazy(dense, adapter.tensor))
        results.append(ClientResult(f"{index:06d}", whole, 1))
    return checked_weights(rule.reweigh(sent, results, weights), len(adapters))


def _zero_factors(adapter: AdapterFolder, layer: str) -> Factors:
    entry = adapter.layers[layer]
    m, n = entry.shape
    return Factors(torch.zeros(entry.rank, n), torch.zeros(m, entry.rank), entry.scaling)


def _zero_tensor(adapter: AdapterFolder, name: str) -> Tensor:
    return torch.zeros_like(adapter.tensor(name))
