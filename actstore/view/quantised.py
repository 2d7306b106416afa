"""Numbers as a page carries them: one byte each, which is what the eye can tell apart."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import numpy as np
import numpy.typing as npt


def quantised(
    values: npt.NDArray[Any], largest: npt.ArrayLike, *, signed: bool
) -> npt.NDArray[np.uint8]:
    """Return values as bytes: square roots of their part of the largest, so small ones are finer.

    Code 0 is no value.  Else 1 … 255 are 0 … `largest`, or where values are signed -`largest` …
    `largest`, with 128 for zero; what lies beyond is its nearest end.

    Parameters
    ----------
    values : ndarray of float
        The values; NaN is none.
    largest : array_like
        Sizes that the last code stands for; broadcast with `values`.
    signed : bool
        Whether values below zero are told from zero.
    """
    ends = np.asarray(largest, dtype=np.float64)
    low = -1.0 if signed else 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.clip(np.where(ends > 0, values / ends, 0.0 * values), low, 1.0)
    roots = np.sign(relative) * np.sqrt(np.abs(relative))
    codes = 128 + np.round(127 * roots) if signed else 1 + np.round(254 * roots)
    return np.where(np.isnan(roots), 0, codes).astype(np.uint8)


def embedded(codes: npt.NDArray[np.uint8]) -> str:
    """Return bytes as base64, in C order."""
    return b64encode(np.ascontiguousarray(codes).tobytes()).decode("ascii")
