"""Counts in words, for what people read."""

from __future__ import annotations


def counted(n: int, noun: str) -> str:
    """Return a number of things in words.

    Examples
    --------
    >>> counted(1, "segment"), counted(12345, "row")
    ('1 segment', '12,345 rows')
    """
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"
