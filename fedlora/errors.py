"""Errors whose words may be read by others than the one on whose machine they were raised."""

from __future__ import annotations


class PublicError(ValueError):
    """A refusal whose text holds no row, no file's name and no figure of private data.

    A node sends these texts to its server, and those of no other error.
    """
