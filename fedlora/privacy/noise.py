"""Randomness for privacy: from the operating system, never from a user's seed.

A seed that anybody else knows would let them subtract the noise, and tell who was drawn.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray


def uniform(count: int) -> NDArray[np.float64]:
    """`count` independent uniform numbers in [0, 1), multiples of 2^-53."""
    return np.asarray(_bits(count) * 2.0**-53, dtype=np.float64)


def gaussian(count: int) -> NDArray[np.float64]:
    """`count` independent standard normal numbers (Box and Muller 1958), at most 8.6 in size.

    Float64 from 53 random bits each; what is added to it is rounded once, at the end.
    """
    pairs = (count + 1) // 2
    radius = np.sqrt(-2.0 * np.log1p(-uniform(pairs)))
    angle = 2.0 * np.pi * uniform(pairs)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def _bits(count: int) -> NDArray[np.uint64]:
    words = np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
    return words >> np.uint64(11)
