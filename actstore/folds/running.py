"""The running state of one site that `actstore.folds.kernel` adds bands to.

**Keys.**  A candidate for a list is one integer, ``rank of its value << 32 | 2**32 - 1 - offset``,
so that a larger key is a better place: higher value (for the bottom list lower), then lower row.
0 is no key: it would stand for NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actstore.compiled import compiled
from actstore.folds.topk import Ranked, empty_list

N_PLACES = 16
"""Places of NaN and of overflow that are remembered."""
BITS = {"float16": np.uint16, "bfloat16": np.int16, "float32": np.uint32}
"""What the bits of each stored dtype are seen as, which tells the kernel how to read them."""

N_COUNTS = 272
"""Counts of a column from one to the next: its 256 bins and what keeps columns apart."""
NO_BIN = 255
"""The bin where NaN is counted, which holds no value."""
NOT_HERE = -1
"""Of an open window's highest value: it was met in an earlier band."""

TOP, BOTTOM = 0, 1
NAN, OVERFLOW = 0, 1
FLOAT32_MAX = float(np.finfo(np.float32).max)
NOWHERE = np.uint64(2**64 - 1)
LOW = np.uint64(2**32 - 1)
SIGN = np.uint64(2**31)


class Sums(NamedTuple):
    """Running sums of some rows of one site; the last axis is the width."""

    shift: NDArray[np.float64]
    """What the powers are taken about; NaN until the first rows come."""
    powers: NDArray[np.float64]
    """Sums of (value - shift)**p, p = 1 … 4, and of the squares of positive values: (5, width)."""
    extremes: NDArray[np.float32]
    """Largest and smallest value, (2, width)."""
    n: NDArray[np.int64]
    """Values, NaN not counted."""
    n_positive: NDArray[np.int64]
    """Values above 0."""


class Candidates(NamedTuple):
    """What may still enter some lists of one site: the top and bottom list, or a top list alone."""

    keys: NDArray[np.uint64]
    """Keys in no order, (lists, width, capacity)."""
    counts: NDArray[np.int32]
    """Keys held, (lists, width)."""
    limits: NDArray[np.float32]
    """Values a candidate must exceed (top) or fall below (bottom), (lists, width)."""
    k: int
    """How many are kept when the keys are full."""


class Window(NamedTuple):
    """The window that is open where a band ends."""

    highs: NDArray[np.float32]
    """Its highest value so far, -inf where there is none; shape (width,)."""
    offsets: NDArray[np.int64]
    """Offset in the segment of the first row that has it, where it passes the limit; (width,)."""


class Found(NamedTuple):
    """NaN and infinities that were met."""

    counts: NDArray[np.int64]
    """How many, (2,)."""
    places: NDArray[np.uint64]
    """The first of them, as ``offset << 32 | column``, ascending, (2, N_PLACES)."""


def nothing_found() -> Found:
    """Return no faults."""
    return Found(np.zeros(2, np.int64), np.full((2, N_PLACES), NOWHERE))


def encode(values: NDArray[np.float32], offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the keys of a top list for values, none of them -0.0, and the rows that have them."""
    codes = values.view(np.uint32).astype(np.uint64)
    ranks = codes ^ np.where(codes & SIGN, LOW, SIGN)
    return np.asarray(ranks << np.uint64(32) | (LOW - offsets.astype(np.uint64)))


def ranked(candidates: Candidates, first_row_id: int) -> list[Ranked]:
    """Return the candidates' best k of each list, decoded and in order."""
    lists = []
    for side, (all_keys, n_keys) in enumerate(zip(candidates.keys, candidates.counts, strict=True)):
        keys = all_keys[:, : n_keys.max(initial=0)].copy()
        keys[np.arange(keys.shape[1]) >= n_keys[:, None]] = 0
        keys.sort(axis=1)
        found = empty_list(n_keys.size, candidates.k)
        np.minimum(n_keys, candidates.k, out=found.counts)
        codes = found.values.view(np.uint32)
        _decode(keys, found.counts, side == BOTTOM, first_row_id, codes, found.row_ids)
        lists.append(found)
    return lists


@compiled
def _decode(
    keys: NDArray[np.uint64],
    counts: NDArray[np.int32],
    is_bottom: bool,
    first_row_id: int,
    codes: NDArray[np.uint32],
    row_ids: NDArray[np.int64],
) -> None:
    """Write the bits of the values and the rows that a column's last, largest keys stand for."""
    width, n_keys = keys.shape
    for column in range(width):
        for place in range(counts[column]):
            key = keys[column, n_keys - 1 - place]
            rank = key >> np.uint64(32)
            if is_bottom:
                rank ^= LOW
            codes[column, place] = np.uint32(rank ^ (SIGN if rank & SIGN else LOW))
            row_ids[column, place] = first_row_id + np.int64(LOW - (key & LOW))
