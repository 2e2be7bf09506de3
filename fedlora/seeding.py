"""Named random streams: one seed, every consumer its own stream, none of them global.

Adding a consumer never shifts another's draws. Noise for privacy never comes from here.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream `names`: the head of SHA-256 over seed and names.

    `derive(0, "client", "a", 3)` is the same on every machine and in every Python.
    """
    text = "\x1f".join([str(seed), *(_typed(name) for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _typed(name: str | int) -> str:
    """The name with its type, so that 1 and "1" differ; no name can hold the separator."""
    kind = "str" if isinstance(name, str) else "int"
    return f"{kind}:{name}".replace("\\", "\\\\").replace("\x1f", "\\x1f")


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A torch generator (CPU) for the stream `names`."""
    return torch.Generator().manual_seed(derive(seed, *names))


def numpy_generator(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator (PCG64, stable across versions for integers and permutations)."""
    return np.random.Generator(np.random.PCG64(derive(seed, *names)))
