"""What client-level noise does to an update, before anything is paid: sizes, ratios, who is enough.

Every design sends a message whose norm is at most that of the clipped update, so that the noise of
one number is sigma = noise * clip / clients in all of them; they differ in how many numbers there
are to be noised, and in what the message can say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlora.sums import EXTRA


@dataclass(frozen=True)
class Prediction:
    """A design on one layer: all in units of the clip, for the mean over the clients.

    `noise` bounds the expected spectral norm of the noise in the new increment, `threshold` the
    size below which a direction drowns in it, `signal` what a layer can have at most: its even
    share of the clip, all of it in one direction, all clients agreeing.
    """

    design: str
    shape: tuple[int, int]
    noise: float
    threshold: float
    signal: float

    @property
    def ratio(self) -> float:
        """Noise over signal; above 1 the update drowns even in the best of cases."""
        return self.noise / self.signal


def predict(
    design: str, shapes: Mapping[str, tuple[int, int]], rank: int, noise: float, clients: int
) -> dict[str, Prediction]:
    """The prediction for each layer (m, n), from `noise` (a multiplier) and the fixed denominator.

    Spectral norms of Gaussian matrices (Davidson and Szarek 2001): sigma (sqrt a + sqrt b) for
    a x b numbers. A direction is found by the SVD above sigma (m n)^(1/4) (Benaych-Georges and
    Nadakuditi 2012). Two messages share the budget: noise is sqrt 2 larger in each, which `noise`
    has in it already.
    """
    sigma, even = noise / clients, 1 / math.sqrt(max(len(shapes), 1))
    found = {}
    for name, shape in shapes.items():
        # the core's columns are random from the first round on: they see so much of an update
        seen = math.sqrt(min(rank, *shape) / shape[0]) if design == "core" else 1.0
        noised = sigma * spectral(design, shape, rank)
        found[name] = Prediction(
            design, shape, noised, sigma * _threshold(design, shape, rank), even * seen
        )
    return found


def spectral(design: str, shape: tuple[int, int], rank: int) -> float:
    """A bound of the expected spectral norm of the noise in the increment, for sigma = 1."""
    a, b = noised_shape(design, shape, rank)
    return math.sqrt(a) + math.sqrt(b)


def noised_shape(design: str, shape: tuple[int, int], rank: int) -> tuple[int, int]:
    """The shape of the noised message that the increment is made of: the last one."""
    m, n = shape
    r = min(rank, m, n)
    if design == "increment":
        return m, n
    if design == "rows":
        return m, r
    if design == "core":
        return r, r
    return (r if design == "power" else min(r + EXTRA, m, n)), n


def clients_needed(predictions: Sequence[Prediction], clients: int) -> int:
    """How many clients would bring the largest ratio to 1."""
    return math.ceil(clients * max(one.ratio for one in predictions))


def _threshold(design: str, shape: tuple[int, int], rank: int) -> float:
    a, b = noised_shape(design, shape, rank)
    return math.sqrt(math.sqrt(a * b))
