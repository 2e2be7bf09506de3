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

    Of the message whose noise is the largest beside what it sees: `noise` bounds the expected
    spectral norm of its noise, `threshold` is the size below which a direction drowns in it,
    `signal` what the message can see of a layer's even share of the clip, taken as one direction
    on which all clients agree.
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
        messages = [
            Prediction(
                design, shape, sigma * (math.sqrt(a) + math.sqrt(b)),
                sigma * math.sqrt(math.sqrt(a * b)), even * seen,
            ) for a, b, seen in _messages(design, shape, rank)
        ]  # fmt: skip
        found[name] = max(messages, key=lambda one: one.ratio)
    return found


def spectral(design: str, shape: tuple[int, int], rank: int) -> float:
    """A bound of the expected spectral norm of the noise in the increment, for sigma = 1."""
    a, b = noised_shape(design, shape, rank)
    return math.sqrt(a) + math.sqrt(b)


def noised_shape(design: str, shape: tuple[int, int], rank: int) -> tuple[int, int]:
    """The shape of the noised message that the increment is made of: the last one."""
    a, b, _ = _messages(design, shape, rank)[-1]
    return a, b


def _messages(design: str, shape: tuple[int, int], rank: int) -> list[tuple[int, int, float]]:
    """The shape of every message that is noised, and how much of an update's norm it can see.

    The last A's rows, in which clients begin, are taken to see all of it. Random columns see what
    their number allows: the core's before B has any, and those of the sketch in each round.
    """
    m, n = shape
    r, c = min(rank, m, n), min(rank + EXTRA, m, n)
    return {
        "increment": [(m, n, 1.0)],
        "rows": [(m, r, 1.0)],
        "core": [(r, r, math.sqrt(r / m))],
        "power": [(m, r, 1.0), (r, n, 1.0)],
        "sketch": [(m, c, math.sqrt(c / n)), (c, n, 1.0)],
    }[design]


def clients_needed(predictions: Sequence[Prediction], clients: int) -> int:
    """How many clients would bring the largest ratio to 1."""
    return math.ceil(clients * max(one.ratio for one in predictions))
