"""What mechanisms cost and how much noise a budget asks for: the border to dp-accounting.

Everything is for neighbours by adding or removing one unit (an example, or a client).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from typing import Any, Literal, TypeAlias

Accountant: TypeAlias = Literal["pld", "rdp"]
CLOSE = 1e-3  # the noise found for a budget spends at least 1 - CLOSE of it
FINE, COARSE = 1e-4, 1e-3  # steps of the grid of losses: as the library's own, and to search on
Spent: TypeAlias = tuple[tuple[float, float, int], ...]  # (noise, sampling, steps) of each


@dataclass(frozen=True, order=True)
class Mechanism:
    """Gaussian noise on a sum: `noise` is its standard deviation over the sum's sensitivity.

    `sampling` is the rate at which each step draws each unit by itself (Poisson; 1: all of them),
    `steps` how often this is done.
    """

    noise: float
    steps: int = 1
    sampling: float = 1.0


def epsilon(spent: Iterable[Mechanism], delta: float, accountant: Accountant = "pld") -> float:
    """The epsilon at `delta` of all mechanisms together, an upper bound; infinite without noise.

    `pld` composes privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022), `rdp`
    Renyi divergences (Mironov 2017), which is faster and never much better.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1, got {delta}")
    steps: Counter[tuple[float, float]] = Counter()
    for one in spent:
        steps[one.noise, one.sampling] += one.steps
    return _epsilon(tuple(sorted((n, q, t) for (n, q), t in steps.items() if t)), delta, accountant)


@lru_cache(maxsize=4096)
def noise_for(
    epsilon: float, delta: float, steps: int, sampling: float = 1.0, accountant: Accountant = "pld"
) -> float:
    """Noise that spends the budget in `steps` to within 0.1 %, and never more than it.

    ValueError for a budget that no noise keeps.
    """
    if not (epsilon > 0 and 0 < delta < 1 and 0 < sampling <= 1 and steps > 0):
        raise ValueError(
            f"epsilon {epsilon}, delta {delta}, sampling rate {sampling} and steps {steps} must be "
            "above 0, delta below 1, the rate at most 1"
        )

    def spends(noise: float, grid: float = FINE) -> float:
        return _epsilon(((noise, sampling, steps),), delta, accountant, grid)

    start = _rough_noise(epsilon, delta, steps, sampling)
    if accountant == "pld":  # a tenth of the time, and mostly the answer
        start = _search(partial(spends, grid=COARSE), epsilon, start) or start
    noise = _search(spends, epsilon, start)
    if noise is not None:
        return noise
    raise ValueError(
        f"no noise was found that keeps epsilon {epsilon} at delta {delta} over {steps} steps: "
        "take a larger epsilon or delta, fewer rounds or steps, or privacy.accountant = 'rdp'"
    )


def _search(spends: Callable[[float], float], epsilon: float, noise: float) -> float | None:
    """The noise that spends all of epsilon but CLOSE, by secants from `noise` on; None if lost."""
    spent, slope = spends(noise), -1.5  # of log epsilon over log noise, for a start
    for _ in range(50):
        if epsilon * (1 - CLOSE) <= spent <= epsilon:
            return noise
        last, cost = noise, spent
        noise *= _factor(epsilon * (1 - CLOSE / 2) / spent if spent else math.inf, slope)
        spent = spends(noise)
        told = 0 < spent < math.inf and 0 < cost < math.inf
        if told and not math.isclose(noise, last, rel_tol=1e-9):
            slope = min(-0.1, math.log(spent / cost) / math.log(noise / last))
    return None


def _factor(short: float, slope: float) -> float:
    """What to multiply the noise by, to spend `short` times as much: a quarter to four times.

    0 is of an infinite epsilon: the accountant cannot tell losses so unlikely from delta.
    """
    return min(4.0, max(0.25, short ** (1 / slope))) if short else 4.0


def _rough_noise(epsilon: float, delta: float, steps: int, sampling: float) -> float:
    """Where to look for the noise: by Renyi divergence, which takes milliseconds."""
    noise = 1.0
    while _epsilon(((noise, sampling, steps),), delta, "rdp") > epsilon and noise < 1e9:
        noise *= 1.5
    while _epsilon(((noise / 1.1, sampling, steps),), delta, "rdp") <= epsilon and noise > 1e-3:
        noise /= 1.1
    return noise


@lru_cache(maxsize=4096)
def _epsilon(spent: Spent, delta: float, accountant: Accountant, grid: float = FINE) -> float:
    if not spent:
        return 0.0
    if any(noise <= 0 for noise, _, _ in spent):
        return math.inf
    return _by_losses(spent, delta, grid) if accountant == "pld" else _by_renyi(spent, delta)


def _by_renyi(spent: Spent, delta: float) -> float:
    library = _library()
    keeper = _library("rdp").RdpAccountant()
    for noise, sampling, steps in spent:
        event = library.GaussianDpEvent(noise)
        if sampling < 1:
            event = library.PoissonSampledDpEvent(sampling, event)
        keeper.compose(library.SelfComposedDpEvent(event, steps))
    return float(keeper.get_epsilon(delta))


def _by_losses(spent: Spent, delta: float, grid: float) -> float:
    """As the library's PLDAccountant, but for making what a step loses once and not each time."""
    losses = _library("pld.privacy_loss_distribution")
    total = losses.identity(value_discretization_interval=grid)
    for noise, sampling, steps in spent:
        if sampling < 1:
            total = total.compose(_step_losses(noise, sampling, grid).self_compose(steps))
        else:  # Gaussians add up to one
            total = total.compose(_step_losses(noise / math.sqrt(steps), 1.0, grid))
    return float(total.get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)  # of some MB each
def _step_losses(noise: float, sampling: float, grid: float) -> Any:
    """The privacy loss distribution of one step on a grid of this width, rounded upwards."""
    return _library("pld.privacy_loss_distribution").from_gaussian_mechanism(
        noise, value_discretization_interval=grid, sampling_prob=sampling
    )


def _library(part: str = "") -> Any:
    """dp-accounting or a module of it, without warnings about orders that it leaves out."""
    try:
        library = import_module(f"dp_accounting.{part}" if part else "dp_accounting")
    except ImportError as error:
        raise ValueError("privacy needs its accountant: pip install 'fedlora[privacy]'") from error
    logging.getLogger("absl").setLevel(logging.ERROR)
    return library
