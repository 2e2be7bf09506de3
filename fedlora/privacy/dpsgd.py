"""DP-SGD on a client: per-example gradients by Opacus, clipped, summed, noised; the border to it.

Abadi et al. 2016 (1607.00133): Poisson batches, sum of gradients clipped to C, plus N(0, (sigma
C)^2), over the expected batch. What the optimiser and the server make of it is post-processing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.partition import Rows
from fedlora.privacy.noise import gaussian, uniform


def poisson_batch(rows: Rows, rate: float) -> Rows:
    """Each row by itself with probability `rate`; empty now and then. Drawn by the system."""
    return rows[uniform(len(rows)) < rate]


@dataclass(eq=False)
class PrivateSteps:
    """The gradients of one round's steps made private; `clipped` of `seen` examples were cut.

    Norms and sums are float64: a batch's sum moves by at most `clip` (1 + 1e-12) when an example is
    added or removed. A gradient that is not finite counts as zero, so that an odd example can
    neither break the bound nor show itself by a crash.
    """

    module: nn.Module
    parameters: Mapping[str, nn.Parameter]
    clip: float
    noise: float
    expected: float
    start: Mapping[str, Tensor]
    seen: int = 0
    clipped: int = 0
    steps: int = field(default=0)

    def finish(self, examples: int) -> None:
        """Turns the per-example gradients of the batch into private ones in `.grad`.

        RuntimeError where a parameter has none: its training would not be private. The batch may be
        empty: its noise is drawn all the same.
        """
        total = self._clipped_sum(examples)
        noise = self.noise * self.clip
        for name, parameter in self.parameters.items():
            drawn = torch.from_numpy(gaussian(parameter.numel())).view_as(parameter)
            noised = total[name] + noise * drawn.to(parameter.device, torch.float64)
            parameter.grad = (noised / self.expected).to(parameter.dtype)
            parameter.grad_sample = None  # type: ignore[attr-defined]
        self.steps += 1

    def check(self) -> None:
        """RuntimeError unless noise reached every trained tensor: no epsilon is reported then."""
        still = [n for n, p in self.parameters.items() if torch.equal(p.detach(), self.start[n])]
        if self.steps and still:
            raise RuntimeError(
                f"{still[0]} did not move in {self.steps} private steps ({len(still)} tensors): "
                "what was trained is not what the accountant was told, no epsilon is reported"
            )

    def _clipped_sum(self, examples: int) -> dict[str, Tensor]:
        """The sum over the batch of the gradients, each cut to the norm `clip` over all tensors."""
        if examples == 0:
            return {n: torch.zeros_like(p, dtype=torch.float64) for n, p in self.parameters.items()}
        each = {name: self._per_example(name, examples) for name in self.parameters}
        squares = torch.stack([g.flatten(1).square().sum(dim=1) for g in each.values()]).sum(dim=0)
        finite = torch.isfinite(squares)
        norms = squares.sqrt()
        factors = torch.where(finite, (self.clip / norms.clamp(min=self.clip)), 0.0)
        self.seen += examples
        self.clipped += int((~finite | (norms > self.clip)).sum())
        kept = {name: torch.where(_over(finite, g), g, 0.0) for name, g in each.items()}
        return {name: torch.einsum("i,i...->...", factors, g) for name, g in kept.items()}

    def _per_example(self, name: str, examples: int) -> Tensor:
        found = getattr(self.parameters[name], "grad_sample", None)
        if isinstance(found, list):
            found = torch.cat(found) if found else None
        if found is None or len(found) != examples:
            raise RuntimeError(
                f"{name} has {0 if found is None else len(found)} per-example gradients for "
                f"{examples} examples: Opacus does not know its layer; freeze it, or train without "
                "privacy"
            )
        return found.to(torch.float64)


@contextmanager
def private_steps(
    network: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    *,
    clip: float,
    noise: float,
    expected: float,
) -> Iterator[PrivateSteps]:
    """Wraps the network while a client trains, so that `parameters` get per-example gradients.

    `noise` is its standard deviation over `clip`, `expected` the expected batch. Use `.module` for
    the forward pass and sum the loss over the batch, one term an example.
    """
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # full backward hooks on inputs without gradients
        wrapped = _opacus().GradSampleModule(network, loss_reduction="sum", strict=False)
        try:
            yield PrivateSteps(wrapped, parameters, clip, noise, expected, start)
        finally:
            wrapped.to_standard_module()
            for parameter in parameters.values():
                parameter.grad_sample = None  # type: ignore[attr-defined]


def _over(mask: Tensor, each: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (each.ndim - 1))


def _opacus() -> Any:
    try:
        return import_module("opacus")
    except ImportError as error:
        raise ValueError(
            "example-level privacy needs Opacus: pip install 'fedlora[privacy]'"
        ) from error
