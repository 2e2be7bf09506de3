"""DP-SGD on a client: per-example gradients by Opacus, clipped, summed, noised; the border to it.

Abadi et al. 2016 (1607.00133): Poisson batches, sum of gradients clipped to C, plus N(0, (sigma
C)^2), over the expected batch. What the optimiser and the server make of it is post-processing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
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
    """The gradients of one round's steps made private.

    A step's batch may come in pieces (`begin`, forward, backward, for each), so that no more than
    one piece's gradients are held; `finish` ends the step.
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
    steps: int = 0
    examples: int = 0  # of the piece that is on its way
    total: dict[str, Tensor] = field(default_factory=dict)  # clipped sums of the pieces before it

    def begin(self, examples: int) -> None:
        """To be called before the forward pass of a piece, with the number of examples in it."""
        self._add()
        self.examples = examples

    def rehearse(self) -> None:
        """Throws the gradients of a batch away, if every parameter got one for each example.

        Before anything is charged: ValueError as in `finish`.
        """
        for name in self.parameters:
            self._per_example(name)
        self._forget()
        self.total = {}

    def finish(self) -> None:
        """Turns the per-example gradients of the batch into private ones in `.grad`.

        ValueError where a parameter has none: its training would not be private. The batch may be
        empty: its noise is drawn all the same.
        """
        self._add()
        total, self.total = self.total or self._zeros(), {}
        noise = self.noise * self.clip
        for name, parameter in self.parameters.items():
            drawn = torch.from_numpy(gaussian(parameter.numel())).view(parameter.shape)
            noised = total[name] + noise * drawn.to(total[name].device)
            parameter.grad = (noised / self.expected).to(parameter.dtype).to(parameter.device)
        self.steps += 1

    def check(self) -> None:
        """ValueError unless noise reached every trained tensor: no epsilon is reported then."""
        still = [n for n, p in self.parameters.items() if torch.equal(p.detach(), self.start[n])]
        if self.steps and still:
            raise ValueError(
                f"{still[0]} did not move in {self.steps} private steps ({len(still)} tensors): "
                "what was trained is not what the accountant was told, no epsilon is reported; "
                "leave it out of model.targets, or take a larger client.lr"
            )

    def _forget(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]
        self.examples = 0

    def _add(self) -> None:
        """Adds the piece that is on its way, if it has examples, and forgets their gradients."""
        if self.examples:
            total, piece = self.total or self._zeros(), self._clipped_sum()
            self.total = {name: total[name] + own for name, own in piece.items()}
            self._forget()

    def _zeros(self) -> dict[str, Tensor]:
        return {
            name: torch.zeros(parameter.shape, dtype=torch.float64, device=_exact(parameter))
            for name, parameter in self.parameters.items()
        }

    def _clipped_sum(self) -> dict[str, Tensor]:
        """The sum over a piece of the gradients, each cut to the norm `clip` over all tensors."""
        each = {name: self._per_example(name) for name in self.parameters}
        squares = torch.stack([g.flatten(1).square().sum(dim=1) for g in each.values()]).sum(dim=0)
        finite = torch.isfinite(squares)
        norms = squares.sqrt()
        factors = torch.where(finite, (self.clip / norms.clamp(min=self.clip)), 0.0)
        for gradient in each.values():
            gradient[~finite] = 0.0
        return {name: torch.einsum("i,i...->...", factors, g) for name, g in each.items()}

    def _per_example(self, name: str) -> Tensor:
        """The parameter's gradients, one an example, in float64."""
        found = getattr(self.parameters[name], "grad_sample", None)
        if isinstance(found, list):
            found = torch.cat(found) if found else None
        if found is None or len(found) != self.examples:
            raise ValueError(
                f"{name} has {0 if found is None else len(found)} per-example gradients for "
                f"{self.examples} examples: Opacus does not know its layer; leave it out of "
                "model.targets, or train without privacy"
            )
        exact: Tensor = found.to(_exact(found)).to(torch.float64)
        return exact


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
        opacus = _opacus()
        _clear(network)  # of a batch that ended half-way
        wrapped = opacus.GradSampleModule(network, loss_reduction="sum", strict=False)
        steps = PrivateSteps(wrapped, parameters, clip, noise, expected, start)
        own = {id(parameter) for parameter in parameters.values()}
        hooks = [
            module.register_forward_pre_hook(partial(_one_row_an_example, steps, name))
            for name, module in network.named_modules()
            if any(id(parameter) in own for parameter in module.parameters(recurse=False))
        ]
        try:
            yield steps
        finally:
            for hook in hooks:
                hook.remove()
            wrapped.to_standard_module()
            _clear(network)


def _one_row_an_example(
    steps: PrivateSteps, name: str, module: nn.Module, inputs: tuple[Any, ...]
) -> None:
    """ValueError for a layer that sees something else than one row an example.

    What all examples share (positions, say) gets a gradient of the whole batch, which would be
    taken for that of its first example.
    """
    rows = [part.shape[0] for part in inputs if isinstance(part, Tensor)]
    if torch.is_grad_enabled() and any(count != steps.examples for count in rows):
        raise ValueError(
            f"layer {name} sees {rows[0]} rows for {steps.examples} examples: its gradients cannot "
            "be told apart; leave it out of model.targets, or train without privacy"
        )


def _clear(network: nn.Module) -> None:
    """Forgets what Opacus noted of batches."""
    for module in network.modules():
        for name in ("activations", "max_batch_len"):
            if name in vars(module):
                delattr(module, name)
    for parameter in network.parameters():
        for name in ("_current_grad_sample", "grad_sample", "summed_grad"):
            if name in vars(parameter):
                delattr(parameter, name)


def _exact(tensor: Tensor) -> torch.device:
    """Where float64 sums are made: in place, but for devices that have no float64."""
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device


def _opacus() -> Any:
    try:
        return import_module("opacus")
    except ImportError as error:
        raise ValueError(
            "example-level privacy needs Opacus: pip install 'fedlora[privacy]'"
        ) from error
