"""Errors whose words may be read by others than the one on whose machine they were raised."""

from __future__ import annotations


class PublicError(ValueError):
    """A refusal whose text holds no row, no file's name and no figure of private data.

    A node sends these texts to its server, and those of no other error.
    """


def is_memory(error: BaseException) -> bool:
    """Whether memory ran out; on CPUs torch has no type of its own for it."""
    named = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return named or isinstance(error, MemoryError)
