"""The one dial of memory: peak resident bytes allowed beyond the loaded model."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import psutil

from actstore.errors import ArgumentError

Progress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", re.IGNORECASE)


def as_count(name: str, value: Any, least: int, most: int = 2**31 - 1) -> int:
    """Return a whole number that was given for a parameter.

    Raises
    ------
    ArgumentError
        If it is none, or not between `least` and `most`.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ArgumentError(f"{name} = {value!r} is not a whole number.")
    number = operator.index(value)
    if not least <= number <= most:
        expected = f"{least} or more" if most >= 2**62 else f"{least} … {most}"
        raise ArgumentError(f"{name} = {number} was given; expected {expected}.")
    return number


def parse_budget(budget: int | str | None) -> int:
    """Return a budget in bytes.

    Parameters
    ----------
    budget : int, str or None
        Bytes, or a size such as ``"2GB"`` or ``"512MiB"``; None means the smaller of 4 GiB and
        half of what is free.

    Raises
    ------
    ArgumentError
        If it is not a size, or less than 64 MiB.

    Examples
    --------
    >>> parse_budget("2GB")
    2000000000
    """
    if budget is None:
        return min(4 * 2**30, int(psutil.virtual_memory().available) // 2)
    if isinstance(budget, str):
        match = _SIZE.fullmatch(budget)
        if not match:
            raise ArgumentError(
                f"budget = {budget!r} is not a size; expected bytes or something like '2GB'."
            )
        budget = int(float(match[1]) * {**_UNITS, **_BINARY_UNITS}[match[2].upper()])
    if budget < 64 * 2**20:
        raise ArgumentError(f"budget = {budget:,} bytes is too small; expected at least 64 MiB.")
    return budget
